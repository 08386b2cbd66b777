"""Which image a name in a table means: by its path, or by the end of a path."""

import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from captioner import storage

__all__ = ["ImageIndex", "by_ending"]


class ImageIndex:
    """The files of a directory, looked up by the names that a table gives them."""

    def __init__(self, directory: str, files: Sequence[str]):
        """Prepares the look-up.

        Args:
            directory: the URI of the directory that the names start from.
            files: the URIs of all files below it.
        """
        self._directory = _parts(storage.as_path(directory))
        self._by_path = {"/".join(self._relative(uri)): uri for uri in files}
        self._by_ending = by_ending(files)
        self._by_rough_name: dict[str, str] = {}

    def find(self, name: str) -> list[str]:
        r"""The URIs of the files that a name may mean: none, the one, or several.

        A path from the directory comes first, then the end of a path. Where neither is found as it
        is written, the same is tried without white space around it, with ``/`` for ``\\``, without
        ``.`` and ``..``, and from the root. A name never leads out of the directory.
        """
        if name in self._by_path:
            return [self._by_path[name]]
        found = self._by_ending(name)
        if not found and (path := self._as_path(name)) != name:
            found = [self._by_path[path]] if path in self._by_path else self._by_ending(path)
        return found

    def similar(self, name: str) -> str | None:
        """A file's path that differs from a name in its ending or in upper and lower case alone."""
        if not self._by_rough_name:
            for path in self._by_path:
                self._by_rough_name.setdefault(_rough(path), path)
                self._by_rough_name.setdefault(_rough(path.rsplit("/", 1)[-1]), path)
        return self._by_rough_name.get(_rough(name))

    def _as_path(self, name: str) -> str:
        """A name's path from the directory; empty where it leads out of it."""
        name = storage.as_path(name.strip().replace("\\", "/"))
        parts = _parts(posixpath.normpath(name.split("://", 1)[-1]))
        if not (name.startswith("/") or "://" in name):
            return "" if ".." in parts else "/".join(parts)
        depth = len(self._directory)
        return "/".join(parts[depth:]) if parts[:depth] == self._directory else ""

    def _relative(self, uri: str) -> list[str]:
        return _parts(storage.as_path(uri))[len(self._directory) :]


def by_ending(uris: Iterable[str]) -> Callable[[str], list[str]]:
    """Looks up the URIs that end in a name: in all of its parts, not only in the last.

    Letters with accents count as the same in both of Unicode's spellings.
    """
    by_name = defaultdict(list)
    for uri in uris:
        by_name[_composed(uri.rsplit("/", 1)[-1])].append(uri)

    def find(name: str) -> list[str]:
        name = _composed(name)
        same = by_name.get(name.rsplit("/", 1)[-1], [])
        return [uri for uri in same if _composed(uri).endswith(f"/{name}")]

    return find


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _rough(name: str) -> str:
    return os.path.splitext(name.strip())[0].lower()


def _parts(uri: str) -> list[str]:
    """The parts of a path, whichever way its file system writes the scheme and slashes."""
    return [part for part in uri.split("://", 1)[-1].split("/") if part]
