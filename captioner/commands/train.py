"""``captioner train``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click

from captioner.commands.importing import importing
from captioner.commands.settings_file import config_options, format_config
from captioner.config import PRESETS, LaunchConfig, ModelConfig, TrainConfig
from captioner.errors import InputError, printable
from captioner.options import GroupedCommand, allow_missing_option, configure, option, options_of

__all__ = ["train"]

_PRESETS = {name: PRESETS[name] for name in ("small", "notebook")}  # the default first
_ARCHITECTURE = ("backbone", "image_size", "width", "layers", "heads")  # with options of their own


@click.command(cls=GroupedCommand, short_help="Train or fine-tune a model.")
@click.argument("data")
@click.argument("output")
@option(
    "--preset",
    type=click.Choice(list(_PRESETS)),
    default="small",
    show_default=True,
    group="Model",
    help="Defaults of the options below and, without --model, the model's architecture.",
)
@options_of(ModelConfig, presets=_PRESETS, only=_ARCHITECTURE)
@option(
    "--dropout",
    type=click.FloatRange(0, 1),
    group="Model",
    help="Dropout of the decoder: after the embeddings, the attentions and the feed-forward, and "
    "before the head.  [default: 0.2]",
)
@option(
    "--model",
    metavar="MODEL",
    group="Model",
    help="Continue with this model, local or in a bucket.  [default: a new model]",
)
@option(
    "--encoder-weights",
    metavar="FILE",
    group="Model",
    help="Pretrained encoder weights.  [default: downloaded by timm]",
)
@option(
    "--overwrite",
    is_flag=True,
    group="Model",
    help="Replace the model in OUTPUT.  [default: off, which resumes]",
)
@option(
    "--images",
    metavar="DIR",
    multiple=True,
    group="Data",
    help="Folder of the images, searched recursively.  [default: Images/, or the JSON file's "
    "folder]",
)
@option(
    "--data",
    "more_data",
    metavar="DATA[:WEIGHT]",
    multiple=True,
    group="Data",
    help="Train on this dataset too, WEIGHT times per epoch; DATA has the weight 1. The mean CIDEr "
    "that chooses the best epoch has the same weights. Repeatable.  [default: DATA alone]",
)
@option(
    "--val-data",
    metavar="FILE",
    multiple=True,
    group="Data",
    help="Validate on this dataset, in any format of DATA, and train on all of DATA.  "
    "[default: part of DATA]",
)
@option(
    "--train-list",
    metavar="FILE",
    multiple=True,
    group="Data",
    help="Names of the images to train on, one per line.  [default: from the split]",
)
@option(
    "--val-list",
    metavar="FILE",
    multiple=True,
    group="Data",
    help="Names of the images to validate on, one per line.  [default: from the split]",
)
@allow_missing_option
@option(
    "--tokenizer",
    type=click.Choice(["words", "bpe"]),
    group="Vocabulary",
    help="Units of captions: words, or subwords (bpe), which are learned from the training "
    "captions and can spell any word.  [default: words; with --model the model's own]",
)
@options_of(TrainConfig, presets=_PRESETS)
@options_of(LaunchConfig)
@config_options
def train(
    data: str,
    output: str,
    preset: str,
    more_data: tuple[str, ...],
    images: tuple[str, ...],
    val_data: tuple[str, ...],
    train_list: tuple[str, ...],
    val_list: tuple[str, ...],
    allow_missing: bool,
    dropout: float | None,
    tokenizer: str | None,
    encoder_weights: str | None,
    model: str | None,
    overwrite: bool,
    print_config: bool,
    **options: Any,
) -> None:
    """Train a model on DATA and write it to the directory OUTPUT.

    DATA is local or in a bucket, and one of:

    - a folder with Images/ and captions.txt, a CSV with the columns image and caption;

    - a JSON file in COCO's format, such as captions_train2017.json, with --val-data;

    - a JSON file in Karpathy's format, such as dataset_coco.json, which contains the split.

    The validation images come from --val-data, from --train-list and --val-list, or from Karpathy's
    split. Without these, the last 100 images are kept for testing and the 200 images before them
    are used for validation. With --data, give --images, --val-data, --train-list and --val-list
    once for each dataset, DATA first, or "none" for a dataset that needs none.

    Run the same command again to resume a run that was stopped.
    """
    architecture = {name: options.pop(name) for name in _ARCHITECTURE} | {"dropout": dropout}
    if model:
        _refuse_beside_model(encoder_weights, architecture)
    config = configure(PRESETS[preset].train, options)
    launch = configure(LaunchConfig(), options)
    if print_config:
        click.echo(format_config(click.get_current_context(), [config, launch]))
        return
    with importing():
        from captioner import storage
        from captioner.data.mixing import data_places, read_split
        from captioner.model.loading import is_pretrained
        from captioner.training import journal
        from captioner.training import run as training
        from captioner.training.words import check_tokenizer

    if model and tokenizer and not is_pretrained(model):
        check_tokenizer(model, tokenizer)
    model_config = _model_config(preset, architecture, tokenizer)
    output = storage.absolute(output)
    places = data_places(
        data,
        more_data,
        images=images,
        validation=val_data,
        train_list=train_list,
        validation_list=val_list,
    )
    split, described = read_split(places, allow_missing=allow_missing)
    click.echo(described, err=True)
    epochs = training.train(
        split,
        output,
        model_config=model_config,
        config=config,
        launch=launch,
        encoder_weights=encoder_weights,
        initial_model=model,
        overwrite=overwrite,
    )
    click.echo(printable(f"{output}: {journal.describe_best(epochs)}"))


def _refuse_beside_model(encoder_weights: str | None, architecture: Mapping[str, Any]) -> None:
    """Refuses options that a model to continue from already decides."""
    if encoder_weights:
        raise InputError("give --model or --encoder-weights, not both: a model keeps its encoder")
    if names := [name for name, value in architecture.items() if value is not None]:
        shown = "--encoder" if names[0] == "backbone" else "--" + names[0].replace("_", "-")
        raise InputError(f"give --model or {shown}, not both: a model keeps its architecture")


def _model_config(
    preset: str, architecture: Mapping[str, Any], tokenizer: str | None
) -> ModelConfig:
    """The settings of a new model: a preset's, changed by the options."""
    from captioner.model.backbone import with_encoder

    config = PRESETS[preset].model
    if tokenizer == "bpe":
        config = replace(config, tokenizer="bpe")
    if architecture["backbone"] is not None:
        config = with_encoder(config, architecture["backbone"])
    if architecture["dropout"] is not None:
        config = config.with_dropout(architecture["dropout"])
    return configure(config, architecture)
