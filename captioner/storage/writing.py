"""Write files atomically, and delete them."""

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from fsspec.implementations.local import LocalFileSystem

from captioner.errors import OutputError
from captioner.storage.client_errors import http_status, reason
from captioner.storage.filesystems import filesystem, is_local
from captioner.storage.retries import attempt

__all__ = ["check_target", "delete", "is_temporary", "write", "writing"]

_LONGEST_NAME = 200  # bytes, of the 255 that file systems take


def write(uri: str, data: bytes, *, new: bool = False) -> None:
    """Writes a file atomically.

    Locally: a temporary file in the same folder, named ``.NAME.tmp-…``, is flushed to the disk and
    renamed. In a bucket: one object, which appears when its upload is complete.

    Args:
        uri: the file.
        data: its content.
        new: in a bucket, which has no locks, do not replace an object.

    Raises:
        FileExistsError: the object exists, and ``new`` is set.
        OutputError: the file cannot be written.
    """

    def write_bytes(fs: Any, path: str) -> None:
        if isinstance(fs, LocalFileSystem):
            with _replacing(path) as file:
                file.write(data)
        elif new:
            _create(fs, path, data)
        else:
            fs.pipe_file(path, data)

    try:
        attempt(uri, write_bytes)
    except OSError as error:
        if new and isinstance(error, FileExistsError) and not is_local(uri):
            raise
        raise OutputError(f"cannot write {uri}: {reason(error)}") from error


def _create(fs: Any, path: str, data: bytes) -> None:
    try:
        fs.pipe_file(path, data, mode="create")
    except Exception as error:
        if http_status(error) in (409, 412):  # a failed condition, or another writer at work
            raise FileExistsError(path) from error
        if http_status(error) != 501:
            raise
        fs.pipe_file(path, data)  # a store without conditional requests


@contextmanager
def writing(uri: str) -> Iterator[BinaryIO]:
    """Opens a file to write piece by piece, atomically as with :func:`write`.

    A bucket's object is kept in a temporary file of this machine until it is complete.

    Raises:
        OutputError: the file cannot be written.
    """
    fs, path = filesystem(uri)
    try:
        if isinstance(fs, LocalFileSystem):
            with _replacing(path) as file:
                yield file
            return
        with tempfile.NamedTemporaryFile(prefix="captioner-") as spooled:
            yield cast(BinaryIO, spooled)
            spooled.flush()
            attempt(uri, lambda fs, path: fs.put_file(spooled.name, path))
    except OSError as error:
        raise OutputError(f"cannot write {uri}: {reason(error)}") from error


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """A new file under a temporary name, which replaces ``path`` when the block succeeds."""
    directory, name = os.path.split(path)
    directory = directory or "."
    os.makedirs(directory, exist_ok=True)
    temporary = os.path.join(directory, f".{_shortened(name)}.tmp-{secrets.token_hex(4)}")
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
    _flush_directory(directory)


def _shortened(name: str) -> str:
    """The start of a file's name, short enough for what a temporary file's name adds."""
    return os.fsdecode(os.fsencode(name)[:_LONGEST_NAME])


def _flush_directory(directory: str) -> None:
    """Makes a rename survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a directory; the file is in its place anyway.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def check_target(uri: str) -> None:
    """Refuses a local file that cannot be written, before work whose result it is to hold.

    Raises:
        OutputError: it is a folder, or its folder cannot be made or written.
    """
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        return
    if os.path.isdir(path):
        raise OutputError(f"cannot write {uri}: it is a folder; name a file")
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise OutputError(f"cannot write {uri}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {uri}: no permission to write to {folder}")


def is_temporary(name: str) -> bool:
    """Whether a file name is that of a temporary file, which a killed writer leaves behind."""
    return re.fullmatch(r"\..+\.tmp-[0-9a-f]{8}", name) is not None


def delete(uri: str) -> None:
    """Deletes a file, or a directory with its content, if it exists.

    Raises:
        OutputError: it cannot be deleted.
    """

    def remove(fs: Any, path: str) -> None:
        if fs.info(path)["type"] != "directory":
            fs.rm_file(path)  # rm would take a name with brackets or a star for a pattern
        elif isinstance(fs, LocalFileSystem):
            shutil.rmtree(path)
        else:
            for file in fs.find(path):
                fs.rm_file(file)

    try:
        attempt(uri, remove)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"cannot delete {uri}: {reason(error)}") from error
