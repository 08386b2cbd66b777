"""Where this machine keeps what can be computed again."""

import functools
import os
import stat
import tempfile
from pathlib import Path

__all__ = ["cache_directory"]


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
