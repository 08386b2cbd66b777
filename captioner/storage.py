"""Files by URI, through fsspec: list, read, write atomically.

A URI is a local path, a ``file://`` URI (percent-encoded, RFC 8089) or anything that fsspec has a
file system for (``s3://``, ``gs://``, ``abfs://``, ``memory://``). Credentials are the file system's
own business: they come from the environment, and are never part of a message.
"""

import os
import re
import secrets
import urllib.parse
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from captioner.errors import InputError, OutputError

__all__ = ["Listed", "absolute", "delete", "exists", "find", "join", "names", "read", "write"]

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
    try:
        return fsspec.core.url_to_fs(uri)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
        scheme = uri.split("://")[0]
        raise InputError(f"cannot open {scheme}:// URIs: {error}") from error


def absolute(uri: str, base: str | None = None) -> str:
    """A local path made absolute, from ``base`` or the working directory; other URIs as they are."""
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


def find(directory: str, extensions: Collection[str]) -> list[Listed]:
    """All files below a directory with one of these extensions (lower case, no dot), sorted by URI.

    Raises:
        InputError: there is no such directory, or it cannot be listed.
    """
    fs, path = _filesystem(directory)
    endings = tuple(f".{extension}" for extension in extensions)
    try:
        if not fs.isdir(path):
            problem = "is not a directory" if fs.exists(path) else "does not exist"
            raise InputError(f"{directory} {problem}")
        entries = fs.find(path, detail=True)
    except OSError as error:
        raise InputError(f"cannot list {directory}: {_reason(error)}") from error
    local = isinstance(fs, LocalFileSystem)
    return sorted(
        (
            Listed(
                _readable(name) if local else fs.unstrip_protocol(name),
                info.get("size"),
            )
            for name, info in entries.items()
            if info["type"] == "file" and name.lower().endswith(endings)
        ),
        key=lambda listed: listed.uri,
    )


def read(uri: str, limit: int | None = None) -> bytes:
    """A file's bytes; with a limit, at most ``limit + 1`` of them, so that the caller sees more.

    Raises:
        OSError: it cannot be read.
    """
    fs, path = _filesystem(uri)
    with fs.open(path, "rb") as file:
        return file.read(-1 if limit is None else limit + 1)  # type: ignore[no-any-return]


def exists(uri: str) -> bool:
    """Whether there is a file or a directory."""
    fs, path = _filesystem(uri)
    return bool(fs.exists(path))


def names(directory: str) -> list[str]:
    """The names of what stands in a directory, sorted; empty where there is no such directory."""
    fs, path = _filesystem(directory)
    fs.invalidate_cache(path)
    try:
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
        fs.rm(path, recursive=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"cannot delete {uri}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
