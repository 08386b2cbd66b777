"""Commands on a finished output: ``report``, ``export`` and ``compact``."""

import sys
from typing import Any

import click

from captioner.commands.importing import importing
from captioner.config import ExportConfig
from captioner.errors import printable
from captioner.options import GroupedCommand, Size, configure, option, options_of

__all__ = ["compact", "export", "report"]


@click.command(cls=GroupedCommand, short_help="Summarise an output.")
@click.argument("output")
@option(
    "--missing",
    is_flag=True,
    group="Options",
    help="Print only the URIs of images without a row, one per line.  [default: off]",
)
def report(output: str, missing: bool) -> None:
    """Summarise OUTPUT: rows by status, throughput, best and worst captions, missing images.

    Exits with 1 if an image has no row.
    """
    with importing():
        from captioner import storage
        from captioner.review.report import summarise

    summary = summarise(storage.absolute(output))
    lines = summary.audit.missing if missing else summary.lines()
    for line in lines:
        click.echo(printable(line))
    if summary.audit.missing:
        sys.exit(1)


@click.command(cls=GroupedCommand, short_help="Export captions in the format of another tool.")
@click.argument("output")
@click.argument("destination", required=False)
@option(
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
    with importing():
        from captioner import storage
        from captioner.output import exports

    target = None if destination is None else storage.absolute(destination)
    summary = exports.export(storage.absolute(output), target, form=form, config=config)
    click.echo(printable(summary.describe()))


@click.command(cls=GroupedCommand, short_help="Merge part files into fewer, larger files.")
@click.argument("output")
@option(
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
    with importing():
        from captioner import storage
        from captioner.output import compaction

    click.echo(printable(compaction.compact(storage.absolute(output), size).describe()))
