"""Generates captions with a pretrained model, and runs the model again on finished captions.

The second pass, the replay, gives the log-probabilities and the attention maps of a caption.

Shapes: B images, L tokens of a sequence, K of them the caption's, P patches of the image.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from captioner.model.huggingface.families import Family
from captioner.model.huggingface.replay import (
    MapHooks,
    StepMaps,
    layers_of,
    token_logprobs,
    with_attention_matrix,
)

__all__ = [
    "Architecture",
    "BaseArchitecture",
    "Generated",
    "Inputs",
    "Replayed",
    "image_columns",
    "image_token",
    "prefix",
    "square",
]

Inputs = dict[str, Any]


@dataclass
class Generated:
    """Sequences as a model wrote them; the caption's tokens begin at ``start``.

    ``given`` of the caption's tokens were the prompt's. ``state`` is what a replay reuses.
    """

    sequences_BL: Tensor
    start: int
    given: int
    state: Any = None


@dataclass
class Replayed:
    """Log-probabilities of the caption's tokens, and where asked for their maps, for each image."""

    logprobs_BK: Tensor
    maps_BKP: list[Tensor] | None
    grids: list[tuple[int, int]]


class Architecture(Protocol):
    """A kind of model."""

    generator: Any
    """The module whose ``generate`` runs."""

    def context(self) -> int:
        """The longest sequence, in tokens."""

    def generate(self, inputs: Inputs, config: Any, processors: LogitsProcessorList) -> Generated:
        """Generates a caption for each image."""

    def step_maps(self) -> StepMaps | None:
        """Collects maps during generation; None where only a replay computes the matrix."""

    def replay(self, inputs: Inputs, generated: Generated, *, maps: bool) -> Replayed:
        """Gives finished captions to the model."""


def prefix(inputs: Inputs, start_token: int) -> Tensor:
    """The start token and the prompt's tokens, ``(B, 1 + given)``."""
    pixels = inputs["pixel_values"]
    start_B1 = torch.full((len(pixels), 1), start_token, device=pixels.device)
    return torch.cat([start_B1, inputs["input_ids"]], 1) if "input_ids" in inputs else start_B1


def square(patches: int) -> tuple[int, int]:
    """The height and width of a square grid."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise RuntimeError(f"{patches} image tokens are not a square")
    return side, side


class BaseArchitecture:
    """What the architectures share: the maps and log-probabilities of a replay."""

    def __init__(self, family: Family, model: Any):
        self.family, self.model, self.generator = family, model, model
        self._layers = layers_of(model, family.attentions) if family.attentions else []
        self._language = model.get_submodule(family.language)

    def context(self) -> int:
        """The longest sequence, in tokens."""
        text = self.model.config.get_text_config(decoder=True)
        return int(text.max_position_embeddings)

    def step_maps(self) -> StepMaps | None:
        """None: the matrix is computed in a replay alone."""
        return None

    def _maps(self, rows: int, columns_BP: Tensor | None, forward: Any) -> tuple[Any, Any]:
        """The logits of a forward pass, and its maps where columns are given."""
        if columns_BP is None:
            return forward().logits[:, -rows:], None
        hooks = MapHooks(self._layers, rows, columns_BP)
        with with_attention_matrix(self._language), hooks:
            logits_BKV = forward().logits[:, -rows:]
        return logits_BKV, hooks.mean_maps()

    def _replayed(self, generated: Generated, columns_BP: Tensor | None, forward: Any) -> Replayed:
        tokens_BK = generated.sequences_BL[:, generated.start :]
        logits_BKV, maps_BKP = self._maps(tokens_BK.shape[1], columns_BP, forward)
        logprobs_BK = token_logprobs(logits_BKV, tokens_BK)
        if columns_BP is None:
            return Replayed(logprobs_BK, None, [])
        grid = square(columns_BP.shape[1])
        return Replayed(logprobs_BK, list(maps_BKP), [grid] * len(tokens_BK))


def image_token(model: Any) -> int:
    """The id of the token that stands for a patch of the image."""
    config = model.config
    token = getattr(config, "image_token_id", None)
    return int(config.image_token_index if token is None else token)


def image_columns(ids_BL: Tensor, token: int) -> Tensor:
    """Where the image's tokens are, ``(B, P)``, each row having the same number."""
    where = (ids_BL == token).nonzero()[:, 1]
    return where.view(len(ids_BL), -1)
