"""``captioner evaluate``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from captioner.commands.importing import importing
from captioner.config import TEXT_SETTINGS, DecodeConfig, RunConfig
from captioner.errors import InputError, printable
from captioner.options import GroupedCommand, allow_missing_option, configure, option, options_of

if TYPE_CHECKING:
    from captioner.evaluation.evaluation import Evaluation

__all__ = ["evaluate"]


@click.command(cls=GroupedCommand, short_help="Score captions against captions that people wrote.")
@click.argument("source")
@option(
    "--model",
    metavar="MODEL",
    group="What to score",
    help="Caption the images of the dataset SOURCE with this model.  [this or --references]",
)
@option(
    "--references",
    metavar="DATA",
    group="What to score",
    help="Score the captions in SOURCE, a caption job's output, against the captions of this "
    "dataset or the accepted captions of this reviewed output.  [this or --model]",
)
@option(
    "--split",
    type=click.Choice(["train", "val", "test", "all"]),
    group="What to score",
    help="Split to score, made as captioner train makes it without lists.  [default: test; all "
    "with --references and for COCO's format]",
)
@option(
    "--list",
    "names",
    metavar="FILE",
    group="What to score",
    help="File with the names of the images to score, one per line.  [default: the split]",
)
@option(
    "--images",
    metavar="DIR",
    group="Data",
    help="Folder of the dataset's images.  [default: Images/, or the JSON file's folder]",
)
@allow_missing_option
@option(
    "--tokenizer",
    type=click.Choice(["auto", "ptb", "simple"]),
    default="auto",
    show_default=True,
    group="Scores",
    help="Tokenizer; ptb needs Java, as METEOR does; auto chooses ptb if Java runs, else simple.",
)
@option(
    "--spice",
    is_flag=True,
    group="Scores",
    help="Add SPICE, which is slow and downloads its models once.  [default: off]",
)
@option(
    "--json",
    "json_file",
    metavar="FILE",
    group="Scores",
    help="JSON file for the scores; - prints JSON instead of the table.  [default: none]",
)
@option(
    "--per-image",
    metavar="FILE",
    group="Scores",
    help="Parquet file for the scores of each image, lowest CIDEr first.  [default: none]",
)
@options_of(DecodeConfig, only=TEXT_SETTINGS)
@options_of(RunConfig, only=("device", "precision", "batch_size", "decoders"))
def evaluate(
    source: str,
    model: str | None,
    references: str | None,
    images: str | None,
    split: str | None,
    names: str | None,
    allow_missing: bool,
    tokenizer: str,
    spice: bool,
    json_file: str | None,
    per_image: str | None,
    **options: Any,
) -> None:
    """Score captions against captions that people wrote: BLEU, METEOR, ROUGE-L, CIDEr.

    With --model, SOURCE is a dataset in any format that captioner train reads; its images are
    captioned and then scored. With --references, SOURCE is the output of a caption job. Its images
    are matched with those of the dataset or the reviewed output by URI, or else by file name.
    """
    _check_choices(source, model, references, split, names)
    if references is not None:
        _refuse_beside_references(source, options)
    decode = configure(DecodeConfig(attention="none"), options)
    run = configure(RunConfig(), options)
    with importing():
        from captioner import storage
        from captioner.data.dataset import read_dataset
        from captioner.evaluation import captions, evaluation, metrics
        from captioner.evaluation import references as scored
        from captioner.output.directory import OutputDirectory

    targets = [file for file in (json_file, per_image) if file is not None and file != "-"]
    for target in map(storage.absolute, targets):
        storage.check_target(target)
        if references is not None:
            OutputDirectory(storage.absolute(source)).refuse_own(target)
    chosen_tokenizer = metrics.choose_tokenizer(tokenizer)
    data = (read_dataset if references is None else scored.read_references)(
        references or source,
        images,
        needed=_needed_splits(split, of_model=model is not None),
        allow_missing=allow_missing or names is not None,  # choose_images checks a list
    )
    if names is None and split is None:
        split = data.default_split if model else "all"
    chosen = scored.choose_images(data, split=split, names=names, allow_missing=allow_missing)
    if model is not None:
        if seen := scored.describe_seen(chosen, data, model, split=split):
            click.echo(printable(seen), err=True)
        captioned = captions.caption_dataset(chosen, model, decode=decode, run=run)
    else:
        captioned = captions.join_output(storage.absolute(source), chosen)
    result = evaluation.evaluate(captioned, tokenizer=chosen_tokenizer, spice=spice)
    _write(result, json_file, per_image)


def _check_choices(
    source: str,
    model: str | None,
    references: str | None,
    split: str | None,
    names: str | None,
) -> None:
    """Refuses options that exclude each other, or none of two where one is needed."""
    if model is None and references is None:
        raise InputError(
            f"add --model MODEL to caption the images of {source}, or --references DATA to score "
            "its captions"
        )
    if model is not None and references is not None:
        raise InputError("give --model or --references, not both")
    if split and names:
        raise InputError("give --split or --list, not both")


def _refuse_beside_references(source: str, options: Mapping[str, Any]) -> None:
    """Refuses options of captioning for captions that exist."""
    for name, value in options.items():
        if value is not None:
            raise InputError(
                f"--{name.replace('_', '-')} needs --model: the captions in {source} exist already"
            )


def _write(result: "Evaluation", json_file: str | None, per_image: str | None) -> None:
    """Prints a result and writes the requested files."""
    from captioner import storage

    for line in result.captioned.describe_left_out() + result.scores.describe_left_out():
        click.echo(printable(line), err=True)
    if json_file == "-":
        click.echo(result.to_json())
    else:
        for line in result.lines():
            click.echo(printable(line))
    if json_file and json_file != "-":
        storage.write(storage.absolute(json_file), (result.to_json() + "\n").encode())
    if per_image:
        storage.write(storage.absolute(per_image), result.to_parquet())


def _needed_splits(split: str | None, *, of_model: bool) -> tuple[str, ...] | None:
    """The splits whose images are scored; None for all of them."""
    split = split or ("test" if of_model else "all")
    return None if split == "all" else (split,)
