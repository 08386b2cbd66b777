"""Several data sets trained on together, each with a weight."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from captioner import storage
from captioner.data.dataset import read_dataset
from captioner.data.splits import Portion, Split
from captioner.errors import InputError

__all__ = ["DataPlace", "data_places", "mix", "read_split"]

_WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class DataPlace:
    """Where a data set is, and how it is split.

    Attributes:
        source: see :func:`captioner.data.dataset.read_dataset`.
        weight: how often an epoch trains on each of its images.
        images: the folder of its images; None: beside ``source``.
        validation: another data set to validate on; None: a part of this one.
        train_list: names of the images to train on; None: the data set's own split.
        validation_list: names of the images to validate on.
    """

    source: str
    weight: float = 1.0
    images: str | None = None
    validation: str | None = None
    train_list: str | None = None
    validation_list: str | None = None

    @property
    def name(self) -> str:
        """The last part of its URI, without an ending."""
        return storage.absolute(self.source).rstrip("/").rsplit("/", 1)[-1].removesuffix(".json")


def data_places(
    source: str,
    more: Sequence[str],
    *,
    images: Sequence[str] = (),
    validation: Sequence[str] = (),
    train_list: Sequence[str] = (),
    validation_list: Sequence[str] = (),
) -> list[DataPlace]:
    """The data sets that options name.

    Args:
        source: the first data set, of weight 1.
        more: the others, each ``URI`` or ``URI:WEIGHT``.
        images: a folder for each data set in their order, ``none`` where it has its own; or empty.
        validation: likewise, data sets to validate on.
        train_list: likewise, lists of names.
        validation_list: likewise, lists of names.

    Raises:
        InputError: an option has not one value for each data set, a weight is 0, or two options for
            the same data set exclude each other.
    """
    weighted = [(source, 1.0), *map(_parse_weighted, more)]
    columns = {
        "--images": images,
        "--val-data": validation,
        "--train-list": train_list,
        "--val-list": validation_list,
    }
    for option, values in columns.items():
        if len(values) not in (0, len(weighted)):
            raise InputError(
                f"{option} is given {len(values)} times for {len(weighted)} datasets: give it once "
                "for each, DATA first, with none for a dataset that needs none"
            )
    rows = zip(*(_for_each(values, len(weighted)) for values in columns.values()), strict=True)
    places = []
    for (uri, weight), (folder, other, trained, validated) in zip(weighted, rows, strict=True):
        if other and (trained or validated):
            raise InputError("give --train-list and --val-list, or --val-data, not both")
        places.append(
            DataPlace(
                source=uri,
                weight=weight,
                images=folder,
                validation=other,
                train_list=trained,
                validation_list=validated,
            )
        )
    return places


def _for_each(values: Sequence[str], count: int) -> list[str | None]:
    """A value for each data set; None for the word ``none``, and where there are no values."""
    return [None if value == "none" else value for value in values] or [None] * count


def _parse_weighted(text: str) -> tuple[str, float]:
    """Splits ``URI:WEIGHT`` into both; the weight is 1 where there is none.

    Raises:
        InputError: the weight is 0.
    """
    match = _WEIGHTED.fullmatch(text)
    if match is None:
        return text, 1.0
    if not float(match[2]):
        raise InputError(f"--data {text}: the weight must be above 0; use for example {match[1]}:2")
    return match[1], float(match[2])


def read_split(places: Sequence[DataPlace], *, allow_missing: bool = False) -> tuple[Split, str]:
    """Reads and splits data sets.

    Args:
        places: the data sets.
        allow_missing: accept data sets, and lists, with more than half of their images missing.

    Returns:
        The images of all, and a line for each data set that says how many there are.

    Raises:
        InputError: see :func:`captioner.data.dataset.read_dataset` and
            :meth:`captioner.data.dataset.Dataset.split`; or an image is in the training images of
            one data set and in the validation images of another.
    """
    splits, lines = [], []
    names = _unique([place.name for place in places])
    for name, place in zip(names, places, strict=True):
        read = partial(read_dataset, needed=("train", "val"), images_directory=place.images)
        # Lists say themselves which images are needed.
        captioned = read(place.source, allow_missing=allow_missing or place.train_list is not None)
        if place.validation is not None:
            captioned = captioned.validated_by(read(place.validation, allow_missing=allow_missing))
        split = captioned.split(
            place.train_list, place.validation_list, allow_missing=allow_missing
        )
        splits.append(split)
        line = captioned.describe(split)
        lines.append(line if len(places) == 1 else f"{name}, weight {place.weight:g}: {line}")
    if len(places) == 1:
        return splits[0], lines[0]
    weights = [place.weight for place in places]
    return mix(splits, names, weights), "\n".join(lines)


def mix(splits: Sequence[Split], names: Sequence[str], weights: Sequence[float]) -> Split:
    """One split of the images of several.

    Args:
        splits: at least one.
        names: what the figures of each are called.
        weights: how often an epoch trains on each image of each; of 2.5, half of the images come
            a third time, drawn anew in each epoch.

    Raises:
        InputError: an image is in two of the training, validation and test images.
    """
    return Split(
        [image for split in splits for image in split.train],
        [image for split in splits for image in split.validation],
        [image for split in splits for image in split.test],
        tuple(
            Portion(name, weight, len(split.train), len(split.validation))
            for name, weight, split in zip(names, weights, splits, strict=True)
        ),
    )


def _unique(names: Sequence[str]) -> list[str]:
    """The names; where one comes again, with a number."""
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return unique
