"""The interface of a model: images and prompts in, captions out.

A model has two states. A :class:`Model` is found but not loaded: it is small, can be pickled, and
knows its identity and how to prepare images. :meth:`Model.load` returns a :class:`LoadedModel`,
which holds the weights on a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from captioner.config import DecodeConfig
from captioner.data.preparation import Preparation

if TYPE_CHECKING:
    import torch

__all__ = ["Caption", "Finish", "LoadedModel", "Model"]

#: Why a caption ended: the model ended it, or it reached the largest number of tokens.
Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption.

    Attributes:
        text: the caption as people read it; not always the words joined by spaces.
        tokens: the caption's words.
        token_logprobs: each word's natural log-probability.
        score: mean natural log-probability of the generated tokens and of the caption's end.
        attention_THW: a map ``(H, W)`` for each word, or one map; None if no maps are kept. Each
            map sums to 1.
        finish: why the caption ended.
        captions: further captions of the image where several are sampled, this one first.
    """

    text: str
    tokens: list[str]
    token_logprobs: list[float]
    score: float
    attention_THW: np.ndarray | None
    finish: Finish = "stop"
    captions: list[str] = field(default_factory=list)


class LoadedModel(Protocol):
    """A model whose weights are on a device."""

    @property
    def device(self) -> "torch.device":
        """The device."""
        ...

    @property
    def dtype(self) -> "torch.dtype":
        """The type of number that the model computes in."""
        ...

    def caption(
        self, images: Sequence[np.ndarray], prompts: Sequence[str] | None = None
    ) -> list[Caption]:
        """Captions uint8 RGB images ``(H, W, 3)``, one caption each, in order.

        Args:
            images: the images, prepared as the model asks for.
            prompts: a prompt for each image; None uses the prompt of the decode settings, where
                nothing stands for the source's columns.
        """
        ...


class Model(Protocol):
    """A model that is found but not loaded."""

    @property
    def preparation(self) -> Preparation:
        """How decode workers prepare an image for this model."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """Everything about the model that can change a caption; part of a job's fingerprint."""
        ...

    @property
    def low_score(self) -> float | None:
        """The score below which a caption is probably wrong; None if nobody measured it."""
        ...

    def resolve(self, decode: DecodeConfig) -> DecodeConfig:
        """The settings with this model's own values where none are given.

        Raises:
            InputError: the model does not have a setting that is given, or a package is missing.
        """
        ...

    def load(
        self, decode: DecodeConfig, *, device: str, precision: str, compiled: bool = False
    ) -> LoadedModel:
        """Reads the weights onto a device.

        Args:
            decode: resolved settings.
            device: see :func:`captioner.runtime.device.choose_device`.
            precision: ``auto``, ``fp32`` or ``bf16``.
            compiled: compile what can be compiled.

        Raises:
            CaptionerError: the model cannot be loaded here.
        """
        ...
