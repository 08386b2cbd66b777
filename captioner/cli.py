"""The command line. Options come from the dataclasses in :mod:`captioner.config`."""

import dataclasses
import sys
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import click

from captioner import __version__
from captioner.config import PRESETS, DecodeConfig, ListingConfig, RunConfig, TrainConfig
from captioner.errors import CaptionerError, InputError

__all__ = ["main"]

Config = TypeVar("Config")


class _Commands(click.Group):
    """Prints our errors as one line and exits with their code; ``--debug`` shows where from."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except CaptionerError as error:
            if context.params.get("debug"):
                raise
            click.echo(f"captioner: {_printable(str(error))}", err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("captioner: stopped by SIGINT", err=True)
            context.exit(130)


def _printable(text: str) -> str:
    """One line that a terminal shows as it is, whatever a file name holds."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _options(config: type, *, from_preset: bool = False) -> Callable[[Any], Any]:
    """An option for each field of a config, ``--field-name``."""

    def decorate(command: Any) -> Any:
        hints = typing.get_type_hints(config)
        for each in reversed(dataclasses.fields(config)):
            name = each.metadata["option"] or "--" + each.name.replace("_", "-")
            hint = hints[each.name]
            choices = typing.get_args(hint)
            optional = type(None) in choices
            text = each.metadata["help"]
            if from_preset:
                text += "  [default: the preset's]"
            elif each.default is not None:
                text += f"  [default: {each.default}]"
            kind: Any
            if optional or (hint is not bool and typing.get_origin(hint) is not typing.Literal):
                [kind] = [c for c in choices if c is not type(None)] if optional else [hint]
                kind = _OrNone(kind) if optional else kind
            elif hint is bool:
                name, kind = f"{name}/--no-{name[2:]}", bool
            else:
                kind = click.Choice([str(choice) for choice in choices])
            command = click.option(name, each.name, type=kind, default=None, help=text)(command)
        return command

    return decorate


class _OrNone(click.ParamType):  # type: ignore[type-arg]
    """A number, or the word ``none``."""

    def __init__(self, kind: type):
        self.kind = click.types.convert_type(kind)
        self.name = f"{self.kind.name}|none"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return "none" if value == "none" else self.kind.convert(value, param, ctx)


def _configure(base: Config, values: dict[str, Any]) -> Config:
    """``base`` with the given options; an option that was not given is None."""
    hints = typing.get_type_hints(type(base))
    changed = {}
    for each in dataclasses.fields(base):  # type: ignore[arg-type]
        value = values.get(each.name)
        if value is None:
            continue
        if value == "none" and type(None) in typing.get_args(hints[each.name]):
            value = None
        elif typing.get_origin(hints[each.name]) is typing.Literal:
            by_name = {str(choice): choice for choice in typing.get_args(hints[each.name])}
            value = by_name[value]
        changed[each.name] = value
    return dataclasses.replace(base, **changed)  # type: ignore[type-var]


@click.group(cls=_Commands, context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="captioner")
@click.option("--debug", is_flag=True, help="Show where an error comes from.")
def main(debug: bool) -> None:
    """Train an image captioner; caption folders and buckets of images into Parquet."""


@main.command()
@click.argument("data")
@click.argument("output")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="small",
    show_default=True,
    help="The model, and how it is trained unless an option says otherwise.",
)
@click.option("--train-list", metavar="FILE", help="Names of the images to train on, a line each.")
@click.option("--val-list", metavar="FILE", help="Names of the images to validate on.")
@click.option(
    "--encoder-weights",
    metavar="FILE",
    help="Published weights of the encoder.  [default: downloaded by timm]",
)
@click.option("--device", default="auto", show_default=True, help="As for caption.")
@click.option("--overwrite", is_flag=True, help="Replace the model in OUTPUT.")
@_options(TrainConfig, from_preset=True)
def train(
    data: str,
    output: str,
    preset: str,
    train_list: str | None,
    val_list: str | None,
    encoder_weights: str | None,
    device: str,
    overwrite: bool,
    **options: Any,
) -> None:
    """Train a model on DATA and write it to the directory OUTPUT.

    DATA is a folder with Images/ and captions.txt, a CSV with the columns image and caption.
    Without lists the last 100 images of the table are left for testing and the 200 before them
    are validated on.
    """
    config = _configure(PRESETS[preset].train, options)
    from captioner import dataset, storage, training

    output = storage.absolute(output)
    if "config.json" in storage.names(output) and not overwrite:
        raise InputError(f"{output} holds a model already: use another directory, or --overwrite")
    captioned = dataset.read_dataset(storage.absolute(data))
    split = captioned.split(train_list, val_list)
    click.echo(captioned.describe(split), err=True)
    metrics = training.train(
        split,
        output,
        model_config=PRESETS[preset].model,
        config=config,
        encoder_weights=encoder_weights,
        device=device,
    )
    best = min(metrics, key=lambda epoch: epoch["validation_loss"])
    click.echo(
        f"{output}: validation loss {best['validation_loss']:.4f} after epoch {best['epoch']:.0f}"
    )


@main.command()
@click.argument("source")
@click.argument("output")
@click.option("--model", required=True, help="Model directory, local or in a bucket.")
@click.option("--overwrite", is_flag=True, help="Delete what an earlier job wrote to OUTPUT first.")
@_options(ListingConfig)
@_options(DecodeConfig)
@_options(RunConfig)
def caption(source: str, output: str, model: str, overwrite: bool, **options: Any) -> None:
    """Caption every image of SOURCE into Parquet files in OUTPUT.

    SOURCE is a directory, which is searched recursively, or a .txt, .csv or .parquet file of
    image URIs. Both may be local or in a bucket. Run the same command again to go on where a
    killed job stopped, or to caption images that are new.
    """
    listing = _configure(ListingConfig(), options)
    decode = _configure(DecodeConfig(), options)
    run = _configure(RunConfig(), options)
    from captioner.pipeline import caption_images

    summary = caption_images(
        source, output, model, listing=listing, decode=decode, run=run, overwrite=overwrite
    )
    click.echo(summary.describe())


@main.command()
@click.argument("output")
@click.argument("uri")
@click.option("-o", "--image", "target", required=True, metavar="FILE", help="PNG to write.")
def show(output: str, uri: str, target: str) -> None:
    """Draw where the model looked: the image URI of the captions in OUTPUT, word by word.

    URI is as listed, or the end of it where that says which image is meant.
    """
    from captioner import report, storage

    row = report.find_row(storage.absolute(output), uri)
    storage.write(storage.absolute(target), report.draw(row))
    click.echo(_printable(row.caption))


@main.command("report")
@click.argument("output")
@click.option("--missing", is_flag=True, help="List every image that has no row, and stop.")
def report_command(output: str, missing: bool) -> None:
    """Say what OUTPUT holds: rows by status, throughput, best and worst captions, what is missing.

    Exits with 1 where an image has no row.
    """
    from captioner import report, storage

    summary = report.summarise(storage.absolute(output))
    lines = summary.accounts.missing if missing else summary.lines()
    for line in lines:
        click.echo(_printable(line))
    if summary.accounts.missing:
        sys.exit(1)


if __name__ == "__main__":
    main()
