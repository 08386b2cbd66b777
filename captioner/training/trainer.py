"""A model in training: steps of cross-entropy, epochs, the state that a resumed run needs.

The loss is the notebook's: cross-entropy of each next word, padding ignored. Self-critical training
is in :mod:`captioner.training.self_critical`, validation in :mod:`captioner.training.validation`.

The batches are the same on any number of workers: each worker draws the same plan of batches and
takes its share of every batch, and the sum of the workers' gradients is that of the whole batch.
Dropout and samples are each worker's own, and differ with the number of workers.

Shapes in names: as in :mod:`captioner.model.network`.
"""

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from captioner.config import TrainConfig
from captioner.errors import CaptionerError, InputError
from captioner.model.network import CaptionModel
from captioner.model.vocabulary import PAD, Vocabulary
from captioner.runtime import prefetch
from captioner.runtime.device import choose_device, choose_dtype
from captioner.runtime.memory import keep_freed_memory
from captioner.training.averaging import ExponentialMovingAverage
from captioner.training.batches import Batch, TrainingImages, plan_batches

__all__ = ["StepFigures", "Trainer", "caption_loss", "learning_rate_factor"]

_GROUPS = 2  # of AdamW: matrices and vectors; the encoder's own follow
_LOSS_ROWS = 256  # rows of logits whose loss is computed at once on a CPU: they fit its cache


def caption_loss(logits_NV: Tensor, ids_RT: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross-entropy of the words ``ids_RT[:, 1:]``, padding left out."""
    words_RT = ids_RT[:, 1:]
    words_N = words_RT[words_RT != PAD]
    at_once = _LOSS_ROWS if logits_NV.device.type == "cpu" else max(1, len(words_N))
    loss = partial(F.cross_entropy, label_smoothing=label_smoothing, reduction="sum")
    parts = zip(torch.split(logits_NV, at_once), torch.split(words_N, at_once), strict=True)
    return torch.stack([loss(logits.float(), words) for logits, words in parts]).sum()


def learning_rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate at a step, of the peak: a linear warm-up, then constant or a cosine."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class StepFigures:
    """One step's figures.

    Attributes:
        step: its number, counted from 1 over all epochs.
        value: the mean loss of a word in nats; in self-critical training the mean CIDEr of samples.
        gradient_norm: of all trained weights, before clipping.
        learning_rate: of this step.
    """

    step: int
    value: float
    gradient_norm: float
    learning_rate: float


class Trainer:
    """A model in training, on one of the workers that train it together.

    Args:
        model: the model, which is trained in place.
        vocabulary: its words.
        config: how to train.
        device: where to compute, see :func:`captioner.runtime.device.choose_device`.
        rank: this worker's number.
        workers: how many workers there are.
    """

    def __init__(
        self,
        model: CaptionModel,
        vocabulary: Vocabulary,
        config: TrainConfig,
        *,
        device: str = "auto",
        rank: int = 0,
        workers: int = 1,
    ):
        self.config, self.vocabulary = config, vocabulary
        self.rank, self.workers = rank, workers
        self.device = choose_device(device)
        self.dtype = choose_dtype(config.precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = model.to(self.device)
        self.model.encoder.fine_tune(config.fine_tune_from)
        if config.drop_path:
            self.model.encoder.use_stochastic_depth(config.drop_path)
        self._parallel: nn.Module = self.model
        if workers > 1:
            self._parallel = DistributedDataParallel(self.model)
        #: the norm of the last step's gradient, before clipping
        self.gradient_norm = 0.0
        self.average = ExponentialMovingAverage(model, config.average) if config.average else None
        self.reset_optimizer()

    @property
    def result(self) -> CaptionModel:
        """The model that is validated and saved: the moving average of the weights, or the last."""
        return self.model if self.average is None else self.average.model

    def reset_optimizer(self) -> None:
        """Makes a new AdamW for the weights as they are.

        The encoder's weights are groups of their own only where their learning rate is another:
        the order of the weights decides how the gradient's norm is rounded.
        """
        trained = [p for p in self.model.parameters() if p.requires_grad]
        encoder = []
        if self.config.encoder_learning_rate is not None:
            own = set(self.model.encoder.parameters())
            encoder = [p for p in trained if p in own]
            trained = [p for p in trained if p not in own]
        decay = self.config.weight_decay
        decay_of_vectors = decay if self.config.weight_decay_of == "all" else 0.0
        groups = [
            group
            for weights in ([trained, encoder] if encoder else [trained])
            for group in (
                {"params": [p for p in weights if p.ndim >= 2], "weight_decay": decay},
                {"params": [p for p in weights if p.ndim < 2], "weight_decay": decay_of_vectors},
            )
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, fused=True)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, tensors and numbers only."""
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state` returned."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])

    def train_epoch(
        self,
        images: TrainingImages,
        epoch: int,
        report: Callable[[int, StepFigures], None],
        *,
        step: "Callable[[Sequence[Batch]], tuple[float, float]] | None" = None,
    ) -> float:
        """Trains on every image, as often as the weight of its data set says.

        Args:
            images: what to train on.
            epoch: its number, counted from 1.
            report: receives each step's number of images and its figures.
            step: computes the gradients of a batch's parts and descends, as :meth:`descend` does;
                returns a sum over the whole batch and its weight. None: cross-entropy.

        Returns:
            The mean of what the steps return: the loss of a word for cross-entropy.

        Raises:
            InputError: none of the images can be read or decoded.
            CaptionerError: the loss is not finite.
        """
        # Dropout and samples depend on the epoch alone: a resumed run draws the same ones.
        torch.manual_seed((self.config.seed * 1_000 + epoch) * 1_000 + self.rank)
        # Samples come from the model without dropout, and so must their gradient.
        self.model.train(step is None)
        plan = plan_batches(images.lengths, self.config, epoch, images.portions)
        views = random.Random(f"{self.config.seed} {epoch} views")  # noqa: S311
        chosen = [[(i, views.randrange(self.config.views)) for i in batch] for batch in plan]
        first_step, steps = (epoch - 1) * len(plan), self.config.epochs * len(plan)
        total = count = 0.0
        for index, parts in enumerate(self._parts(images, chosen)):
            number = first_step + index
            rate = encoder_rate = self.config.scst_learning_rate
            if step is None:
                factor = learning_rate_factor(number, steps, self.config)
                rate, own = self.config.learning_rate * factor, self.config.encoder_learning_rate
                encoder_rate = rate if own is None else own * factor
            self._set_rates(rate, encoder_rate)
            value, weight = (step or self._step)(parts)
            if not (math.isfinite(value) and math.isfinite(self.gradient_norm)):
                option = "--learning-rate" if step is None else "--scst-learning-rate"
                raise CaptionerError(
                    f"the loss is not finite in step {number + 1} of epoch {epoch}; run the same "
                    f"command again with a lower {option}"
                )
            total, count = total + value, count + weight
            mean = value / max(1.0, weight)
            report(len(chosen[index]), StepFigures(number + 1, mean, self.gradient_norm, rate))
        if not count:
            raise InputError("none of the images to train on can be read or decoded")
        return total / count

    def _set_rates(self, rate: float, encoder_rate: float) -> None:
        """Sets the learning rates of the groups that :meth:`reset_optimizer` makes."""
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = rate if index < _GROUPS else encoder_rate

    def _parts(
        self, images: TrainingImages, chosen: Sequence[Sequence[tuple[int, int]]]
    ) -> Iterator[list[Batch]]:
        """This worker's share of each batch, in ``config.accumulate`` parts."""

        def load(batch: Sequence[tuple[int, int]]) -> list[Batch]:
            share = batch[self.rank :: self.workers]
            size = math.ceil(len(share) / self.config.accumulate)
            return [images.batch(share[i : i + size]) for i in range(0, len(share), size)]

        return prefetch.map_ahead(load, chosen, threads=os.cpu_count() or 1)

    def _step(self, parts: Sequence[Batch]) -> tuple[float, float]:
        """A step on the cross-entropy: the whole batch's summed loss, and its number of words."""
        words = self.sum(sum(part.words for part in parts))

        def backward(part: Batch) -> float:
            ids_RT = part.ids_RT.to(self.device)
            logits_NV = self.logits(part.inputs.to(self.device), ids_RT)
            loss = caption_loss(logits_NV, ids_RT, self.config.label_smoothing)
            (loss * (self.workers / max(1.0, words))).backward()  # type: ignore[no-untyped-call]
            return loss.item()

        return self.sum(self.descend(parts, backward)), words

    def descend(self, parts: Sequence[Batch], backward: Callable[[Batch], float]) -> float:
        """One step of AdamW on the sum of the parts' gradients.

        Args:
            parts: this worker's share of a batch.
            backward: computes a part's gradients.

        Returns:
            The sum of what ``backward`` returned.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in parts[:-1]:
            with self._unsynchronised():
                total += backward(part)
        total += backward(parts[-1])
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        if math.isinf(limit):
            gradients = [p.grad for p in trained if p.grad is not None]
            self.gradient_norm = float(nn.utils.get_total_norm(gradients))
        else:
            self.gradient_norm = float(nn.utils.clip_grad_norm_(trained, limit))
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        return total

    def logits(self, inputs: Tensor, ids_RT: Tensor) -> Tensor:
        """The logits ``(N, V)`` of the words ``ids_RT[:, 1:]``, padding left out.

        Args:
            inputs: images, or their features.
            ids_RT: captions, padded.
        """
        with self.autocast():
            inputs = inputs.to(self.dtype) if inputs.is_floating_point() else inputs
            return self._parallel(inputs, ids_RT[:, :-1], ids_RT[:, 1:] != PAD)  # type: ignore[no-any-return]

    def features(self, model: CaptionModel, part: Batch) -> Tensor:
        """The encoder's features of a part's images, ``(B, h, w, C)``, in the trainer's dtype."""
        inputs = part.inputs.to(self.device)
        features = inputs if inputs.is_floating_point() else model.encoder(inputs)
        return features.to(self.dtype)

    def autocast(self) -> AbstractContextManager[object]:
        """Matrix products in the trainer's dtype."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _unsynchronised(self) -> AbstractContextManager[object]:
        if isinstance(self._parallel, DistributedDataParallel):
            return self._parallel.no_sync()
        return nullcontext()

    def sum(self, value: float) -> float:
        """The sum of a value over all workers."""
        if self.workers == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return float(tensor)
