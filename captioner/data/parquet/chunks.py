"""Reads one column of a row group of a Parquet file, page by page, and keeps decoded pages.

What a file claims about its sizes is checked before Arrow allocates memory for it.
"""

import bisect
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.data.parquet.pages import (
    DATA,
    DELTA_BYTE_ARRAY,
    DICTIONARY,
    DamagedError,
    Page,
    PageFile,
    TruncatedHeaderError,
    parse_page,
)
from captioner.data.parquet.shared import SharedCache
from captioner.errors import CaptionerError, one_line

__all__ = ["LARGEST_HEADER", "Chunk", "Place", "Row", "check_version"]

_HEADER, LARGEST_HEADER = 1 << 13, 1 << 20  # bytes
_HELD = 1 << 24  # bytes of a chunk in a bucket that is read at once
_REQUEST = 1 << 26  # bytes of one request to a bucket
_LARGE = 1 << 26  # bytes of a page; a process decodes only one larger page at a time
_LARGEST = 1 << 31  # bytes of a decompressed page, by the format; of its values as well
_BUFFER = 1 << 20  # bytes that Arrow reads at a time
_OVERHEAD = 64  # bytes of a page for each image, besides the image itself


class Place(NamedTuple):
    """Where some images are: a column of a row group."""

    container: str
    version: str | None
    column: str
    row_group: int


#: A row: the number of its page, or why it has none, and the row's place in the page.
Row = tuple[int | Exception, int]


_pages: SharedCache[pa.ChunkedArray] = SharedCache(
    1 << 27, lambda values: int(values.get_total_buffer_size())
)
_large_page = threading.Lock()


def check_version(place: Place) -> None:
    """Raises OSError where the file is another than when it was listed."""
    if place.version is not None and storage.version(place.container) != place.version:
        raise OSError(f"{place.container} is gone or has changed since it was listed")


def _find_excess(pages: Sequence[Page], limit: int) -> pa.ChunkedArray | Exception | None:
    """What stands for a page that could not hold only images within the limit, if it is one."""
    for page in pages:
        # Each value may repeat the begin of the one before.
        largest = page.size * (page.values if page.encoding == DELTA_BYTE_ARRAY else 1)
        most = max(_LARGE, page.values * (limit + _OVERHEAD))
        if page.size > most or largest > _LARGEST:
            if all(each.values == 1 for each in pages):  # longer than the limit, whatever it is
                return pa.chunked_array([pa.array([bytes(limit + 1)], pa.large_binary())])
            return OSError(
                f"the Parquet file has a page of {page.size} bytes for {page.values} images of at "
                f"most {limit} bytes"
            )
    return None


class Chunk:
    """A column of a row group. Thread-safe.

    Attributes:
        pages: the data pages that are known so far, in order.
        is_local: whether the file is on this machine.
    """

    def __init__(
        self, place: Place, metadata: pq.FileMetaData, path: str, column: pq.ColumnChunkMetaData
    ):
        self._place, self._metadata, self._path = place, metadata, path
        offsets = (column.dictionary_page_offset, column.data_page_offset)
        self._begin = min(offset for offset in offsets if offset)
        self._end = self._begin + column.total_compressed_size
        if self._begin < 0 or column.total_compressed_size < 0:
            raise DamagedError("the Parquet file is damaged: its footer has negative offsets")
        self._rows: int = metadata.row_group(place.row_group).num_rows
        self.is_local = storage.is_local(place.container)
        self._lock = threading.Lock()
        self.pages: list[Page] = []
        self._firsts: list[int] = []  # row of each page
        self._known = 0  # rows in them
        self._next = self._begin  # where the first unknown page begins
        self._dictionary: Page | None = None
        self._held: memoryview | None = None

    def locate(self, row: int, retries: int) -> Row:
        """The page of a row, and the row's place in it."""
        with self._lock:
            try:
                while self._known <= row:
                    self._read_next(retries)
            except CaptionerError:
                raise
            except Exception as error:  # a bucket's client raises errors of many types
                return error, 0
            number = bisect.bisect_right(self._firsts, row) - 1
            return number, row - self._firsts[number]

    def _read_next(self, retries: int) -> None:
        """Reads the header of the next page.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        if self._next >= self._end:
            raise DamagedError(
                f"the Parquet file is damaged: {self._known} rows instead of {self._rows} are in "
                f"the column {self._place.column} of row group {self._place.row_group}"
            )
        page = self._parse(retries)
        if page.end > self._end or self._known + page.values > self._rows:
            raise DamagedError(f"the Parquet file is damaged: the page at byte {page.begin}")
        if page.kind == DICTIONARY:
            self._dictionary = page
        elif page.kind == DATA and page.values:
            self.pages.append(page)
            self._firsts.append(self._known)
            self._known += page.values
        self._next = page.end

    def _parse(self, retries: int) -> Page:
        length = _HEADER
        while True:
            end = min(self._next + length, self._end)
            try:
                return parse_page(self.bytes_of(self._next, end, retries), self._next)
            except TruncatedHeaderError:
                if end == self._end or length >= LARGEST_HEADER:
                    raise
                length *= 8

    def decode(
        self, numbers: Sequence[int], limit: int, retries: int
    ) -> dict[int, pa.ChunkedArray | Exception]:
        """The values of pages, or why they cannot be read."""
        decoded: dict[int, pa.ChunkedArray | Exception] = {}
        span = _Span(self, [self.pages[number] for number in numbers], retries)
        for number in numbers:
            page = self.pages[number]
            pages = [page]
            if page.has_dictionary:
                if self._dictionary is None:
                    decoded[number] = DamagedError("the Parquet file is damaged: no dictionary")
                    continue
                pages.insert(0, self._dictionary)
            if (fault := _find_excess(pages, limit)) is not None:
                decoded[number] = fault
                continue
            try:
                decoded[number] = _pages.get(
                    (self._place, self._path, number), partial(self._decode, pages, span)
                )
            except CaptionerError:
                raise
            except Exception as error:  # a bucket's client raises errors of many types
                decoded[number] = error
        return decoded

    def _decode(self, pages: Sequence[Page], span: "_Span") -> pa.ChunkedArray:
        """The values of the last of some pages, the other of which is its dictionary."""
        is_large = sum(page.size for page in pages) > _LARGE
        with _large_page if is_large else nullcontext():
            return self._decode_now(pages, span)

    def _decode_now(self, pages: Sequence[Page], span: "_Span") -> pa.ChunkedArray:
        file = PageFile(self._end, self._begin, [span.data(page) for page in pages])
        try:
            return self._parse_values(file, pages[-1])
        except (pa.ArrowException, OSError, MemoryError) as error:
            raise DamagedError(f"the Parquet file is damaged: {one_line(error)}") from error

    def _parse_values(self, file: PageFile, page: Page) -> pa.ChunkedArray:
        # Arrow's own threads may outlive Python's last moment, which aborts the process. Without
        # a buffer size, Arrow would read the whole chunk at once. As a dictionary, an image that
        # comes a million times takes its memory once.
        parquet = pq.ParquetFile(
            file,
            metadata=self._metadata,
            pre_buffer=False,
            buffer_size=_BUFFER,
            read_dictionary=[self._path] if page.has_dictionary else None,
        )
        batches = parquet.iter_batches(
            page.values,
            row_groups=[self._place.row_group],
            columns=[self._path],
            use_threads=False,
        )
        arrays, rows = [], 0
        for batch in batches:
            array = batch.column(0)
            arrays.append(array.flatten()[0] if pa.types.is_struct(array.type) else array)
            rows += len(array)
            if rows >= page.values:
                return pa.chunked_array(arrays)
        raise DamagedError("a page holds fewer values than it says")

    def bytes_of(self, begin: int, end: int, retries: int) -> memoryview:
        """Bytes of the file; a small chunk in a bucket is read at once."""
        if self.is_local or self._end - self._begin > _HELD:
            return self._read(begin, end, retries)
        if self._held is None:
            self._held = self._read(self._begin, self._end, retries)
        return self._held[begin - self._begin : end - self._begin]

    def _read(self, begin: int, end: int, retries: int) -> memoryview:
        """Bytes of the file, if it is still the one that was listed."""
        container = self._place.container
        data = bytearray(end - begin)
        for start in range(begin, end, _REQUEST):
            stop = min(start + _REQUEST, end)
            data[start - begin : stop - begin] = storage.read_range(
                container, start, stop, retries=retries
            )
        check_version(self._place)
        return memoryview(data)


class _Span:
    """The bytes of some pages of a chunk; those of pages next to each other come at once."""

    def __init__(self, chunk: Chunk, pages: Sequence[Page], retries: int):
        self._chunk, self._pages, self._retries = chunk, pages, retries
        self._begin, self._data = 0, memoryview(b"")

    def data(self, page: Page) -> memoryview:
        """The bytes of a page."""
        if not self._begin <= page.begin < self._begin + len(self._data):
            end = page.end
            for other in self._pages:
                if other.begin == end and not self._chunk.is_local:
                    end = other.end
            self._begin = page.begin
            self._data = self._chunk.bytes_of(page.begin, end, self._retries)
        return self._data[page.begin - self._begin : page.end - self._begin]
