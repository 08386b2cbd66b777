"""What a frozen encoder makes of the images, computed once and kept on this machine's disk.

The features stand in files of a few hundred images, each named for all that they depend on: the
encoder's weights, the images and their versions, the view. A job that was killed goes on with the
next file; images that were added cost no more than themselves.
"""

import copy
import hashlib
import math
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from captioner import images, storage
from captioner.dataset import CaptionedImage, ahead
from captioner.model import ImageEncoder
from captioner.progress import progress_bar

__all__ = ["Features", "compute_features", "load_view"]

_CHUNK = 512  # images a file
_LEAST_CROP = 0.7  # of the height and of the width
_LARGEST_CHANGE = 0.35  # of brightness, contrast and saturation
_ERASED = 0.6  # of the views
_ERASED_AREA = (0.02, 0.12)  # of the image
_LUMA = np.array((0.299, 0.587, 0.114), np.float32)


def load_view(uri: str, size: int, view: int, augmentation: str = "crops") -> np.ndarray | None:
    """One of the versions of an image that are trained on: pixels ``(size, size, 3)``.

    View 0 is the image itself. Odd views are mirrored; from view 2 on they are crops, chosen by the
    view's number and the file's name. With ``strong`` augmentation these crops differ in
    brightness, contrast and saturation too (not in hue: captions name colours), and most have a
    rectangle erased (Zhong et al. 2017). None where the image cannot be read or decoded.
    """
    try:
        data = storage.read(uri)
    except OSError:
        return None
    if view < 2:
        pixels_HW3 = images.decode(data, size).pixels_HW3
    else:
        generator = random.Random(f"{view} {uri.rsplit('/', 1)[-1]}")  # noqa: S311
        enlarged = round(size / generator.uniform(_LEAST_CROP, 1))
        pixels_HW3 = images.decode(data, enlarged).pixels_HW3
        if pixels_HW3 is not None:
            top, left = (generator.randint(0, enlarged - size) for _ in range(2))
            pixels_HW3 = pixels_HW3[top : top + size, left : left + size]
            if augmentation == "strong":
                pixels_HW3 = _change(pixels_HW3, generator)
    if pixels_HW3 is not None and view % 2:
        pixels_HW3 = pixels_HW3[:, ::-1]
    return None if pixels_HW3 is None else np.ascontiguousarray(pixels_HW3)


def _change(pixels_HW3: np.ndarray, generator: random.Random) -> np.ndarray:
    brightness, contrast, saturation = (
        generator.uniform(1 - _LARGEST_CHANGE, 1 + _LARGEST_CHANGE) for _ in range(3)
    )
    grey_HW1 = (pixels_HW3 @ _LUMA)[..., None]
    values_HW3 = grey_HW1 + (pixels_HW3 - grey_HW1) * saturation
    middle = grey_HW1.mean()
    values_HW3 = (middle + (values_HW3 - middle) * contrast) * brightness
    if generator.random() < _ERASED:
        size = len(values_HW3)
        area, aspect = generator.uniform(*_ERASED_AREA), generator.uniform(0.5, 2)
        height, width = (round(size * math.sqrt(area * each)) for each in (aspect, 1 / aspect))
        top, left = generator.randint(0, size - height), generator.randint(0, size - width)
        values_HW3[top : top + height, left : left + width] = 127
    changed: np.ndarray = values_HW3.clip(0, 255).astype(np.uint8)
    return changed


class Features:
    """Float16 features of images in files that are memory-mapped."""

    def __init__(self, paths: Sequence[Path]):
        # np.load would keep a descriptor of each: there are more files than a process may open.
        self._files: list[Any] = [safe_open(path, framework="numpy") for path in paths]
        first = [file.get_slice("features")[:, 0, 0, 0] for file in self._files]
        self._decodable = ~np.isnan(np.concatenate(first))
        self._rows = np.arange(len(self._decodable))

    def __getitem__(self, image: int) -> np.ndarray:
        """The features ``(h, w, C)`` of an image; all NaN where it cannot be decoded."""
        chunk, row = divmod(int(self._rows[image]), _CHUNK)
        features: np.ndarray = self._files[chunk].get_slice("features")[row]
        return features

    def select(self, images: np.ndarray) -> "Features":
        """The features of some of the images, which are counted anew."""
        selected = copy.copy(self)
        selected._rows = self._rows[images]
        return selected

    def decodable(self) -> np.ndarray:
        """Whether each image could be decoded."""
        decodable: np.ndarray = self._decodable[self._rows]
        return decodable


def compute_features(
    encoder: ImageEncoder,
    examples: Sequence[CaptionedImage],
    *,
    image_size: int,
    views: int = 1,
    augmentation: str = "crops",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] | None = None,
) -> list[Features]:
    """The features of each image, from the user's cache directory where they stand there already.

    Args:
        encoder: in eval mode; it is left as it is.
        examples: the images.
        image_size: their height and width.
        views: how many versions of each image; see :func:`load_view`.
        augmentation: see :func:`load_view`.
        dtype: to compute in.
        batch_size: images a forward pass.
        share: this process and how many there are on this machine: each computes some files.
        wait: returns when all of them are done; needed where there are several.

    Returns:
        The features of each view.
    """
    cache = storage.cache_directory("features")
    cache.mkdir(parents=True, exist_ok=True)
    chunks = [examples[i : i + _CHUNK] for i in range(0, len(examples), _CHUNK)]
    versions = [_versions(chunk) for chunk in chunks]
    fingerprint = _fingerprint(encoder)
    # Rounding the model itself would change what is trained and kept, and the names of the files.
    converted = copy.deepcopy(encoder).to(dtype).to(memory_format=torch.channels_last)
    rank, processes = share
    features = []
    for view in range(views):
        settings = f"{image_size} {view} {dtype} {images.PREPROCESSING_VERSION} "
        if view > 1 and augmentation != "crops":
            settings += f"{augmentation} "
        paths = [cache / _file_name(settings + fingerprint, each) for each in versions]
        files = list(zip(paths, chunks, strict=True))
        compute = partial(
            _compute_files,
            converted,
            view=view,
            image_size=image_size,
            augmentation=augmentation,
            batch_size=batch_size,
        )
        compute([each for each in files[rank::processes] if not each[0].exists()])
        if wait is not None:
            wait()
        # To another process an image may have had another version, and the file another name.
        compute([each for each in files if not each[0].exists()])
        features.append(Features(paths))
    return features


def _compute_files(
    encoder: ImageEncoder,
    files: Sequence[tuple[Path, Sequence[CaptionedImage]]],
    *,
    view: int,
    image_size: int,
    augmentation: str,
    batch_size: int,
) -> None:
    if not files:
        return
    load = partial(load_view, size=image_size, view=view, augmentation=augmentation)
    total = sum(len(chunk) for _, chunk in files)
    description = "features" if view == 0 else f"features, view {view + 1}"
    with progress_bar(total, unit="image", description=description) as progress:
        for path, chunk in files:
            encoded = _encode(encoder, chunk, load, image_size, batch_size, progress)
            temporary = path.with_suffix(f".tmp-{os.getpid()}")
            save_file({"features": encoded}, temporary)
            os.replace(temporary, path)


def _encode(
    encoder: ImageEncoder,
    examples: Sequence[CaptionedImage],
    load: Callable[[str], np.ndarray | None],
    image_size: int,
    batch_size: int,
    progress: "tqdm[NoReturn]",
) -> np.ndarray:
    device = next(encoder.parameters()).device
    blank = np.zeros((image_size, image_size, 3), np.uint8)
    encoded = []
    loaded = ahead(lambda example: load(example.uri), examples, os.cpu_count() or 1)
    for begin in range(0, len(examples), batch_size):
        pixels = [next(loaded) for _ in examples[begin : begin + batch_size]]
        stacked = np.stack([blank if each is None else each for each in pixels])
        with torch.inference_mode():
            encoded_BhwC = encoder(torch.from_numpy(stacked).to(device))
            features = encoded_BhwC.half().contiguous().cpu().numpy()
        features[[each is None for each in pixels]] = np.nan
        encoded.append(features)
        progress.update(len(pixels))
    return np.concatenate(encoded)


def _fingerprint(encoder: ImageEncoder) -> str:
    digest = hashlib.sha256()
    tensors = {**encoder.state_dict(), "mean": encoder.mean, "std": encoder.std}
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _versions(examples: Sequence[CaptionedImage]) -> str:
    return "".join(f"{each.uri} {storage.version(each.uri)}\n" for each in examples)


def _file_name(settings: str, versions: str) -> str:
    return hashlib.sha256((settings + versions).encode()).hexdigest()[:32] + ".safetensors"
