"""List one level of a directory."""

import errno
import os
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from captioner.storage.retries import attempt
from captioner.storage.uris import from_operating_system

__all__ = ["is_directory", "names", "sizes"]


def is_directory(uri: str) -> bool:
    """Whether a directory exists.

    Raises:
        OSError: the file system cannot answer.
    """
    return attempt(uri, lambda fs, path: bool(fs.isdir(path)))


def names(directory: str) -> list[str]:
    """Lists the names in a directory, sorted; empty if it does not exist.

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
    """Lists the files in a directory with their sizes in bytes; empty if it does not exist.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        entries = attempt(directory, lambda fs, path: fs.ls(path, detail=True))
    except FileNotFoundError:
        return {}
    # A link to a file, as git-annex and DVC create for large files, has a third type.
    files = [entry for entry in entries if entry["type"] != "directory"]
    return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in files}
