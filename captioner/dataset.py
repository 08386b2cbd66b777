"""Captioned images: the captions table, the split, training batches."""

import io
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from captioner import storage
from captioner.config import ListingConfig
from captioner.errors import InputError
from captioner.vocabulary import PAD

__all__ = [
    "CaptionedImage",
    "Dataset",
    "Split",
    "ahead",
    "collate",
    "read_dataset",
]

Item = TypeVar("Item")
Result = TypeVar("Result")

_VALIDATION, _TEST = 200, 100  # the notebook's split: the last images of the table


@dataclass(frozen=True)
class CaptionedImage:
    """An image and what people wrote about it."""

    uri: str
    captions: list[str]


@dataclass(frozen=True)
class Split:
    """The images to train on, those to validate on, and those to test on."""

    train: list[CaptionedImage]
    validation: list[CaptionedImage]
    test: list[CaptionedImage]

    def __post_init__(self) -> None:
        sides = {"train": self.train, "validation": self.validation, "test": self.test}
        for (one, first), (other, second) in itertools.combinations(sides.items(), 2):
            uris = {image.uri for image in first}
            if shared := sum(image.uri in uris for image in second):
                raise InputError(f"{shared} images are in both {one} and {other}")


@dataclass(frozen=True)
class Dataset:
    """All captioned images in the order of the table, and what had to be left out.

    ``sides`` says of each image whether it is for ``train``, ``val`` or ``test``, where the file
    does (Karpathy's); else it is None.
    """

    images: list[CaptionedImage]
    empty_captions: int
    without_image: int
    without_caption: int
    sides: list[str] | None = None

    def split(self, train_list: str | None = None, validation_list: str | None = None) -> Split:
        """By two files of image names, a line each; without them as the file or the notebook does.

        The notebook's split: the last 100 images are for testing, the 200 before for validation.

        Raises:
            InputError: one list without the other, an unreadable list, an image on two sides, or
                too few images.
        """
        if (train_list is None) != (validation_list is None):
            raise InputError("--train-list and --val-list go together")
        if train_list is not None and validation_list is not None:
            train, validation = self.listed(train_list), self.listed(validation_list)
            return Split(train, validation, [])
        if self.sides is not None:
            by_side = [
                [image for image, own in zip(self.images, self.sides, strict=True) if own == side]
                for side in ("train", "val", "test")
            ]
            if not (by_side[0] and by_side[1]):
                raise InputError("the file's own split has nothing to train or to validate on")
            return Split(*by_side)
        held_out = _VALIDATION + _TEST
        if len(self.images) <= held_out:
            raise InputError(
                f"{len(self.images)} images are too few to hold out the last {held_out}: "
                "give lists of the images"
            )
        images = self.images
        return Split(images[:-held_out], images[-held_out:-_TEST], images[-_TEST:])

    def describe(self, split: Split) -> str:
        """What is trained and validated on, and what was left out: one line for a person."""
        left_out = {
            "images without a caption": self.without_caption,
            "captioned images that are not there": self.without_image,
            "empty captions": self.empty_captions,
        }
        text = f"{len(split.train)} images to train on, {len(split.validation)} to validate on"
        return "; left out: ".join(
            [text, ", ".join(f"{n} {what}" for what, n in left_out.items() if n)]
        ).removesuffix("; left out: ")

    def listed(self, uri: str) -> list[CaptionedImage]:
        """The images that a file names, a line each.

        Raises:
            InputError: it cannot be read, or names none of the images.
        """
        try:
            names = {line.strip() for line in storage.read(uri).decode().splitlines()}
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {uri}: {error}") from error
        listed = [image for image in self.images if image.uri.rsplit("/", 1)[-1] in names]
        if not listed:
            raise InputError(f"{uri} names none of the images")
        return listed


@dataclass
class _Entry:
    """An image as a table names it: a path from the images' directory, or the end of one."""

    captions: list[object]
    side: str | None = None


def read_dataset(source: str, images_directory: str | None = None) -> Dataset:
    """Reads captioned images.

    Args:
        source: a folder with ``Images/`` and ``captions.txt`` (CSV with columns ``image,caption``);
            or a JSON file: COCO's captions (``captions_train2017.json``), or Karpathy's split
            (``dataset_coco.json``).
        images_directory: where the images are; by default ``Images/`` in the folder, or the JSON
            file's own. They may stand in folders below it.

    Raises:
        InputError: there is no such table or directory, or no image of it has a caption.
    """
    if source.lower().endswith(".json"):
        table, images = source, images_directory or source.rsplit("/", 1)[0]
        entries = _read_json(table)
    else:
        table = storage.join(source, "captions.txt")
        images = images_directory or storage.join(source, "Images")
        entries = _read_csv(source, table)
    files = [listed.uri for listed in storage.find(images, ListingConfig().endings)]
    find = _finder(images, files)
    kept: dict[str, CaptionedImage] = {}
    sides: dict[str, str] = {}
    empty = without_image = 0
    for name, entry in entries.items():
        captions = [c for c in entry.captions if isinstance(c, str) and c.strip()]
        empty += len(entry.captions) - len(captions)
        uri = find(name)
        if uri is None:
            without_image += bool(captions)
        elif uri in kept:
            kept[uri].captions.extend(captions)
        elif captions:
            kept[uri] = CaptionedImage(uri, captions)
            sides[uri] = entry.side or ""
    if not kept:
        raise InputError(f"no image in {images} has a caption in {table}")
    return Dataset(
        images=list(kept.values()),
        empty_captions=empty,
        without_image=without_image,
        without_caption=len(files) - len(kept),
        sides=[sides[uri] for uri in kept] if any(sides.values()) else None,
    )


def _finder(directory: str, files: Sequence[str]) -> Callable[[str], str | None]:
    """Looks an image up in the listing: by its path, else by its name where only one has it."""
    known = set(files)
    by_name: dict[str, str | None] = {}
    for uri in files:
        name = uri.rsplit("/", 1)[-1]
        by_name[name] = None if name in by_name else uri

    def find(name: str) -> str | None:
        uri = storage.join(directory, name)
        return uri if uri in known else by_name.get(name.rsplit("/", 1)[-1])

    return find


def _read_csv(source: str, table_uri: str) -> dict[str, _Entry]:
    try:
        data = storage.read(table_uri)
        table = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise InputError(f"{source} has no captions.txt") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {table_uri}: {' '.join(str(error).split())}") from error
    if not {"image", "caption"} <= set(table.columns):
        raise InputError(f"{table_uri} has no columns image,caption")
    groups = table.groupby("image", sort=False)["caption"]
    return {str(name): _Entry(group.tolist()) for name, group in groups}


def _read_json(uri: str) -> dict[str, _Entry]:
    try:
        parsed = json.loads(storage.read(uri))
        if "annotations" in parsed:
            return _coco(parsed)
        return _karpathy(parsed)
    except OSError as error:
        raise InputError(f"cannot read {uri}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise InputError(f"{uri} is not COCO's captions nor Karpathy's split: {reason}") from error


def _coco(parsed: dict[str, Any]) -> dict[str, _Entry]:
    by_id = {}
    entries: dict[str, _Entry] = {}
    for image in parsed["images"]:
        by_id[image["id"]] = entries.setdefault(_name(image["file_name"]), _Entry([]))
    for annotation in parsed["annotations"]:
        if (entry := by_id.get(annotation["image_id"])) is not None:
            entry.captions.append(annotation["caption"])
    return entries


def _karpathy(parsed: dict[str, Any]) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for image in parsed["images"]:
        side = {"restval": "train"}.get(image["split"], image["split"])
        name = _name(image["filename"])
        if folder := image.get("filepath"):
            name = f"{_name(folder)}/{name}"
        entry = entries.setdefault(name, _Entry([], side))
        if entry.side != side:
            raise ValueError(f"{name} is on two sides of it")
        entry.captions.extend(sentence["raw"] for sentence in image["sentences"])
    return entries


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a file name is {value!r}")
    return value


def ahead(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int
) -> Iterator[Result]:
    """``map``, computed by threads a few items ahead of where it is consumed; in order."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def collate(captions: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """The encoded captions of ``B`` images as padded ids ``(B·n, T)``, an image's rows together.

    ``n`` is the largest number of captions of an image here; what an image lacks is all padding.
    """
    n = max(map(len, captions))
    rows = [each[i] if i < len(each) else [] for each in captions for i in range(n)]
    ids = np.full((len(rows), max(2, *map(len, rows))), PAD, dtype=np.int64)
    for row, sequence in enumerate(rows):
        ids[row, : len(sequence)] = sequence
    return torch.from_numpy(ids)
