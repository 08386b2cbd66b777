"""Commands that make a model from others: ``average-models`` and ``import-model``."""

import click

from captioner.commands.importing import importing
from captioner.errors import printable
from captioner.options import GroupedCommand, option

__all__ = ["average_models", "import_model"]


@click.command(
    "average-models", cls=GroupedCommand, short_help="Average the weights of fine-tuned models."
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.argument("output")
@option(
    "--encoder-weights",
    metavar="FILE",
    group="Options",
    help="Published encoder weights; the encoder is averaged with them.  [default: none]",
)
@option(
    "--overwrite",
    is_flag=True,
    group="Options",
    help="Replace a model in OUTPUT.  [default: off]",
)
def average_models(
    models: tuple[str, ...], output: str, encoder_weights: str | None, overwrite: bool
) -> None:
    """Write the average of the weights of some models to OUTPUT, as float16.

    Fine-tuned versions of one model are often better averaged than alone. A model that is named
    twice counts twice.
    """
    with importing():
        from captioner.model import averaging

    averaging.average_models(models, output, encoder_weights=encoder_weights, overwrite=overwrite)


@click.command(cls=GroupedCommand, short_help="Convert a model with pickled weights.")
@click.argument("model")
@click.argument("directory")
def import_model(model: str, directory: str) -> None:
    """Convert a pretrained MODEL with pickled weights to safetensors in DIRECTORY.

    MODEL is OWNER/NAME[@REVISION] on the Hugging Face hub, or a local directory. The weights are
    read without running code that they may hold. Caption with --model DIRECTORY then.
    """
    with importing():
        from captioner.model.huggingface.importing import import_model as convert

    click.echo(f"model written to {printable(str(convert(model, directory)))}")
