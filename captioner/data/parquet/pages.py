"""The pages of a Parquet file's column: where each begins, and how many rows it holds.

A row group stores a column as a chunk: an optional dictionary page, then data pages one after
another, each with a header in Thrift's compact protocol. Arrow reads a chunk from its begin, and
offers no way to reach a page in the middle; a row group of a hundred thousand images is gigabytes.
The headers alone are quick to read, and Arrow decodes the pages that :class:`PageFile` shows it.

Format: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from dataclasses import dataclass
from typing import Any

from captioner import storage

__all__ = [
    "DATA",
    "DELTA_BYTE_ARRAY",
    "DICTIONARY",
    "DamagedError",
    "Page",
    "PageFile",
    "parse_page",
]

DATA, DICTIONARY = "data", "dictionary"
PLAIN, DELTA_BYTE_ARRAY = 0, 7  # encodings
_ENCODING = {5: 2, 8: 4}  # the encoding's field in the structures of the data pages' versions
_KINDS = {0: DATA, 1: "index", 2: DICTIONARY, 3: DATA}  # 3 is the second version of a data page


class DamagedError(OSError):
    """A Parquet file is damaged."""


@dataclass(frozen=True)
class Page:
    """A page of a chunk.

    Attributes:
        kind: :data:`DATA`, :data:`DICTIONARY`, or ``index``, which readers pass over.
        begin: where its header begins, in bytes from the begin of the file.
        end: where the next page begins.
        values: how many values it holds; a row's missing image counts.
        size: of its decompressed content, in bytes.
        encoding: of the values of a data page, by its number in the format.
    """

    kind: str
    begin: int
    end: int
    values: int
    size: int
    encoding: int = PLAIN

    @property
    def has_dictionary(self) -> bool:
        """Whether its values are numbers of entries of the chunk's dictionary."""
        return self.encoding in (2, 8)


class TruncatedHeaderError(DamagedError):
    """The header of a page is longer than the bytes that were read."""


def parse_page(data: bytes | memoryview, begin: int) -> Page:
    """Parses the header of a page.

    Args:
        data: the file's bytes from ``begin`` on, at least those of the header.
        begin: where the page begins in the file.

    Raises:
        TruncatedHeaderError: ``data`` ends before the header does.
        DamagedError: this is not the header of a page.
    """
    parser = _Thrift(data)
    header = parser.struct()
    form = next((number for number in (5, 7, 8) if isinstance(header.get(number), dict)), None)
    details = {} if form is None else header[form]
    encoding = details.get(_ENCODING[form], PLAIN) if form in _ENCODING else PLAIN
    numbers = [header.get(2), header.get(3), details.get(1, 0), encoding]
    known = _KINDS.get(header.get(1, -1))
    if known is None or not all(isinstance(n, int) and 0 <= n < 1 << 31 for n in numbers):
        raise DamagedError(f"the Parquet file is damaged: no page begins at byte {begin}")
    size, compressed, values, encoding = numbers
    return Page(known, begin, begin + parser.position + compressed, values, size, encoding)


class _Thrift:
    """Reads structures in Thrift's compact protocol; binary values are passed over."""

    _DEEPEST = 8  # structures within structures

    def __init__(self, data: bytes | memoryview):
        self._data, self.position = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The fields of a structure by their numbers."""
        if depth > self._DEEPEST:
            raise DamagedError("the Parquet file is damaged: a page's header is nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            delta, kind = head >> 4, head & 15
            number = number + delta if delta else self._signed()
            fields[number] = self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # true and false are the kind itself
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self._unsigned())
        if kind == 12:
            return self.struct(depth + 1)
        raise DamagedError(
            f"the Parquet file is damaged: a page's header has a value of kind {kind}"
        )

    def _byte(self) -> int:
        if self.position >= len(self._data):
            raise TruncatedHeaderError("the Parquet file is damaged: a page's header has no end")
        self.position += 1
        return self._data[self.position - 1]

    def _skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self._data):
            raise TruncatedHeaderError("the Parquet file is damaged: a page's header has no end")

    def _unsigned(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise DamagedError("the Parquet file is damaged: a number in a page's header")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)


class PageFile(storage.SeekableFile):
    """Some pages of a chunk as the file that Arrow expects them in.

    Where the chunk begins, the dictionary page and the given data pages follow each other, as if
    the chunk had no others; nothing else of the file is there.
    """

    def __init__(self, size: int, begin: int, pages: list[memoryview]):
        super().__init__(size)
        self._pieces: list[tuple[int, memoryview]] = []
        for page in pages:
            self._pieces.append((begin, page))
            begin += len(page)

    def readinto(self, buffer: Any) -> int:
        """Reads to the end of a piece at most; nothing where there is none."""
        for begin, piece in self._pieces:
            if begin <= self._position < begin + len(piece):
                start = self._position - begin
                data = piece[start : start + len(buffer)]
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
        return 0
