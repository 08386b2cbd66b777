"""A batch of images in, captions with attention maps out. Knows no Ray and no files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from captioner.bundle import Bundle
from captioner.config import DecodeConfig
from captioner.errors import InputError
from captioner.generate import Hypothesis, generate
from captioner.memory import keep_few_kernels, keep_freed_memory

__all__ = ["Caption", "Captioner", "choose_device", "choose_dtype"]

_IMAGES_A_THREAD = 4  # that go through the encoder at once on a CPU


@dataclass(frozen=True)
class Caption:
    """A caption.

    ``score`` is the mean natural log-probability of the words and of the end. ``attention_TGG``
    has a map for each word, or one map, the mean over the words and the end, as in the notebook's
    overlay; it is None where the decode settings ask for none.
    """

    tokens: list[str]
    token_logprobs: list[float]
    score: float
    attention_TGG: np.ndarray | None

    @property
    def text(self) -> str:
        """The words, joined by spaces."""
        return " ".join(self.tokens)


def choose_device(name: str) -> torch.device:
    """The device of that name; for ``auto`` a GPU where there is one.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where CUDA is not compiled in
        raise InputError(f"no device {name!r} here") from error
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in: for ``auto``, bfloat16 where the hardware multiplies in it."""
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if device.type == "cuda":
        hardware = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        hardware = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    else:
        hardware = False
    return torch.bfloat16 if hardware else torch.float32


class Captioner:
    """Captions batches of images with one model on one device."""

    def __init__(
        self,
        bundle: Bundle,
        decode: DecodeConfig | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
    ):
        self.decode = decode or DecodeConfig()
        self.vocabulary = bundle.vocabulary
        self.image_size = bundle.config.image_size
        keep_few_kernels()
        self.device = choose_device(device)
        self.dtype = choose_dtype(precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = bundle.model.eval().to(self.device, self.dtype)
        self.model.encoder.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images_BHW3: np.ndarray) -> list[Caption]:
        """Captions uint8 RGB images ``(B, size, size, 3)``, ``size`` being ``image_size``."""
        images = torch.from_numpy(images_BHW3).to(self.device, non_blocking=True)
        features_BhwC = torch.cat([self.model.encoder(part) for part in self._parts(images)])
        hypotheses = generate(self.model.decoder, features_BhwC, self.decode)
        return [self._caption(hypothesis) for hypothesis in hypotheses]

    def _parts(self, images: Tensor) -> Sequence[Tensor]:
        """A batch in parts: on a CPU more images at once take more memory and no less time."""
        if self.device.type != "cpu":
            return [images]
        return torch.split(images, _IMAGES_A_THREAD * torch.get_num_threads())

    def _caption(self, hypothesis: Hypothesis) -> Caption:
        words, maps_SP = len(hypothesis.ids), hypothesis.attention_SP
        if maps_SP is not None:
            mean = self.decode.attention == "mean"
            maps_SP = maps_SP.mean(0, keepdims=True) if mean else maps_SP[:words]
            side = math.isqrt(maps_SP.shape[1])
            maps_SP = maps_SP.reshape(-1, side, side)
        return Caption(
            tokens=self.vocabulary.words(hypothesis.ids),
            token_logprobs=hypothesis.logprobs[:words],
            score=float(np.mean(hypothesis.logprobs)),
            attention_TGG=maps_SP,
        )
