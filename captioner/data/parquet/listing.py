"""Lists the rows of Parquet files: images in their cells, or URIs of images.

Listing reads the footers and the kept columns, but not the column of images.
"""

import logging
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.config import ListingConfig
from captioner.data.columns import Keep, with_kept, without_views
from captioner.data.lists import resolve_uri, uri_column
from captioner.data.parquet.columns import image_column
from captioner.data.source import list_files
from captioner.errors import InputError, one_line
from captioner.runtime.prefetch import map_ahead
from captioner.schema import LISTING
from captioner.storage import Listed

__all__ = ["cell_uri", "holds_images", "list_parquet"]

_logger = logging.getLogger(__name__)

_THREADS = 16  # that list files: mostly waiting, for a bucket
_PLAUSIBLE = 1_000_000  # rows of a row group that need no check
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # Hive's name of a folder for null


@dataclass(frozen=True)
class _Wanted:
    """What is wanted of the files of a source.

    Attributes:
        source: the source, for messages.
        column: of images or of URIs.
        is_images: whether the column holds images.
        kept: the kept columns, each with its new name.
        partitions: the names that the folders of the files have, as in ``split=train``.
    """

    source: str
    column: str
    is_images: bool
    kept: dict[str, str]
    partitions: list[str]


@dataclass(frozen=True)
class _Rows:
    """The rows of a file: a listing and, row by row, the kept columns."""

    listing: pa.Table
    kept: pa.Table


def holds_images(uri: str, column: str | None) -> bool:
    """Whether a Parquet file holds images, rather than a list of URIs.

    Raises:
        InputError: the file cannot be read, or its columns leave open which holds the images.
    """
    try:
        return image_column(_read_schema(uri), uri, column) is not None
    except FileNotFoundError as error:
        raise InputError(f"{uri} does not exist") from error
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {uri}: {one_line(error)}") from error


def list_parquet(
    source: str, files: Sequence[Listed], listing: ListingConfig, keep: Keep
) -> pa.Table:
    """The images of Parquet files: :data:`captioner.schema.LISTING`.

    A file that is damaged becomes one row with the problem, unless there is no other.

    Args:
        source: a folder, whose folders may be named ``key=value``, or a file.
        files: its Parquet files, in order.
        listing: which column holds the images, and how many images to list at most.
        keep: the columns to keep.

    Raises:
        InputError: no file can be read, the files differ in their columns, or they have no images.
    """
    wanted = _choose(source, files, listing.column, keep)
    tables: list[_Rows] = []
    count = 0
    for rows in map_ahead(partial(_list_file, wanted), files, _THREADS):
        tables.append(rows)
        count += len(rows.listing)
        if listing.limit is not None and listing.sample is None and count >= listing.limit:
            break
    images = pa.concat_tables([rows.listing for rows in tables])
    if len(images) and not images["problem"].null_count:
        raise InputError(f"{images['uri'][0]}: {images['problem'][0]}")
    if not len(images):
        raise InputError(f"{source} lists no images: its Parquet files have no rows")
    if wanted.is_images:
        _logger.info("images from the column %s of %d Parquet files", wanted.column, len(files))
    return _without_repeats(with_kept(images, _join_kept(wanted, tables)), source)


def _choose(source: str, files: Sequence[Listed], given: str | None, keep: Keep) -> _Wanted:
    """Chooses the columns by the first file that can be read."""
    problem = ""
    for file in files:
        try:
            schema = _read_schema(file.uri)
        except (OSError, pa.ArrowException) as error:
            problem = problem or f"cannot read {file.uri}: {one_line(error)}"
            continue
        names: list[str] = schema.names
        column = image_column(schema, file.uri, given)
        is_images = column is not None
        if column is None:
            column = uri_column(names, file.uri, given, is_text=True)
        of_folders = [name for name in _partition(source, file.uri) if name not in names]
        chosen = keep.choose([*names, *of_folders], file.uri, column)
        partitions = [name for name in of_folders if name in chosen]
        return _Wanted(source, column, is_images, chosen, partitions)
    raise InputError(problem)


def _read_schema(uri: str) -> pa.Schema:
    with storage.open_binary(uri, ranges=True) as file:
        return pq.ParquetFile(file, pre_buffer=False).schema_arrow


def _list_file(wanted: _Wanted, file: Listed) -> _Rows:
    """The rows of a file; for a damaged file, one row with the problem.

    Raises:
        InputError: the file has other columns than the first.
    """
    version = storage.version(file.uri)
    try:
        with storage.open_binary(file.uri, ranges=True) as opened:
            # Arrow's own threads may outlive Python's last moment, which aborts the process.
            parquet = pq.ParquetFile(opened, pre_buffer=False)
            _check_columns(wanted, file.uri, parquet.schema_arrow)
            if wanted.is_images:
                listed = _list_cells(wanted, file.uri, version, parquet.metadata)
                return _Rows(listed, _read_kept(wanted, file.uri, parquet, None))
            return _list_uris(wanted, file.uri, parquet)
    except (OSError, pa.ArrowException, MemoryError, UnicodeDecodeError) as error:
        problem = f"the Parquet file cannot be read: {one_line(error)}"
    _logger.warning("%s: %s", file.uri, problem)
    listing = list_files([Listed(file.uri, file.size)])
    column = LISTING.get_field_index("problem")
    listing = listing.set_column(column, LISTING.field(column), pa.array([problem]))
    return _Rows(listing, pa.table({name: pa.nulls(1) for name in wanted.kept.values()}))


def _check_columns(wanted: _Wanted, uri: str, schema: pa.Schema) -> None:
    own = [name for name in wanted.kept if name not in wanted.partitions]
    for name in (wanted.column, *own):
        if schema.names.count(name) != 1:
            raise InputError(
                f"{uri} has no column {name}, which other Parquet files of {wanted.source} have: "
                "leave the file out with --exclude, or give a folder whose files have the same "
                "columns"
            )


def _list_cells(wanted: _Wanted, uri: str, version: str, metadata: pq.FileMetaData) -> pa.Table:
    """A listing of the images of a file.

    Raises:
        OSError: the footer claims what the file cannot hold.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    counts = np.array([_count(group, wanted.column) for group in groups], np.int64)
    total = int(counts.sum())
    begins = np.cumsum(counts) - counts
    rows = np.arange(total)
    values = {
        "uri": pa.array([cell_uri(uri, wanted.column, row) for row in range(total)], pa.string()),
        "container": _repeat(uri, total),
        "version": _repeat(version, total),
        "column": _repeat(wanted.column, total),
        "row_group": pa.array(np.repeat(np.arange(len(groups)), counts).astype(np.int32)),
        "position": pa.array(rows - np.repeat(begins, counts)),
    }
    columns = [values.get(field.name, pa.nulls(total, field.type)) for field in LISTING]
    return pa.table(columns, schema=LISTING)


def _repeat(value: str, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(value), count)


def _count(group: pq.RowGroupMetaData, column: str) -> int:
    """The rows of a row group.

    Raises:
        OSError: they are more than it can hold.
    """
    rows: int = group.num_rows
    for chunk in map(group.column, range(group.num_columns)):
        if chunk.path_in_schema in (column, f"{column}.bytes"):
            if rows < 0 or rows != chunk.num_values:
                raise OSError(f"its footer claims {rows} rows and {chunk.num_values} images")
            if rows > max(_PLAUSIBLE, chunk.total_compressed_size):
                size = chunk.total_compressed_size
                raise OSError(f"its footer claims {rows} images in {size} bytes")
            return rows
    raise OSError(f"the column {column} holds no bytes of images")


def cell_uri(container: str, column: str, row: int) -> str:
    """The URI of an image in a Parquet file: ``FILE#COLUMN=ROW``, with rows counted from 0."""
    return f"{container}#{_quote(column)}={row}"


def _quote(column: str) -> str:
    """A column's name with characters escaped that a URI gives a meaning to."""
    return re.sub(r"[%#=/?\s]", lambda match: urllib.parse.quote(match[0], safe=""), column)


def _list_uris(wanted: _Wanted, uri: str, parquet: pq.ParquetFile) -> _Rows:
    """The images that a file lists, from its own folder, without rows that name none."""
    values = parquet.read([wanted.column], use_threads=False)[wanted.column]
    if pa.types.is_primitive(values.type) or pa.types.is_nested(values.type):
        raise InputError(
            f"{uri}: the column {wanted.column} holds {values.type}, "
            "neither images nor the URIs of images"
        )
    uris = values.cast(pa.string()).to_pylist()
    given = [row for row, value in enumerate(uris) if value]
    if empty := len(uris) - len(given):
        _logger.warning("rows of %s without a URI, left out: %d", uri, empty)
    listing = list_files(Listed(resolve_uri(uri, uris[row]), None) for row in given)
    return _Rows(listing, _read_kept(wanted, uri, parquet, given))


def _read_kept(
    wanted: _Wanted, uri: str, parquet: pq.ParquetFile, rows: Sequence[int] | None
) -> pa.Table:
    """The kept columns of a file, for some rows or all, by their new names."""
    own = [name for name in wanted.kept if name not in wanted.partitions]
    table = without_views(parquet.read(own, use_threads=False)) if own else pa.table({})
    if own and rows is not None:
        table = table.take(pa.array(rows, pa.int64()))
    count = parquet.metadata.num_rows if rows is None else len(rows)
    folders = _partition(wanted.source, uri)
    return pa.table(
        {
            new: _constant(folders.get(old), count) if old in wanted.partitions else table[old]
            for old, new in wanted.kept.items()
        }
    )


def _constant(value: str | None, count: int) -> pa.Array:
    return pa.nulls(count, pa.string()) if value is None else _repeat(value, count)


def _partition(source: str, uri: str) -> dict[str, str | None]:
    """The names and values of the folders ``name=value`` between a source and a file."""
    below = uri.removeprefix(source.rstrip("/") + "/").split("/")[:-1]
    pairs = [folder.partition("=") for folder in below if "=" in folder]
    return {
        urllib.parse.unquote(name): None if value == _NO_VALUE else urllib.parse.unquote(value)
        for name, _, value in pairs
    }


def _join_kept(wanted: _Wanted, tables: Sequence[_Rows]) -> pa.Table:
    """The kept columns of all files, with a type for each.

    Raises:
        InputError: the files have a column with types that do not fit together.
    """
    try:
        kept = pa.concat_tables([rows.kept for rows in tables], promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(
            f"--keep: a column differs between the Parquet files of {wanted.source}: "
            f"{one_line(error)}; leave it out of --keep"
        ) from error
    for name in wanted.partitions:
        place = kept.column_names.index(wanted.kept[name])
        kept = kept.set_column(place, wanted.kept[name], _as_numbers(kept[wanted.kept[name]]))
    for place, field in enumerate(kept.schema):
        if pa.types.is_null(field.type):
            kept = kept.set_column(place, field.name, kept[field.name].cast(pa.string()))
    return kept


def _as_numbers(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values of folders as whole numbers, where all are written as such."""
    found = [value for value in values.unique().to_pylist() if value is not None]
    plain = all(re.fullmatch(r"0|-?[1-9]\d{0,17}", value) for value in found)
    return values.cast(pa.int64()) if found and plain else values


def _without_repeats(images: pa.Table, source: str) -> pa.Table:
    """A listing with each URI once: its first row."""
    first: dict[str, int] = {}
    for row, uri in enumerate(images["uri"].to_pylist()):
        first.setdefault(uri, row)
    if repeated := len(images) - len(first):
        _logger.warning("repeated URIs in %s, left out: %d", source, repeated)
        return images.take(pa.array(first.values(), pa.int64()))
    return images
