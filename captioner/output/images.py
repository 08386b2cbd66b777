"""Reads the images of an output by their URIs, also those in tar and Parquet files."""

import threading

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner import storage
from captioner.data.reading import is_in_container, read_images
from captioner.output.directory import OutputDirectory
from captioner.output.manifest import read_manifest

__all__ = ["OutputImages"]


class OutputImages:
    """The images of an output. Thread-safe.

    The manifest, which says where an image is in a tar or a Parquet file, is read when the first
    such image is, and again for an image that a growing output has listed since.
    """

    def __init__(self, directory: OutputDirectory):
        self._directory = directory
        self._lock = threading.Lock()
        self._images: pa.Table | None = None
        self._order = np.empty(0, np.int64)  # of the images by URI

    def read(self, uri: str, limit: int) -> bytes:
        """An image's bytes; ``limit + 1`` of them, at most, show that it is longer.

        Raises:
            CaptionerError: the whole store cannot be used.
            OSError: the image cannot be read.
        """
        if not is_in_container(uri):
            return storage.read(uri, limit)
        [data] = read_images(self._find(uri), limit, storage.RETRIES)
        if isinstance(data, Exception):
            raise data if isinstance(data, OSError) else OSError(str(data))
        return data

    def _find(self, uri: str) -> pa.Table:
        with self._lock:
            for reads in (False, True):
                if reads or self._images is None:
                    self._images = read_manifest(self._directory)
                    self._order = pc.sort_indices(self._images["uri"]).to_numpy()
                place = self._place(self._images["uri"], uri)
                if place is not None:
                    return self._images.slice(place, 1)
        raise FileNotFoundError(f"{uri} is not an image of {self._directory.uri}")

    def _place(self, uris: pa.ChunkedArray, uri: str) -> int | None:
        """The row of a URI, by bisection; None if no row has it."""
        begin, end = 0, len(self._order)
        while begin < end:
            middle = (begin + end) // 2
            if uris[int(self._order[middle])].as_py() < uri:
                begin = middle + 1
            else:
                end = middle
        if begin == len(self._order):
            return None
        place = int(self._order[begin])
        return place if uris[place].as_py() == uri else None
