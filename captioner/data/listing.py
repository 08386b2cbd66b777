"""Which images a source holds: a folder, or a list of URIs."""

import io
import logging
from collections import Counter
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.config import ListingConfig
from captioner.data.delimited import CsvTable, decode_text
from captioner.errors import InputError, first_of, one_line
from captioner.storage import Listed

__all__ = ["list_source"]

_logger = logging.getLogger(__name__)

_LISTS = (".txt", ".csv", ".parquet")
_SHOWN = 5  # names in a message


def list_source(source: str, listing: ListingConfig) -> list[Listed]:
    """The images of a source, each once.

    Args:
        source: a folder, listed recursively and sorted; or a list, whose order is kept: a ``.txt``
            file with a URI a line, or a ``.csv`` or ``.parquet`` file with a column ``uri`` or only
            one column. Relative paths in a list start from its own folder.
        listing: which files of a folder are images, and how many images to take at most.

    Raises:
        InputError: there is no such source, it holds no image, or it is a list that is damaged,
            that has no such column, or that names images outside of its bucket.
    """
    source = storage.as_path(source)
    try:
        is_list = source.lower().endswith(_LISTS) and not storage.is_directory(source)
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
        raise InputError(f"cannot read {source}: {one_line(error)}") from error
    read = _READERS[source.lower().rsplit(".", 1)[-1]]
    uris = read(source, data)
    if empty := sum(not uri for uri in uris):
        _logger.warning("left out: %d rows of %s without a URI", empty, source)
    absolute = [_from(source, uri) for uri in uris if uri]
    listed = [Listed(uri, None) for uri in dict.fromkeys(absolute)]
    if repeated := len(absolute) - len(listed):
        _logger.warning("left out: %d URIs of %s that it lists already", repeated, source)
    return listed


def _read_lines(source: str, data: bytes) -> list[str]:
    # splitlines() and strip() would take characters of a name, as U+2028, for white space.
    lines = (line.strip(" \t\r") for line in decode_text(source, data).split("\n"))
    return [line for line in lines if line]


def _read_csv(source: str, data: bytes) -> list[str]:
    """A column as text: an image called 0001 is not number 1."""
    table = CsvTable(source, data)
    name = _uri_column(table.columns, source)
    place = table.columns.index(name)
    return [row.fields[place] for row in table.rows(name)]


def _read_parquet(source: str, data: bytes) -> list[str | None]:
    """A column, and nothing of the others, which may be many or large."""
    try:
        # Arrow's own threads may outlive Python's last moment, which aborts the process.
        file = pq.ParquetFile(io.BytesIO(data), pre_buffer=False)
        name = _uri_column(file.schema_arrow.names, source)
        column = file.read([name], use_threads=False)[name]
        if pa.types.is_primitive(column.type):
            raise InputError(f"{source}: the column {name} holds {column.type}, not text")
        return column.cast(pa.string()).to_pylist()  # type: ignore[no-any-return]
    except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        raise InputError(f"cannot read {source}: {one_line(error)}") from error


_READERS: dict[str, Callable[[str, bytes], Sequence[str | None]]] = {
    "txt": _read_lines,
    "csv": _read_csv,
    "parquet": _read_parquet,
}


def _uri_column(names: list[str], source: str) -> str:
    """The name of the column of a list with these columns."""
    if names.count("uri") == 1:
        return "uri"
    if len(names) != 1:
        raise InputError(
            f"{source} must have one column uri, not {', '.join(names)}: rename the column of URIs"
        )
    [name] = names
    if ";" in name or "\t" in name:
        raise InputError(f"{source} must have commas between its columns, not {name!r}")
    if "." in name or "/" in name or _is_file(_from(source, name)):
        raise InputError(
            f"{source} begins with an image, {name}, not with the name of the column: "
            "add uri as the first line, or rename the file to .txt"
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
