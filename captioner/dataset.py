"""Captioned images: the captions table, the split, features computed once, training batches."""

import hashlib
import io
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from captioner import images, storage
from captioner.config import ListingConfig
from captioner.errors import InputError
from captioner.model import ImageEncoder
from captioner.vocabulary import PAD, Vocabulary

__all__ = [
    "CaptionedImage",
    "Dataset",
    "Split",
    "ahead",
    "collate",
    "compute_features",
    "load_pixels",
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
            train, validation = self.listed(train_list), self.listed(validation_list)
            train_uris = {image.uri for image in train}
            if shared := sum(image.uri in train_uris for image in validation):
                raise InputError(f"{shared} images are in both {train_list} and {validation_list}")
            return Split(train, validation, [])
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


def load_pixels(uri: str, size: int) -> np.ndarray | None:
    """An image's pixels ``(size, size, 3)``; None where it cannot be read or decoded."""
    try:
        data = storage.read(uri)
    except OSError:
        return None
    return images.decode(data, size).pixels_HW3


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


def compute_features(
    encoder: ImageEncoder,
    uris: Sequence[str],
    *,
    image_size: int,
    dtype: torch.dtype,
    directory: str | None = None,
    batch_size: int = 32,
) -> np.ndarray:
    """A frozen encoder's features of all images: float16 ``(N, h, w, C)``, mapped from a file.

    The file is named for the encoder's weights and the images, and is used again when both are the
    same. The features of an image that cannot be decoded are all NaN.

    Args:
        encoder: in eval mode.
        uris: the images.
        image_size: their height and width.
        dtype: to compute in.
        directory: where the file goes; by default ``captioner`` in the user's cache directory.
        batch_size: images a forward pass.
    """
    cache = Path(directory or _cache_directory())
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{_features_key(encoder, uris, image_size, dtype)}.npy"
    if path.exists():
        return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]
    device = next(encoder.parameters()).device
    weights = next(encoder.parameters()).dtype
    encoder.to(dtype)
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    features: np.memmap | None = None
    threads = os.cpu_count() or 1
    batches = [range(i, min(i + batch_size, len(uris))) for i in range(0, len(uris), batch_size)]
    with tqdm(total=len(uris), unit="image", desc="features", disable=None) as progress:
        loaded = ahead(lambda uri: load_pixels(uri, image_size), uris, threads)
        for indices in batches:
            pixels = [next(loaded) for _ in indices]
            blank = np.zeros((image_size, image_size, 3), np.uint8)
            stacked = np.stack([blank if each is None else each for each in pixels])
            with torch.inference_mode():
                encoded = encoder(torch.from_numpy(stacked).to(device)).half().cpu().numpy()
            encoded[[each is None for each in pixels]] = np.nan
            if features is None:
                shape = (len(uris), *encoded.shape[1:])
                features = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
            features[indices.start : indices.stop] = encoded
            progress.update(len(indices))
    assert features is not None, "no images"
    features.flush()
    os.replace(temporary, path)
    encoder.to(weights)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "captioner" / "features"


def _features_key(
    encoder: ImageEncoder, uris: Sequence[str], image_size: int, dtype: torch.dtype
) -> str:
    digest = hashlib.sha256(f"{image_size} {dtype} {images.PREPROCESSING_VERSION}".encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().float().numpy().tobytes())
    for tensor in (encoder.mean, encoder.std):
        digest.update(tensor.cpu().float().numpy().tobytes())
    for uri in uris:
        digest.update(f"{uri} {storage.version(uri)}\n".encode())
    return digest.hexdigest()[:32]


def collate(captions: Sequence[Sequence[str]], vocabulary: Vocabulary, max_length: int) -> Tensor:
    """The captions of ``B`` images as padded ids ``(B·n, T)``, an image's rows together.

    ``n`` is the largest number of captions of an image here; what an image lacks is all padding.
    """
    n = max(map(len, captions))
    encoded = [
        vocabulary.encode(each[i], max_length) if i < len(each) else []
        for each in captions
        for i in range(n)
    ]
    ids = np.full((len(encoded), max(map(len, encoded))), PAD, dtype=np.int64)
    for row, sequence in enumerate(encoded):
        ids[row, : len(sequence)] = sequence
    return torch.from_numpy(ids)


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch's images."""
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)  # noqa: S311
    return order
