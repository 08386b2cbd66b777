"""Reads images from the cells of Parquet files: by pages, with bounded memory.

Of a row group, only the pages of the wanted rows are read, and a page is decoded once for all
images in it: its rows stay in a small cache for the groups that follow. The pages of a group that
lie in a bucket come with one request. What a file claims about its sizes is checked before Arrow
allocates memory for it.
"""

import itertools
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.data.lists import resolve_uri
from captioner.data.parquet.chunks import LARGEST_HEADER, Chunk, Place, Row, check_version
from captioner.data.parquet.shared import SharedCache
from captioner.errors import CaptionerError, StorageError, one_line

__all__ = ["read_cells"]

_AT_ONCE = 1 << 24  # bytes of decompressed pages that are decoded for a group at a time


def read_cells(images: pa.Table, limit: int, retries: int) -> Iterator[bytes | Exception]:
    """Reads images of Parquet files, in order: see :func:`captioner.data.reading.read_images`."""
    rows = images.select(["container", "version", "column", "row_group", "position"]).to_pylist()
    places = ((Place(*list(row.values())[:4]), row["position"]) for row in rows)
    for place, some in itertools.groupby(places, key=lambda each: each[0]):
        positions = [position for _, position in some]
        for position, value in zip(
            positions, _read(place, "bytes", positions, limit, retries), strict=True
        ):
            if value is None:
                yield _read_linked(place, position, limit, retries)
            else:
                yield value


def _read_linked(place: Place, position: int, limit: int, retries: int) -> bytes | Exception:
    """The image that a cell without bytes names by its path, from the file's folder."""
    [path] = _read(place, "path", [position], LARGEST_HEADER, retries)
    if isinstance(path, Exception):
        return path
    if not path:
        return OSError(f"the column {place.column} is empty in this row")
    try:
        return storage.read(resolve_uri(place.container, path.decode()), limit, retries=retries)
    except CaptionerError as error:
        if isinstance(error, StorageError):
            raise
        return error
    except Exception as error:  # a bucket's client raises errors of many types
        return OSError(f"its path {path.decode(errors='replace')!r}: {one_line(error)}")


def _read(
    place: Place, field: str, positions: Sequence[int], limit: int, retries: int
) -> Iterator[bytes | Exception | None]:
    """The values of rows of a row group, in order; None for a null."""
    try:
        chunk = _open_chunk(place, field, retries)
    except CaptionerError:
        raise
    except Exception as error:  # a bucket's client raises errors of many types
        yield from itertools.repeat(error, len(positions))
        return
    if chunk is None:  # a column of plain bytes has no path
        yield from itertools.repeat(None, len(positions))
        return
    for pages, rows in _runs(chunk, positions, retries):
        decoded = chunk.decode(pages, limit, retries)
        for number, row in rows:
            values = decoded.get(number) if isinstance(number, int) else number
            yield values if isinstance(values, Exception) else _value(values, row, limit)


def _value(values: pa.ChunkedArray, row: int, limit: int) -> bytes | None:
    value = values[row]
    if pa.types.is_dictionary(values.type):
        value = value.value
    if not value.is_valid:
        return None
    data = value.as_buffer()
    return data.slice(0, min(data.size, limit + 1)).to_pybytes()  # type: ignore[no-any-return]


def _runs(
    chunk: Chunk, positions: Sequence[int], retries: int
) -> Iterator[tuple[list[int], list[Row]]]:
    """Rows whose pages are decoded at once, with those pages: a few, or a large one."""
    pages: list[int] = []
    rows: list[Row] = []
    size = 0
    for position in positions:
        number, row = chunk.locate(position, retries)
        if isinstance(number, int) and number not in pages:
            size += chunk.pages[number].size
            if pages and size > _AT_ONCE:
                yield pages, rows
                pages, rows, size = [], [], chunk.pages[number].size
            pages.append(number)
        rows.append((number, row))
    yield pages, rows


_footers: SharedCache[pq.FileMetaData] = SharedCache(16)
_chunks: SharedCache[Chunk | None] = SharedCache(8)


def _open_chunk(place: Place, field: str, retries: int) -> Chunk | None:
    """The chunk of a column; None for a field that the column does not have."""
    return _chunks.get((place, field), lambda: _find_chunk(place, field, retries))


def _find_chunk(place: Place, field: str, retries: int) -> Chunk | None:
    metadata = _footers.get(place[:2], lambda: _read_footer(place))
    wanted = (f"{place.column}.{field}", *([place.column] if field == "bytes" else []))
    group = metadata.row_group(place.row_group)
    for path in wanted:
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema == path:
                return Chunk(place, metadata, path, column)
    if field != "bytes":
        return None
    raise OSError(f"{place.container} has no column {place.column} of images")


def _read_footer(place: Place) -> pq.FileMetaData:
    try:
        with storage.open_binary(place.container, ranges=True) as file:
            metadata = pq.ParquetFile(file, pre_buffer=False).metadata
    except pa.ArrowException as error:
        check_version(place)
        raise OSError(one_line(error)) from error
    check_version(place)
    return metadata
