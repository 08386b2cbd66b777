"""Finds images again whose tar file has changed since they were listed."""

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner.errors import OutputError, first_of
from captioner.output.manifest import Shard

__all__ = ["moved_images"]

_SHOWN = 5  # names in a message

_logger = logging.getLogger(__name__)


def moved_images(manifest: pa.Table, listing: pa.Table, shards: Sequence[Shard]) -> pa.Table:
    """The images to caption whose tar file has changed, with their new rows of the manifest.

    An image of the same name is the same image. One that the tar file does not hold any more keeps
    its row, and is found unreadable.

    Args:
        manifest: the images ever listed.
        listing: the images that the source contains at present.
        shards: what is to be captioned.

    Raises:
        OutputError: a Parquet file has changed, whose images have no names.
    """
    current = _versions(listing)
    changed = [tar for tar, version in _pairs(manifest) if current.get(tar, version) != version]
    rows = _rows_of(manifest, shards, set(changed))
    before = manifest.take(rows)
    versions = zip(before["container"].to_pylist(), before["version"].to_pylist(), strict=True)
    rows = rows.filter(pa.array([current[tar] != version for tar, version in versions], pa.bool_()))
    if not len(rows):
        return manifest.slice(0, 0)
    before = manifest.take(rows)
    _refuse_parquet(before, shards)
    uris = listing.filter(pc.is_in(listing["container"], pc.unique(before["container"])))
    place_of = {uri: place for place, uri in enumerate(uris["uri"].to_pylist())}
    places = pa.array([place_of.get(uri) for uri in before["uri"].to_pylist()], pa.int64())
    found = pc.is_valid(places)
    _report(before, pc.sum(found).as_py() or 0)
    now, then = uris.take(places.drop_null()), before.filter(found)
    for name in ("shard", "row"):
        now = now.append_column(manifest.schema.field(name), then[name])
    return now.select(manifest.column_names)


def _pairs(images: pa.Table) -> Iterable[tuple[str, str]]:
    """The containers of images, with each of their versions."""
    images = images.filter(pc.is_valid(images["container"]))
    pairs = images.group_by(["container", "version"]).aggregate([])
    return zip(pairs["container"].to_pylist(), pairs["version"].to_pylist(), strict=True)


def _versions(listing: pa.Table) -> dict[str, str]:
    return dict(_pairs(listing))


def _rows_of(manifest: pa.Table, shards: Sequence[Shard], containers: set[str]) -> pa.Array:
    """The rows of the manifest of images to caption, of some containers."""
    numbers = manifest["shard"].to_numpy()
    rows: list[int] = []
    for shard in shards if containers else []:
        if shard.images["container"][0].as_py() in containers:
            begin = int(np.searchsorted(numbers, shard.number))
            rows += [begin + row for row in shard.redone or range(len(shard))]
    return pa.array(sorted(rows), pa.int64())


def _refuse_parquet(images: pa.Table, shards: Sequence[Shard]) -> None:
    numbers = pa.array([shard.number for shard in shards if not shard.redone], pa.int32())
    cells = pc.and_(pc.is_valid(images["column"]), pc.is_in(images["shard"], numbers))
    images = images.filter(cells)
    if len(images):
        raise OutputError(
            f"{images['container'][0]} has changed since it was listed, and {len(images)} of its "
            "images have no caption yet: a row may be another image now. Restore the earlier "
            "file with its modification time, use another output, or add --overwrite"
        )


def _report(images: pa.Table, found: int) -> None:
    tars = pc.unique(images["container"]).to_pylist()
    _logger.warning(
        "tar files that have changed since they were listed: %d: %s; they still contain %d of "
        "the %d images to caption",
        len(tars),
        first_of(tars, _SHOWN),
        found,
        len(images),
    )
