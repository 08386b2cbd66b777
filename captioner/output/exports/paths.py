"""Paths of images relative to a common folder."""

import itertools
import re
from collections.abc import Iterable

from captioner import storage
from captioner.errors import InputError

__all__ = ["common_folder", "image_path", "relative"]

_TAR_MEMBER = re.compile(
    r"tar://(?P<name>.*)::(?P<container>[^:]+:/.*?)\.tar", re.DOTALL | re.IGNORECASE
)
_PARQUET_CELL = re.compile(r"(?P<container>.*)\.parquet#(?P<name>[^/]*)", re.DOTALL | re.IGNORECASE)


def image_path(uri: str) -> str:
    """The path of an image; one in a file of many is below the path of that file.

    ``tar://a/0.jpg::s3://b/00000.tar`` becomes ``s3://b/00000/a/0.jpg``.
    """
    match = _TAR_MEMBER.fullmatch(uri) or _PARQUET_CELL.fullmatch(uri)
    return storage.as_path(f"{match['container']}/{match['name']}" if match else uri)


def common_folder(uris: Iterable[str]) -> str:
    """The deepest folder that holds all images, without a slash at its end.

    Raises:
        InputError: there is none, for example between a bucket and a local folder.
    """
    first: list[str] | None = None
    for uri in uris:
        folders = image_path(uri).split("/")[:-1]
        if first is None:
            first = folders
        elif folders != first:
            pairs = zip(first, folders, strict=False)
            first = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    common = "/".join(first or [])
    if not common.strip("/") or common.endswith((":", ":/")):
        raise InputError("the images have no folder in common: name one with --root")
    return common


def relative(uri: str, root: str) -> str:
    """The path of an image below ``root``.

    Raises:
        InputError: the image is not below it.
    """
    path, folder = image_path(uri), root.rstrip("/") + "/"
    if not path.startswith(folder):
        raise InputError(f"{uri} is not below --root {root}")
    parts = path[len(folder) :].split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InputError(
            f"{uri}: the path below --root {root} has empty, . or .. segments; use another --root"
        )
    return "/".join(parts)
