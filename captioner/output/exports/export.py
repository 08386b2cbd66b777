"""One export, from its settings to its summary."""

import os
from collections.abc import Callable
from typing import Literal

from captioner import storage
from captioner.config import ExportConfig
from captioner.errors import InputError
from captioner.output.directory import OutputDirectory
from captioner.output.exports import imagefolder, sidecars, tables, webdataset
from captioner.output.exports.job import ExportJob, ExportSummary
from captioner.output.exports.ledger import Ledger
from captioner.output.exports.rows import Rows
from captioner.output.images import OutputImages
from captioner.runtime.progress import progress_bar

__all__ = ["FORMATS", "Format", "export"]

Format = Literal["sidecar", "jsonl", "csv", "coco", "webdataset", "hf"]

#: The writer of each format.
FORMATS: dict[str, Callable[[ExportJob], None]] = {
    "sidecar": sidecars.write,
    "jsonl": tables.write_jsonl,
    "csv": tables.write_csv,
    "coco": tables.write_coco,
    "webdataset": webdataset.write,
    "hf": imagefolder.write,
}

_FOLDERS = ("sidecar", "webdataset", "hf")  # formats of many files

# Settings that some formats do not use.
_FORMATS_OF: dict[str, tuple[Format, ...]] = {
    "columns": ("jsonl", "csv", "webdataset", "hf"),
    "id": ("coco",),
    "extension": ("sidecar",),
    "root": ("sidecar",),
    "shard_images": ("webdataset",),
}


def export(
    output: str,
    destination: str | None,
    *,
    form: Format,
    config: ExportConfig | None = None,
) -> ExportSummary:
    """Exports the rows of a caption job's output whose status is ``ok``.

    Args:
        output: the caption job's output directory, local or in a bucket.
        destination: the file or folder to write, local or in a bucket; None, for sidecars only,
            puts each sidecar beside its image.
        form: the format to write.
        config: which rows and columns to export, and how.

    Returns:
        The number of images written, and the number left out for each reason.

    Raises:
        InputError: a setting does not fit the format or the output's columns; or a file that the
            export did not write was in the way and is kept.
        OutputError: ``output`` is not a caption job's output, or a file cannot be written.
    """
    config = config or ExportConfig()
    if destination is None and form != "sidecar":
        raise InputError(f"--format {form} needs a DESTINATION to write to")
    _refuse_other_formats(form, config)
    directory = OutputDirectory(output)
    if destination is not None:
        directory.refuse_own(destination)
        if (
            form in _FOLDERS
            and storage.is_local(destination)
            and os.path.isfile(storage.as_path(destination))
        ):
            raise InputError(f"{destination} is a file: name a folder for --format {form}")
    rows = Rows(directory, where=config.where, columns=config.columns, reviewed=config.reviewed)
    ledger = Ledger(directory, destination or "")
    summary = ExportSummary(destination or "beside the images")
    with progress_bar(rows.total, unit="image") as progress:
        job = ExportJob(
            rows,
            OutputImages(directory),
            destination or "",
            config,
            ledger,
            summary,
            progress.update,
        )
        try:
            FORMATS[form](job)
        finally:
            ledger.save()
    summary.filtered, summary.not_ok = rows.filtered, rows.not_ok
    summary.not_reviewed = rows.not_reviewed
    if summary.kept:
        examples = ", ".join(summary.kept_examples)
        raise InputError(
            f"{summary.describe()} ({examples}): to replace these files, add --existing overwrite"
        )
    if summary.shared:
        raise InputError(
            f"{summary.describe()} ({summary.shared_example}): export to a table, such as --format "
            "jsonl, or rename the images"
        )
    return summary


def _refuse_other_formats(form: Format, config: ExportConfig) -> None:
    """Refuses settings that would have no effect.

    Raises:
        InputError: a setting is for another format.
    """
    if config.existing in ("append", "prepend") and form != "sidecar":
        raise InputError(f"--existing {config.existing} is for --format sidecar, not {form}")
    for name, forms in _FORMATS_OF.items():
        if form not in forms and getattr(config, name) != getattr(ExportConfig(), name):
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"{option} is for --format {' or '.join(forms)}, not {form}: leave it out"
            )
