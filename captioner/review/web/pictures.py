"""Keeps the pictures of the page, which are made on demand."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

__all__ = ["PictureCache"]

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
