"""The pictures of the page, made on demand: photos in two sizes, and attention maps."""

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
from PIL import Image

from captioner.output.attention import colour
from captioner.output.images import OutputImages
from captioner.review.rows import read_photo

__all__ = ["SIZES", "PictureCache", "map_png", "photo_jpeg"]

#: Pixels of a photo's longest side, by the name of the size.
SIZES = {"small": 320, "large": 1280}
_CACHE_BYTES = 128_000_000  # bytes
_AT_ONCE = 4  # pictures: a photo takes up to 1 GB while it is decoded


class PictureCache:
    """Keeps the most recently used pictures, up to a number of bytes. Thread-safe."""

    def __init__(self, limit: int = _CACHE_BYTES):
        self._limit = limit
        self._bytes = 0
        self._pictures: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._making = threading.BoundedSemaphore(_AT_ONCE)

    def get(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        """Returns the picture of a key, made by ``make`` if it is not in the cache."""
        with self._lock:
            if key in self._pictures:
                self._pictures.move_to_end(key)
                return self._pictures[key]
        with self._making:
            picture = make()
        with self._lock:
            if key not in self._pictures:
                self._pictures[key] = picture
                self._bytes += len(picture)
            while self._bytes > self._limit and len(self._pictures) > 1:
                _, oldest = self._pictures.popitem(last=False)
                self._bytes -= len(oldest)
        return picture


def photo_jpeg(photos: OutputImages, uri: str, size: str) -> bytes:
    """Reads a photo as JPEG in one of the :data:`SIZES`.

    Raises:
        InputError: it cannot be read or decoded.
    """
    sink = io.BytesIO()
    read_photo(photos, uri, SIZES[size]).save(sink, "JPEG", quality=85)
    return sink.getvalue()


def map_png(map_HW: np.ndarray) -> bytes:
    """Encodes an attention map as a PNG with one pixel per value; the page enlarges it."""
    sink = io.BytesIO()
    picture: Image.Image = colour(map_HW)
    picture.save(sink, "PNG")
    return sink.getvalue()
