"""Where this machine keeps what can be computed again."""

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory(name: str) -> Path:
    """The directory of one of captioner's caches, below the user's cache directory.

    The directory may not exist yet.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "captioner" / name
