"""Tables of captions as they are published: Flickr's CSV, COCO's captions, Karpathy's split."""

import io
import json
from dataclasses import dataclass
from typing import Any

import pandas as pd

from captioner import storage
from captioner.errors import InputError

__all__ = ["Entry", "read_csv", "read_json"]

_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


@dataclass(frozen=True)
class Entry:
    """An image as a table names it: a path from the images' directory, or the end of one.

    A table may have several entries of an image.

    Attributes:
        name: the image's name in the table.
        captions: the values in the place of captions, text or not.
        split: ``train``, ``val`` or ``test``; None where the table has no splits.
        tokens: the words of each caption, in the order of ``captions``; None where the table has
            no words for a caption.
    """

    name: str
    captions: list[object]
    split: str | None = None
    tokens: list[list[str] | None] | None = None


def read_csv(uri: str) -> list[Entry]:
    """The entries of a CSV file with the columns ``image,caption``, in its order.

    Raises:
        InputError: it cannot be read, or has no such columns.
    """
    try:
        table = pd.read_csv(io.BytesIO(storage.read(uri)), dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        folder, name = uri.rsplit("/", 1)
        raise InputError(f"{folder} has no {name}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {uri}: {' '.join(str(error).split())}") from error
    if not {"image", "caption"} <= set(table.columns):
        raise InputError(f"{uri} has no columns image,caption")
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes what is too much for an index
        raise InputError(f"{uri}: a line has more fields than the first: quote a caption's commas")
    groups = table.groupby("image", sort=False)["caption"]
    return [Entry(str(name), group.tolist()) for name, group in groups]


def read_json(uri: str) -> list[Entry]:
    """The entries of COCO's captions or of Karpathy's split, in the order of their images.

    Raises:
        InputError: it cannot be read, or is neither.
    """
    try:
        parsed = json.loads(storage.read(uri))
        if not isinstance(parsed, dict):
            raise ValueError("it is no object")
        return _coco(parsed) if "annotations" in parsed else _karpathy(parsed)
    except FileNotFoundError as error:
        raise InputError(f"{uri} does not exist") from error
    except OSError as error:
        raise InputError(f"cannot read {uri}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{uri} is neither COCO's captions nor Karpathy's split: {error}"
        ) from error


def _coco(parsed: dict[str, Any]) -> list[Entry]:
    """Captions of an image that is not listed are an entry that is named as no image is."""
    names: dict[int | str, str] = {}
    captions: dict[int | str, list[object]] = {}
    for image in _objects(parsed, "images"):
        key, name = _id(image, "id"), _text(image, "file_name")
        if names.setdefault(key, name) != name:
            raise ValueError(f"two images have the id {key!r}")
        captions.setdefault(key, [])
    for annotation in _objects(parsed, "annotations"):
        captions.setdefault(_id(annotation, "image_id"), []).append(annotation.get("caption"))
    return [Entry(names.get(key, f"image_id {key}"), each) for key, each in captions.items()]


def _karpathy(parsed: dict[str, Any]) -> list[Entry]:
    entries = []
    for image in _objects(parsed, "images"):
        name, split = _text(image, "filename"), _text(image, "split")
        if split not in _SPLITS:
            raise ValueError(f"there is no split {split!r}")
        if image.get("filepath"):
            name = storage.join(_text(image, "filepath"), name)
        sentences = _objects(image, "sentences")
        captions = [sentence.get("raw") for sentence in sentences]
        tokens = [_words(sentence.get("tokens")) for sentence in sentences]
        entries.append(Entry(name, captions, _SPLITS[split], tokens))
    return entries


def _words(tokens: object) -> list[str] | None:
    """The words of a caption; None where there are none, or where one is not text."""
    if isinstance(tokens, list) and tokens and all(isinstance(word, str) for word in tokens):
        return tokens
    return None


def _objects(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = record.get(key)
    if not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
        raise ValueError(f"{key} is not a list of objects")
    return value


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} of an image is not text")
    return value


def _id(record: dict[str, Any], key: str) -> int | str:
    value = record.get(key)
    if not isinstance(value, (int, str)):
        raise ValueError(f"{key} is neither a whole number nor text")
    return value
