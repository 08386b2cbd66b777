"""The batches of an epoch: which images, which captions, which views."""

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from captioner.config import ModelConfig, TrainConfig
from captioner.data.dataset import CaptionedImage
from captioner.data.preparation import Preparation
from captioner.data.splits import Portion
from captioner.data.views import load_view
from captioner.model.tokenization import TokenizerKind
from captioner.model.vocabulary import PAD, Vocabulary
from captioner.training.features import Features

__all__ = [
    "Batch",
    "TrainingImages",
    "captions_to_encode",
    "collate",
    "plan_batches",
    "steps_per_epoch",
]


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


def captions_to_encode(
    image: CaptionedImage, which: str, kind: TokenizerKind
) -> list[str] | list[list[str]]:
    """The captions of an image to train on: texts, or the words that the dataset gives.

    Args:
        image: the image.
        which: ``first`` or ``all`` of its captions.
        kind: how the model splits captions; at white space it splits the texts itself.
    """
    captions = image.tokens if kind == "ptb" and image.tokens else image.captions
    return captions[:1] if which == "first" else captions


_SIDE = re.compile(r"(left|right)(most|wards?|hand|handed)?")


_LETTERS = re.compile(r"[^\W\d_]+")


def steps_per_epoch(portions: Sequence[Portion], batch_size: int) -> int:
    """How many batches :func:`plan_batches` makes."""
    return math.ceil(sum(portion.images_per_epoch for portion in portions) / batch_size)


def plan_batches(
    lengths: Sequence[int], config: TrainConfig, epoch: int, portions: Sequence[Portion] = ()
) -> list[list[int]]:
    """The batches of an epoch, whose sizes differ by one at most.

    Each image comes as often as the weight of its data set says, by default once. Where
    ``config.sort_batches`` is above 1, images with captions of like length come together, which
    leaves less padding; which images, and in what order, still is random.
    """
    generator = random.Random(f"{config.seed} {epoch}")  # noqa: S311
    order = _images_of_epoch(portions, generator) if portions else list(range(len(lengths)))
    generator.shuffle(order)
    if config.sort_batches > 1:
        window = config.batch_size * config.sort_batches
        windows = [order[begin : begin + window] for begin in range(0, len(order), window)]
        order = [index for each in windows for index in sorted(each, key=lengths.__getitem__)]
    count = math.ceil(len(order) / config.batch_size)
    bounds = [len(order) * i // count for i in range(count + 1)]
    batches = [order[begin:end] for begin, end in itertools.pairwise(bounds)]
    if config.sort_batches > 1:
        generator.shuffle(batches)
    return batches


def _images_of_epoch(portions: Sequence[Portion], generator: random.Random) -> list[int]:
    """The indices of the images to train on, each as often as its data set's weight says."""
    order: list[int] = []
    begin = 0
    for portion in portions:
        own = range(begin, begin + portion.train)
        order += [*own] * int(portion.weight)
        if portion.drawn:
            order += generator.sample(own, portion.drawn)
        begin += portion.train
    return order


@dataclass(frozen=True)
class Batch:
    """Some images: ``inputs`` are features ``(B, h, w, C)`` or images ``(B, size, size, 3)``.

    ``ids_RT`` are their captions and ``images`` their places in the source; an image that cannot be
    read is black, or has features of zeros, and has captions of nothing but padding.
    """

    inputs: Tensor
    ids_RT: Tensor
    images: list[int]

    @property
    def readable(self) -> Tensor:
        """Whether each image could be read: ``(B,)``."""
        return (self.ids_RT.view(len(self.images), -1) != PAD).any(1)

    @property
    def words(self) -> int:
        """How many words are predicted in the captions, their ends counted."""
        return int((self.ids_RT[:, 1:] != PAD).sum())


@dataclass
class TrainingImages:
    """The images to train on, or to validate on, with their encoded captions.

    Attributes:
        examples: the images and their captions.
        views: the features of each view, where the encoder is frozen; None computes them.
        model: the model's settings.
        vocabulary: the words of the captions.
        captions: ``first`` or ``all`` of an image's captions.
        augmentation: how crops are changed, see :class:`captioner.config.TrainConfig`.
        portions: the data sets that the images come from; by default one.
        unreadable: the URIs of images that could not be read or decoded. They stay in the plan of
            batches, so that it is the same for all workers and after a resume.
    """

    examples: Sequence[CaptionedImage]
    views: list[Features] | None
    model: ModelConfig
    vocabulary: Vocabulary
    captions: str = "all"
    augmentation: str = "crops"
    portions: Sequence[Portion] = ()
    unreadable: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not self.portions:
            self.portions = [Portion("", 1.0, len(self.examples), len(self.examples))]
        chosen = [e.captions[:1] if self.captions == "first" else e.captions for e in self.examples]
        encode = partial(self.vocabulary.encode, max_length=self.model.max_length)
        given = partial(captions_to_encode, which=self.captions, kind=self.vocabulary.kind)
        self.ids = [[encode(caption) for caption in given(e)] for e in self.examples]
        self.without_sides = [
            [ids for ids, text in zip(encoded, texts, strict=True) if not _names_a_side(text)]
            for encoded, texts in zip(self.ids, chosen, strict=True)
        ]
        self.lengths = [max(map(len, encoded)) for encoded in self.ids]
        for view in self.views or []:
            decodable = zip(self.examples, view.decodable(), strict=True)
            self.unreadable |= {example.uri for example, good in decodable if not good}

    def choose(self, image: int, view: int) -> tuple[int, list[list[int]]]:
        """The view to take in place of ``view``, and the captions that are true of it."""
        if view % 2 == 0 or len(self.without_sides[image]) == len(self.ids[image]):
            return view, self.ids[image]
        if self.without_sides[image]:
            return view, self.without_sides[image]
        return view - 1, self.ids[image]

    def batch(self, chosen: Sequence[tuple[int, int]]) -> Batch:
        """The images and views of ``chosen``."""
        inputs, sequences = [], []
        for image, view in chosen:
            true_view, captions = self.choose(image, view)
            values, readable = self._load(image, true_view)
            inputs.append(values)
            sequences.append(captions if readable else [[]])
        images = [image for image, _ in chosen]
        return Batch(torch.from_numpy(np.stack(inputs)), collate(sequences), images)

    def _load(self, image: int, view: int) -> tuple[np.ndarray, bool]:
        """Features or pixels, and whether the image could be read; without them zeros."""
        uri = self.examples[image].uri
        if self.views is not None:
            features = self.views[view][image]
            readable = uri not in self.unreadable
            return (features, True) if readable else (np.zeros_like(features), False)
        preparation = Preparation.of(self.model)
        pixels = load_view(uri, preparation, view, self.augmentation)
        if pixels is None:
            self.unreadable.add(uri)
            size = self.model.image_size
            return np.zeros((size, size, 3), np.uint8), False
        return pixels, True


def _names_a_side(caption: str) -> bool:
    return any(_SIDE.fullmatch(letters) for letters in _LETTERS.findall(caption.lower()))
