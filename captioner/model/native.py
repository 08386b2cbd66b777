"""Captions batches of images with a trained model, without Ray and without files."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from captioner import storage
from captioner.config import DecodeConfig
from captioner.model.bundle import Bundle
from captioner.model.folding import fold_batch_norm
from captioner.model.generate import Hypothesis, generate
from captioner.model.words import join_logprobs, join_maps
from captioner.runtime.device import choose_device, choose_dtype
from captioner.runtime.memory import keep_few_kernels, keep_freed_memory

__all__ = ["Blur", "Caption", "Captioner"]

_IMAGES_PER_THREAD = 4  # that a CPU encodes at once

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caption:
    """A caption.

    Attributes:
        text: the caption as people read it; not always the words joined by spaces.
        tokens: the words.
        token_logprobs: the natural log-probability of each word.
        score: the mean natural log-probability of the words, or subwords, and of the end.
        attention_THW: a map for each word; or one map, the mean over the words, or subwords, and
            the end, as in the notebook's overlay; None if the decode settings ask for no maps.
        ended: whether the model ended the caption before the length limit.
    """

    text: str
    tokens: list[str]
    token_logprobs: list[float]
    score: float
    attention_THW: np.ndarray | None
    ended: bool = True


class Blur:
    """Smooths attention maps by a Gaussian; what lies outside of the image counts as 0.

    A cell of an encoder's grid has seen more than its own pixels, and attention is often drawn to a
    single cell at the edge of a thing, or of the photo.

    Args:
        deviation: standard deviation of the Gaussian in cells; 0 leaves maps as they are.
        grid: height and width of the maps.
    """

    def __init__(self, deviation: float, grid: tuple[int, int]):
        self._weights: list[np.ndarray] = []
        if deviation:
            for cells in grid:
                distances = np.subtract.outer(np.arange(cells), np.arange(cells)) / deviation
                self._weights.append(np.exp(-(distances**2) / 2).astype(np.float32))

    def __call__(self, maps_THW: np.ndarray) -> np.ndarray:
        """The maps, each with its old sum."""
        if not self._weights:
            return maps_THW
        rows_HH, columns_WW = self._weights
        blurred: np.ndarray = rows_HH @ maps_THW @ columns_WW
        blurred *= (maps_THW.sum((1, 2)) / blurred.sum((1, 2)))[:, None, None]
        return blurred


def _cache_compiled_code() -> None:
    """Caches compiled code in the user's cache directory unless TORCHINDUCTOR_CACHE_DIR is set.

    torch's default is in the directory for temporary files, where other users can write.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    variable = "TORCHINDUCTOR_CACHE_DIR"
    if os.environ.get(variable, default_cache_dir()) == default_cache_dir():
        os.environ[variable] = str(storage.cache_directory("compiled"))


class Captioner:
    """Captions batches of images with one model on one device.

    The bundle's model is moved to the device and its BatchNorm layers are folded, which
    makes the bundle unusable for anything else.

    Args:
        bundle: the model.
        decode: what decides the captions.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        compiled: compile the encoder for this machine, which takes seconds and makes it faster.
            On a CPU that happens here, on a GPU at the first batch and at each larger batch. If
            the compilation fails, the encoder runs uncompiled.
    """

    def __init__(
        self,
        bundle: Bundle,
        decode: DecodeConfig | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        compiled: bool = False,
    ):
        self.decode = decode or DecodeConfig()
        self.vocabulary = bundle.vocabulary
        self.image_size, self.grid = bundle.config.image_size, bundle.grid
        self._blur = Blur(bundle.config.attention_blur, bundle.grid)
        keep_few_kernels()
        self.device = choose_device(device)
        self.dtype = choose_dtype(precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = bundle.model.eval()
        fold_batch_norm(self.model.encoder, self.image_size)
        self.model.to(self.device, self.dtype)
        self.model.encoder.to(memory_format=torch.channels_last)
        self._compiles = compiled
        self._compiled: Callable[[Tensor], Tensor] = self.model.encoder
        self._compiled_for: list[int] = []  # batch sizes
        if compiled and self._encodes_in_parts:
            self._compile(self._part_size)

    @torch.no_grad()
    def __call__(self, images_BHW3: np.ndarray) -> list[Caption]:
        """Captions uint8 RGB images ``(B, size, size, 3)``, ``size`` being ``image_size``."""
        images = torch.from_numpy(images_BHW3)
        if self.device.type == "cuda":
            images = images.pin_memory()  # makes the copy asynchronous
        images = images.to(self.device, non_blocking=True)
        features_BhwC = torch.cat([self._encode(part) for part in self._parts(images)])
        hypotheses = generate(self.model.decoder, features_BhwC, self.decode)
        return [self._caption(hypothesis) for hypothesis in hypotheses]

    @property
    def _encodes_in_parts(self) -> bool:
        """Whether a batch is encoded in parts, which on a CPU saves RAM and costs no time."""
        return self.device.type == "cpu"

    def _parts(self, images: Tensor) -> Sequence[Tensor]:
        return torch.split(images, self._part_size) if self._encodes_in_parts else [images]

    @property
    def _part_size(self) -> int:
        return _IMAGES_PER_THREAD * torch.get_num_threads()

    def _encode(self, images_BHW3: Tensor) -> Tensor:
        count = len(images_BHW3)
        if self._compiles and count > max(self._compiled_for, default=0):
            self._compile(count)
        # Compiled code takes a fixed number of images. A batch that was halved because the GPU ran
        # out of memory must not be padded to its former size.
        sizes = [
            s
            for s in self._compiled_for
            if count <= s and (self._encodes_in_parts or s < 2 * count)
        ]
        if not sizes:
            return self.model.encoder(images_BHW3)  # type: ignore[no-any-return]
        filled = F.pad(images_BHW3, (0, 0, 0, 0, 0, 0, 0, min(sizes) - count))
        features: Tensor = self._compiled(filled)
        return features[:count]

    def _compile(self, images: int) -> None:
        shape = (images, self.image_size, self.image_size, 3)
        blank = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        try:
            import torch._inductor.config as inductor

            _cache_compiled_code()
            self._compiled = torch.compile(self.model.encoder, dynamic=False)
            # Freezing makes the weights constants. It has no effect as an option of torch.compile
            # or in inference mode.
            with inductor.patch(freezing=True), torch.no_grad():
                self._compiled(blank)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # a compiler that torch calls fails or is not installed
            reason = str(problem).strip().splitlines()
            _logger.warning(
                "cannot compile the encoder, which runs uncompiled: %s",
                reason[0] if reason else type(problem).__name__,
            )
            self._compiles, self._compiled_for = False, []
        else:
            self._compiled_for.append(images)

    def _caption(self, hypothesis: Hypothesis) -> Caption:
        text, words, members = self.vocabulary.split(hypothesis.ids)
        count = len(hypothesis.ids)
        logprobs, maps_THW = hypothesis.logprobs[:count], None
        is_split = members != [[place] for place in range(count)]  # a word into subwords
        if is_split:
            logprobs = join_logprobs(logprobs, members)
        if hypothesis.attention_SP is not None:
            maps_THW = self._blur(hypothesis.attention_SP.reshape(-1, *self.grid))
            if self.decode.attention == "mean":
                maps_THW = maps_THW.mean(0, keepdims=True)
            elif is_split:
                maps_THW = join_maps(maps_THW[:count], members)
            else:
                maps_THW = maps_THW[:count]
        return Caption(
            text=text,
            tokens=words,
            token_logprobs=logprobs,
            score=float(np.mean(hypothesis.logprobs)),
            attention_THW=maps_THW,
            ended=hypothesis.ended,
        )
