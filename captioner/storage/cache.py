"""Where this machine keeps what it can compute or fetch again: features and models.

A cache is a folder of files. Report the use of a file with :func:`mark_used`:
:func:`trim` deletes the files first that were not used for the longest time.
"""

import functools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from captioner.errors import OutputError

__all__ = [
    "CACHES",
    "Cache",
    "cache_directory",
    "clear_cache",
    "inspect_cache",
    "mark_used",
    "trim",
]

#: The names of captioner's caches.
CACHES = ("features", "compiled", "models")


@dataclass(frozen=True)
class Cache:
    """What a cache holds.

    Attributes:
        name: one of :data:`CACHES`.
        path: its directory, which may not exist.
        files: how many files there are.
        size: their sizes in bytes, summed.
    """

    name: str
    path: Path
    files: int
    size: int


def inspect_cache(name: str) -> Cache:
    """Counts the files of a cache."""
    path = cache_directory(name)
    sizes = [status.st_size for _, status in _files(path)]
    return Cache(name, path, len(sizes), sum(sizes))


def clear_cache(name: str) -> Cache:
    """Deletes a cache's directory, and returns what it held.

    Raises:
        OutputError: it cannot be deleted.
    """
    cache = inspect_cache(name)
    try:
        shutil.rmtree(cache.path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OutputError(f"cannot delete {cache.path}: {error.strerror or error}") from error
    return cache


def mark_used(path: Path) -> None:
    """Records that a file of a cache is used now; its time of change stays."""
    with suppress(OSError):  # another process may have deleted it; another user may own it
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def trim(directory: Path, most: int, keep: Collection[Path]) -> None:
    """Deletes the least recently used files of a cache until it takes at most ``most`` bytes.

    Args:
        directory: the cache's.
        most: bytes; a negative number deletes all files but those to keep.
        keep: files that are not deleted; they count.
    """
    kept = set(keep)
    files = sorted(_files(directory), key=lambda file: file[1].st_atime_ns)
    size = sum(status.st_size for _, status in files)
    for path, status in files:
        if size <= most:
            return
        if path not in kept:
            with suppress(OSError):
                path.unlink()
                size -= status.st_size


def _files(directory: Path) -> list[tuple[Path, os.stat_result]]:
    """The files below a directory; those that disappear meanwhile are left out."""
    found = []
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                found.append((path, path.lstat()))
    return found


def cache_directory(name: str) -> Path:
    """The directory of one of captioner's caches, below the user's cache directory.

    Where the user has no home directory, as in a container with a user id without a name, or may
    not write to it, the caches are in a private folder of the directory for temporary files. The
    cache's directory may not exist yet.
    """
    return _base() / "captioner" / name


def _base() -> Path:
    if given := os.environ.get("XDG_CACHE_HOME"):
        base = Path(given)
    else:
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # neither HOME nor an entry in the table of users
            return _temporary_base(tempfile.gettempdir())
    return base if _is_writable(base) else _temporary_base(tempfile.gettempdir())


def _is_writable(directory: Path) -> bool:
    """Whether a directory, or the nearest one above it that exists, can be written to."""
    existing = next(each for each in (directory, *directory.absolute().parents) if each.exists())
    return os.access(existing, os.W_OK | os.X_OK)


@functools.lru_cache(maxsize=8)
def _temporary_base(temporary: str) -> Path:
    """A folder that belongs to this user alone: others could put files into a shared one."""
    base = Path(temporary, f"captioner-cache-{os.getuid()}")
    base.mkdir(mode=0o700, exist_ok=True)
    status = base.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
        return base
    return Path(tempfile.mkdtemp(prefix="captioner-cache-"))
