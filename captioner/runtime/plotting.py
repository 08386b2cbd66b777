"""Matplotlib: where it keeps its files."""

import os

from captioner import storage

__all__ = ["prepare_matplotlib"]


def prepare_matplotlib() -> None:
    """Lets matplotlib keep its files in captioner's cache; call it before the first import.

    Matplotlib's own place is in the home directory. Where that cannot be written to, matplotlib
    prints a notice.
    """
    os.environ.setdefault("MPLCONFIGDIR", str(storage.cache_directory("matplotlib")))
