"""Tar files of images and captions, as the webdataset library and its relatives read them."""

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

from captioner import storage
from captioner.output.exports.images import THREADS, file_extension, read_image
from captioner.output.exports.job import ExportJob
from captioner.runtime import prefetch

__all__ = ["write"]

Row = dict[str, Any]


def write(job: ExportJob) -> None:
    """Writes ``00000.tar`` …: for each image the members KEY.jpg, KEY.txt and KEY.json.

    KEY is the number of the row among those exported. The JSON has the row's columns. A tar whose
    rows have not changed is not written again.

    Raises:
        OutputError: a tar cannot be written.
    """
    numbered = enumerate(_rows(job))
    for number in itertools.count():
        rows = list(itertools.islice(numbered, job.config.shard_images))
        if not rows:
            return
        target = storage.join(job.destination, f"{number:05d}.tar")
        content = _digest(job, rows)
        version = storage.version(target)
        if version and job.ledger.version(target) == version:
            if job.ledger.content(target) == content:
                job.summary.unchanged += len(rows)
                continue
        elif not job.may_write(target):
            job.summary.keep(target, len(rows))
            continue
        with storage.writing(target) as file:
            written = _write_tar(file, job, rows)
        job.summary.written += written
        job.summary.unreadable += len(rows) - written
        if written == len(rows):  # otherwise the next run tries the images again
            job.ledger.note(target, content)
        else:
            job.ledger.note(target)
        job.ledger.save()


def _rows(job: ExportJob) -> Iterator[Row]:
    for count, table in job.rows.tables():
        yield from table.to_pylist()
        job.advance(count)


def _digest(job: ExportJob, rows: list[tuple[int, Row]]) -> str:
    """A digest of everything that a tar of these rows holds, except the images' bytes."""
    digest = hashlib.sha256()
    for number, row in rows:
        digest.update(json.dumps([number, *_members(job, row)]).encode())
    return digest.hexdigest()


def _members(job: ExportJob, row: Row) -> tuple[str, str]:
    """The text and the JSON of an image."""
    columns = job.rows.chosen([name for name in row if name != "status" and name != "error"])
    values = {name: row[name] for name in columns} | {"caption": job.text(row["caption"])}
    return job.text(row["caption"]), json.dumps(values, ensure_ascii=False, default=str)


def _write_tar(file: BinaryIO, job: ExportJob, rows: list[tuple[int, Row]]) -> int:
    """Writes a tar; returns the number of images in it, without unreadable images."""
    written = 0
    images = prefetch.map_ahead(
        partial(read_image, job.images), [row["uri"] for _, row in rows], THREADS
    )
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for (number, row), data in zip(rows, images, strict=True):
            if data is None:
                continue
            text, columns = _members(job, row)
            for extension, member in (
                (file_extension(row["uri"]), data),
                (".txt", text.encode(errors="surrogatepass")),
                (".json", columns.encode(errors="surrogatepass")),
            ):
                header = tarfile.TarInfo(f"{number:09d}{extension}")
                header.size = len(member)
                tar.addfile(header, io.BytesIO(member))
            written += 1
    return written
