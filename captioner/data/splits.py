"""Captioned images, the splits that they are in, and lists of their names."""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from captioner import storage
from captioner.data.delimited import decode_text
from captioner.data.names import by_ending
from captioner.errors import InputError, first_of, one_line

__all__ = [
    "MOST_MISSING",
    "CaptionedImage",
    "Portion",
    "Split",
    "finder",
    "named_images",
    "warn_if_single",
]

#: The share of named images that may be missing without ``--allow-missing``.
MOST_MISSING = 0.5
_SHOWN = 5  # names in a message

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
class Portion:
    """A data set in a split of several.

    Attributes:
        name: what its figures are called.
        weight: how often an epoch trains on each of its images; of 2.5, half of the images come a
            third time.
        train: how many images to train on are its own.
        validation: how many images to validate on are its own.
    """

    name: str
    weight: float
    train: int
    validation: int

    @property
    def drawn(self) -> int:
        """How many of its images come once more, for the weight's fraction."""
        return round(self.train * (self.weight % 1))

    @property
    def images_per_epoch(self) -> int:
        """How many images of an epoch are its own, repeats included."""
        return self.train * int(self.weight) + self.drawn


@dataclass(frozen=True)
class Split:
    """The images to train, validate and test on; no image is in two of them.

    Attributes:
        train: the images to train on.
        validation: the images to validate on.
        test: the images to test on.
        portions: the data sets, in the order of their images in each list; by default the images
            are one data set of weight 1.
    """

    train: list[CaptionedImage]
    validation: list[CaptionedImage]
    test: list[CaptionedImage]
    portions: tuple[Portion, ...] = ()

    def __post_init__(self) -> None:
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        for (one, first), (other, second) in itertools.combinations(splits.items(), 2):
            uris = {image.uri for image in first}
            if shared := sum(image.uri in uris for image in second):
                raise InputError(f"{shared} images are in both {one} and {other}")
        if not self.portions:
            whole = Portion("", 1.0, len(self.train), len(self.validation))
            object.__setattr__(self, "portions", (whole,))


def named_images(
    uri: str, images: Sequence[CaptionedImage], *, allow_missing: bool = False
) -> list[CaptionedImage]:
    """Those of some images that a file names, a line each, in the order of the images.

    Names that no image has are logged.

    Args:
        uri: the file.
        images: what may be named: see :func:`finder`.
        allow_missing: accept a file of which more than half of the names are of no image.

    Raises:
        InputError: the file cannot be read, names none of the images, names several by one name, or
            more than half of its names are of no image.
    """
    names = _read_names(uri)
    find = finder(images)
    chosen: set[str] = set()
    unknown = []
    for name in names:
        found = find(name)
        if len(found) > 1:
            fitting = first_of([image.uri for image in found], _SHOWN)
            raise InputError(
                f"{uri}: {len(found)} images are called {name}: name the folder too ({fitting})"
            )
        if not found:
            unknown.append(name)
        chosen.update(image.uri for image in found)
    if unknown:
        problem = (
            f"{len(unknown)} of the {len(names)} names in {uri} are of no captioned image: "
            f"{first_of(unknown, _SHOWN)}"
        )
        if not chosen:
            raise InputError(problem)
        if len(unknown) > MOST_MISSING * len(names) and not allow_missing:
            raise InputError(f"{problem}; to accept this, add --allow-missing")
        _logger.warning("left out: %s", problem)
    return [image for image in images if image.uri in chosen]


def _read_names(uri: str) -> list[str]:
    try:
        text = decode_text(uri, storage.read(uri))
    except OSError as error:
        raise InputError(f"cannot read {uri}: {error.strerror or one_line(error)}") from error
    # splitlines() and strip() would take characters of a name, as U+2028, for white space.
    lines = (line.strip(" \t\r") for line in text.split("\n"))
    names = list(dict.fromkeys(line for line in lines if line))
    if not names:
        raise InputError(f"{uri} is empty: each line must name an image")
    return names


def finder(images: Sequence[CaptionedImage]) -> Callable[[str], list[CaptionedImage]]:
    """Looks up the image that the table calls so; else those whose URIs end in the name."""
    by_name = {image.name: image for image in images}
    by_uri = {image.uri: image for image in images}
    find_uris = by_ending(by_uri)

    def find(name: str) -> list[CaptionedImage]:
        if name in by_name:
            return [by_name[name]]
        if name in by_uri:
            return [by_uri[name]]
        return [by_uri[uri] for uri in find_uris(name.removeprefix("./"))]

    return find


def warn_if_single(images: Sequence[CaptionedImage], purpose: str) -> None:
    """Logs that CIDEr, which compares a caption with those of other images, needs several.

    Args:
        images: the images that are scored.
        purpose: what they are for, such as ``validate on``.
    """
    if len(images) == 1:
        _logger.warning("only 1 image to %s: its CIDEr is always 0; give more images", purpose)
