"""The exponential moving average of a model's weights: validated and kept in the model's place."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from captioner.model.network import CaptionModel

__all__ = ["ExponentialMovingAverage"]


class ExponentialMovingAverage:
    """A copy of a model whose weights follow the model's.

    After ``n`` steps the decay is at most ``(1 + n) / (10 + n)``: the average soon forgets the
    weights that it started from (as in TensorFlow's ``ExponentialMovingAverage``).
    """

    def __init__(self, model: CaptionModel, decay: float):
        self._averaged = AveragedModel(model, multi_avg_fn=partial(_update, decay))

    @property
    def model(self) -> CaptionModel:
        """The model with the averaged weights."""
        return self._averaged.module  # type: ignore[return-value]

    def update(self, model: CaptionModel) -> None:
        """Moves the average towards the model's weights: once a step."""
        self._averaged.update_parameters(model)

    def restart(self) -> None:
        """Counts steps from 0 again."""
        self._averaged.n_averaged.zero_()

    def state(self) -> dict[str, Any]:
        """The averaged weights and the number of steps."""
        return self._averaged.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state` returned."""
        self._averaged.load_state_dict(state)


@torch.no_grad()
def _update(
    decay: float, averages: Sequence[Tensor], weights: Sequence[Tensor], steps: Tensor | int
) -> None:
    decay = min(decay, (1 + float(steps)) / (10 + float(steps)))
    for average, weight in zip(averages, weights, strict=True):
        average.lerp_(weight.to(average.dtype), 1 - decay)
