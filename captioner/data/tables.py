"""Tables of captions as they are published: Flickr's CSV, COCO's captions, Karpathy's split."""

from dataclasses import dataclass
from typing import Any

from captioner import storage
from captioner.config import parse_json
from captioner.data.delimited import CsvTable
from captioner.errors import InputError, one_line

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
    """The entries of a CSV file with the columns ``image`` and ``caption``, in its order.

    Raises:
        InputError: the file cannot be read, lacks these columns or is damaged; with the line.
    """
    try:
        data = storage.read(uri)
    except FileNotFoundError as error:
        folder, name = uri.rsplit("/", 1)
        raise InputError(f"{folder} has no {name}") from error
    except OSError as error:
        raise InputError(f"cannot read {uri}: {error.strerror or one_line(error)}") from error
    table = CsvTable(uri, data)
    if any(table.columns.count(name) != 1 for name in ("image", "caption")):
        raise InputError(
            f"{uri}, line 1: must name the columns image and caption once, separated by commas, "
            f"not {','.join(table.columns)[:100]!r}"
        )
    image, caption = (table.columns.index(name) for name in ("image", "caption"))
    captions: dict[str, list[object]] = {}
    for row in table.rows("image"):
        captions.setdefault(row.fields[image], []).append(row.fields[caption])
    return [Entry(name, each) for name, each in captions.items()]


def read_json(uri: str) -> list[Entry]:
    """The entries of COCO's captions or of Karpathy's split, in the order of their images.

    Raises:
        InputError: the file cannot be read, or is neither.
    """
    try:
        parsed = parse_json(storage.read(uri))
    except FileNotFoundError as error:
        raise InputError(f"{uri} does not exist") from error
    except OSError as error:
        raise InputError(f"cannot read {uri}: {error.strerror or one_line(error)}") from error
    except InputError as error:
        raise InputError(f"{uri} is not valid JSON: {error}") from error
    try:
        if not isinstance(parsed, dict):
            raise ValueError("it is not an object")
        return _coco(parsed) if "annotations" in parsed else _karpathy(parsed)
    except ValueError as error:
        raise InputError(
            f"{uri} is neither COCO's captions nor Karpathy's split: {error}"
        ) from error


def _coco(parsed: dict[str, Any]) -> list[Entry]:
    """An entry of captions whose image is not listed has a name that no image has."""
    names: dict[str, str] = {}
    captions: dict[str, list[object]] = {}
    for image in _objects(parsed, "images"):
        key, name = _id(image, "id"), _text(image, "file_name")
        if names.setdefault(key, name) != name:
            raise ValueError(f"two images have the id {key}")
        captions.setdefault(key, [])
    annotations = _objects(parsed, "annotations")
    if annotations and not any("caption" in annotation for annotation in annotations):
        raise ValueError(
            "none of its annotations has a caption: give captions_*.json, not instances_*.json"
        )
    for annotation in annotations:
        captions.setdefault(_id(annotation, "image_id"), []).append(annotation.get("caption"))
    return [Entry(names.get(key, f"image_id {key}"), each) for key, each in captions.items()]


def _karpathy(parsed: dict[str, Any]) -> list[Entry]:
    entries = []
    for image in _objects(parsed, "images"):
        name, split = _text(image, "filename"), _text(image, "split")
        if split not in _SPLITS:
            raise ValueError(f"the split {split!r} is not one of {', '.join(_SPLITS)}")
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


def _id(record: dict[str, Any], key: str) -> str:
    """An id as text: some tools write numbers in quotes."""
    value = record.get(key)
    if not isinstance(value, (int, str)):
        raise ValueError(f"{key} is neither a whole number nor text")
    return str(value)
