"""The command line. Options come from the dataclasses in :mod:`captioner.config`."""

import dataclasses
import gc
import io
import logging
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import click

from captioner import __version__
from captioner.config import (
    PRESETS,
    DecodeConfig,
    ExportConfig,
    LaunchConfig,
    ListingConfig,
    RunConfig,
    TrainConfig,
)
from captioner.errors import CaptionerError, InputError, printable
from captioner.runtime.signals import limit_stopping
from captioner.runtime.streams import error_of_stdout, has_own_streams, protect_streams

__all__ = ["main"]

Config = TypeVar("Config")

_INTERRUPTED = "captioner: stopped by SIGINT"
_MOST_SECONDS_TO_STOP = 20  # after a signal: Kubernetes grants 30 seconds


class _Echo(logging.Handler):
    """What the library tells goes to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(printable(record.getMessage()), err=True)


class _Commands(click.Group):
    """Prints our errors as one line and exits with their code; ``--debug`` shows where from."""

    def main(self, *arguments: Any, **keywords: Any) -> Any:
        """Runs a command; neither a broken stream nor a read that hangs outlives it."""
        protect_streams()
        if has_own_streams():
            limit_stopping(_MOST_SECONDS_TO_STOP)
        try:
            return super().main(*arguments, **keywords)
        except SystemExit as end:
            if not end.code and (reason := error_of_stdout()):
                click.echo(f"captioner: cannot write to standard output: {reason}", err=True)
                raise SystemExit(1) from end
            if end.code and has_own_streams() and _is_at_work():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code if isinstance(end.code, int) else 1)
            raise

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except CaptionerError as error:
            if context.params.get("debug"):
                raise
            click.echo(f"captioner: {printable(str(error))}", err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo(_INTERRUPTED, err=True)
            context.exit(130)


def _is_at_work() -> bool:
    """Whether threads would keep the process from ending, such as reads that hang."""
    return any(
        not each.daemon for each in threading.enumerate() if each is not threading.main_thread()
    )


@contextmanager
def _importing() -> Iterator[None]:
    """Does not look for garbage in what imports make: it stays, and looking takes a fifth of them.

    Nor is it looked through later, when the process ends among others. Ctrl-C ends the process at
    once: packages that are interrupted in their import may go on without a part of them.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop_at_once)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
        if interrupt is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupt)


def _stop_at_once(*_: object) -> None:
    click.echo(_INTERRUPTED, err=True)
    os._exit(130)


def _options(
    config: type, *, from_preset: bool = False, only: Container[str] | None = None
) -> Callable[[Any], Any]:
    """An option for each field of a config, or only for some: ``--field-name``."""

    def decorate(command: Any) -> Any:
        hints = typing.get_type_hints(config)
        for each in reversed(dataclasses.fields(config)):
            if only is not None and each.name not in only:
                continue
            name = each.metadata["option"] or "--" + each.name.replace("_", "-")
            hint = hints[each.name]
            choices = typing.get_args(hint)
            text = each.metadata["help"]
            if from_preset:
                text += "  [default: the preset's]"
            elif each.default is not None:
                text += f"  [default: {each.default}]"
            kind: Any
            if typing.get_origin(hint) is typing.Literal:
                kind = click.Choice([str(choice) for choice in choices])
            elif hint is bool:
                name, kind = f"{name}/--no-{name[2:]}", bool
            else:
                kind = _OrWord(*choices) if choices else hint
            command = click.option(name, each.name, type=kind, default=None, help=text)(command)
        return command

    return decorate


class _OrWord(click.ParamType):  # type: ignore[type-arg]
    """A value of the first type; or the word for the second, which is ``none`` or a literal."""

    def __init__(self, kind: type, other: Any):
        self.kind = click.types.convert_type(kind)
        self.word: str = next(iter(typing.get_args(other)), "none")
        self.name = f"{self.kind.name}|{self.word}"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return value if value == self.word else self.kind.convert(value, param, ctx)


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr's are: names in any script
    logger = logging.getLogger("captioner")
    if not any(isinstance(handler, _Echo) for handler in logger.handlers):
        logger.addHandler(_Echo())
    logger.setLevel(logging.INFO)
    logger.propagate = False


_allow_missing = click.option(
    "--allow-missing",
    is_flag=True,
    help="Accept a dataset, or a list of names, of which more than half of the images are missing.",
)


@main.command()
@click.argument("data")
@click.argument("output")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="small",
    show_default=True,
    help="The model, unless --model names one, and how it is trained unless an option says else.",
)
@click.option(
    "--images",
    metavar="DIR",
    help="Where the images are, in folders or not.  [default: Images/, or the JSON file's folder]",
)
@click.option(
    "--val-data",
    metavar="FILE",
    help="Validate on these data, which are as DATA; all of DATA is trained on.",
)
@click.option("--train-list", metavar="FILE", help="Names of the images to train on, a line each.")
@click.option("--val-list", metavar="FILE", help="Names of the images to validate on.")
@_allow_missing
@click.option(
    "--encoder-weights",
    metavar="FILE",
    help="Published weights of the encoder.  [default: downloaded by timm]",
)
@click.option("--model", help="Go on with this model and its vocabulary, not with a new one.")
@click.option("--overwrite", is_flag=True, help="Replace the model in OUTPUT.")
@_options(LaunchConfig)
@_options(TrainConfig, from_preset=True)
def train(
    data: str,
    output: str,
    preset: str,
    images: str | None,
    val_data: str | None,
    train_list: str | None,
    val_list: str | None,
    allow_missing: bool,
    encoder_weights: str | None,
    model: str | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Train a model on DATA and write it to the directory OUTPUT.

    DATA is local or in a bucket, and one of:

    - a folder with Images/ and captions.txt, a CSV with the columns image and caption;

    - COCO's captions, a JSON file such as captions_train2017.json; --val-data gives the other one;

    - Karpathy's split, a JSON file such as dataset_coco.json, which says what to validate on.

    The images to validate on come from --val-data, from two lists or from Karpathy's split. Without
    any of them the last 100 images are left for testing and the 200 before them are validated on.
    """
    if val_data and (train_list or val_list):
        raise InputError("give --train-list and --val-list, or --val-data, not both")
    if model and encoder_weights:
        raise InputError("give --model or --encoder-weights, not both: a model has an encoder")
    config = _configure(PRESETS[preset].train, options)
    launch = _configure(LaunchConfig(), options)
    with _importing():
        from captioner import storage
        from captioner.data import dataset
        from captioner.training import loop
        from captioner.training import run as training

    output = storage.absolute(output)
    read = partial(dataset.read_dataset, images_directory=images, needed=("train", "val"))
    # Lists say themselves which images are needed.
    captioned = read(data, allow_missing=allow_missing or train_list is not None)
    if val_data:
        captioned = captioned.validated_by(read(val_data, allow_missing=allow_missing))
    split = captioned.split(train_list, val_list, allow_missing=allow_missing)
    click.echo(captioned.describe(split), err=True)
    epochs = training.train(
        split,
        output,
        model_config=PRESETS[preset].model,
        config=config,
        launch=launch,
        encoder_weights=encoder_weights,
        begin_with=model,
        overwrite=overwrite,
    )
    best = loop.best_of(epochs)
    text = f"{output}: CIDEr {best.validation_cider:.1f} on the validation images"
    click.echo(printable(f"{text} after epoch {best.epoch}"))


@main.command()
@click.argument("source")
@click.argument("output")
@click.option("--model", help="Model directory, local or in a bucket.  [default: captioner's own]")
@click.option("--overwrite", is_flag=True, help="Delete what an earlier job wrote to OUTPUT first.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and on what; write nothing.")
@_options(ListingConfig)
@_options(DecodeConfig)
@_options(RunConfig)
def caption(
    source: str, output: str, model: str | None, overwrite: bool, dry_run: bool, **options: Any
) -> None:
    """Caption every image of SOURCE into Parquet files in OUTPUT.

    SOURCE is a directory, which is searched recursively, or a .txt, .csv or .parquet file of
    image URIs. Both may be local or in a bucket. Run the same command again to go on where a
    killed job stopped, or to caption images that are new.
    """
    listing = _configure(ListingConfig(), options)
    decode = _configure(DecodeConfig(), options)
    run = _configure(RunConfig(), options)
    with _importing():
        from captioner.caption.job import caption_images, plan_captioning
        from captioner.model import bundle

    do = plan_captioning if dry_run else caption_images
    done = do(
        source,
        output,
        model or bundle.DEFAULT,
        listing=listing,
        decode=decode,
        run=run,
        overwrite=overwrite,
    )
    click.echo(printable(done.describe()))


@main.command()
@click.argument("output", default="captioner-demo")
@click.option("--model", help="Model directory.  [default: captioner's own]")
def demo(output: str, model: str | None) -> None:
    """Caption the photos that scikit-image carries into OUTPUT, and draw where the model looked."""
    with _importing():
        from captioner import storage
        from captioner.model import bundle
        from captioner.review.demo import run_demo

    output = storage.absolute(output)
    for drawing, text in run_demo(output, model or bundle.DEFAULT):
        click.echo(f"{printable(text)}  {printable(drawing)}")
    click.echo(f"a page of all of them: {printable(storage.join(output, 'gallery.html'))}")


@main.command()
@click.argument("output")
@click.argument("uri")
@click.option("-o", "--image", "target", required=True, metavar="FILE", help="PNG to write.")
def show(output: str, uri: str, target: str) -> None:
    """Draw where the model looked: the image URI of the captions in OUTPUT, word by word.

    URI is as listed, or the end of it where that says which image is meant.
    """
    if not target.lower().endswith(".png"):
        raise InputError(f"{target}: a drawing is a PNG, and its name should end so")
    with _importing():
        from captioner import storage
        from captioner.review import rows

    row = rows.find_row(storage.absolute(output), uri)
    storage.write(storage.absolute(target), rows.draw(row))
    click.echo(printable(row.caption))


@main.command()
@click.argument("output")
@click.option("-o", "--page", "target", required=True, metavar="FILE", help="HTML to write.")
@click.option("--images", "count", default=100, show_default=True, help="How many at most.")
@click.option(
    "--order",
    type=click.Choice(["random", "best", "worst", "listed"]),
    default="random",
    show_default=True,
    help="Images drawn from all, or those with the best or worst scores, or the first ones.",
)
@click.option("--seed", default=0, show_default=True, help="Of the draw.")
def gallery(output: str, target: str, count: int, order: typing.Any, seed: int) -> None:
    """Make a page to look through the captions in OUTPUT: point at a word to see where it looked.

    The page holds all that it shows, and no script.
    """
    with _importing():
        from captioner import storage
        from captioner.review.gallery import make_gallery

    page = make_gallery(storage.absolute(output), count=count, order=order, seed=seed)
    storage.write(storage.absolute(target), page.encode())


@main.command("report")
@click.argument("output")
@click.option("--missing", is_flag=True, help="List every image that has no row, and stop.")
def report_command(output: str, missing: bool) -> None:
    """Say what OUTPUT holds: rows by status, throughput, best and worst captions, what is missing.

    Exits with 1 where an image has no row.
    """
    with _importing():
        from captioner import storage
        from captioner.review import report

    summary = report.summarise(storage.absolute(output))
    lines = summary.accounts.missing if missing else summary.lines()
    for line in lines:
        click.echo(printable(line))
    if summary.accounts.missing:
        sys.exit(1)


@main.command()
@click.argument("output")
@click.argument("destination", required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(["sidecar", "jsonl", "csv", "coco", "webdataset", "hf"]),
    required=True,
    help="What to write.",
)
@_options(ExportConfig)
def export(output: str, destination: str | None, form: Any, **options: Any) -> None:
    """Export the captions in OUTPUT to DESTINATION in the format of another tool.

    sidecar: a text file for each image, in DESTINATION or, without it, beside the image. jsonl,
    csv: a table. coco: a results file for COCO's evaluation. webdataset: tar files of images and
    captions. hf: a folder that Hugging Face datasets reads as "imagefolder".

    Only rows whose status is ok are exported. Run the command again to export what has changed.
    """
    config = _configure(ExportConfig(), options)
    with _importing():
        from captioner import storage
        from captioner.output import exports

    target = None if destination is None else storage.absolute(destination)
    summary = exports.export(storage.absolute(output), target, form=form, config=config)
    click.echo(printable(summary.describe()))


@main.command()
@click.argument("output")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port; 0 takes a free one.")
@click.option("--token", help="What the page's address must carry; needed with --host.")
@click.option("--open", "open_browser", is_flag=True, help="Open the page in a browser.")
def review(output: str, host: str, port: int, token: str | None, open_browser: bool) -> None:
    """Serve a page to find, look at and correct the captions in OUTPUT, until Ctrl-C.

    OUTPUT may be finished or still growing. Decisions go to OUTPUT/__captioner/review.parquet; the
    captions themselves stay as they are.
    """
    with _importing():
        from captioner import storage
        from captioner.review.web.serve import serve

    serve(
        storage.absolute(output),
        host=host,
        port=port,
        token=token,
        open_browser=open_browser,
        announce=lambda address: click.echo(f"review page: {address}  (Ctrl-C ends it)"),
    )


class _Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes, with or without KB, MB or GB."""

    name = "size"
    _units: typing.ClassVar = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B|)", str(value).upper())
        if match is None:
            self.fail(f"{value!r} is no size, as 256MB is", param, ctx)
        return int(float(match[1]) * self._units[match[2]])


@main.command()
@click.argument("output")
@click.option(
    "--size",
    type=_Size(),
    default="256MB",
    show_default=True,
    help="Of a part at most; one of half the size stays as it is. KB, MB, GB.",
)
def compact(output: str, size: int) -> None:
    """Merge the part files in OUTPUT, whose job is finished, to fewer and larger ones.

    The rows and their order stay. Run it again when it was killed.
    """
    with _importing():
        from captioner import storage
        from captioner.output import compaction

    click.echo(printable(compaction.compact(storage.absolute(output), size).describe()))


@main.command()
@click.argument("source")
@click.option("--model", help="Caption the images of the dataset SOURCE with this model.")
@click.option(
    "--references",
    metavar="DATA",
    help="Score the captions in SOURCE, a caption job's output, against this dataset's.",
)
@click.option("--images", metavar="DIR", help="Where the dataset's images are.  [as for train]")
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test", "all"]),
    help="Images to score, split as train does without lists.  [default: all with --references and "
    "of COCO's captions, else test]",
)
@click.option(
    "--list", "names", metavar="FILE", help="Names of the images instead of a split, a line each."
)
@_allow_missing
@click.option(
    "--tokenizer",
    type=click.Choice(["auto", "ptb", "simple"]),
    default="auto",
    show_default=True,
    help="ptb needs Java, as METEOR does; simple needs none; auto takes ptb where Java runs.",
)
@click.option("--spice", is_flag=True, help="SPICE too: slow, and downloads its models once.")
@click.option(
    "--json", "json_file", metavar="FILE", help="JSON to write; - prints it, and no table."
)
@click.option("--per-image", metavar="FILE", help="Parquet to write: scores by image, worst first.")
@_options(DecodeConfig, only=("beam", "length_penalty", "max_words", "allow_unknown"))
@_options(RunConfig, only=("device", "precision", "batch_size", "decoders"))
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
    """Score captions against what people wrote: BLEU, METEOR, ROUGE-L, CIDEr.

    With --model, SOURCE is a dataset as train takes it, whose images are captioned first. With
    --references, SOURCE is the output of a caption job; images are joined by URI, or else by file
    name.
    """
    if (model is None) == (references is None):
        raise InputError("give one of --model and --references")
    if split and names:
        raise InputError("give one of --split and --list")
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if references is not None and given:
        raise InputError(f"{given[0]} goes with --model: the captions in {source} are made already")
    decode = _configure(DecodeConfig(attention="none"), options)
    run = _configure(RunConfig(), options)
    with _importing():
        from captioner import storage
        from captioner.data import dataset
        from captioner.evaluation import evaluation, metrics

    chosen = metrics.choose_tokenizer(tokenizer)
    captioned_images = dataset.read_dataset(
        references or source,
        images,
        needed=_needed_splits(split, of_model=model is not None),
        allow_missing=allow_missing or names is not None,  # a list says itself what is needed
    )
    if names is None and split is None:
        split = captioned_images.default_split if model else "all"
    chosen_images = evaluation.choose_images(
        captioned_images, split=split, names=names, allow_missing=allow_missing
    )
    if model is not None:
        if seen := evaluation.describe_seen(chosen_images, captioned_images, model, split=split):
            click.echo(printable(seen), err=True)
        captioned = evaluation.caption_dataset(chosen_images, model, decode=decode, run=run)
    else:
        captioned = evaluation.join_output(storage.absolute(source), chosen_images)
    result = evaluation.evaluate(captioned, tokenizer=chosen, spice=spice)
    for line in captioned.describe_left_out() + result.scores.describe_left_out():
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
    """The splits of which images are scored, where the dataset has splits; None: all of them."""
    split = split or ("test" if of_model else "all")
    return None if split == "all" else (split,)


if __name__ == "__main__":
    main()
