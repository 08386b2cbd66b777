"""Names of tar files and of what is in them: sources, patterns, keys, URIs."""

import fnmatch
import itertools
import re
import urllib.parse
from collections.abc import Iterator

from captioner import storage
from captioner.errors import InputError

__all__ = [
    "COMPRESSED",
    "expand",
    "is_tar",
    "key_of",
    "member_uri",
    "refuse_compressed",
    "rest_uri",
]

#: Ends of the names of compressed tar files, in lower case.
COMPRESSED = tuple(
    ".tgz .tbz .tbz2 .txz .tzst .tar.gz .tar.bz2 .tar.xz .tar.zst .tar.lz4".split()  # noqa: SIM905
)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1_000_000  # names of a pattern


def is_tar(uri: str) -> bool:
    """Whether a URI names tar files: one, or several by a pattern."""
    return uri.lower().endswith(".tar")


def refuse_compressed(uri: str) -> None:
    """Refuses a compressed tar file.

    Raises:
        InputError: it is one.
    """
    if uri.lower().endswith(COMPRESSED):
        raise InputError(
            f"{uri} is a compressed tar file, whose images cannot be read one by one; decompress "
            "it to a .tar file"
        )


def expand(pattern: str) -> list[str]:
    """The names that a pattern stands for, in order; the name of a file stands for itself.

    ``{000..099}`` counts, with leading zeros where they are given; ``{a,b}`` lists; ``*``, ``?``
    and ``[…]`` in the last part of the path match names in its folder.

    Raises:
        InputError: the braces cannot be expanded, or no name matches.
    """
    if not any(character in pattern for character in "{*?[") or storage.version(pattern):
        return [pattern]
    pieces: list[list[str]] = []
    end = 0
    for match in _BRACES.finditer(pattern):
        pieces += [[pattern[end : match.start()]], _choices(match[1], pattern)]
        end = match.end()
    pieces.append([pattern[end:]])
    count = 1
    for piece in pieces:
        count *= len(piece)
    if count > _MOST:
        raise InputError(f"{pattern} stands for {count} names, more than {_MOST}")
    names = ["".join(each) for each in itertools.product(*pieces)]
    return [found for name in names for found in _matches(name)]


def _choices(inner: str, pattern: str) -> list[str]:
    if match := _RANGE.fullmatch(inner):
        first, last = match.groups()
        if int(last) - int(first) >= _MOST:
            raise InputError(f"{pattern} stands for more than {_MOST} names")
        if int(first) <= int(last):
            width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
            return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    elif "," in inner:
        return inner.split(",")
    raise InputError(
        f"{pattern}: cannot expand {{{inner}}}; use for example {{000..099}} or {{first,second}}"
    )


def _matches(name: str) -> Iterator[str]:
    folder, slash, last = name.rpartition("/")
    if not any(character in last for character in "*?["):
        yield name
        return
    found = [each for each in storage.names(folder or slash) if fnmatch.fnmatchcase(each, last)]
    if not found:
        raise InputError(f"no file matches {name}")
    yield from (f"{folder}{slash}{each}" for each in found)


def key_of(name: str) -> tuple[str, str]:
    """A member's key and extension: the path up to the first dot of the last part, and the rest."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension


def member_uri(name: str, tar: str, *, position: int | None = None) -> str:
    """The URI of a member, as fsspec spells it: ``tar://NAME::URI``.

    Args:
        name: the member's.
        tar: the URI of the tar file.
        position: where the data begin, for a name that the tar file has several times.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        name = urllib.parse.quote(name.encode("utf-8", "surrogateescape"))
    name = name.replace("::", "%3A%3A").replace("#offset=", "%23offset=")
    place = "" if position is None else f"#offset={position}"
    return f"tar://{name.lstrip('/')}{place}::{_with_scheme(tar)}"


def rest_uri(tar: str, position: int) -> str:
    """What names the members from an offset on, which cannot be listed."""
    return member_uri("", tar, position=position)


def _with_scheme(tar: str) -> str:
    return tar if storage.has_scheme(tar) else f"file://{tar}"
