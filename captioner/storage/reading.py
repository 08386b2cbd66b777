"""Read files: whole, the first bytes, or ranges; their sizes and versions."""

import io
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, cast

from fsspec.implementations.local import LocalFileSystem

from captioner.storage.client_errors import http_status
from captioner.storage.filesystems import filesystem
from captioner.storage.retries import RETRIES, attempt

__all__ = ["Ranges", "identify", "open_binary", "read", "read_range", "size", "version"]

_SMALLEST_READ = 1 << 16  # bytes
_REQUESTS = 16  # ranges of an object requested at a time


def read(uri: str, limit: int | None = None, *, retries: int = RETRIES) -> bytes:
    """A file's bytes, complete by the size that the store reports; one request to a bucket.

    Args:
        uri: the file.
        limit: at most ``limit + 1`` bytes are read, which shows the caller that the file is longer.
        retries: how often a transient error is retried.

    Raises:
        StorageError: the whole store cannot be used.
        OSError: the file cannot be read.
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
            if http_status(error) == 416:  # an empty object has no byte 0
                return b""
            raise

    return attempt(uri, read_bytes, retries=retries)


def _at_most(file: BinaryIO, count: int) -> bytes:
    """The first ``count`` bytes of a local file, or all; takes memory for as many as there are."""
    # read(n) allocates n bytes at once. One byte more than the file's size reaches the end of a
    # file that does not grow; the smallest read is for files that report no size (in /proc).
    at_once = max(os.fstat(file.fileno()).st_size + 1, _SMALLEST_READ)
    pieces = []
    while piece := file.read(min(at_once, count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def read_range(uri: str, begin: int, end: int, *, retries: int = RETRIES) -> bytes:
    """The bytes of a file from ``begin`` up to ``end``, complete; one request to a bucket.

    Raises:
        StorageError: the whole store cannot be used.
        OSError: the file cannot be read, or ends before ``end``.
    """

    def read_bytes(fs: Any, path: str) -> bytes:
        if not isinstance(fs, LocalFileSystem):
            return fs.cat_file(path, start=begin, end=end)  # type: ignore[no-any-return]
        with _open_local(path) as file:
            file.seek(begin)
            return _at_most(file, end - begin)

    data = attempt(uri, read_bytes, retries=retries) if end > begin else b""
    if len(data) != end - begin:
        raise OSError(f"{len(data)} bytes came instead of {end - begin}")
    return data


def open_binary(uri: str, *, ranges: bool = False) -> BinaryIO:
    """A file to read parts of.

    A bucket's object is read at once, or, with ``ranges``, where the caller reads.

    Raises:
        OSError: it cannot be opened.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return _open_local(path)
    return cast(BinaryIO, Ranges(uri)) if ranges else io.BytesIO(read(uri))


class SeekableFile(io.RawIOBase):
    """A file of a known size with a position; what reads it is left to its kinds."""

    def __init__(self, size: int):
        super().__init__()
        self._size, self._position = size, 0

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the position; reads nothing."""
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if begin + offset < 0:
            raise ValueError(f"cannot seek to {begin + offset}")
        self._position = begin + offset
        return self._position


class Ranges(SeekableFile):
    """A bucket's object as a file: each read is one request for that range, retried as others are.

    fsspec's own file reads ahead, which wastes requests where the reader knows what it needs.
    """

    def __init__(self, uri: str):
        size: int | None = attempt(uri, lambda fs, path: fs.info(path)["size"])
        if size is None:
            raise OSError(f"the server does not tell the size of {uri}")
        super().__init__(size)
        self._uri = uri
        self._fetched: list[tuple[int, bytes]] = []  # each with its first position

    def fetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Requests bytes that will be read, as ``(begin, end)``, all spans at a time.

        Raises:
            OSError: they cannot be read.
        """
        self._fetched = []
        with ThreadPoolExecutor(_REQUESTS) as pool:
            pieces = list(pool.map(self._get, spans))
        self._fetched = [(begin, piece) for (begin, _), piece in zip(spans, pieces, strict=True)]

    def _get(self, span: tuple[int, int]) -> bytes:
        return read_range(self._uri, *span)

    def readinto(self, buffer: Any) -> int:
        """Makes one request, unless the bytes are fetched already or the file is at its end."""
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
    """Opens a regular file; refuses a pipe or a device, which may never end."""
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is not a regular file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer


def version(uri: str) -> str:
    """A file's size and modification time, ETag or hash, as text; empty if it does not exist."""
    try:
        return identify(uri)[1]
    except OSError:
        return ""


def identify(uri: str, *, retries: int = RETRIES) -> tuple[int | None, str]:
    """A file's size in bytes, None if it is unknown, and its version as :func:`version` has it.

    Raises:
        StorageError: the whole store cannot be used.
        OSError: the file does not exist, or the store does not answer.
    """
    info = attempt(uri, lambda fs, path: fs.info(path), retries=retries)
    marks = (info.get(name) for name in ("mtime", "ETag", "etag", "blob_id"))
    return info.get("size"), f"{info.get('size')} {next(filter(None, marks), None)}"


def size(uri: str) -> int | None:
    """A file's size in bytes; None if it is unknown."""
    try:
        reported: int | None = attempt(uri, lambda fs, path: fs.info(path).get("size"))
    except OSError:
        return None
    return reported
