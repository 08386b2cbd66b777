"""Lists of images: files of text, CSV, TSV, JSON Lines or Parquet that name an image a row."""

import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.config import parse_json
from captioner.data.columns import Keep, infer_column, with_kept, without_views
from captioner.data.delimited import CsvTable, decode_text
from captioner.data.source import list_files
from captioner.errors import InputError, first_of, one_line
from captioner.storage import Listed

__all__ = ["is_list", "is_parquet", "read_list", "resolve_uri", "uri_column"]

_logger = logging.getLogger(__name__)

_SHOWN = 20  # names of columns in a message

#: Names, in lower case, of columns that hold the URIs of images in published tables.
_URI_NAMES = frozenset(
    """
    uri url image image_uri image_url image_path img img_url img_path file file_name filename
    file_path filepath path photo picture
    """.split()  # noqa: SIM905
)


def is_list(source: str) -> bool:
    """Whether a source is a list by its name."""
    return _kind(source) in _READERS


def is_parquet(source: str) -> bool:
    """Whether a source is a Parquet file by its name."""
    return _kind(source) == "parquet"


@dataclass(frozen=True)
class _Wanted:
    """What is wanted of a list: its column of URIs, if it is named, and the columns to keep."""

    column: str | None
    keep: Keep


@dataclass(frozen=True)
class _Rows:
    """The rows of a list: their URIs, None or empty where there is none, and the kept columns."""

    uris: Sequence[str | None]
    kept: pa.Table


def read_list(source: str, column: str | None = None, keep: Keep | None = None) -> pa.Table:
    """The images of a list, each once, in the list's order: :data:`captioner.schema.LISTING`.

    Args:
        source: a ``.txt`` file with a URI a line; or a ``.csv``, ``.tsv``, ``.jsonl``, ``.ndjson``
            or ``.parquet`` file with a column of URIs; all but the last may be compressed
            (``.csv.gz``). Relative paths start from the list's own folder.
        column: the column of URIs; by default ``uri``, else the only column, else the only one
            whose name is usual for URIs, as ``url``, ``image``, ``file_name`` and ``path`` are.
        keep: the columns that come along. Of a URI that is listed several times, the first row
            counts.

    Raises:
        InputError: the list cannot be read, is damaged, has no such column, or names no image or
            images outside of its bucket.
    """
    kind, wanted = _kind(source), _Wanted(column, keep or Keep(None))
    if kind == "txt" and column is not None:
        raise InputError(f"--column: {source} has no columns; remove --column")
    if kind == "txt":
        wanted.keep.refuse(source)
    rows = _READERS[kind](source, _read(source), wanted)
    first: dict[str, int] = {}  # the row of each URI
    for number, uri in enumerate(rows.uris):
        if uri:
            first.setdefault(resolve_uri(source, uri), number)
    given = sum(bool(uri) for uri in rows.uris)
    if empty := len(rows.uris) - given:
        _logger.warning("rows of %s without a URI, left out: %d", source, empty)
    if not first:
        raise InputError(f"{source} lists no images")
    if repeated := given - len(first):
        _logger.warning("repeated URIs in %s, left out: %d", source, repeated)
    listing = list_files(Listed(uri, None) for uri in first)
    return with_kept(listing, rows.kept.take(pa.array(first.values(), pa.int64())))


def _kind(source: str) -> str:
    """The list's ending, without the dot; empty for what is compressed and must not be."""
    name = source.lower().rsplit("/", 1)[-1]
    plain = name.removesuffix(".gz")
    kind = plain.rpartition(".")[2] if "." in plain else ""
    return "" if kind == "parquet" and plain != name else kind


def _read(source: str) -> bytes:
    try:
        data = storage.read(source)
        return gzip.decompress(data) if source.lower().endswith(".gz") else data
    except FileNotFoundError as error:
        raise InputError(f"{source} does not exist") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {source}: {one_line(error)}") from error


def _read_lines(source: str, data: bytes, wanted: _Wanted) -> _Rows:
    # splitlines() and strip() would take characters of a name, as U+2028, for white space.
    lines = (line.strip(" \t\r") for line in decode_text(source, data).split("\n"))
    return _rows([line for line in lines if line], {})


def _rows(uris: Sequence[str | None], kept: dict[str, pa.Array]) -> _Rows:
    return _Rows(uris, pa.table(kept) if kept else _no_columns(len(uris)))


def _no_columns(rows: int) -> pa.Table:
    """A table with rows, but without columns."""
    return pa.table({"": pa.nulls(rows)}).select([])


def _read_csv(source: str, data: bytes, wanted: _Wanted) -> _Rows:
    """Columns of text: an image called 0001 is not number 1."""
    return _text_columns(CsvTable(source, data), source, wanted)


def _read_tsv(source: str, data: bytes, wanted: _Wanted) -> _Rows:
    """As CSV, unless that is damaged: many programs write tabs without quoting anything."""
    try:
        return _text_columns(CsvTable(source, data, separator="\t"), source, wanted)
    except InputError as error:
        plain = CsvTable(source, data, separator="\t", is_quoted=False)
        try:
            return _text_columns(plain, source, wanted)
        except InputError:
            raise error from None


def _text_columns(table: CsvTable, source: str, wanted: _Wanted) -> _Rows:
    name = uri_column(table.columns, source, wanted.column, is_text=True)
    chosen = wanted.keep.choose(table.columns, source, name)
    place = table.columns.index(name)
    places = [table.columns.index(old) for old in chosen]
    uris: list[str] = []
    kept: list[list[str]] = [[] for _ in places]
    for row in table.rows(name):
        uris.append(row.fields[place])
        for values, each in zip(kept, places, strict=True):
            values.append(row.fields[each])
    columns = zip(chosen.values(), kept, strict=True)
    return _rows(uris, {new: pa.array(values, pa.string()) for new, values in columns})


def _read_json_lines(source: str, data: bytes, wanted: _Wanted) -> _Rows:
    rows: list[tuple[int, dict[str, object]]] = []
    for number, line in enumerate(decode_text(source, data).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except InputError as error:
            raise InputError(f"{source}, line {number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{source}, line {number}: not an object, as {{…}} is")
        rows.append((number, row))
    if not rows:
        return _rows([], {})
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    name = uri_column(names, source, wanted.column)
    uris = []
    for number, row in rows:
        uri = row.get(name)
        if not isinstance(uri, (str, type(None))):
            shown = json.dumps(uri)[:100]
            raise InputError(f"{source}, line {number}: {name} is {shown}, not text")
        uris.append(uri)

    def place_of(row: int) -> str:
        return f"line {rows[row][0]}"

    kept = {
        new: infer_column([row.get(old) for _, row in rows], place_of, f"{source}, {old}")
        for old, new in wanted.keep.choose(names, source, name).items()
    }
    return _rows(uris, kept)


def _read_parquet(source: str, data: bytes, wanted: _Wanted) -> _Rows:
    """The columns that are wanted, and nothing of the others, which may be many or large."""
    try:
        # Arrow's own threads may outlive Python's last moment, which aborts the process.
        file = pq.ParquetFile(io.BytesIO(data), pre_buffer=False)
        names = file.schema_arrow.names
        name = uri_column(names, source, wanted.column, is_text=True)
        chosen = wanted.keep.choose(names, source, name)
        table = without_views(file.read([name, *chosen], use_threads=False))
        values = table[name]
        if pa.types.is_primitive(values.type) or pa.types.is_nested(values.type):
            raise InputError(
                f"{source}: the column {name} holds {values.type}, "
                "neither images nor the URIs of images"
            )
        return _rows(
            values.cast(pa.string()).to_pylist(), {new: table[old] for old, new in chosen.items()}
        )
    except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        raise InputError(f"cannot read {source}: {one_line(error)}") from error


_READERS: dict[str, Callable[[str, bytes, _Wanted], _Rows]] = {
    "txt": _read_lines,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_json_lines,
    "ndjson": _read_json_lines,
    "parquet": _read_parquet,
}


def uri_column(
    names: Sequence[str], source: str, column: str | None, *, is_text: bool = False
) -> str:
    """The name of the column of URIs in a table with these columns."""
    shown = first_of(names, _SHOWN)
    if column is not None:
        if names.count(column) != 1:
            how_often = "no column" if column not in names else "several columns called"
            raise InputError(
                f"--column {column}: {source} has {how_often} {column}; its columns are {shown}"
            )
        return column
    if names.count("uri") == 1:
        return "uri"
    if len(names) == 1:
        if is_text:
            _check_only_column(names[0], source)
        return names[0]
    known = sorted({name for name in names if name.lower() in _URI_NAMES}, key=names.index)
    if len(known) == 1 and names.count(known[0]) > 1:
        raise InputError(f"{source} has several columns called {known[0]}: rename one")
    if len(known) == 1:
        return known[0]
    if known:
        raise InputError(
            f"{source}: each of the columns {' and '.join(known)} may be the column of URIs; "
            "choose one with --column"
        )
    raise InputError(
        f"{source} has no column with a usual name for URIs; its columns are {shown}. Name the "
        "column of URIs with --column; the first line of a CSV or TSV file must name the columns"
    )


def _check_only_column(name: str, source: str) -> None:
    """Refuses what is not the name of a column, but the first row or several names."""
    if ";" in name or "\t" in name:
        raise InputError(
            f"{source} must separate columns by commas, but its first line is {name!r}: convert "
            "the file, or rename a file with tabs to .tsv"
        )
    if "." in name or "/" in name or _is_file(resolve_uri(source, name)):
        raise InputError(
            f"{source} begins with an image, {name}, not with the name of the column: "
            "add uri as the first line, or rename the file to .txt"
        )


def _is_file(uri: str) -> bool:
    try:
        storage.read(uri, 0)
    except OSError:
        return False
    return True


def resolve_uri(source: str, uri: str) -> str:
    """The URI that a list means: a relative one starts from the list's own folder."""
    base = source[: source.rfind("/") + 1]
    if "://" not in base or storage.has_scheme(uri) or uri.startswith("/"):
        return storage.absolute(uri, base)
    scheme, place = base.split("://", 1)
    return f"{scheme}://{'/'.join(_resolved(place.split('/')[:-1], uri.split('/'), source))}"


def _resolved(folder: Sequence[str], path: Sequence[str], source: str) -> list[str]:
    """The parts of a path from a folder in a bucket, whose first part is the bucket."""
    parts, bucket = list(folder), len(folder[:1])
    for part in path:
        if part == "..":
            if len(parts) == bucket:
                raise InputError(f"{source} lists an image outside of the bucket: {'/'.join(path)}")
            parts.pop()
        elif part != ".":
            parts.append(part)
    return parts
