"""Files by URI, through fsspec: list, read, write atomically.

A URI is a local path, a ``file://`` URI (percent-encoded, RFC 8089) or anything that fsspec has a
file system for (``s3://``, ``gs://``, ``abfs://``, ``memory://``). Credentials are the file
system's own business: they come from the environment, and are never part of a message. What a
bucket's client raises comes out as an OSError, after what may pass has been tried again.
"""

import asyncio
import errno
import fcntl
import io
import os
import random
import re
import secrets
import shutil
import stat
import tempfile
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from captioner.errors import CaptionerError, InputError, OutputError

__all__ = [
    "Listed",
    "Ranges",
    "absolute",
    "arrow_filesystem",
    "as_path",
    "cache_directory",
    "delete",
    "find",
    "is_directory",
    "is_local",
    "is_temporary",
    "join",
    "locked",
    "names",
    "open_binary",
    "read",
    "readable",
    "size",
    "sizes",
    "version",
    "write",
    "writing",
]

Result = TypeVar("Result")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# USER:PASSWORD@ before a host or a bucket. A secret may have a slash in it; an access point's ARN
# has colons, and what follows a port is an object's name.
_CREDENTIALS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+://)(?!arn:)[^/:@]*:(?!\d+/)[^@]*@")
# In a client's message, the query of a URL may hold a signature, and its authority a password.
_SECRETS = re.compile(r"(?<=://)(?:[^/\s@]*:[^\s@]*|[^/\s@]+)@|(?<=\S)\?[^\s\"'?]*=[^\s\"']*")

_EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "azure"),
}

_LEAST_READ = 1 << 16  # bytes
_RANGES = 16  # of an object asked for at a time

# What may pass when it is tried again.
_RETRIES = 2
_FIRST_WAIT = 0.2  # seconds, doubled each time
_TRANSIENT_STATUSES = {408, 429, 500, 502, 503, 504}
_TRANSIENT_NUMBERS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ESTALE,
}
# By name: none of these packages has to be there.
_TRANSIENT_NAMES = {
    "aiohttp.ClientConnectionError",
    "aiohttp.ClientPayloadError",
    "azure.IncompleteReadError",
    "azure.ServiceRequestError",
    "azure.ServiceResponseError",
    "botocore.HTTPClientError",
    "botocore.IncompleteReadError",
    "botocore.ResponseParserError",
    "google.TransportError",
    "requests.ConnectionError",
    "requests.Timeout",
}
_KINDS = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    TimeoutError,
)


class Listed(NamedTuple):
    """A file in a listing; ``size`` in bytes, None where the file system does not tell."""

    uri: str
    size: int | None


def _filesystem(uri: str) -> tuple[Any, str]:
    """The file system of a URI and the path in it."""
    if uri.startswith("file://"):
        return LocalFileSystem(), os.fsdecode(urllib.parse.unquote_to_bytes(uri[len("file://") :]))
    if not _SCHEME.match(uri):
        return LocalFileSystem(), uri
    _refuse_credentials(uri)
    scheme = uri.split("://")[0]
    try:
        # Not fsspec.url_to_fs: it would take an object's name with "::" in it for several URIs.
        kind = fsspec.get_filesystem_class(scheme)
        # What others write meanwhile is to be listed: no cache.
        settings = {**kind._get_kwargs_from_urls(uri), "use_listings_cache": False}
        if _EXTRAS.get(scheme) != "s3":
            return kind(**settings), kind._strip_protocol(uri)
        # botocore tries a request again, in its standard mode three times in all unless the
        # environment says otherwise, and so do we: s3fs, in between, would multiply the two.
        if not os.environ.keys() & {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"}:
            given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            settings["config_kwargs"] = {"retries": {"mode": "standard"}, **given}
        fs = kind(**settings)
        fs.retries = 1
        return fs, kind._strip_protocol(uri)
    except ImportError as error:
        hint = f"install captioner[{_EXTRAS[scheme]}]" if scheme in _EXTRAS else _reason(error)
        raise InputError(f"cannot open {scheme}:// URIs: {hint}") from error
    except Exception as error:  # no such protocol, or its client lacks an account's name
        raise InputError(f"cannot open {scheme}:// URIs: {_reason(error)}") from error


def _refuse_credentials(uri: str) -> None:
    if match := _CREDENTIALS.match(uri):
        redacted = f"{match[1]}…@{uri[match.end() :]}"
        raise InputError(f"{redacted} has credentials in it: give them by the environment")


def _attempt(uri: str, action: Callable[[Any, str], Result], *, retries: int = _RETRIES) -> Result:
    """``action(file system, path)``, again after a growing wait while what it raises may pass.

    Raises:
        InputError: there is no such file system.
        OSError: what the action raised last; a bucket's client's own errors, too.
    """
    fs, path = _filesystem(uri)
    attempt = 0
    while True:
        try:
            return action(fs, path)
        except CaptionerError:
            raise
        except Exception as error:
            if attempt >= retries or not _is_transient(error):
                if isinstance(fs, LocalFileSystem):
                    raise
                kind = next((kind for kind in _KINDS if isinstance(error, kind)), OSError)
                raise kind(_reason(error)) from error
        # Jitter, so that workers which failed together do not come back together.
        time.sleep(_FIRST_WAIT * 2**attempt * random.uniform(0.5, 1))  # noqa: S311
        attempt += 1


def _is_transient(error: Exception) -> bool:
    names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if isinstance(error, (ConnectionError, TimeoutError, asyncio.TimeoutError)):
        return True
    if names & _TRANSIENT_NAMES:
        return True
    if (status := _status(error)) is not None:
        return status in _TRANSIENT_STATUSES
    return isinstance(error, OSError) and error.errno in _TRANSIENT_NUMBERS


def _status(error: Exception) -> int | None:
    """The HTTP status that an error, or its cause, stands for."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        # botocore's, aiohttp's, Azure's and gcsfs's, in this order
        found = [metadata.get("HTTPStatusCode")]
        found += [getattr(each, name, None) for name in ("status", "status_code", "code")]
        for status in found:
            if isinstance(status, int):
                return status
    return None


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """The file system of a URI as pyarrow knows them, and the path in it."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = _filesystem(uri)
    return PyFileSystem(FSSpecHandler(fs)), path


def absolute(uri: str, base: str | None = None) -> str:
    """A local path made absolute, from ``base`` or the working directory; else the URI as it is.

    Raises:
        InputError: there are credentials in the URI, or the working directory is deleted.
    """
    _refuse_credentials(uri)
    if _SCHEME.match(uri):
        return uri
    try:
        return os.path.abspath(os.path.join(base or "", uri))
    except FileNotFoundError as error:
        raise InputError(f"{uri} starts from the working directory, which is deleted") from error


def as_path(uri: str) -> str:
    """The path that a ``file://`` URI stands for; anything else as it is."""
    return _filesystem(uri)[1] if uri.startswith("file://") else uri


def cache_directory(name: str) -> Path:
    """A directory of ours among what this user's programs keep to be quicker; it may not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "captioner" / name


def join(directory: str, name: str) -> str:
    """The URI of ``name`` in ``directory``."""
    return f"{directory.rstrip('/')}/{name}"


def readable(uri: str) -> str:
    """A local path that is valid UTF-8, or, where it is not, the file:// URI that says the same."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        return "file://" + urllib.parse.quote(os.fsencode(uri))
    return uri


def find(
    directory: str, endings: tuple[str, ...], others: Counter[str] | None = None
) -> list[Listed]:
    """All files below a directory whose names end so, sorted by URI.

    Args:
        directory: searched with all that is below it.
        endings: in lower case, with the dot.
        others: is told how many files have which other endings, hidden files not counted.

    Raises:
        InputError: there is no such directory, or it cannot be listed.
    """
    others = Counter() if others is None else others

    def is_wanted(name: str) -> bool:
        if name.lower().endswith(endings):
            return True
        name = name.rsplit("/", 1)[-1]
        if not name.startswith("."):
            others[os.path.splitext(name)[1].lower()] += 1
        return False

    def list_files(fs: Any, path: str) -> list[Listed]:
        others.clear()
        if isinstance(fs, LocalFileSystem):
            if not os.path.isdir(path):
                raise _no_directory(directory, exists=os.path.exists(path))
            return list(_find_local(path, is_wanted))
        found = fs.find(path, detail=True)
        if not found and not fs.isdir(path):
            raise _no_directory(directory, exists=False)
        if list(found) == [path.rstrip("/")]:
            raise _no_directory(directory, exists=True)
        # Not fsspec's unstrip_protocol: it would lose an account or a host that the URI names.
        scheme, place = directory.split("://", 1)
        begin, folder = f"{scheme}://{place.rstrip('/')}", path.rstrip("/")
        return [
            Listed(begin + name.removeprefix(folder), info.get("size"))
            for name, info in found.items()
            if info["type"] == "file" and is_wanted(name)
        ]

    try:
        return sorted(_attempt(directory, list_files), key=attrgetter("uri"))
    except OSError as error:
        raise InputError(f"cannot list {directory}: {_reason(error)}") from error


def _no_directory(directory: str, *, exists: bool) -> InputError:
    problem = "is one file, and no directory of images" if exists else "does not exist"
    return InputError(f"{directory} {problem}")


def _find_local(directory: str, is_wanted: Callable[[str], bool]) -> Iterator[Listed]:
    """Links to files are listed, links to directories are not followed.

    Unlike fsspec's, this fails where a folder cannot be listed, and lists a link whose file is
    gone: an image that is lost is to be accounted for.
    """

    def fail(error: OSError) -> None:
        reason = _reason(error)
        raise InputError(f"cannot list {readable(error.filename)}: {reason}") from error

    for folder, _, names_in_folder in os.walk(directory, onerror=fail):
        for name in names_in_folder:
            if not is_wanted(name):
                continue
            path = os.path.join(folder, name)
            try:
                status = os.stat(path)
            except OSError:
                yield Listed(readable(path), None)
                continue
            if stat.S_ISREG(status.st_mode):
                yield Listed(readable(path), status.st_size)


def read(uri: str, limit: int | None = None, *, retries: int = _RETRIES) -> bytes:
    """A file's bytes, all that the store said there are, in one request of a bucket.

    Args:
        uri: the file.
        limit: at most ``limit + 1`` bytes are read, so that the caller sees more.
        retries: how often an error that may pass is tried again.

    Raises:
        OSError: it cannot be read.
    """
    end = None if limit is None else limit + 1

    def read_bytes(fs: Any, path: str) -> bytes:
        if isinstance(fs, LocalFileSystem):
            try:
                with _open_local(path) as file:
                    return file.read() if end is None else _at_most(file, end)
            except ValueError as error:  # there is a zero byte in the name
                raise OSError(str(error)) from error
        try:
            # With a start, s3fs does not ask for the size first.
            return fs.cat_file(path, start=0, end=end)  # type: ignore[no-any-return]
        except Exception as error:
            if _status(error) == 416:  # an empty object has no byte 0
                return b""
            raise

    return _attempt(uri, read_bytes, retries=retries)


def _at_most(file: BinaryIO, count: int) -> bytes:
    """The first ``count`` bytes of a local file, or all; takes memory for as many as there are."""
    # To read(n), n bytes are allocated at once. One more than the file's size is the end of a file
    # that has not grown since; the least is for those whose size is not told (in /proc).
    at_once = max(os.fstat(file.fileno()).st_size + 1, _LEAST_READ)
    pieces = []
    while piece := file.read(min(at_once, count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def open_binary(uri: str, *, ranges: bool = False) -> BinaryIO:
    """A file to read parts of; a bucket's is read at once, or with ``ranges`` where it is asked.

    Raises:
        OSError: it cannot be opened.
    """
    fs, path = _filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return _open_local(path)
    return cast(BinaryIO, Ranges(uri)) if ranges else io.BytesIO(read(uri))


class Ranges(io.RawIOBase):
    """A bucket's object as a file: each read is a request for as much, tried again as others are.

    fsspec's own reads ahead, which is not wanted where the reader knows what it needs.
    """

    def __init__(self, uri: str):
        self._uri, self._position = uri, 0
        self._size: int = _attempt(uri, lambda fs, path: fs.info(path)["size"])
        self._fetched: list[tuple[int, bytes]] = []  # where they begin

    def fetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Asks for bytes that will be read, from begin to end, all spans at a time.

        Raises:
            OSError: they cannot be read.
        """
        self._fetched = []
        with ThreadPoolExecutor(_RANGES) as pool:
            pieces = list(pool.map(self._get, spans))
        self._fetched = [(begin, piece) for (begin, _), piece in zip(spans, pieces, strict=True)]

    def _get(self, span: tuple[int, int]) -> bytes:
        begin, end = span
        data: bytes = _attempt(self._uri, lambda fs, path: fs.cat_file(path, start=begin, end=end))
        if len(data) != end - begin:
            raise OSError(f"{len(data)} bytes came instead of {end - begin}")
        return data

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Asks for nothing."""
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = begin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """One request, where there is anything left that was not fetched."""
        begin, end = self._position, min(self._position + len(buffer), self._size)
        if begin >= end:
            return 0
        for start, piece in self._fetched:
            if start <= begin and end <= start + len(piece):
                buffer[: end - begin] = memoryview(piece)[begin - start : end - start]
                break
        else:
            buffer[: end - begin] = self._get((begin, end))
        self._position = end
        return end - begin


def _open_local(path: str) -> BinaryIO:
    """Opens a file to be read; a pipe or a device, which may never end, is not one."""
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is not a regular file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer


def is_local(uri: str) -> bool:
    """Whether it is on a file system of this machine, which has locks."""
    return isinstance(_filesystem(uri)[0], LocalFileSystem)


def is_directory(uri: str) -> bool:
    """Whether there is such a directory.

    Raises:
        OSError: that cannot be told.
    """
    return _attempt(uri, lambda fs, path: bool(fs.isdir(path)))


def version(uri: str) -> str:
    """What changes when a file does: its size, and its time or ETag; empty where it is gone."""
    try:
        info = _attempt(uri, lambda fs, path: fs.info(path))
    except OSError:
        return ""
    return f"{info.get('size')} {info.get('mtime') or info.get('ETag') or info.get('etag')}"


def size(uri: str) -> int | None:
    """A file's bytes; None where that cannot be told."""
    try:
        told: int | None = _attempt(uri, lambda fs, path: fs.info(path).get("size"))
    except OSError:
        return None
    return told


def names(directory: str) -> list[str]:
    """The names of what stands in a directory, sorted; empty where there is no such directory.

    Raises:
        OSError: it is not a directory, or cannot be listed.
    """

    def list_names(fs: Any, path: str) -> list[str]:
        if isinstance(fs, LocalFileSystem):
            return os.listdir(path)
        # Asked first: where nothing is, s3fs would list what is beside it. By its kind, since
        # another process may make the directory between the two questions.
        if not fs.isdir(path) and fs.info(path)["type"] == "file":
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), directory)
        entries = (entry.rstrip("/") for entry in fs.ls(path, detail=False))
        # Where a console made a folder there is an object of the folder's own name.
        return [entry.rsplit("/", 1)[-1] for entry in entries if entry != path.rstrip("/")]

    try:
        return sorted(_attempt(directory, list_names))
    except FileNotFoundError:
        return []


def sizes(directory: str) -> dict[str, int]:
    """The names of what is no folder in a directory, with its bytes; empty where there is no such.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        entries = _attempt(directory, lambda fs, path: fs.ls(path, detail=True))
    except FileNotFoundError:
        return {}
    # A link to a file, as git-annex and DVC make of large ones, is of a third type.
    files = [entry for entry in entries if entry["type"] != "directory"]
    return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in files}


def write(uri: str, data: bytes, *, new: bool = False) -> None:
    """Writes a file that is either there in full or not at all.

    Locally: a temporary file in the same folder, named ``.NAME.tmp-…``, is flushed to the disk and
    renamed. In a bucket: one object, which appears when its upload is complete.

    Args:
        uri: the file.
        data: what is to be in it.
        new: in a bucket, which has no locks, do not take the place of an object.

    Raises:
        FileExistsError: there is such an object, and it was to be new.
        OutputError: it cannot be written.
    """

    def write_bytes(fs: Any, path: str) -> None:
        if isinstance(fs, LocalFileSystem):
            _write_local(path, data)
        elif new:
            _create(fs, path, data)
        else:
            fs.pipe_file(path, data)

    try:
        _attempt(uri, write_bytes)
    except OSError as error:
        if new and isinstance(error, FileExistsError) and not is_local(uri):
            raise
        raise OutputError(f"cannot write {uri}: {_reason(error)}") from error


def _create(fs: Any, path: str, data: bytes) -> None:
    try:
        fs.pipe_file(path, data, mode="create")
    except Exception as error:
        if _status(error) in (409, 412):  # a condition that failed, or another writer's at work
            raise FileExistsError(path) from error
        if _status(error) != 501:
            raise
        fs.pipe_file(path, data)  # a store that knows no conditions


@contextmanager
def writing(uri: str) -> Iterator[BinaryIO]:
    """A file to write bit by bit: as with :func:`write`, it is there in full afterwards or not.

    What is meant for a bucket stands in a temporary file of this machine until it is complete.

    Raises:
        OutputError: it cannot be written.
    """
    fs, path = _filesystem(uri)
    try:
        if isinstance(fs, LocalFileSystem):
            with _replacing(path) as file:
                yield file
            return
        with tempfile.NamedTemporaryFile(prefix="captioner-") as spooled:
            yield cast(BinaryIO, spooled)
            spooled.flush()
            _attempt(uri, lambda fs, path: fs.put_file(spooled.name, path))
    except OSError as error:
        raise OutputError(f"cannot write {uri}: {_reason(error)}") from error


def _write_local(path: str, data: bytes) -> None:
    with _replacing(path) as file:
        file.write(data)


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """A new file under a temporary name, which takes the place of ``path`` when all went well."""
    directory, name = os.path.split(path)
    directory = directory or "."
    os.makedirs(directory, exist_ok=True)
    temporary = os.path.join(directory, f".{name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself survives a power cut
    except OSError as error:
        # Some file systems cannot do that for a directory; the file is in its place all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """While entered, no other process can enter with the same file; in a bucket any can.

    Raises:
        OutputError: another process has it, or it cannot be written.
    """
    fs, path = _filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        yield
        return
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "ab+", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        raise OutputError(f"cannot write {uri}: {_reason(error)}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().decode(errors="replace")
            raise OutputError(f"another job is at work: {uri} is locked by {holder}") from error
        except OSError as error:
            # Some network file systems know no locks.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise OutputError(f"cannot lock {uri}: {_reason(error)}") from error
        yield


def is_temporary(name: str) -> bool:
    """Whether a file of that name was being written, and is left where the writer was killed."""
    return re.fullmatch(r"\..+\.tmp-[0-9a-f]{8}", name) is not None


def delete(uri: str) -> None:
    """Deletes a file, or a directory with all that is in it.

    Raises:
        OutputError: it cannot be deleted.
    """

    def remove(fs: Any, path: str) -> None:
        if fs.info(path)["type"] != "directory":
            fs.rm_file(path)  # rm would take a name with brackets or a star in it for a pattern
        elif isinstance(fs, LocalFileSystem):
            shutil.rmtree(path)
        else:
            for file in fs.find(path):
                fs.rm_file(file)

    try:
        _attempt(uri, remove)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"cannot delete {uri}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line, without what may be a secret in it."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return _SECRETS.sub("…", text) or type(error).__name__
