"""Paths of images relative to a common folder."""

import itertools
from collections.abc import Iterable

from captioner import storage
from captioner.errors import InputError

__all__ = ["common_folder", "relative"]


def common_folder(uris: Iterable[str]) -> str:
    """The deepest folder that holds all images, without a slash at its end.

    Raises:
        InputError: there is none, for example between a bucket and a local folder.
    """
    first: list[str] | None = None
    for uri in uris:
        folders = storage.as_path(uri).split("/")[:-1]
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
    path, folder = storage.as_path(uri), root.rstrip("/") + "/"
    if not path.startswith(folder):
        raise InputError(f"{uri} is not below --root {root}")
    parts = path[len(folder) :].split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InputError(
            f"{uri}: the path below --root {root} has empty, . or .. segments; use another --root"
        )
    return "/".join(parts)
