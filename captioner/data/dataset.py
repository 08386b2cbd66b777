"""A dataset of captioned images: read from a table, split, chosen from."""

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from captioner import storage
from captioner.config import ListingConfig
from captioner.data import tables
from captioner.data.filters import PROGRAMS_FILES, Exclusion
from captioner.data.gathering import Gathering
from captioner.data.splits import CaptionedImage, Split, finder, named_images, warn_if_single
from captioner.errors import InputError

__all__ = [
    "CaptionedImage",
    "Dataset",
    "Split",
    "finder",
    "read_dataset",
    "warn_if_single",
]

_VALIDATION, _TEST = 200, 100  # the notebook's split: the last images of the table


@dataclass(frozen=True)
class Dataset:
    """All captioned images in the order of the table, and how much had to be left out.

    Attributes:
        images: the images that exist and have a caption.
        empty_captions: captions left out, being empty or not text.
        without_image: images left out, being named and captioned, but not found.
        without_caption: images left out, having no caption.
        splits: each image's split, ``train``, ``val`` or ``test``; None where the dataset has no
            splits of its own.
        ambiguous: names left out, since several files fit them.
        repeated_captions: captions that their image has already; they are kept.
        is_whole: the dataset is one split of a larger one, as each of COCO's files is.
    """

    images: list[CaptionedImage]
    empty_captions: int = 0
    without_image: int = 0
    without_caption: int = 0
    splits: list[str] | None = None
    ambiguous: int = 0
    repeated_captions: int = 0
    is_whole: bool = False

    def validated_by(self, other: "Dataset") -> "Dataset":
        """Both together: these images are for training, the other's for validation.

        Raises:
            InputError: one of the two has splits of its own.
        """
        if self.splits is not None or other.splits is not None:
            raise InputError("the dataset has its own validation split: remove --val-data")
        return Dataset(
            images=self.images + other.images,
            empty_captions=self.empty_captions + other.empty_captions,
            without_image=self.without_image + other.without_image,
            without_caption=self.without_caption + other.without_caption,
            splits=["train"] * len(self.images) + ["val"] * len(other.images),
            ambiguous=self.ambiguous + other.ambiguous,
            repeated_captions=self.repeated_captions + other.repeated_captions,
        )

    def split(
        self,
        train_list: str | None = None,
        validation_list: str | None = None,
        test_list: str | None = None,
        *,
        allow_missing: bool = False,
    ) -> Split:
        """Splits by files of image names, a line each; without them as the dataset or the notebook.

        The notebook's split: the last 100 images are for testing, the 200 before for validation.

        Args:
            train_list: names of the images to train on: see :meth:`listed`.
            validation_list: names of the images to validate on.
            test_list: names of the images to test on.
            allow_missing: accept lists of which more than half of the names are of no image.

        Raises:
            InputError: one list without the other, an unreadable list, an image in two splits, or
                too few images.
        """
        if train_list is not None and validation_list is not None:
            lists = (train_list, validation_list, test_list)
            train, validation, test = (
                [] if each is None else self.listed(each, allow_missing=allow_missing)
                for each in lists
            )
            split = Split(train, validation, test)
        elif train_list is None and validation_list is None and test_list is None:
            split = self._own_split()
        else:
            raise InputError("--train-list and --val-list need each other: give both")
        warn_if_single(split.validation, "validate on")
        return split

    def _own_split(self) -> Split:
        if self.splits is not None:
            split = Split(self.of_split("train"), self.of_split("val"), self.of_split("test"))
            for name, images in (("train", split.train), ("validate", split.validation)):
                if not images:
                    raise InputError(
                        f"the dataset's split has no images to {name} on: "
                        "name images with --train-list and --val-list"
                    )
            return split
        held_out = _VALIDATION + _TEST
        if len(self.images) <= held_out:
            raise InputError(
                f"{len(self.images)} images are too few to hold out the last {held_out} for "
                "validation and testing: name images with --train-list and --val-list, or give "
                "another dataset with --val-data"
            )
        images = self.images
        return Split(images[:-held_out], images[-held_out:-_TEST], images[-_TEST:])

    def choose(self, split: str) -> list[CaptionedImage]:
        """The images of a split, or all of them.

        Args:
            split: ``train``, ``val`` or ``test`` as :meth:`split` does without lists, or ``all``.

        Raises:
            InputError: there are no such images, or too few to split.
        """
        if split == "all":
            return self.images
        if self.splits is not None:
            images = self.of_split(split)
        elif len(self.images) > _VALIDATION + _TEST:
            parts = self._own_split()
            images = {"train": parts.train, "val": parts.validation, "test": parts.test}[split]
        else:
            raise InputError(
                f"{len(self.images)} images are too few to split: use --split all, or name images "
                "with --list"
            )
        if not images:
            raise InputError(f"the dataset has no split {split}: use another --split, or --list")
        return images

    @property
    def default_split(self) -> str:
        """What to evaluate on: ``all`` of a file that is one split itself, else ``test``."""
        return "all" if self.is_whole else "test"

    def of_split(self, split: str) -> list[CaptionedImage]:
        """The images of the dataset's own split ``train``, ``val`` or ``test``."""
        splits = self.splits or itertools.repeat(None)
        return [image for image, own in zip(self.images, splits, strict=False) if own == split]

    def describe(self, split: Split) -> str:
        """How many images are trained and validated on, and what was left out: one line."""
        left_out = {
            "images without a caption": self.without_caption,
            "captioned images that are not there": self.without_image,
            "names that fit several images": self.ambiguous,
            "empty captions": self.empty_captions,
        }
        text = f"{len(split.train)} images to train on, {len(split.validation)} to validate on"
        if split.test:
            text += f", {len(split.test)} for testing"
        if self.repeated_captions:
            text += f"; {self.repeated_captions} captions repeat one of the same image"
        if any(left_out.values()):
            text += "; left out: "
            text += ", ".join(f"{count} {what}" for what, count in left_out.items() if count)
        return text

    def listed(self, uri: str, *, allow_missing: bool = False) -> list[CaptionedImage]:
        """The images that a file names, one name a line."""
        return named_images(uri, self.images, allow_missing=allow_missing)


def read_dataset(
    source: str,
    images_directory: str | None = None,
    *,
    needed: Collection[str] | None = None,
    allow_missing: bool = False,
) -> Dataset:
    """Reads captioned images.

    Args:
        source: a folder with ``Images/`` and ``captions.txt`` (CSV with columns ``image,caption``);
            or a JSON file: COCO's captions (``captions_train2017.json``), or Karpathy's split
            (``dataset_coco.json``).
        images_directory: where the images are, in folders or not; by default ``Images/`` in the
            folder, or the JSON file's own folder.
        needed: which of ``train``, ``val`` and ``test`` are needed, where the table has splits;
            None: all of them. The images of the others may be missing.
        allow_missing: accept a table of which more than half of the images are not found.

    Raises:
        InputError: there is no such table or directory, the table is damaged, none of its images is
            found with a caption, more than half of them are not found, or an image is in two
            splits.
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
    hint = "" if images_directory else " (--images says where the images are)"
    exclude = Exclusion(PROGRAMS_FILES).match
    try:  # Of any ending: the table says which files are images.
        files = [listed.uri for listed in storage.find(directory, ("",), exclude=exclude)]
    except InputError as error:
        raise InputError(f"{error}{hint}") from error
    gathered = Gathering(table, directory, files)
    for entry in entries:
        gathered.add(entry)
    gathered.check(needed, allow_missing=allow_missing, hint=hint)
    # All images of a folder should have captions. Those of a JSON file may be among others.
    endings = ListingConfig().endings
    pictures = [] if is_json else [uri for uri in files if uri.lower().endswith(endings)]
    own = [split for split in gathered.splits.values() if split is not None]
    return Dataset(
        images=list(gathered.kept.values()),
        empty_captions=gathered.empty_captions,
        without_image=len(gathered.missing),
        without_caption=gathered.without_caption(pictures),
        splits=own or None,
        ambiguous=len(gathered.ambiguous),
        repeated_captions=gathered.repeated_captions,
        is_whole=is_json and not own,
    )
