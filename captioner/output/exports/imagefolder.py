"""A folder that ``datasets.load_dataset("imagefolder", data_dir=…)`` reads."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from captioner import storage
from captioner.output.exports.images import THREADS, file_extension, read_image
from captioner.output.exports.job import ExportJob
from captioner.runtime import prefetch

__all__ = ["write"]

_FOLDER = 10_000  # images in a folder


def write(job: ExportJob) -> None:
    """Writes the images to ``images/0000/…`` and, last, ``metadata.jsonl`` with their captions.

    ``metadata.jsonl`` has ``file_name``, ``text``, and the chosen columns. An image is not copied
    again if its copy already has the image's recorded size.

    Raises:
        OutputError: a file cannot be written.
    """
    target = storage.join(job.destination, "metadata.jsonl")
    if not job.may_write(target):
        job.summary.keep(target, job.rows.total)
        return
    copies = prefetch.map_ahead(partial(_copy, job), enumerate(_rows(job)), THREADS)
    with storage.writing(target) as file:
        for name, row, outcome in copies:
            setattr(job.summary, outcome, getattr(job.summary, outcome) + 1)
            if outcome == "unreadable":
                continue
            columns = job.rows.chosen(["uri", "score"])
            values = {"file_name": name, "text": job.text(row["caption"])}
            values |= {column: row[column] for column in columns if column != "caption"}
            line = json.dumps(values, ensure_ascii=False, default=str) + "\n"
            file.write(line.encode(errors="surrogatepass"))
    job.ledger.note(target)


def _rows(job: ExportJob) -> Iterator[dict[str, Any]]:
    for count, table in job.rows.tables():
        yield from table.to_pylist()
        job.advance(count)


def _copy(
    job: ExportJob, numbered: tuple[int, dict[str, Any]]
) -> tuple[str, dict[str, Any], Literal["written", "unchanged", "unreadable"]]:
    """Copies the image of a row; returns the path of the copy, the row and the outcome."""
    number, row = numbered
    name = f"images/{number // _FOLDER:04d}/{number:09d}{file_extension(row['uri'])}"
    target = storage.join(job.destination, name)
    if row["bytes"] is not None and storage.size(target) == row["bytes"]:
        return name, row, "unchanged"
    data = read_image(job.images, row["uri"])
    if data is None:
        return name, row, "unreadable"
    storage.write(target, data)
    return name, row, "written"
