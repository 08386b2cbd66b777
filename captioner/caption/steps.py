"""The steps of a caption job, common to both engines: read and decode an image, write a part.

Both engines consist of these steps and of :mod:`captioner.caption.batches`, and cut a shard into
the same batches; they therefore write the same rows.
"""

import io
import re
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.caption.timing import Timing
from captioner.config import DecodeConfig, RunConfig
from captioner.data import images
from captioner.data.preparation import Preparation
from captioner.data.prompts import columns_of, fill
from captioner.data.reading import read_images
from captioner.errors import OutputError, one_line
from captioner.output.manifest import Shard
from captioner.output.parts import Part, part_name, read_part
from captioner.schema import KEPT, STATUSES, CaptionRow, kept_fields, part_schema, rows_to_table

__all__ = [
    "CaptionJob",
    "Loaded",
    "Results",
    "ShardResult",
    "Withheld",
    "common_failure",
    "finish_shard",
    "load_images",
    "prompts",
    "write_part",
]


@dataclass(frozen=True)
class Withheld:
    """The rows of a shard, not written yet, whose images all fail for the same kind of reason.

    See :mod:`captioner.caption.early_failures`.
    """

    shard: Shard
    kind: str
    rows: list[CaptionRow]


@dataclass(frozen=True)
class ShardResult:
    """A finished shard.

    Attributes:
        rows: its rows, by status.
        timing: the time spent since the engine's last result.
        withheld: the rows, if they are not written yet.
    """

    rows: dict[str, int]
    timing: Timing
    withheld: Withheld | None = None


#: What an engine yields.
Results = Generator[ShardResult, None, None]


@dataclass(frozen=True, kw_only=True)
class CaptionJob:
    """The settings for each process of a job; small, and the same on every machine.

    ``preparation`` is the shape of image that the model takes.
    """

    output: str
    preparation: Preparation
    decode: DecodeConfig
    run: RunConfig


@dataclass
class Loaded:
    """An image in progress: its row so far, and its pixels until it is captioned.

    ``seconds`` is the time of reading and decoding; images that are read together share the
    reading's. ``prompt`` is None where all images have the same.
    """

    row: CaptionRow
    pixels_HW3: np.ndarray | None
    seconds: float = 0.0
    prompt: str | None = None


def load_images(job: CaptionJob, listed: pa.Table) -> list[Loaded]:
    """Reads and decodes a group of images; an image's row says what is wrong with it.

    Args:
        job: the settings.
        listed: rows of a listing; see :func:`captioner.data.reading.groups`.

    Raises:
        CaptionerError: no image of the job can be read, for example without credentials.
    """
    rows = listed.select(["uri", "size", "container", "problem"]).to_pylist()
    known = [_known_fault(job, row) for row in rows]
    wanted = listed.filter(pa.array([fault is None for fault in known], pa.bool_()))
    data = read_images(wanted, job.run.max_bytes, job.run.retries)
    loaded = list(_loaded(job, rows, known, data))
    for image, prompt in zip(loaded, prompts(job, listed), strict=True):
        image.prompt = prompt
    return loaded


def prompts(job: CaptionJob, listed: pa.Table) -> Sequence[str | None]:
    """The prompt of each image if the prompt names columns of the source; else None for each."""
    template = job.decode.prompt
    if template is None or not columns_of(template):
        return [None] * len(listed)
    return [fill(template, row) for row in listed[KEPT].to_pylist()]


def _known_fault(job: CaptionJob, listed: dict[str, Any]) -> CaptionRow | None:
    """The row of an image that need not be read."""
    uri, size, limit = listed["uri"], listed["size"], job.run.max_bytes
    if listed["problem"] is not None:
        return CaptionRow(uri=uri, bytes=size, status="unreadable", error=listed["problem"])
    if size is not None and size > limit:
        error = f"more than {limit} bytes"
        return CaptionRow(uri=uri, bytes=size, status="rejected", error=error)
    return None


def _loaded(
    job: CaptionJob,
    rows: Sequence[dict[str, Any]],
    known: Sequence[CaptionRow | None],
    data: Iterator[bytes | Exception],
) -> Iterator[Loaded]:
    for listed, fault in zip(rows, known, strict=True):
        begin = time.perf_counter()
        loaded = _decode(job, listed, next(data)) if fault is None else Loaded(fault, None)
        loaded.seconds = time.perf_counter() - begin
        yield loaded


def _decode(job: CaptionJob, listed: dict[str, Any], data: bytes | Exception) -> Loaded:
    uri, size, limit = listed["uri"], listed["size"], job.run.max_bytes
    if isinstance(data, Exception):
        row = CaptionRow(uri=uri, bytes=size, status="unreadable", error=one_line(data))
        return Loaded(row, None)
    decoded = images.decode(data, job.preparation, max_pixels=job.run.max_pixels, max_bytes=limit)
    if len(data) <= limit:
        size = len(data)
    elif listed["container"] is None:  # a longer file is not read to its end
        size = storage.size(uri)
    row = CaptionRow(
        uri=uri,
        width=decoded.width,
        height=decoded.height,
        bytes=size,
        status=decoded.status,
        error=decoded.error,
    )
    return Loaded(row, decoded.pixels_HW3)


def finish_shard(
    job: CaptionJob, shard: Shard, rows: list[CaptionRow], timing: Timing
) -> ShardResult:
    """Writes a shard's rows, unless all of its images fail alike; adds the time of writing.

    Raises:
        OutputError: as :func:`write_part`.
    """
    begin = time.perf_counter()
    counted = Counter(row.status for row in rows)
    counts: dict[str, int] = {status: counted[status] for status in STATUSES}
    withheld = None
    may_withhold = job.run.stop_after_failures is not None and not shard.redone
    if may_withhold and (kind := common_failure(rows)) is not None:
        withheld = Withheld(shard, kind, rows)
    else:
        write_part(job, shard, rows)
    timing += Timing(write=time.perf_counter() - begin)
    return ShardResult(counts, timing, withheld)


# Parts of a message that vary between failures of one kind: paths, URIs, quotes, numbers.
_VARYING = re.compile(r"""\S*[/\\]\S*|'[^']*'|"[^"]*"|\b[0-9a-fA-F-]{8,}\b|\d+""")


def common_failure(rows: Sequence[CaptionRow]) -> str | None:
    """The kind of failure that all rows share; None if there is none."""
    kinds = {_kind_of_failure(row) for row in rows}
    return kinds.pop() if len(kinds) == 1 else None


def _kind_of_failure(row: CaptionRow) -> str | None:
    if row.status == "ok":
        return None
    message = (row.error or "").replace(row.uri, "…").replace(row.uri.rsplit("/", 1)[-1], "…")
    return f"{row.status}: {_VARYING.sub('…', message)}"


def write_part(job: CaptionJob, shard: Shard, captioned: Sequence[CaptionRow]) -> None:
    """Writes a shard's rows as its part, or replaces redone rows in the existing part.

    Raises:
        OutputError: the part cannot be written, or, where rows are redone, cannot be read or holds
            other images.
        RuntimeError: the rows are not those of the shard's images.
    """
    if [row.uri for row in captioned] != shard.uris:
        raise RuntimeError(f"the rows of shard {shard.number} are not those of its images")
    kept = kept_fields(shard.images.schema)
    schema = part_schema(
        attention=job.decode.attention, levels=job.decode.attention_levels, kept=kept
    )
    rows = rows_to_table(captioned)
    for field, values in zip(kept, shard.images[KEPT].flatten() if kept else [], strict=True):
        rows = rows.append_column(field, values)
    rows = rows.cast(schema)
    if shard.redone:
        rows = _replace_rows(read_part(job.output, Part(shard.number, shard.number)), shard, rows)
    sink = io.BytesIO()
    pq.write_table(rows.cast(schema), sink, compression="zstd")
    storage.write(storage.join(job.output, part_name(shard.number)), sink.getvalue())


def _replace_rows(part: pa.Table, shard: Shard, rows: pa.Table) -> pa.Table:
    """Replaces the redone rows of a part."""
    order = np.arange(len(part))
    order[shard.redone] = len(part) + np.arange(len(rows))
    if part["uri"].take(shard.redone).to_pylist() != shard.uris:
        raise OutputError(f"{part_name(shard.number)} holds other images than its shard")
    return pa.concat_tables([part.cast(rows.schema), rows]).take(order)
