"""Finds which images have their row: the remaining shards, the retries and the final count.

A shard is done when, and only when, its rows are in a part.
"""

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner.errors import OutputError
from captioner.output.directory import OutputDirectory, with_ids
from captioner.output.manifest import Shard, by_shard, parts_with_images, read_manifest
from captioner.output.parts import Part, read_part
from captioner.schema import STATUSES

__all__ = ["Audit", "audit", "count_finished", "remaining_shards", "shards_to_retry"]

_READERS = 16  # threads that read parts: mostly waiting, for a bucket
_READ_AHEAD = 65_536  # rows of parts in memory, unless a part has more


@dataclass(frozen=True)
class Audit:
    """What an output directory holds.

    Attributes:
        images: the number of images in the manifest.
        rows: the number of rows by status.
        missing: the URIs of the images without a row.
        missing_names: their names for messages.
    """

    images: int
    rows: dict[str, int]
    missing: list[str]
    missing_names: list[str] = field(default_factory=list, compare=False)


def audit(directory: OutputDirectory) -> Audit:
    """Counts the rows of every part by status, and compares their images with the manifest.

    Raises:
        OutputError: a part cannot be read, does not hold the images of its shards, each once and
            in order, or belongs to no shard.
    """
    manifest = read_manifest(directory)
    missing: list[str] = []
    names: list[str] = []
    id_column = directory.id_column
    for shard in remaining_shards(directory, manifest):
        missing += shard.uris
        names += with_ids(shard.uris, None if id_column is None else shard.kept(id_column))
    rows: Counter[str] = Counter()
    for _, part in _statuses(directory, manifest):
        for each in pc.value_counts(part["status"]).to_pylist():
            rows[each["values"]] += each["counts"]
    by_status: dict[str, int] = {status: rows[status] for status in STATUSES if status in rows}
    return Audit(len(manifest), by_status, missing, names)


def remaining_shards(
    directory: OutputDirectory, manifest: pa.Table, *, begun: bool = True
) -> Iterator[Shard]:
    """The shards without a part, in order; all shards if the job has not begun."""
    done = {shard for part in directory.parts() for shard in part.shards} if begun else set()
    for number, table in by_shard(manifest):
        if number not in done:
            yield Shard(number, table.drop_columns(["shard", "row"]))


def count_finished(directory: OutputDirectory, manifest: pa.Table) -> int:
    """The number of images in shards that have a part; reads no part."""
    return len(manifest) - sum(map(len, remaining_shards(directory, manifest)))


def shards_to_retry(directory: OutputDirectory, manifest: pa.Table) -> Iterator[Shard]:
    """The images of finished shards whose rows are not ``ok``.

    The sizes of files are unknown: they may have been replaced since they were listed.

    Raises:
        OutputError: as :func:`audit`.
    """
    for listed, rows in _statuses(directory, manifest):
        bad = np.flatnonzero(pc.not_equal(rows["status"], "ok").to_numpy())
        for number, images in by_shard(listed.take(bad)):
            rows_of_part = images["row"].to_pylist()
            images = images.drop_columns(["shard", "row"])
            in_container = pc.is_valid(images["container"])
            sizes = pc.if_else(in_container, images["size"], pa.scalar(None, pa.int64()))
            images = images.set_column(images.column_names.index("size"), "size", sizes)
            yield Shard(number, images, rows_of_part)


def _statuses(
    directory: OutputDirectory, manifest: pa.Table
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """For each part, its images and the URIs and statuses of its rows; reads parts in parallel."""
    waiting: deque[tuple[Part, pa.Table, Future[pa.Table]]] = deque()
    rows = 0
    with ThreadPoolExecutor(_READERS) as pool:
        for part, listed in parts_with_images(directory, manifest):
            while waiting and rows + len(listed) > _READ_AHEAD:
                rows -= len(waiting[0][1])
                yield _checked(*waiting.popleft())
            rows += len(listed)
            reading = pool.submit(read_part, directory.uri, part, ["uri", "status"])
            waiting.append((part, listed, reading))
        while waiting:
            yield _checked(*waiting.popleft())


def _checked(
    part: Part, listed: pa.Table, reading: "Future[pa.Table]"
) -> tuple[pa.Table, pa.Table]:
    rows = reading.result()
    if len(rows) != len(listed):
        whose = "shard" if part.first == part.last else "shards"
        raise OutputError(f"{part.name} has {len(rows)} rows, its {whose} {len(listed)}")
    if not rows["uri"].equals(listed["uri"]):
        raise OutputError(f"{part.name} holds other images than its shard")
    return listed, rows
