"""Captioned images: the captions table, the split, training batches."""

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

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
    """The images to train on, and those to validate on."""

    train: list[CaptionedImage]
    validation: list[CaptionedImage]


@dataclass(frozen=True)
class Dataset:
    """All captioned images in the order of the table, and what had to be left out."""

    images: list[CaptionedImage]
    empty_captions: int
    without_image: int
    without_caption: int

    def split(self, train_list: str | None = None, validation_list: str | None = None) -> Split:
        """By two files of image names, a line each; without them as the notebook does.

        The notebook's split: the last 100 images are for testing, the 200 before for validation.

        Raises:
            InputError: one list without the other, an unreadable list, or too few images.
        """
        if (train_list is None) != (validation_list is None):
            raise InputError("--train-list and --val-list go together")
        if train_list is not None and validation_list is not None:
            train, validation = self._listed(train_list), self._listed(validation_list)
            train_uris = {image.uri for image in train}
            if shared := sum(image.uri in train_uris for image in validation):
                raise InputError(f"{shared} images are in both {train_list} and {validation_list}")
            return Split(train, validation)
        held_out = _VALIDATION + _TEST
        if len(self.images) <= held_out:
            raise InputError(
                f"{len(self.images)} images are too few to hold out the last {held_out}: "
                "give --train-list and --val-list"
            )
        return Split(self.images[:-held_out], self.images[-held_out:-_TEST])

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

    def _listed(self, uri: str) -> list[CaptionedImage]:
        try:
            names = {line.strip() for line in storage.read(uri).decode().splitlines()}
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {uri}: {error}") from error
        listed = [image for image in self.images if image.uri.rsplit("/", 1)[-1] in names]
        if not listed:
            raise InputError(f"{uri} names none of the images")
        return listed


def read_dataset(directory: str) -> Dataset:
    """Reads a folder with ``Images/`` and ``captions.txt`` (CSV with columns ``image,caption``).

    Raises:
        InputError: there is no such folder or table, or no image of it has a caption.
    """
    table_uri = storage.join(directory, "captions.txt")
    try:
        data = storage.read(table_uri)
        table = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise InputError(f"{directory} has no captions.txt") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {table_uri}: {' '.join(str(error).split())}") from error
    if not {"image", "caption"} <= set(table.columns):
        raise InputError(f"{table_uri} has no columns image,caption")
    directory_uri = storage.join(directory, "Images")
    files = {
        listed.uri.rsplit("/", 1)[-1]: listed.uri
        for listed in storage.find(directory_uri, ListingConfig().endings)
    }
    empty = int((table["caption"].str.strip() == "").sum())
    table = table[table["caption"].str.strip() != ""]
    captioned = {
        str(name): group.tolist() for name, group in table.groupby("image", sort=False)["caption"]
    }
    kept = [CaptionedImage(files[name], each) for name, each in captioned.items() if name in files]
    if not kept:
        raise InputError(f"no image in {directory_uri} has a caption in {table_uri}")
    return Dataset(
        images=kept,
        empty_captions=empty,
        without_image=len(captioned) - len(kept),
        without_caption=len(files) - len(kept),
    )


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
