"""The manifest: the images of a job and the shard of each image.

A listing becomes numbered shards. Shards keep their numbers and their images: images that a later
listing adds become new shards at the end, in a new file. So do the rows of images that are found
elsewhere in their container: of an image's rows, the last one counts.
"""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner import storage
from captioner.errors import OutputError, StorageError, one_line
from captioner.output.directory import PRIVATE, OutputDirectory, by_number
from captioner.output.parts import Part, PartFile
from captioner.schema import KEPT, MANIFEST

__all__ = [
    "Shard",
    "by_shard",
    "extend_manifest",
    "new_shards",
    "parts_with_images",
    "read_manifest",
    "replace_images",
]


@dataclass(frozen=True)
class Shard:
    """Some consecutive images of the manifest, all of one container or none: one part file.

    Attributes:
        number: counts from 0.
        images: rows of a listing: :data:`captioner.schema.LISTING`.
        redone: empty for a new part. Otherwise the images are only some of those of an existing
            part, to be captioned again; these are the numbers of their rows in the part.
    """

    number: int
    images: pa.Table
    redone: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    @cached_property
    def uris(self) -> list[str]:
        """The URIs of the images."""
        uris: list[str] = self.images["uri"].to_pylist()
        return uris

    def kept(self, column: str) -> list[Any]:
        """The values of a kept column of the source, one for each image."""
        values: list[Any] = pc.struct_field(self.images[KEPT], column).to_pylist()
        return values


def read_manifest(directory: OutputDirectory) -> pa.Table:
    """All images ever listed, by shard and row: :data:`captioner.schema.MANIFEST`.

    Raises:
        OutputError: a file of the manifest cannot be read, or is not one.
    """
    return _read(directory, _files(directory))


def extend_manifest(directory: OutputDirectory, listing: pa.Table, shard_size: int) -> pa.Table:
    """Adds new images of a listing to the manifest as new shards; returns the whole manifest.

    Raises:
        OutputError: the manifest cannot be read or written.
    """
    return _append(directory, lambda manifest: new_shards(manifest, listing, shard_size))


def replace_images(directory: OutputDirectory, images: pa.Table) -> pa.Table:
    """Replaces rows of the manifest by rows for the same shard and row; returns all of it.

    Raises:
        OutputError: the manifest cannot be read or written.
    """
    return _append(directory, lambda _: _typed(images))


def _append(directory: OutputDirectory, rows: Callable[[pa.Table], pa.Table]) -> pa.Table:
    """Appends rows, which depend on the manifest so far; returns the whole manifest."""
    while True:
        names = _files(directory)
        manifest = _read(directory, names)
        if not len(added := rows(manifest)):
            return manifest
        sink = io.BytesIO()
        pq.write_table(added, sink, compression="zstd")
        uri = directory.private(f"manifest-{len(names):04d}.parquet")
        try:
            storage.write(uri, sink.getvalue(), new=True)
        except (
            FileExistsError
        ):  # in a bucket, another job wrote this name first: read what it listed
            continue
        return _joined([manifest, added])


def _files(directory: OutputDirectory) -> list[str]:
    names = (name for name in directory.names(PRIVATE) if name.startswith("manifest-"))
    return sorted(names, key=by_number)


def _read(directory: OutputDirectory, names: Sequence[str]) -> pa.Table:
    try:
        tables = [
            _typed(PartFile(io.BytesIO(storage.read(directory.private(name)))).read())
            for name in names
        ]
    except (OSError, pa.ArrowException, ValueError) as error:
        if isinstance(error, StorageError):
            raise
        raise OutputError(
            f"the manifest of {directory.uri} cannot be read: {one_line(error)}"
        ) from error
    return _joined(tables)


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Some manifests as one; an empty one has no columns of the source."""
    joined = pa.concat_tables([table for table in tables if len(table)] or [MANIFEST.empty_table()])
    places = joined["shard"].to_numpy().astype(np.int64) << 32 | joined["row"].to_numpy()
    if (np.diff(places) > 0).all():
        return joined
    _, last = np.unique(places[::-1], return_index=True)
    return joined.take(len(places) - 1 - last)


def _typed(table: pa.Table) -> pa.Table:
    """A manifest with its types; the kept columns stay unchanged.

    Raises:
        ValueError: the table is not a manifest.
    """
    kept = [table.schema.field(KEPT)] if KEPT in table.column_names else []
    return table.cast(pa.schema([*MANIFEST, *kept]))


def new_shards(manifest: pa.Table, listing: pa.Table, shard_size: int) -> pa.Table:
    """The listed images that are not in the manifest, without duplicates, as new shards.

    A shard has at most ``shard_size`` images, and only images of one row group or one other
    container.
    """
    seen = set(manifest["uri"].to_pylist())
    new = [n for n, uri in enumerate(listing["uri"].to_pylist()) if not _is_in(seen, uri)]
    listing = listing.take(pa.array(new, pa.int64()))
    first = (pc.max(manifest["shard"]).as_py() + 1) if len(manifest) else 0
    shards, rows = _cut(listing, shard_size)
    kept = [KEPT] if KEPT in listing.column_names else []
    columns = {name: listing[name] for name in listing.column_names if name != KEPT}
    columns |= {"shard": pa.array(first + shards), "row": pa.array(rows)}
    return _typed(pa.table(columns | {name: listing[name] for name in kept}))


def _is_in(seen: set[str], uri: str) -> bool:
    """Whether a URI is in a set; adds it."""
    if uri in seen:
        return True
    seen.add(uri)
    return False


def _cut(listing: pa.Table, shard_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The shard, counted from 0, and the row in it of each image of a listing."""
    index = np.arange(len(listing))
    changes = np.zeros(len(listing), bool)
    for name, other in (("container", ""), ("row_group", -1)):
        values = pc.fill_null(listing[name], other).to_numpy()
        changes[1:] |= values[1:] != values[:-1]
    begin = np.maximum.accumulate(np.where(changes, index, 0))
    rows = (index - begin) % shard_size
    return np.cumsum(rows == 0) - 1, rows


def parts_with_images(
    directory: OutputDirectory, manifest: pa.Table
) -> list[tuple[Part, pa.Table]]:
    """The parts that count, in order, each with its images.

    Raises:
        OutputError: a part belongs to no shard of the manifest.
    """
    numbers, parts = manifest["shard"].to_numpy(), directory.parts()
    begins = np.searchsorted(numbers, np.array([p.first for p in parts], numbers.dtype))
    ends = np.searchsorted(numbers, np.array([p.last for p in parts], numbers.dtype), "right")
    found = []
    for part, begin, end in zip(parts, begins.tolist(), ends.tolist(), strict=True):
        if begin == end or part.last > numbers[-1]:
            raise OutputError(f"{part.name} belongs to no shard of the manifest")
        found.append((part, manifest.slice(begin, end - begin)))
    return found


def by_shard(manifest: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """The shards of a manifest, in order: a number and its images."""
    numbers = manifest["shard"].to_numpy()
    edges = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
    for begin, end in itertools.pairwise(edges):
        yield int(numbers[begin]), manifest.slice(begin, end - begin)
