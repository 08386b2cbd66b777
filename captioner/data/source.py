"""Sources of images: what a listing says of each image.

A source is a folder, a list, or files that hold many images: containers. Its listing is an Arrow
table with a row an image: :data:`captioner.schema.LISTING`. To add a kind of source, write its
``images``, choose it in :mod:`captioner.data.listing`, and, if it has containers, name what reads
them in :mod:`captioner.data.reading`.
"""

from collections.abc import Iterable
from typing import Protocol

import pyarrow as pa

from captioner.schema import LISTING
from captioner.storage import Listed

__all__ = ["Source", "list_files"]


class Source(Protocol):
    """Where images come from."""

    def images(self) -> pa.Table:
        """Every image once, in a stable order: :data:`captioner.schema.LISTING`.

        Raises:
            InputError: the source cannot be listed.
        """


def list_files(files: Iterable[Listed]) -> pa.Table:
    """A listing of images that are files."""
    files = list(files)
    columns = {
        "uri": pa.array([each.uri for each in files], pa.string()),
        "size": pa.array([each.size for each in files], pa.int64()),
    }
    for field in list(LISTING)[len(columns) :]:
        columns[field.name] = pa.nulls(len(files), field.type)
    return pa.table(columns, schema=LISTING)
