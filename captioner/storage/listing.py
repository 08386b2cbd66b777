"""List directories: recursively by file name extension, or one level."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem

from captioner.errors import InputError
from captioner.storage.client_errors import reason
from captioner.storage.retries import attempt
from captioner.storage.uris import from_operating_system, readable

__all__ = ["Listed", "find", "is_directory", "names", "sizes"]


class Listed(NamedTuple):
    """A file in a listing; ``size`` in bytes, None where the file system does not tell."""

    uri: str
    size: int | None


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
        return sorted(attempt(directory, list_files), key=attrgetter("uri"))
    except OSError as error:
        raise InputError(f"cannot list {directory}: {reason(error)}") from error


def _no_directory(directory: str, *, exists: bool) -> InputError:
    problem = "is one file, and no directory of images" if exists else "does not exist"
    return InputError(f"{directory} {problem}")


def _find_local(directory: str, is_wanted: Callable[[str], bool]) -> Iterator[Listed]:
    """Links to files are listed, links to directories are not followed.

    Unlike fsspec's, this fails where a folder cannot be listed, and lists a link whose file is
    gone: an image that is lost is to be accounted for.
    """

    def fail(error: OSError) -> None:
        why = reason(error)
        folder = readable(from_operating_system(error.filename))
        raise InputError(f"cannot list {folder}: {why}") from error

    for folder, _, names_in_folder in os.walk(directory, onerror=fail):
        for name in names_in_folder:
            if not is_wanted(name):
                continue
            path = os.path.join(folder, name)
            uri = readable(from_operating_system(path))
            try:
                status = os.stat(path)
            except OSError:
                yield Listed(uri, None)
                continue
            if stat.S_ISREG(status.st_mode):
                yield Listed(uri, status.st_size)


def is_directory(uri: str) -> bool:
    """Whether there is such a directory.

    Raises:
        OSError: that cannot be told.
    """
    return attempt(uri, lambda fs, path: bool(fs.isdir(path)))


def names(directory: str) -> list[str]:
    """The names of what stands in a directory, sorted; empty where there is no such directory.

    Raises:
        OSError: it is not a directory, or cannot be listed.
    """

    def list_names(fs: Any, path: str) -> list[str]:
        if isinstance(fs, LocalFileSystem):
            return [from_operating_system(name) for name in os.listdir(path)]
        # Asked first: where nothing is, s3fs would list what is beside it. By its kind, since
        # another process may make the directory between the two questions.
        if not fs.isdir(path) and fs.info(path)["type"] == "file":
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), directory)
        entries = (entry.rstrip("/") for entry in fs.ls(path, detail=False))
        # Where a console made a folder there is an object of the folder's own name.
        return [entry.rsplit("/", 1)[-1] for entry in entries if entry != path.rstrip("/")]

    try:
        return sorted(attempt(directory, list_names))
    except FileNotFoundError:
        return []


def sizes(directory: str) -> dict[str, int]:
    """The names of what is no folder in a directory, with its bytes; empty where there is no such.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        entries = attempt(directory, lambda fs, path: fs.ls(path, detail=True))
    except FileNotFoundError:
        return {}
    # A link to a file, as git-annex and DVC make of large ones, is of a third type.
    files = [entry for entry in entries if entry["type"] != "directory"]
    return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in files}
