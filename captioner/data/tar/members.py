"""The members of a tar file, found by one pass over its headers.

tarfile parses the headers, with GNU's and POSIX's long names. It is driven header by header: its
own iteration ends without a word where a header is damaged, and what follows would be lost.
Nothing is extracted, and no header is believed about how much memory to take.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, cast

from captioner import storage
from captioner.errors import one_line

__all__ = ["Damage", "Kind", "Member", "open_tar", "read_members"]

_LARGEST_HEADER = 1 << 20  # bytes: of a long name or of POSIX's records
_BLOCK = 512
_RECORD = 20 * _BLOCK  # bytes that end a file, at most, as tar pads it
_NEAR, _FAR = 1 << 22, 1 << 16  # bytes of a bucket's object that are read at once
_LARGE = 1 << 19  # bytes of a member over which the next read is a small one

Kind = Literal["file", "link", "sparse", "other"]


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar file.

    Attributes:
        name: as the header has it; bytes that are not UTF-8 are lone surrogates.
        kind: ``other`` is a folder, a device or the like.
        position: where its data begin, in bytes.
        size: of its data, in bytes.
    """

    name: str
    kind: Kind
    position: int
    size: int


@dataclass(frozen=True, slots=True)
class Damage:
    """Why the members from an offset on cannot be listed.

    ``is_certain`` is false where there may be no more of them.
    """

    position: int
    problem: str
    is_certain: bool = True


@dataclass
class _Open:
    """What TarInfo.fromtarfile needs of a TarFile, whose constructor would read a header."""

    fileobj: "_Bounded"
    offset: int = 0
    encoding: str = "utf-8"
    errors: str = "surrogateescape"
    pax_headers: dict[str, str] = field(default_factory=dict)


def read_members(file: BinaryIO, size: int) -> Iterator[Member | Damage]:
    """Yields the members of a tar file; last, where the rest cannot be listed, why.

    Args:
        file: the tar file, open to read.
        size: its size in bytes.

    Raises:
        OSError: the file cannot be read.
    """
    tar = _Open(_Bounded(file))
    last = ""
    while True:
        begin = tar.offset
        if begin > size:
            yield Damage(begin, f"it ends in the middle of {last or 'its first header'}")
            return
        file.seek(begin)
        try:
            info = tarfile.TarInfo.fromtarfile(tar)  # type: ignore[arg-type]
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            if size - begin > _RECORD and (problem := _data_after(file, begin, size)):
                yield Damage(begin, problem)
            return
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            yield Damage(begin, _NO_END, is_certain=False) if begin else Damage(0, "it is empty")
            return
        except (tarfile.TarError, ValueError, ArithmeticError, RecursionError) as error:
            after = f" after {last}" if last else ""
            yield Damage(begin, f"it is damaged{after}: {one_line(error)}")
            return
        position = info.offset_data
        if tar.offset <= begin or info.size < 0:
            yield Damage(begin, f"it is damaged: the size of {info.name} is negative")
            return
        last = info.name
        if position + (info.size if info.isreg() and not info.issparse() else 0) > size:
            yield Damage(begin, f"it ends in the middle of {last}")
            return
        yield Member(info.name, _kind(info), position, info.size)


_NO_END = "it has no end mark, and may be cut off"


def _kind(info: tarfile.TarInfo) -> Kind:
    if info.issparse():
        return "sparse"
    if info.isreg():
        return "file"
    return "link" if info.islnk() or info.issym() else "other"


def _data_after(file: BinaryIO, begin: int, size: int) -> str:
    """Says if there is more than padding behind the end mark, as in tar files that were joined."""
    file.seek(begin)
    if not file.read(_RECORD).strip(b"\0"):
        return ""
    return f"it goes on for {size - begin} bytes behind its end mark: it may be several in one"


class _Bounded:
    """A file whose reads are bounded: a header may claim to be as long as it likes."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, count: int) -> bytes:
        """Reads ``count`` bytes, or what is left.

        Raises:
            tarfile.HeaderError: a header is too long.
        """
        if count > _LARGEST_HEADER:
            raise tarfile.HeaderError(f"a header claims to have {count} bytes")
        return self._file.read(count)


def open_tar(uri: str, size: int) -> BinaryIO:
    """Opens a tar file to read its headers.

    Raises:
        OSError: it cannot be opened.
    """
    if storage.is_local(uri):
        return storage.open_binary(uri)
    return cast(BinaryIO, _Blocks(uri, size))


class _Blocks(storage.SeekableFile):
    """A bucket's object that is read in large blocks, or in small ones between large members."""

    def __init__(self, uri: str, size: int):
        super().__init__(size)
        self._uri = uri
        self._begin, self._block = 0, b""

    def read(self, count: int = -1) -> bytes:
        """Reads ``count`` bytes, or what is left.

        Raises:
            OSError: they cannot be read.
        """
        begin, end = self._position, min(self._position + count, self._size)
        if begin >= end:
            return b""
        if not self._begin <= begin or end > self._begin + len(self._block):
            far = begin - self._begin - len(self._block) > _LARGE
            length = max(_FAR if far else _NEAR, end - begin)
            self._begin = begin
            self._block = storage.read_range(self._uri, begin, min(begin + length, self._size))
        self._position = end
        return self._block[begin - self._begin : end - self._begin]
