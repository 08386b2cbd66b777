"""A file put together from pieces of another, without a copy."""

import bisect
import itertools
from collections.abc import Sequence

from captioner import storage

__all__ = ["SplicedFile"]


class SplicedFile(storage.SeekableFile):
    """Reads pieces of bytes one after the other."""

    def __init__(self, pieces: Sequence[bytes | memoryview]) -> None:
        self._pieces = [memoryview(piece) for piece in pieces if len(piece)]
        self._ends = list(itertools.accumulate(len(piece) for piece in self._pieces))
        super().__init__(self._ends[-1] if self._ends else 0)

    def read(self, size: int | None = -1) -> bytes:
        """The next ``size`` bytes, or fewer at the end; all that is left where it is negative."""
        end = self._size if size is None or size < 0 else min(self._position + size, self._size)
        found = []
        while self._position < end:
            number = bisect.bisect_right(self._ends, self._position)
            begin = self._ends[number] - len(self._pieces[number])
            piece = self._pieces[number][self._position - begin : end - begin]
            found.append(piece)
            self._position += len(piece)
        return b"".join(found)
