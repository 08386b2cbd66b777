"""The manifest: the images of a job and the shard of each image.

A listing becomes numbered shards. Shards keep their numbers: images that a later
listing adds become new shards at the end, in a new file.
"""

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner import storage
from captioner.errors import OutputError, StorageError, one_line
from captioner.output.directory import PRIVATE, OutputDirectory, by_number
from captioner.output.parts import Part, PartFile
from captioner.schema import MANIFEST
from captioner.storage import Listed

__all__ = [
    "Shard",
    "by_shard",
    "extend_manifest",
    "new_shards",
    "parts_with_images",
    "read_manifest",
]


@dataclass(frozen=True)
class Shard:
    """Some consecutive images of the manifest: one part file. ``sizes`` are in bytes, or None.

    Where ``redone`` is not empty, these are only some of a part's images, to be captioned again:
    the numbers of their rows in the part.
    """

    number: int
    uris: list[str]
    sizes: list[int | None]
    redone: list[int] = field(default_factory=list)


def read_manifest(directory: OutputDirectory) -> pa.Table:
    """All images ever listed, by shard and row: :data:`captioner.schema.MANIFEST`.

    Raises:
        OutputError: a file of the manifest cannot be read, or is not one.
    """
    return _read(directory, _files(directory))


def extend_manifest(
    directory: OutputDirectory, listing: Sequence[Listed], shard_size: int
) -> pa.Table:
    """Adds new images to the manifest as new shards; returns the whole manifest.

    Raises:
        OutputError: the manifest cannot be read or written.
    """
    while True:
        names = _files(directory)
        manifest = _read(directory, names)
        if not len(added := new_shards(manifest, listing, shard_size)):
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
        return pa.concat_tables([manifest, added])


def _files(directory: OutputDirectory) -> list[str]:
    names = (name for name in directory.names(PRIVATE) if name.startswith("manifest-"))
    return sorted(names, key=by_number)


def _read(directory: OutputDirectory, names: Sequence[str]) -> pa.Table:
    try:
        tables = [
            PartFile(io.BytesIO(storage.read(directory.private(name)))).read().cast(MANIFEST)
            for name in names
        ]
    except (OSError, pa.ArrowException, ValueError) as error:
        if isinstance(error, StorageError):
            raise
        raise OutputError(
            f"the manifest of {directory.uri} cannot be read: {one_line(error)}"
        ) from error
    return pa.concat_tables([MANIFEST.empty_table(), *tables])


def new_shards(manifest: pa.Table, listing: Sequence[Listed], shard_size: int) -> pa.Table:
    """The listed images that are not in the manifest, without duplicates, as new shards."""
    known = set(manifest["uri"].to_pylist())
    first_of_each = {listed.uri: listed for listed in reversed(listing)}
    new = [first_of_each[uri] for uri in dict.fromkeys(each.uri for each in listing)]
    new = [listed for listed in new if listed.uri not in known]
    first = (pc.max(manifest["shard"]).as_py() + 1) if len(manifest) else 0
    index = np.arange(len(new))
    return pa.table(
        {
            "uri": pa.array([listed.uri for listed in new], pa.string()),
            "size": pa.array([listed.size for listed in new], pa.int64()),
            "shard": first + index // shard_size,
            "row": index % shard_size,
        }
    ).cast(MANIFEST)


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
