"""One file with a line or an object for each image: JSON Lines, CSV, COCO's results."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from captioner import storage
from captioner.errors import InputError
from captioner.output.exports.job import ExportJob

__all__ = ["write_coco", "write_csv", "write_jsonl"]

_COLUMNS = ["uri", "caption", "score", "width", "height"]
_NUMBER = re.compile(r"(\d+)\.[^./]*$")


def write_jsonl(job: ExportJob) -> None:
    """Writes JSON Lines in UTF-8: an object for each image.

    Raises:
        OutputError: the file cannot be written.
    """

    def lines() -> Iterator[str]:
        for row in _rows(job):
            yield json.dumps(row, ensure_ascii=False, default=_encode) + "\n"

    _write(job, lines())


def write_csv(job: ExportJob) -> None:
    """Writes CSV (RFC 4180) with a header; lists are JSON.

    Raises:
        OutputError: the file cannot be written.
    """

    def lines() -> Iterator[str]:
        columns = job.rows.chosen(_COLUMNS)
        yield _csv_line(columns)
        for row in _rows(job):
            yield _csv_line([_cell(row[name]) for name in columns])

    _write(job, lines())


def write_coco(job: ExportJob) -> None:
    """Writes COCO's results format: a list of ``{"image_id": …, "caption": …}``.

    Raises:
        InputError: an image has no id, or two have the same.
        OutputError: the file cannot be written.
    """
    find_id = _id_by_column(job) if job.config.id is not None else _id_by_name

    def lines() -> Iterator[str]:
        seen: set[Any] = set()
        for row in _with_progress(job):
            number = find_id(row)
            if number in seen:
                raise InputError(f"{row['uri']}: another image has the id {number} too; use --id")
            yield ",\n " if seen else "[\n "
            seen.add(number)
            result = {"image_id": number, "caption": job.text(row["caption"])}
            yield json.dumps(result, ensure_ascii=False)
        yield "\n]\n" if seen else "[]\n"

    _write(job, lines())


def _id_by_name(row: dict[str, Any]) -> int:
    """The number at the end of a file's name, as in ``COCO_val2014_000000391895.jpg``."""
    match = _NUMBER.search(storage.as_path(row["uri"]))
    if match is None:
        raise InputError(f"{row['uri']}: the file name does not end in a number; use --id COLUMN")
    return int(match[1])


def _id_by_column(job: ExportJob) -> Callable[[dict[str, Any]], Any]:
    name = job.config.id

    def find(row: dict[str, Any]) -> Any:
        if name not in row:
            raise InputError(f"--id {name}: unknown column; choose from {', '.join(row)}")
        if row[name] is None:
            raise InputError(f"{row['uri']}: the column {name} is empty")
        return row[name]

    return find


def _rows(job: ExportJob) -> Iterator[dict[str, Any]]:
    """The rows with the chosen columns, and captions with prefix and suffix."""
    columns = job.rows.chosen(_COLUMNS)
    for row in _with_progress(job):
        if "caption" in columns:
            row["caption"] = job.text(row["caption"])
        yield {name: row[name] for name in columns}


def _with_progress(job: ExportJob) -> Iterator[dict[str, Any]]:
    for count, table in job.rows.tables():
        yield from table.to_pylist()
        job.advance(count)


def _write(job: ExportJob, lines: Iterator[str]) -> None:
    """Writes the file, unless it would replace a file that the export did not write."""
    storage.check_target(job.destination)
    if not job.may_write(job.destination):
        job.summary.keep(job.destination, job.rows.total)
        return
    with storage.writing(job.destination) as file:
        for line in lines:
            file.write(line.encode(errors="surrogatepass"))
    job.ledger.note(job.destination)
    job.summary.written = job.rows.exported


def _csv_line(values: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, (list, dict, bytes)):
        return json.dumps(value, ensure_ascii=False, default=_encode)
    return value


def _encode(value: object) -> str:
    """Encodes values that JSON lacks: bytes as hexadecimal digits, times and decimals as text."""
    return value.hex() if isinstance(value, bytes) else str(value)
