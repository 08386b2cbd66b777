"""Which images a source holds: a folder, or a table of URIs."""

import io
import logging
from collections import Counter
from collections.abc import Callable

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from captioner import storage
from captioner.config import ListingConfig
from captioner.errors import InputError, first_of, one_line
from captioner.storage import Listed

__all__ = ["list_source"]

_logger = logging.getLogger(__name__)


_TABLES = (".txt", ".csv", ".parquet")


_SHOWN = 5  # endings of files that are passed over


def list_source(source: str, listing: ListingConfig) -> list[Listed]:
    """The images of a source, each once.

    Args:
        source: a directory, listed recursively and sorted; or a ``.txt``, ``.csv`` or ``.parquet``
            file of URIs in the order to keep: a line each, or a column ``uri``, or the only column,
            below its name. Relative paths in it start from the file's own folder.
        listing: which files of a directory are images, and how many images to take at most.

    Raises:
        InputError: there is no such source, it holds no image, or it is a list that cannot be read,
            that has no such column, or that names what is outside of its bucket.
    """
    source = storage.as_path(source)
    try:
        is_list = source.lower().endswith(_TABLES) and not storage.is_directory(source)
    except OSError as error:
        raise InputError(f"cannot read {source}: {one_line(error)}") from error
    if is_list:
        images = _read_list(source)
        if not images:
            raise InputError(f"{source} lists no images")
    else:
        others: Counter[str] = Counter()
        images = storage.find(source, listing.endings, others)
        if not images:
            raise InputError(f"{source} holds no images ({listing.extensions})")
        if others:
            known = [f"{count} {ending or 'without one'}" for ending, count in others.most_common()]
            _logger.info("files of other endings passed over: %s", first_of(known, _SHOWN))
    return images[: listing.limit]


def _read_list(source: str) -> list[Listed]:
    try:
        data = storage.read(source)
    except FileNotFoundError as error:
        raise InputError(f"{source} does not exist") from error
    except OSError as error:
        raise InputError(f"cannot read {source}: {error}") from error
    try:
        if source.lower().endswith(".txt"):
            # splitlines() and strip() would take characters of a name, as U+2028, for white space.
            lines = data.decode("utf-8-sig").split("\n")
            uris: list[str | None] = [line.strip(" \t\r") for line in lines]
        else:
            read = _read_parquet if source.lower().endswith(".parquet") else _read_csv
            column = read(data, lambda names: _uri_column(names, source))
            if pa.types.is_primitive(column.type):
                raise InputError(f"the URIs in {source} are not text, but {column.type}")
            uris = column.cast(pa.string()).to_pylist()
            if empty := sum(not uri for uri in uris):
                _logger.warning("left out: %d rows of %s without a URI", empty, source)
    except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        raise InputError(f"cannot read {source}: {one_line(error)}") from error
    absolute = [_from(source, uri) for uri in uris if uri]
    listed = [Listed(uri, None) for uri in dict.fromkeys(absolute)]
    if len(listed) < len(absolute):
        again = len(absolute) - len(listed)
        _logger.warning("left out: %d URIs of %s that stand there before", again, source)
    return listed


def _read_csv(data: bytes, choose: Callable[[list[str]], str]) -> pa.ChunkedArray:
    """A column as text: an image called 0001 is not number 1."""
    name = choose(pa.csv.open_csv(io.BytesIO(data)).schema.names)
    table = pa.csv.read_csv(
        io.BytesIO(data),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types={name: pa.string()}, include_columns=[name]
        ),
    )
    return table[name]


def _read_parquet(data: bytes, choose: Callable[[list[str]], str]) -> pa.ChunkedArray:
    """A column, and nothing of the others, which may be many or large."""
    # Arrow's own threads may outlive Python's last moment, which aborts the process.
    file = pq.ParquetFile(io.BytesIO(data), pre_buffer=False)
    name = choose(file.schema_arrow.names)
    return file.read([name], use_threads=False)[name]


def _uri_column(names: list[str], source: str) -> str:
    """The name of the column of a list with these columns."""
    if names.count("uri") == 1:
        return "uri"
    if len(names) != 1:
        raise InputError(f"{source} must have one column uri, not {', '.join(names)}")
    [name] = names
    if ";" in name or "\t" in name:
        raise InputError(f"{source} must have commas between its columns, not {name!r}")
    if "." in name or "/" in name or _is_file(_from(source, name)):
        raise InputError(
            f"{source} begins with an image, {name}, and not with the column's name: "
            "let its first line be uri, or call the file .txt"
        )
    return name


def _is_file(uri: str) -> bool:
    try:
        storage.read(uri, 0)
    except OSError:
        return False
    return True


def _from(source: str, uri: str) -> str:
    """The URI that a list means: a relative one starts from the list's own folder."""
    base = source[: source.rfind("/") + 1]
    if "://" not in base or "://" in uri or uri.startswith("/"):
        return storage.readable(storage.absolute(uri, base))
    scheme, place = base.split("://", 1)
    parts = place.split("/")[:-1]
    bucket = len(parts[:1])
    for part in uri.split("/"):
        if part == "..":
            if len(parts) == bucket:
                raise InputError(f"{source} lists {uri}, which is outside of the bucket")
            parts.pop()
        elif part != ".":
            parts.append(part)
    return f"{scheme}://{'/'.join(parts)}"
