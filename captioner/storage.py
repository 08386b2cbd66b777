"""Files by URI, through fsspec: list, read, write atomically.

A URI is a local path, a ``file://`` URI (percent-encoded, RFC 8089) or anything that fsspec has a
file system for (``s3://``, ``gs://``, ``abfs://``, ``memory://``). Credentials are the file
system's own business: they come from the environment, and are never part of a message.
"""

import errno
import fcntl
import os
import re
import secrets
import stat
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from captioner.errors import InputError, OutputError

__all__ = [
    "Listed",
    "absolute",
    "delete",
    "find",
    "is_directory",
    "join",
    "leftovers",
    "locked",
    "names",
    "open_binary",
    "read",
    "version",
    "write",
]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True, slots=True)
class Listed:
    """A file in a listing; ``size`` in bytes, None where the file system does not tell."""

    uri: str
    size: int | None


def _filesystem(uri: str) -> tuple[Any, str]:
    """The file system of a URI and the path in it."""
    if uri.startswith("file://"):
        return LocalFileSystem(), os.fsdecode(urllib.parse.unquote_to_bytes(uri[len("file://") :]))
    if not _SCHEME.match(uri):
        return LocalFileSystem(), uri
    scheme = uri.split("://")[0]
    try:
        # Not fsspec.url_to_fs: it would take an object's name with "::" in it for several URIs.
        kind = fsspec.get_filesystem_class(scheme)
        return kind(**kind._get_kwargs_from_urls(uri)), kind._strip_protocol(uri)
    except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
        raise InputError(f"cannot open {scheme}:// URIs: {error}") from error


def absolute(uri: str, base: str | None = None) -> str:
    """A local path made absolute, from ``base`` or the working directory; else the URI as it is."""
    return uri if _SCHEME.match(uri) else os.path.abspath(os.path.join(base or "", uri))


def join(directory: str, name: str) -> str:
    """The URI of ``name`` in ``directory``."""
    return f"{directory.rstrip('/')}/{name}"


def _readable(uri: str) -> str:
    """A local path that is valid UTF-8, or, where it is not, the file:// URI that says the same."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        return "file://" + urllib.parse.quote(os.fsencode(uri))
    return uri


def find(directory: str, endings: tuple[str, ...]) -> list[Listed]:
    """All files below a directory whose names end so (lower case, with the dot), sorted by URI.

    Raises:
        InputError: there is no such directory, or it cannot be listed.
    """
    fs, path = _filesystem(directory)
    try:
        if not fs.isdir(path):
            problem = "is not a directory" if fs.exists(path) else "does not exist"
            raise InputError(f"{directory} {problem}")
        if isinstance(fs, LocalFileSystem):
            listed = list(_find_local(path, endings))
        else:
            listed = [
                Listed(fs.unstrip_protocol(name), info.get("size"))
                for name, info in fs.find(path, detail=True).items()
                if info["type"] == "file" and name.lower().endswith(endings)
            ]
    except OSError as error:
        raise InputError(f"cannot list {directory}: {_reason(error)}") from error
    return sorted(listed, key=lambda each: each.uri)


def _find_local(directory: str, endings: tuple[str, ...]) -> Iterator[Listed]:
    """Links to files are listed, links to directories are not followed.

    Unlike fsspec's, this fails where a folder cannot be listed, and lists a link whose file is
    gone: an image that is lost is to be accounted for.
    """

    def fail(error: OSError) -> None:
        reason = _reason(error)
        raise InputError(f"cannot list {_readable(error.filename)}: {reason}") from error

    for folder, _, names_in_folder in os.walk(directory, onerror=fail):
        for name in names_in_folder:
            if not name.lower().endswith(endings):
                continue
            path = os.path.join(folder, name)
            try:
                status = os.stat(path)
            except OSError:
                yield Listed(_readable(path), None)
                continue
            if stat.S_ISREG(status.st_mode):
                yield Listed(_readable(path), status.st_size)


def read(uri: str, limit: int | None = None) -> bytes:
    """A file's bytes; with a limit, at most ``limit + 1`` of them, so that the caller sees more.

    Raises:
        OSError: it cannot be read.
    """
    fs, path = _filesystem(uri)
    try:
        with fs.open(path, "rb") as file:
            return file.read(-1 if limit is None else limit + 1)  # type: ignore[no-any-return]
    except ValueError as error:  # no file can be called so: there is a zero byte in the name
        raise OSError(str(error)) from error


def open_binary(uri: str) -> BinaryIO:
    """A file to read parts of.

    Raises:
        OSError: it cannot be opened.
    """
    fs, path = _filesystem(uri)
    return fs.open(path, "rb")  # type: ignore[no-any-return]


def is_directory(uri: str) -> bool:
    """Whether there is such a directory."""
    fs, path = _filesystem(uri)
    return bool(fs.isdir(path))


def version(uri: str) -> str:
    """What changes when a file does: its size, and its time or ETag; empty where it is gone."""
    fs, path = _filesystem(uri)
    try:
        info = fs.info(path)
    except OSError:
        return ""
    return f"{info.get('size')} {info.get('mtime') or info.get('ETag') or info.get('etag')}"


def names(directory: str) -> list[str]:
    """The names of what stands in a directory, sorted; empty where there is no such directory.

    Raises:
        OSError: it is not a directory, or cannot be listed.
    """
    fs, path = _filesystem(directory)
    try:
        if isinstance(fs, LocalFileSystem):
            return sorted(os.listdir(path))
        fs.invalidate_cache(path)
        entries = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)


def write(uri: str, data: bytes) -> None:
    """Writes a file that is either there in full or not at all.

    Locally: a temporary file in the same folder, named ``.NAME.tmp-…``, is flushed to the disk and
    renamed. In a bucket: one object, which appears when its upload is complete.

    Raises:
        OutputError: it cannot be written.
    """
    fs, path = _filesystem(uri)
    try:
        if isinstance(fs, LocalFileSystem):
            _write_local(path, data)
        else:
            fs.pipe_file(path, data)
    except OSError as error:
        raise OutputError(f"cannot write {uri}: {_reason(error)}") from error


def _write_local(path: str, data: bytes) -> None:
    directory, name = os.path.split(path)
    directory = directory or "."
    os.makedirs(directory, exist_ok=True)
    temporary = os.path.join(directory, f".{name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
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


def leftovers(directory: str) -> Iterator[str]:
    """Names of the temporary files that killed writers left in a directory."""
    for name in names(directory):
        if re.fullmatch(r"\..+\.tmp-[0-9a-f]{8}", name):
            yield name


def delete(uri: str) -> None:
    """Deletes a file, or a directory with all that is in it.

    Raises:
        OutputError: it cannot be deleted.
    """
    fs, path = _filesystem(uri)
    try:
        if fs.isfile(path):
            fs.rm_file(path)  # rm would take a name with brackets or a star in it for a pattern
        else:
            fs.rm(path, recursive=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"cannot delete {uri}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
