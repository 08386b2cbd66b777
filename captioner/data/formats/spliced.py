"""A file put together from pieces of another, without a copy."""

import bisect
import io
import itertools
from collections.abc import Sequence

__all__ = ["SplicedFile"]


class SplicedFile(io.RawIOBase):
    """Reads pieces of bytes one after the other."""

    def __init__(self, pieces: Sequence[bytes | memoryview]) -> None:
        super().__init__()
        self._pieces = [memoryview(piece) for piece in pieces if len(piece)]
        self._ends = list(itertools.accumulate(len(piece) for piece in self._pieces))
        self._length = self._ends[-1] if self._ends else 0
        self._position = 0

    def readable(self) -> bool:
        """True: this is what it is for."""
        return True

    def seekable(self) -> bool:
        """True: Pillow's readers seek."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Sets the position, from the beginning, from where it is, or from the end."""
        origin = (0, self._position, self._length)[whence]
        if origin + offset < 0:
            raise ValueError(f"cannot seek to {origin + offset}")
        self._position = origin + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """The next ``size`` bytes, or fewer at the end; all that is left where it is negative."""
        end = self._length if size is None or size < 0 else min(self._position + size, self._length)
        found = []
        while self._position < end:
            number = bisect.bisect_right(self._ends, self._position)
            begin = self._ends[number] - len(self._pieces[number])
            piece = self._pieces[number][self._position - begin : end - begin]
            found.append(piece)
            self._position += len(piece)
        return b"".join(found)
