"""Which files and folders below a source are passed over, by their names."""

import re
from collections.abc import Sequence

__all__ = ["PROGRAMS_FILES", "Exclusion"]

#: Files that programs leave among people's photos: companions and copies of photos, caches, trash.
PROGRAMS_FILES = (
    "._*",  # macOS's metadata of each file, on disks of other systems
    "__MACOSX",
    ".ipynb_checkpoints",
    ".thumbnails",
    "@eaDir",  # thumbnails of a Synology NAS
    ".Trash*",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
)


class Exclusion:
    """Patterns of names and paths; what matches one is passed over, a folder with all in it.

    A pattern without ``/`` is for the name of a file or folder at any depth; one with ``/`` is for
    the path from the source. ``*`` and ``?`` stand for any characters but ``/``, ``**`` for any at
    all, ``[…]`` for one of those listed. Upper and lower case differ.
    """

    def __init__(self, patterns: Sequence[str]):
        self.patterns = tuple(patterns)
        plain = [pattern.rstrip("/") for pattern in patterns]
        self._names = _one_of([None if "/" in each else each for each in plain])
        self._paths = _one_of([each.lstrip("/") if "/" in each else None for each in plain])

    def match(self, path: str) -> str | None:
        """The pattern that a path from the source matches itself, whatever folders it is in."""
        for expression, text in ((self._names, path.rsplit("/", 1)[-1]), (self._paths, path)):
            if expression is not None and (found := expression.fullmatch(text)):
                return self.patterns[int(str(found.lastgroup)[1:])]
        return None


def _one_of(patterns: Sequence[str | None]) -> re.Pattern[str] | None:
    """One expression for all patterns, each a group that is named after its place."""
    groups = [
        f"(?P<p{place}>{_expression(pattern)})"
        for place, pattern in enumerate(patterns)
        if pattern is not None
    ]
    return re.compile("|".join(groups), re.DOTALL) if groups else None


_SPECIAL = re.compile(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])")


def _expression(pattern: str) -> str:
    """A glob as a regular expression."""
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = []
    for piece in _SPECIAL.split(pattern):
        if piece in wildcards:
            pieces.append(wildcards[piece])
        elif _SPECIAL.fullmatch(piece):
            inverted = piece.startswith("[!")
            characters = re.sub(r"([\\\[\]^&~|])", r"\\\1", piece[1 + inverted : -1])
            pieces.append(f"[{'^' if inverted else ''}{characters}]")
        else:
            pieces.append(re.escape(piece))
    return "".join(pieces)
