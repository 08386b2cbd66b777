"""Files below a directory, found by the ends of their names."""

import glob
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem

from captioner.errors import InputError
from captioner.storage.client_errors import reason
from captioner.storage.retries import attempt
from captioner.storage.uris import from_operating_system, readable

__all__ = ["FolderError", "Listed", "PassedOver", "find"]

#: Returns the pattern that excludes a path below the directory, or None.
Exclude = Callable[[str], str | None]


class Listed(NamedTuple):
    """A file in a listing; ``size`` in bytes, None if the file system does not report it."""

    uri: str
    size: int | None


@dataclass
class PassedOver:
    """Files and folders below a directory that are not listed.

    Attributes:
        endings: the number of files with each other ending; hidden files are not counted.
        excluded: the number of files and folders that each pattern excludes; what is in an excluded
            folder is not counted.
        links: links to folders that are listed already, or that lead back to a folder above them.
    """

    endings: Counter[str] = field(default_factory=Counter)
    excluded: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Forgets everything."""
        self.endings.clear()
        self.excluded.clear()
        self.links.clear()


class FolderError(InputError):
    """A folder below a directory cannot be listed.

    Attributes:
        pattern: a pattern that excludes the folder.
    """

    def __init__(self, message: str, pattern: str):
        super().__init__(message)
        self.pattern = pattern


def find(
    directory: str,
    endings: tuple[str, ...],
    *,
    exclude: Exclude = lambda path: None,
    passed_over: PassedOver | None = None,
) -> list[Listed]:
    """Finds all files below a directory whose names have one of the endings, sorted by URI.

    Links to folders are followed, each folder once: see :class:`_Walk`.

    Args:
        directory: searched with all that is below it.
        endings: in lower case, with the dot.
        exclude: returns the pattern that excludes a path below the directory, or None. A folder is
            excluded with all that is in it.
        passed_over: filled with what is not listed.

    Raises:
        FolderError: a folder below the directory cannot be listed.
        InputError: the directory does not exist, or cannot be listed.
    """
    passed_over = PassedOver() if passed_over is None else passed_over

    def is_wanted(name: str) -> bool:
        if name.lower().endswith(endings):
            return True
        name = name.rsplit("/", 1)[-1]
        if not name.startswith("."):
            passed_over.endings[os.path.splitext(name)[1].lower()] += 1
        return False

    def list_files(fs: Any, path: str) -> list[Listed]:
        passed_over.clear()
        if isinstance(fs, LocalFileSystem):
            if not os.path.isdir(path):
                raise _no_directory(directory, exists=os.path.exists(path))
            found = _Walk(path, exclude, passed_over).paths()
            return [each for name in found if is_wanted(name) and (each := _listed(name))]
        return _find_in_bucket(fs, path, directory, is_wanted, _Objects(exclude, passed_over))

    try:
        return sorted(attempt(directory, list_files), key=attrgetter("uri"))
    except OSError as error:
        raise InputError(f"cannot list {directory}: {reason(error)}") from error


def _no_directory(directory: str, *, exists: bool) -> InputError:
    problem = "is a file, not a directory of images" if exists else "does not exist"
    return InputError(f"{directory} {problem}")


def _listed(path: str) -> Listed | None:
    """Lists a local file, or a broken link, which must not go unreported.

    Returns None for a pipe, a socket or a device.
    """
    try:
        status = os.stat(path)
    except OSError:
        return Listed(_uri(path), None)
    return Listed(_uri(path), status.st_size) if stat.S_ISREG(status.st_mode) else None


def _uri(path: str) -> str:
    return readable(from_operating_system(path))


class _Walk:
    """The files below a local directory, with those in folders that links lead to.

    Links to folders are followed after everything else, in the order of their names. A folder that
    is listed already is passed over, and so is a link that leads to a folder above itself.
    """

    def __init__(self, directory: str, exclude: Exclude, passed_over: PassedOver):
        self._directory, self._begin = directory, os.path.join(directory, "")
        self._exclude, self._passed_over = exclude, passed_over
        self._visited: set[tuple[int, int]] = set()
        self._links: list[str] = []

    def paths(self) -> Iterator[str]:
        """Yields the paths of everything but folders."""
        yield from self._below(self._directory, is_linked=False)
        while self._links:
            links, self._links = sorted(self._links), []
            for link in links:
                if self._is_visited(link) or _leads_back(link):
                    self._passed_over.links.append(_uri(link))
                else:
                    yield from self._below(link, is_linked=True)

    def _below(self, top: str, *, is_linked: bool) -> Iterator[str]:
        for folder, folders, names in os.walk(top, onerror=self._fail):
            if identity := _identity(folder):
                self._visited.add(identity)
            kept = []
            for name in folders:
                path = os.path.join(folder, name)
                if self._is_excluded(path):
                    continue
                if os.path.islink(path):
                    self._links.append(path)
                elif is_linked and self._is_visited(path):
                    self._passed_over.links.append(_uri(path))
                else:
                    kept.append(name)
            folders[:] = kept
            for name in names:
                path = os.path.join(folder, name)
                if not self._is_excluded(path):
                    yield path

    def _is_excluded(self, path: str) -> bool:
        pattern = self._exclude(self._relative(path))
        if pattern is not None:
            self._passed_over.excluded[pattern] += 1
        return pattern is not None

    def _relative(self, path: str) -> str:
        return from_operating_system(path.removeprefix(self._begin))

    def _is_visited(self, path: str) -> bool:
        return _identity(path) in self._visited

    def _fail(self, error: OSError) -> None:
        path = str(error.filename)
        message = f"cannot list {_uri(path)}: {reason(error)}"
        if path == self._directory:
            raise InputError(message) from error
        pattern = glob.escape(self._relative(path))
        raise FolderError(message, pattern) from error


def _identity(path: str) -> tuple[int, int] | None:
    """Identifies a folder independently of its path; None if it cannot be examined."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino)


def _leads_back(link: str) -> bool:
    """Whether a link leads to a folder that contains it."""
    target = os.path.join(os.path.realpath(link), "")
    return os.path.join(os.path.realpath(os.path.dirname(link)), "").startswith(target)


class _Objects:
    """Which objects of a bucket an exclusion leaves, by the folders in their names."""

    def __init__(self, exclude: Exclude, passed_over: PassedOver):
        self._exclude, self._passed_over = exclude, passed_over
        self._folders: dict[str, bool] = {"": False}

    def is_excluded(self, path: str) -> bool:
        """Whether an object, or a folder that it is in, is excluded; counts each once."""
        folder = path.rpartition("/")[0]
        return self._is_folder_excluded(folder) or self._matches(path)

    def _is_folder_excluded(self, folder: str) -> bool:
        if folder not in self._folders:
            above = self._is_folder_excluded(folder.rpartition("/")[0])
            self._folders[folder] = above or self._matches(folder)
        return self._folders[folder]

    def _matches(self, path: str) -> bool:
        pattern = self._exclude(path)
        if pattern is not None:
            self._passed_over.excluded[pattern] += 1
        return pattern is not None


def _find_in_bucket(
    fs: Any, path: str, directory: str, is_wanted: Callable[[str], bool], objects: _Objects
) -> list[Listed]:
    found = fs.find(path, detail=True)
    if not found and not fs.isdir(path):
        raise _no_directory(directory, exists=False)
    if list(found) == [path.rstrip("/")]:
        raise _no_directory(directory, exists=True)
    # Not fsspec's unstrip_protocol: it would lose an account or a host that the URI names.
    scheme, place = directory.split("://", 1)
    begin, folder = f"{scheme}://{place.rstrip('/')}", path.rstrip("/")
    listed = []
    for name, info in found.items():
        below = name.removeprefix(folder)
        if info["type"] != "file" or objects.is_excluded(below.lstrip("/")):
            continue
        if is_wanted(name):
            listed.append(Listed(begin + below, info.get("size")))
    return listed
