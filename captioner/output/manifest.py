"""The manifest: which images a job is to caption, and in which shard each is."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from captioner.schema import MANIFEST
from captioner.storage import Listed

__all__ = ["Accounts", "Shard", "new_shards"]


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


@dataclass(frozen=True)
class Accounts:
    """What an output directory holds: ``rows`` by status, and the images without a row."""

    images: int
    rows: dict[str, int]
    missing: list[str]


def new_shards(manifest: pa.Table, listing: Sequence[Listed], shard_size: int) -> pa.Table:
    """What of a listing is not in a manifest yet, in shards of its own."""
    known = set(manifest["uri"].to_pylist())
    new = [listed for listed in listing if listed.uri not in known]
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


def _by_shard(manifest: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """The manifest's shards; a shard's rows stand together."""
    numbers = manifest["shard"].to_numpy()
    edges = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
    for begin, end in itertools.pairwise(edges):
        yield int(numbers[begin]), manifest.slice(begin, end - begin)
