"""The command line: commands that parse, call and print.

Most options come from the settings in :mod:`captioner.config`, by :mod:`captioner.options`.
"""

import gc
import io
import logging
import os
import signal
import sys
import threading
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

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
from captioner.options import GroupedCommand, GroupedOption, Size, configure, options_of
from captioner.runtime.signals import limit_stopping
from captioner.runtime.streams import error_of_stdout, has_own_streams, protect_streams

__all__ = ["main"]

_INTERRUPTED = "captioner: stopped by SIGINT"
_SUMMARIES = {  # in the order of --help: the commands that most people need come first
    "caption": "Caption images into Parquet files.",
    "review": "Serve a page to find, view and correct captions.",
    "gallery": "Write a page of images, captions and maps.",
    "show": "Draw where the model looked in an image.",
    "report": "Summarise an output.",
    "export": "Export captions in the format of another tool.",
    "compact": "Merge part files into fewer, larger files.",
    "train": "Train or fine-tune a model.",
    "evaluate": "Score captions against captions that people wrote.",
    "average-models": "Average the weights of fine-tuned models.",
    "import-model": "Convert a model with pickled weights.",
    "cache": "Show or clear what captioner keeps on this machine.",
    "demo": "Caption the photos that come with scikit-image.",
}
_option = partial(click.option, cls=GroupedOption)
_PRESETS = {name: PRESETS[name] for name in ("small", "notebook")}  # the default first
_BUNDLED = "  [default: the bundled model]"
_MOST_SECONDS_TO_STOP = 20  # after a signal: Kubernetes grants 30 seconds


class _Echo(logging.Handler):
    """What the library tells goes to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(printable(record.getMessage()), err=True)


class _Commands(click.Group):
    """Prints captioner's errors as one line and exits with their code; ``--debug`` shows more."""

    command_class = GroupedCommand

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands by need, not by name."""
        return [*_SUMMARIES, *sorted(self.commands.keys() - _SUMMARIES.keys())]

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Adds a command with its summary for ``captioner --help``."""
        cmd.short_help = _SUMMARIES.get(name or cmd.name or "")
        super().add_command(cmd, name)

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

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Takes arguments as UTF-8, as file names are, in a locale of another encoding too."""
        if sys.getfilesystemencoding() != "utf-8":
            from captioner import storage

            arguments = [storage.from_operating_system(argument) for argument in arguments]
        return super().parse_args(context, arguments)

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


@click.group(cls=_Commands, context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="captioner")
@_option("--debug", is_flag=True, help="Show the traceback of an error.  [default: off]")
def main(debug: bool) -> None:
    """Caption images into Parquet, review and export the captions, train and score models."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr's are: names in any script
    logger = logging.getLogger("captioner")
    if not any(isinstance(handler, _Echo) for handler in logger.handlers):
        logger.addHandler(_Echo())
    logger.setLevel(logging.INFO)
    logger.propagate = False


_allow_missing = _option(
    "--allow-missing",
    is_flag=True,
    group="Data",
    help="Accept data, or a list of names, with more than half of its images missing.  "
    "[default: off]",
)


@main.command()
@click.argument("data")
@click.argument("output")
@_option(
    "--preset",
    type=click.Choice(list(_PRESETS)),
    default="small",
    show_default=True,
    group="Model",
    help="Model architecture, unless --model is given, and defaults of the options below.",
)
@_option(
    "--model",
    metavar="MODEL",
    group="Model",
    help="Continue with this model, local or in a bucket.  [default: a new model]",
)
@_option(
    "--encoder-weights",
    metavar="FILE",
    group="Model",
    help="Pretrained encoder weights.  [default: downloaded by timm]",
)
@_option(
    "--overwrite",
    is_flag=True,
    group="Model",
    help="Replace the model in OUTPUT.  [default: off, which resumes]",
)
@_option(
    "--images",
    metavar="DIR",
    group="Data",
    help="Folder of the images, searched recursively.  [default: Images/, or the JSON file's "
    "folder]",
)
@_option(
    "--val-data",
    metavar="FILE",
    group="Data",
    help="Validate on this dataset, in any form of DATA, and train on all of DATA.  "
    "[default: part of DATA]",
)
@_option(
    "--train-list",
    metavar="FILE",
    group="Data",
    help="Names of the images to train on, one per line.  [default: from the split]",
)
@_option(
    "--val-list",
    metavar="FILE",
    group="Data",
    help="Names of the images to validate on, one per line.  [default: from the split]",
)
@_allow_missing
@options_of(TrainConfig, presets=_PRESETS)
@options_of(LaunchConfig)
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

    - a JSON file in COCO's format, such as captions_train2017.json, with --val-data;

    - a JSON file in Karpathy's format, such as dataset_coco.json, which contains the split.

    The validation images come from --val-data, from --train-list and --val-list, or from Karpathy's
    split. Without any of these, the last 100 images are kept for testing and the 200 images before
    them are used for validation. Run the same command again to resume.
    """
    if val_data and (train_list or val_list):
        raise InputError("give --train-list and --val-list, or --val-data, not both")
    if model and encoder_weights:
        raise InputError("give --model or --encoder-weights, not both: a model has an encoder")
    config = configure(PRESETS[preset].train, options)
    launch = configure(LaunchConfig(), options)
    with _importing():
        from captioner import storage
        from captioner.data import dataset
        from captioner.training import journal
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
        initial_model=model,
        overwrite=overwrite,
    )
    best = journal.best_of(epochs)
    text = f"{output}: CIDEr {best.validation_cider:.1f} on the validation images"
    click.echo(printable(f"{text} after epoch {best.epoch}"))


@main.command()
@click.argument("source")
@click.argument("output")
@_option(
    "--model",
    metavar="MODEL",
    group="Captions",
    help="Model: a directory, local or in a bucket, or OWNER/NAME[@REVISION] on the Hugging Face "
    "hub." + _BUNDLED,
)
@options_of(DecodeConfig)
@_option(
    "--prompt-file",
    metavar="FILE",
    group="Pretrained models",
    help="Text file that holds the prompt, instead of --prompt.  [default: none]",
)
@options_of(ListingConfig)
@_option(
    "--dry-run",
    is_flag=True,
    group="Job",
    help="Print what the job would do, and write nothing.  [default: off]",
)
@_option(
    "--overwrite",
    is_flag=True,
    group="Job",
    help="First delete what an earlier job wrote to OUTPUT.  [default: off, which resumes]",
)
@options_of(RunConfig)
def caption(
    source: str,
    output: str,
    model: str | None,
    prompt_file: str | None,
    overwrite: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Caption every image of SOURCE into Parquet files in OUTPUT.

    SOURCE is a folder, which is searched recursively, or a list of image URIs: a .txt, .csv, .tsv,
    .jsonl or .parquet file. SOURCE and OUTPUT may be local or in a bucket. Run the same command
    again to resume a job that was stopped, or to caption new images.
    """
    listing = configure(ListingConfig(), options)
    if prompt_file is not None:
        options["prompt"] = _read_prompt(prompt_file, options["prompt"])
    decode = configure(DecodeConfig(), options)
    run = configure(RunConfig(), options)
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


def _read_prompt(path: str, given: str | None) -> str:
    """The prompt in a text file.

    Raises:
        InputError: there are two prompts, or the file cannot be read or holds none.
    """
    if given is not None:
        raise InputError("give one of --prompt and --prompt-file")
    try:
        prompt = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --prompt-file {path}: {error}") from error
    if not prompt:
        raise InputError(f"--prompt-file {path} is empty")
    return prompt


@main.command()
@click.argument("model")
@click.argument("directory")
def import_model(model: str, directory: str) -> None:
    """Convert a pretrained MODEL with pickled weights to safetensors in DIRECTORY.

    MODEL is OWNER/NAME[@REVISION] on the Hugging Face hub, or a local directory. The weights are
    read without running code that they may hold. Caption with --model DIRECTORY then.
    """
    with _importing():
        from captioner.model.huggingface.importing import import_model as convert

    click.echo(f"{printable(str(convert(model, directory)))} holds the model now")


@main.command()
@click.argument("action", type=click.Choice(["show", "clear"]), default="show")
@_option(
    "--kind",
    type=click.Choice(["all", "features", "compiled", "models"]),
    default="all",
    show_default=True,
    group="Options",
    help="What to show or clear: images' features, compiled models, or models from buckets.",
)
def cache(action: str, kind: str) -> None:
    """Show or clear what captioner keeps on this machine to avoid computing it again.

    ACTION is show, the default, which prints the files and their size; or clear, which deletes
    them. Clear the cache while no job runs. Before train writes new features, it deletes the least
    recently used ones that it does not need until all fit into 50 GB.
    """
    from captioner import storage

    names = storage.CACHES if kind == "all" else (kind,)
    handle = storage.clear_cache if action == "clear" else storage.inspect_cache
    for each in map(handle, names):
        text = f"{each.path}: files {each.files}, {each.size / 1e6:,.1f} MB"
        click.echo(printable(f"deleted {text}" if action == "clear" else text))


@main.command()
@click.argument("output", default="captioner-demo")
@_option("--model", metavar="MODEL", group="Options", help="Model directory." + _BUNDLED)
def demo(output: str, model: str | None) -> None:
    """Caption scikit-image's photos into OUTPUT, and draw where the model looked."""
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
@_option(
    "-o",
    "--image",
    "target",
    required=True,
    metavar="FILE",
    group="Options",
    help="PNG file to write, local or in a bucket.",
)
def show(output: str, uri: str, target: str) -> None:
    """Draw where the model looked in the image URI, word by word, from the captions in OUTPUT.

    URI is the image's URI in OUTPUT, or the end of it if only one image ends so.
    """
    if not target.lower().endswith(".png"):
        raise InputError(f"--image {target}: not a PNG file; use a name that ends with .png")
    with _importing():
        from captioner import storage
        from captioner.review import rows

    row = rows.find_row(storage.absolute(output), uri)
    storage.write(storage.absolute(target), rows.draw(row))
    click.echo(printable(row.caption))


@main.command()
@click.argument("output")
@_option(
    "-o",
    "--page",
    "target",
    required=True,
    metavar="FILE",
    group="Options",
    help="HTML file to write, local or in a bucket.",
)
@_option(
    "--images",
    "count",
    default=100,
    show_default=True,
    group="Options",
    help="Largest number of images on the page.",
)
@_option(
    "--order",
    type=click.Choice(["random", "best", "worst", "listed"]),
    default="random",
    show_default=True,
    group="Options",
    help="Which images: a random sample, the highest or lowest scores, or the first listed.",
)
@_option("--seed", default=0, show_default=True, group="Options", help="Seed of the random sample.")
def gallery(output: str, target: str, count: int, order: typing.Any, seed: int) -> None:
    """Write a page of images and captions from OUTPUT, with the attention map of each word.

    Point at a word to see where the model looked. The page is one file without scripts or links.
    """
    with _importing():
        from captioner import storage
        from captioner.review.gallery import make_gallery

    page = make_gallery(storage.absolute(output), count=count, order=order, seed=seed)
    storage.write(storage.absolute(target), page.encode())


@main.command("report")
@click.argument("output")
@_option(
    "--missing",
    is_flag=True,
    group="Options",
    help="Print only the URIs of images without a row, one per line.  [default: off]",
)
def report_command(output: str, missing: bool) -> None:
    """Summarise OUTPUT: rows by status, throughput, best and worst captions, missing images.

    Exits with 1 if an image has no row.
    """
    with _importing():
        from captioner import storage
        from captioner.review import report

    summary = report.summarise(storage.absolute(output))
    lines = summary.audit.missing if missing else summary.lines()
    for line in lines:
        click.echo(printable(line))
    if summary.audit.missing:
        sys.exit(1)


@main.command()
@click.argument("output")
@click.argument("destination", required=False)
@_option(
    "--format",
    "form",
    type=click.Choice(["sidecar", "jsonl", "csv", "coco", "webdataset", "hf"]),
    required=True,
    group="Content",
    help="Format to write.",
)
@options_of(ExportConfig)
def export(output: str, destination: str | None, form: Any, **options: Any) -> None:
    """Export the captions in OUTPUT to DESTINATION in the format of another tool.

    sidecar: a text file for each image, in DESTINATION or, without it, beside the image. jsonl,
    csv: a table. coco: a results file for COCO's evaluation. webdataset: tar files of images and
    captions. hf: a folder that Hugging Face datasets reads as "imagefolder".

    Only rows with status ok are exported. Run the command again to export what has changed.
    """
    config = configure(ExportConfig(), options)
    with _importing():
        from captioner import storage
        from captioner.output import exports

    target = None if destination is None else storage.absolute(destination)
    summary = exports.export(storage.absolute(output), target, form=form, config=config)
    click.echo(printable(summary.describe()))


@main.command()
@click.argument("output")
@_option(
    "--open",
    "open_browser",
    is_flag=True,
    group="Options",
    help="Open the page in a browser.  [default: off]",
)
@_option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    default=0,
    show_default=True,
    group="Options",
    help="Port to listen on; 0 takes a free one.",
)
@_option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    group="Options",
    help="Address to listen on; any other than this machine's own needs --token.",
)
@_option(
    "--token",
    metavar="SECRET",
    group="Options",
    help="Secret that the page's address must contain.  [default: none]",
)
def review(output: str, host: str, port: int, token: str | None, open_browser: bool) -> None:
    """Serve a page to find, view and correct the captions in OUTPUT, until Ctrl-C.

    The caption job may still be running. Decisions are written to
    OUTPUT/__captioner/review.parquet; the part files do not change.
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


@main.command()
@click.argument("output")
@_option(
    "--size",
    type=Size(),
    default="256MB",
    show_default=True,
    group="Options",
    help="Largest part, in bytes, KB, MB or GB; a part of half this size or more stays as it is.",
)
def compact(output: str, size: int) -> None:
    """Merge the part files of a finished job in OUTPUT into fewer, larger files.

    The rows and their order do not change. If the command is killed, run it again.
    """
    with _importing():
        from captioner import storage
        from captioner.output import compaction

    click.echo(printable(compaction.compact(storage.absolute(output), size).describe()))


@main.command()
@click.argument("source")
@_option(
    "--model",
    metavar="MODEL",
    group="What to score",
    help="Caption the images of the dataset SOURCE with this model.  [this or --references]",
)
@_option(
    "--references",
    metavar="DATA",
    group="What to score",
    help="Score the captions in SOURCE, a caption job's output, against this dataset or the "
    "accepted captions of this reviewed output.  [this or --model]",
)
@_option(
    "--split",
    type=click.Choice(["train", "val", "test", "all"]),
    group="What to score",
    help="Split to score, made as captioner train does without lists.  [default: test; all with "
    "--references and for COCO's format]",
)
@_option(
    "--list",
    "names",
    metavar="FILE",
    group="What to score",
    help="Names of the images to score, one per line.  [default: the split]",
)
@_option(
    "--images",
    metavar="DIR",
    group="Data",
    help="Folder of the dataset's images.  [default: Images/, or the JSON file's folder]",
)
@_allow_missing
@_option(
    "--tokenizer",
    type=click.Choice(["auto", "ptb", "simple"]),
    default="auto",
    show_default=True,
    group="Scores",
    help="Tokenizer; ptb needs Java, as METEOR does; auto takes ptb if Java runs, else simple.",
)
@_option(
    "--spice",
    is_flag=True,
    group="Scores",
    help="Add SPICE, which is slow and downloads its models once.  [default: off]",
)
@_option(
    "--json",
    "json_file",
    metavar="FILE",
    group="Scores",
    help="JSON file to write; - prints JSON instead of the table.  [default: none]",
)
@_option(
    "--per-image",
    metavar="FILE",
    group="Scores",
    help="Parquet file to write with each image's scores, lowest CIDEr first.  [default: none]",
)
@options_of(
    DecodeConfig,
    only=(
        "beam",
        "length_penalty",
        "max_words",
        "allow_unknown",
        "prompt",
        "system_prompt",
        "max_new_tokens",
        "temperature",
        "top_p",
        "repetition_penalty",
        "seed",
    ),
)
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
    """Score captions against what people wrote: BLEU, METEOR, ROUGE-L, CIDEr.

    With --model, SOURCE is a dataset in any form that captioner train takes, and its images are
    captioned first. With --references, SOURCE is the output of a caption job, whose images are
    matched with the dataset's, or the reviewed output's, by URI, or else by file name.
    """
    if (model is None) == (references is None):
        raise InputError("give one of --model and --references")
    if split and names:
        raise InputError("give one of --split and --list")
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if references is not None and given:
        raise InputError(f"{given[0]} goes with --model: the captions in {source} are made already")
    decode = configure(DecodeConfig(attention="none"), options)
    run = configure(RunConfig(), options)
    with _importing():
        from captioner import storage
        from captioner.data import dataset
        from captioner.evaluation import evaluation, metrics

    chosen = metrics.choose_tokenizer(tokenizer)
    read = dataset.read_dataset if references is None else evaluation.read_references
    captioned_images = read(
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


@main.command("average-models")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.argument("output")
@_option(
    "--encoder-weights",
    metavar="FILE",
    group="Options",
    help="Published encoder weights; the encoder is averaged with them.  [default: none]",
)
@_option(
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
    with _importing():
        from captioner.model import averaging

    averaging.average_models(models, output, encoder_weights=encoder_weights, overwrite=overwrite)


if __name__ == "__main__":
    main()
