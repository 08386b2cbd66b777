"""Features of images from a frozen encoder, computed once and cached on this machine's disk.

Each file has the features of a few hundred images. Its name depends on the encoder's weights, the
images and their versions, and the view. A killed run resumes with the next file; for added images,
only their own features are computed. A file records for each image whether it could be read. The
next run computes a file with an unreadable image again, because the disk or the bucket may work
again.

The size of the cache is limited: before the run writes new files, it deletes the least recently
used files that it does not need until all fit into 50 GB. A single run may need more.
"""

import copy
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from captioner import storage
from captioner.data import images
from captioner.data.dataset import CaptionedImage
from captioner.data.preparation import Preparation
from captioner.data.views import _decode_view
from captioner.errors import OutputError
from captioner.model.encoder import ImageEncoder
from captioner.runtime.prefetch import map_ahead
from captioner.runtime.progress import Progress, progress_bar

__all__ = ["Features", "compute_features"]

_CHUNK = 512  # images a file
_MOST_BYTES = 50 * 10**9  # of the cache; a run's own files may take more
_ASKING = 32  # threads that ask for versions: mostly waiting, for a bucket
_DECODED, _UNDECODABLE, _UNREADABLE = range(3)  # what a file says of an image

_File = tuple[Path, Sequence[CaptionedImage]]  # a file, and the images whose features it holds


class Features:
    """Float16 features of images in files that are memory-mapped."""

    def __init__(self, paths: Sequence[Path]):
        # np.load would keep a descriptor of each: there are more files than a process may open.
        self._files: list[Any] = [safe_open(path, framework="numpy") for path in paths]
        statuses = np.concatenate([file.get_tensor("statuses") for file in self._files])
        self._decodable: np.ndarray = statuses == _DECODED

    def __getitem__(self, image: int) -> np.ndarray:
        """The features ``(h, w, C)`` of an image; all NaN where it is not decodable."""
        chunk, row = divmod(image, _CHUNK)
        features: np.ndarray = self._files[chunk].get_slice("features")[row]
        return features

    def decodable(self) -> np.ndarray:
        """Whether each image could be read and decoded."""
        return self._decodable


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
    """The features of each image, from the user's cache directory if they are there.

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

    Raises:
        OutputError: the cache directory has no room for them, or cannot be written.
    """
    cache = _make_cache()
    preparation = replace(Preparation.of(encoder.config), size=image_size)
    kinds = [_View(number, preparation, augmentation) for number in range(views)]
    by_view = _files(cache, encoder, examples, kinds, dtype)
    # Rounding the model itself would change what is trained and kept, and the names of the files.
    converted = copy.deepcopy(encoder).to(dtype).to(memory_format=torch.channels_last)
    rank, processes = share
    _make_room(cache, converted, [each for files in by_view for each in files], trims=rank == 0)
    features = []
    for view, files in zip(kinds, by_view, strict=True):
        compute = partial(_compute_files, converted, view=view, batch_size=batch_size)
        compute([each for each in files[rank::processes] if not _is_complete(each[0])])
        if wait is not None:
            wait()
        # To another process an image may have had another version, and the file another name.
        compute([each for each in files if not each[0].exists()])
        features.append(Features([path for path, _ in files]))
    return features


@dataclass(frozen=True)
class _View:
    """A version of each image: the image, its mirror image, or a random crop."""

    number: int
    preparation: Preparation
    augmentation: str

    def key(self, dtype: torch.dtype) -> str:
        """What decides the features of this version besides the image and the encoder."""
        size = self.preparation.size
        key = f"{size} {self.number} {dtype} {images.PREPROCESSING_VERSION} "
        if self.number > 1 and self.augmentation != "crops":
            key += f"{self.augmentation} "
        if self.preparation.interpolation != "bilinear":
            key += f"{self.preparation.interpolation} "
        return key

    def load(self, example: CaptionedImage) -> tuple[np.ndarray, int]:
        """The pixels ``(size, size, 3)`` and the status of an image; without any it is black."""
        blank = np.zeros((*self.preparation.target(1, 1), 3), np.uint8)
        try:
            data = storage.read(example.uri)
        except OSError:
            return blank, _UNREADABLE
        pixels = _decode_view(data, example.uri, self.preparation, self.number, self.augmentation)
        return (blank, _UNDECODABLE) if pixels is None else (pixels, _DECODED)


def _make_cache() -> Path:
    cache = storage.cache_directory("features")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write features to {cache}: {error.strerror or error}") from error
    return cache


def _files(
    cache: Path,
    encoder: ImageEncoder,
    examples: Sequence[CaptionedImage],
    views: Sequence[_View],
    dtype: torch.dtype,
) -> list[list[_File]]:
    """The files of each view, which may not exist yet."""
    chunks = [examples[i : i + _CHUNK] for i in range(0, len(examples), _CHUNK)]
    versions = [_versions(chunk) for chunk in chunks]
    fingerprint = _fingerprint(encoder)
    by_view = []
    for view in views:
        paths = [cache / _file_name(view.key(dtype) + fingerprint, each) for each in versions]
        by_view.append(list(zip(paths, chunks, strict=True)))
    return by_view


def _make_room(
    cache: Path,
    encoder: ImageEncoder,
    files: Sequence[_File],
    *,
    trims: bool,
) -> None:
    """Trims the cache for the files that a run has yet to write, if it is this process's task.

    Raises:
        OutputError: the disk has no room for them.
    """
    for path, _ in files:
        storage.mark_used(path)
    missing = sum(len(chunk) for path, chunk in files if not path.exists())
    if not missing:
        return
    with torch.inference_mode():
        needed = missing * 2 * encoder.encode_blank_image().numel()
    if trims:
        storage.trim(cache, _MOST_BYTES - needed, [path for path, _ in files])
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise OutputError(
            f"features take {needed / 1e9:.1f} GB, and {cache} has {free / 1e9:.1f} GB free: "
            "free space with captioner cache clear, use fewer --views, or set XDG_CACHE_HOME to a "
            "directory on another disk"
        )


def _compute_files(
    encoder: ImageEncoder,
    files: Sequence[_File],
    *,
    view: _View,
    batch_size: int,
) -> None:
    if not files:
        return
    total = sum(len(chunk) for _, chunk in files)
    description = "features" if view.number == 0 else f"features, view {view.number + 1}"
    with progress_bar(total, unit="image", description=description) as progress:
        for path, chunk in files:
            encoded = _encode(encoder, chunk, view.load, batch_size, progress)
            temporary = path.with_suffix(f".tmp-{os.getpid()}")
            try:
                save_file(encoded, temporary)
                os.replace(temporary, path)
            except (OSError, SafetensorError) as error:
                temporary.unlink(missing_ok=True)
                raise OutputError(f"cannot write features to {path.parent}: {error}") from error


def _encode(
    encoder: ImageEncoder,
    examples: Sequence[CaptionedImage],
    load: Callable[[CaptionedImage], tuple[np.ndarray, int]],
    batch_size: int,
    progress: Progress,
) -> dict[str, np.ndarray]:
    """What a file holds: ``features`` ``(images, h, w, C)`` and the ``statuses`` of the images."""
    device = next(encoder.parameters()).device
    encoded, statuses = [], []
    loaded = map_ahead(load, examples, os.cpu_count() or 1)
    for begin in range(0, len(examples), batch_size):
        batch = [next(loaded) for _ in examples[begin : begin + batch_size]]
        pixels = torch.from_numpy(np.stack([each for each, _ in batch]))
        with torch.inference_mode():
            encoded.append(encoder(pixels.to(device)).half().contiguous().cpu().numpy())
        statuses += [status for _, status in batch]
        progress.update(len(batch))
    features = np.concatenate(encoded)
    features[np.array(statuses) != _DECODED] = np.nan
    return {"features": features, "statuses": np.array(statuses, np.uint8)}


def _is_complete(path: Path) -> bool:
    """Whether there is such a file, undamaged, and all of its images could be read."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="numpy") as file:
            return _UNREADABLE not in file.get_tensor("statuses")
    except SafetensorError:
        return False


def _fingerprint(encoder: ImageEncoder) -> str:
    digest = hashlib.sha256(encoder.config.backbone.encode())
    tensors = {**encoder.state_dict(), "mean": encoder.mean, "std": encoder.std}
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _versions(examples: Sequence[CaptionedImage]) -> str:
    uris = [each.uri for each in examples]
    versions = map_ahead(storage.version, uris, _ASKING)
    return "".join(f"{uri} {version}\n" for uri, version in zip(uris, versions, strict=True))


def _file_name(settings: str, versions: str) -> str:
    return hashlib.sha256((settings + versions).encode()).hexdigest()[:32] + ".safetensors"
