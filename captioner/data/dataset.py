"""Captioned images, how they are split, training batches."""

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from captioner import storage
from captioner.config import ListingConfig
from captioner.data import tables
from captioner.errors import InputError, first_of

__all__ = [
    "CaptionedImage",
    "Dataset",
    "Split",
    "finder",
    "read_dataset",
]


_VALIDATION, _TEST = 200, 100  # the notebook's split: the last images of the table
_SHOWN = 5  # names of what is left out

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionedImage:
    """An image and the captions that people wrote for it.

    Attributes:
        uri: where the image is.
        captions: one text a caption.
        name: the image's name in the table of captions.
        tokens: the words of each caption, in the order of ``captions``, as the dataset splits
            them (Karpathy's ``tokens``); None where the dataset does not give them for all.
    """

    uri: str
    captions: list[str]
    name: str = ""
    tokens: list[list[str]] | None = None


@dataclass(frozen=True)
class Split:
    """The images to train on, those to validate on, and those to test on."""

    train: list[CaptionedImage]
    validation: list[CaptionedImage]
    test: list[CaptionedImage]

    def __post_init__(self) -> None:
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        for (one, first), (other, second) in itertools.combinations(splits.items(), 2):
            uris = {image.uri for image in first}
            if shared := sum(image.uri in uris for image in second):
                raise InputError(f"{shared} images are in both {one} and {other}")


@dataclass(frozen=True)
class Dataset:
    """All captioned images in the order of the table, and what had to be left out.

    ``splits`` is each image's split, ``train``, ``val`` or ``test``; None where the dataset has no
    splits of its own.
    """

    images: list[CaptionedImage]
    empty_captions: int
    without_image: int
    without_caption: int
    splits: list[str] | None = None

    def validated_by(self, other: "Dataset") -> "Dataset":
        """Both together: these images are for training, the other's for validation.

        Raises:
            InputError: one of the two is split already.
        """
        if self.splits is not None or other.splits is not None:
            raise InputError("Karpathy's split says itself what to validate on: leave --val-data")
        return Dataset(
            images=self.images + other.images,
            empty_captions=self.empty_captions + other.empty_captions,
            without_image=self.without_image + other.without_image,
            without_caption=self.without_caption + other.without_caption,
            splits=["train"] * len(self.images) + ["val"] * len(other.images),
        )

    def split(
        self,
        train_list: str | None = None,
        validation_list: str | None = None,
        test_list: str | None = None,
    ) -> Split:
        """By files of image names, a line each; without them as the data or the notebook do.

        The notebook's split: the last 100 images are for testing, the 200 before for validation.

        Raises:
            InputError: one list without the other, an unreadable list, an image on two sides, or
                too few images.
        """
        if train_list is not None and validation_list is not None:
            test = [] if test_list is None else self.listed(test_list)
            return Split(self.listed(train_list), self.listed(validation_list), test)
        if any(each is not None for each in (train_list, validation_list, test_list)):
            raise InputError("--train-list and --val-list go together")
        if self.splits is not None:
            split = Split(*map(self.of_split, ("train", "val", "test")))
            if not (split.train and split.validation):
                raise InputError("the file's own split has nothing to train or to validate on")
            return split
        held_out = _VALIDATION + _TEST
        if len(self.images) <= held_out:
            raise InputError(
                f"{len(self.images)} images are too few to hold out the last {held_out}: "
                "give lists of the images"
            )
        images = self.images
        return Split(images[:-held_out], images[-held_out:-_TEST], images[-_TEST:])

    def of_split(self, split: str) -> list[CaptionedImage]:
        """The images of the dataset's own split ``train``, ``val`` or ``test``."""
        splits = self.splits or itertools.repeat(None)
        return [image for image, own in zip(self.images, splits, strict=False) if own == split]

    def describe(self, split: Split) -> str:
        """What is trained and validated on, and what was left out: one line for a person."""
        left_out = {
            "images without a caption": self.without_caption,
            "captioned images that are not there": self.without_image,
            "empty captions": self.empty_captions,
        }
        text = f"{len(split.train)} images to train on, {len(split.validation)} to validate on"
        if split.test:
            text += f", {len(split.test)} for testing"
        return "; left out: ".join(
            [text, ", ".join(f"{n} {what}" for what, n in left_out.items() if n)]
        ).removesuffix("; left out: ")

    def listed(self, uri: str) -> list[CaptionedImage]:
        """The images that a file names, a line each, in the order of the table.

        Names that none of them has are logged.

        Raises:
            InputError: it cannot be read, names none of the images, or several by one name.
        """
        try:
            # splitlines() and strip() would take characters of a name, as U+2028, for white space.
            lines = storage.read(uri).decode("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {uri}: {error}") from error
        find = finder(self.images)
        chosen: set[str] = set()
        unknown = []
        for name in dict.fromkeys(line.strip(" \t\r") for line in lines):
            found = find(name)
            if len(found) > 1:
                raise InputError(f"{uri}: {len(found)} images are called {name}")
            if name and not found:
                unknown.append(name)
            chosen.update(image.uri for image in found)
        if not chosen:
            raise InputError(f"{uri} names none of the images")
        if unknown:
            first = first_of(unknown, _SHOWN)
            _logger.warning(
                "left out: %d names in %s that no captioned image has: %s", len(unknown), uri, first
            )
        return [image for image in self.images if image.uri in chosen]


def read_dataset(source: str, images_directory: str | None = None) -> Dataset:
    """Reads captioned images.

    Args:
        source: a folder with ``Images/`` and ``captions.txt`` (CSV with columns ``image,caption``);
            or a JSON file: COCO's captions (``captions_train2017.json``), or Karpathy's split
            (``dataset_coco.json``).
        images_directory: where the images are; by default ``Images/`` in the folder, or the JSON
            file's own. They may stand in folders below it.

    Raises:
        InputError: there is no such table or directory, no image of it has a caption, or an image
            is on two sides of its split.
    """
    source = storage.absolute(source)
    is_json = source.lower().endswith(".json") and not storage.is_directory(source)
    if is_json:
        table, directory = source, source[: source.rindex("/")]
        entries = tables.read_json(table)
    else:
        table, directory = storage.join(source, "captions.txt"), storage.join(source, "Images")
        entries = tables.read_csv(table)
    directory = storage.absolute(images_directory) if images_directory else directory
    files = [listed.uri for listed in storage.find(directory, ListingConfig().endings)]
    find = _locator(directory, files)
    kept: dict[str, CaptionedImage] = {}
    splits: dict[str, str | None] = {}
    missing: set[str] = set()
    # A folder's images are all meant to have captions. Those of a JSON file may stand among others.
    silent = set() if is_json else set(files)
    empty = 0
    for entry in entries:
        uri = find(entry.name)
        image = _captioned(uri or "", entry)
        empty += len(entry.captions) - len(image.captions)
        if not image.captions:
            silent.add(uri or entry.name)
        elif uri is None:
            missing.add(entry.name)
        elif uri not in kept:
            kept[uri], splits[uri] = image, entry.split
        elif splits[uri] != entry.split:
            raise InputError(f"{table}: {entry.name} is in two splits")
        else:
            kept[uri] = _merged(kept[uri], image)
    if not kept:
        hint = "" if images_directory else " (--images says where they are)"
        raise InputError(f"no image in {directory} has a caption in {table}{hint}")
    own = [split for split in splits.values() if split is not None]
    return Dataset(
        images=list(kept.values()),
        empty_captions=empty,
        without_image=len(missing),
        without_caption=len(silent - kept.keys() - missing),
        splits=own or None,
    )


def _captioned(uri: str, entry: tables.Entry) -> CaptionedImage:
    """An entry's image, with its captions that are text."""
    tokens = entry.tokens or [None] * len(entry.captions)
    texts, words = [], []
    for caption, each in zip(entry.captions, tokens, strict=True):
        if _is_text(caption):
            texts.append(caption)
            words.append(each)
    return CaptionedImage(uri, texts, entry.name, _all_given(words))


def _all_given(words: list[list[str] | None]) -> list[list[str]] | None:
    given = [each for each in words if each is not None]
    return given if given and len(given) == len(words) else None


def _merged(first: CaptionedImage, second: CaptionedImage) -> CaptionedImage:
    """One image with the captions of two entries."""
    tokens = None
    if first.tokens is not None and second.tokens is not None:
        tokens = first.tokens + second.tokens
    captions = first.captions + second.captions
    return replace(first, captions=captions, tokens=tokens)


def _is_text(caption: object) -> TypeGuard[str]:
    if not isinstance(caption, str) or not caption.strip():
        return False
    try:
        caption.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True


def finder(images: Sequence[CaptionedImage]) -> Callable[[str], list[CaptionedImage]]:
    """Looks up the image that the table calls so; else those whose URIs end in the name."""
    by_name = {image.name: image for image in images}
    by_uri = {image.uri: image for image in images}
    ending = _ending(list(by_uri))

    def find(name: str) -> list[CaptionedImage]:
        if name in by_name:
            return [by_name[name]]
        return [by_uri[uri] for uri in ending(name)]

    return find


def _ending(uris: Sequence[str]) -> Callable[[str], list[str]]:
    """Looks up the URIs that end in a name: all of its parts, not only the last."""
    by_name = defaultdict(list)
    for uri in uris:
        by_name[uri.rsplit("/", 1)[-1]].append(uri)

    def find(name: str) -> list[str]:
        same = by_name.get(name.rsplit("/", 1)[-1], [])
        return [uri for uri in same if uri.endswith(f"/{name}")]

    return find


def _locator(directory: str, files: Sequence[str]) -> Callable[[str], str | None]:
    """Looks an image up in the listing: by its path, else by an end of it that only one has."""
    depth = len(_parts(directory))
    by_path = {"/".join(_parts(uri)[depth:]): uri for uri in files}
    ending = _ending(files)

    def locate(name: str) -> str | None:
        if name in by_path:
            return by_path[name]
        found = ending(name)
        return found[0] if len(found) == 1 else None

    return locate


def _parts(uri: str) -> list[str]:
    """The parts of a path, whichever way its file system writes the scheme and slashes."""
    return [part for part in uri.split("://", 1)[-1].split("/") if part]
