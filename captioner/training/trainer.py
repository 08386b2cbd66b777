"""One worker's part of training: a step, an epoch, a validation.

The loss is the notebook's: cross-entropy of each next word, padding ignored. Self-critical training
(Rennie et al. 2017) then raises the CIDEr of sampled captions, each against the mean of the image's
other samples.

The batches are the same on any number of workers: all draw the same plan of them, each takes its
share of a batch, and the sum of their gradients is that of the whole batch. Dropout and samples are
each worker's own, and differ with their number.

Shapes in names: as in :mod:`captioner.model.network`.
"""

import copy
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from captioner.config import DecodeConfig, TrainConfig
from captioner.data.dataset import CaptionedImage
from captioner.errors import InputError
from captioner.evaluation.cider import CiderD
from captioner.model.generate import generate, sample
from captioner.model.network import CaptionModel
from captioner.model.tokenization import scoring_words
from captioner.model.vocabulary import EOS, PAD, SPECIAL, START, UNKNOWN, Vocabulary
from captioner.runtime import prefetch
from captioner.runtime.device import choose_device, choose_dtype
from captioner.runtime.memory import keep_freed_memory
from captioner.training.batches import Batch, Source, plan_batches

__all__ = ["Trainer", "caption_loss", "learning_rate_factor"]

_LONGEST_SAMPLE, _LONGEST_GREEDY = 18, 30  # words
_LOSS_ROWS = 256  # whose logits, and what is made of them, fit a CPU's cache


def caption_loss(logits_NV: Tensor, ids_RT: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross-entropy of the words ``ids_RT[:, 1:]``, padding left out."""
    words_RT = ids_RT[:, 1:]
    words_N = words_RT[words_RT != PAD]
    at_once = _LOSS_ROWS if logits_NV.device.type == "cpu" else max(1, len(words_N))
    loss = partial(F.cross_entropy, label_smoothing=label_smoothing, reduction="sum")
    parts = zip(torch.split(logits_NV, at_once), torch.split(words_N, at_once), strict=True)
    return torch.stack([loss(logits.float(), words) for logits, words in parts]).sum()


def learning_rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """What the learning rate is multiplied by at a step: a linear rise, then flat or a cosine."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def _move(
    decay: float, averages: Sequence[Tensor], weights: Sequence[Tensor], steps: Tensor | int
) -> None:
    """A step of an exponential moving average, whose first steps forget how it began."""
    decay = min(decay, (1 + float(steps)) / (10 + float(steps)))
    for average, weight in zip(averages, weights, strict=True):
        average.lerp_(weight.to(average.dtype), 1 - decay)


class Trainer:
    """A model in training."""

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
        self.parallel: nn.Module = self.model
        if workers > 1:
            self.parallel = DistributedDataParallel(self.model)
        self.average = None
        if config.average:
            self.average = AveragedModel(model, multi_avg_fn=partial(_move, config.average))
        self.writer = copy.deepcopy(model.decoder).to(self.dtype).eval()
        self.begin_phase()
        self.reward: CiderD | None = None

    @property
    def kept(self) -> CaptionModel:
        """The model that is validated and kept: the average of the weights, or the last."""
        if self.average is None:
            return self.model
        return self.average.module  # type: ignore[return-value]

    def begin_phase(self) -> None:
        """A new optimizer, for the weights as they are."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        decay = self.config.weight_decay
        decay_of_vectors = decay if self.config.weight_decay_of == "all" else 0.0
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": decay_of_vectors},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, fused=True)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, on the CPU when it was; tensors and numbers only."""
        average = self.average.state_dict() if self.average is not None else None
        return {
            "model": self.model.state_dict(),
            "average": average,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state` gave."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])

    def train_epoch(
        self, source: Source, epoch: int, advance: Callable[[int, float], None]
    ) -> float:
        """Trains on every image once.

        Args:
            source: the images.
            epoch: counted from 1. After ``config.epochs`` they are self-critical ones.
            advance: is told after each step how many images it had, and its loss.

        Returns:
            The mean loss of a word; in a self-critical epoch the mean CIDEr of the samples.

        Raises:
            InputError: none of the images can be read or decoded.
        """
        critical = epoch > self.config.epochs
        if epoch == self.config.epochs + 1:
            if self.average is not None:
                self.model.load_state_dict(self.average.module.state_dict())
                self.average.n_averaged.zero_()
            self.begin_phase()
        # Dropout and samples depend on the epoch alone, so that a resumed run draws them again.
        torch.manual_seed((self.config.seed * 1_000 + epoch) * 1_000 + self.rank)
        # Samples come from the model without dropout, and so must their gradient.
        self.model.train(not critical)
        plan = plan_batches(source.lengths, self.config, epoch)
        views = random.Random(f"{self.config.seed} {epoch} views")  # noqa: S311
        chosen = [[(i, views.randrange(self.config.views)) for i in batch] for batch in plan]
        first_step, steps = (epoch - 1) * len(plan), self.config.epochs * len(plan)
        total = count = 0.0
        for index, parts in enumerate(self._parts(source, chosen)):
            if critical:
                self._set_learning_rate(self.config.scst_learning_rate)
                value, weight = self._critical_step(parts)
            else:
                factor = learning_rate_factor(first_step + index, steps, self.config)
                self._set_learning_rate(self.config.learning_rate * factor)
                value, weight = self._step(parts)
            total, count = total + value, count + weight
            advance(len(chosen[index]), total / max(1.0, count))
        if not count:
            raise InputError("none of the images to train on can be read or decoded")
        return total / count

    def _set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _parts(
        self, source: Source, chosen: Sequence[Sequence[tuple[int, int]]]
    ) -> Iterator[list[Batch]]:
        """This worker's share of each batch, in ``config.accumulate`` parts."""

        def load(batch: Sequence[tuple[int, int]]) -> list[Batch]:
            share = batch[self.rank :: self.workers]
            size = math.ceil(len(share) / self.config.accumulate)
            return [source.batch(share[i : i + size]) for i in range(0, len(share), size)]

        return prefetch.map_ahead(load, chosen, threads=os.cpu_count() or 1)

    def _step(self, parts: Sequence[Batch]) -> tuple[float, float]:
        """A step on the cross-entropy: the whole batch's loss, summed, and number of words."""
        words = self._sum(sum(part.words for part in parts))

        def backward(part: Batch) -> float:
            ids_RT = part.ids_RT.to(self.device)
            logits_NV = self._logits(part.inputs.to(self.device), ids_RT)
            loss = caption_loss(logits_NV, ids_RT, self.config.label_smoothing)
            (loss * (self.workers / max(1.0, words))).backward()  # type: ignore[no-untyped-call]
            return loss.item()

        return self._sum(self._descend(parts, backward)), words

    def _critical_step(self, parts: Sequence[Batch]) -> tuple[float, float]:
        """A step that makes samples likelier the more their CIDEr is above the others'.

        Returns:
            The sum of the images' mean CIDEr over the whole batch, and how many could be read.
        """
        n = self.config.scst_samples
        images = self._sum(sum(int(part.readable.sum()) for part in parts))

        def backward(part: Batch) -> float:
            with self._autocast():
                features = self._features(self.model, part)  # once, for the samples and gradients
            self._refresh_writer(self.model)
            ids_RT = sample(self.writer, features.detach(), n, _LONGEST_SAMPLE).clone()
            rewards_BN = self._rewards(part, ids_RT)
            others_BN = (rewards_BN.sum(1, keepdim=True) - rewards_BN) / (n - 1)
            advantage_BN = (rewards_BN - others_BN) * part.readable[:, None]
            counted_RT = ids_RT[:, 1:] != PAD
            words_N = ids_RT[:, 1:][counted_RT]
            advantage_R1 = advantage_BN.to(self.device).view(-1, 1)
            advantage_N = advantage_R1.expand(counted_RT.shape)[counted_RT]
            logits_NV = self._logits(features, ids_RT).float()
            logits_NV[:, [PAD, START, UNKNOWN]] = -torch.inf  # they were not to be drawn
            logprobs_N = logits_NV.log_softmax(-1).gather(-1, words_N[:, None])[:, 0]
            loss = -(advantage_N * logprobs_N).sum() / (max(1.0, images) * n)
            (loss * self.workers).backward()  # type: ignore[no-untyped-call]
            return float(rewards_BN.mean(1)[part.readable].sum())

        return self._sum(self._descend(parts, backward)), images

    def _descend(self, parts: Sequence[Batch], backward: Callable[[Batch], float]) -> float:
        """One step of AdamW on the sum of the parts' gradients; the sum of what they return."""
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in parts[:-1]:
            with self._unsynchronised():
                total += backward(part)
        total += backward(parts[-1])
        if self.config.clip_norm is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.config.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return total

    def _rewards(self, part: Batch, ids_RT: Tensor) -> Tensor:
        """CIDEr ``(B, N)``; a caption's end is a word, so that none learns to break off."""
        assert self.reward is not None
        rows = ids_RT.cpu().view(len(part.images), self.config.scst_samples, -1).tolist()
        return torch.tensor(
            [
                [self.reward.score(image, self._reward_words(ids)) for ids in samples]
                for image, samples in zip(part.images, rows, strict=True)
            ]
        )

    def _reward_words(self, ids: Sequence[int]) -> list[str]:
        ended = EOS in ids
        words = self.vocabulary.words(ids[1 : ids.index(EOS)] if ended else ids[1:])
        return [*scoring_words(self.vocabulary.join(words)), *([SPECIAL[EOS]] if ended else [])]

    def reward_for(self, examples: Sequence[CaptionedImage]) -> None:
        """Prepares self-critical training on these images."""
        end = [SPECIAL[EOS]]
        self.reward = CiderD(
            [[scoring_words(text) + end for text in each.captions] for each in examples]
        )

    def _logits(self, inputs: Tensor, ids_RT: Tensor) -> Tensor:
        with self._autocast():
            inputs = inputs.to(self.dtype) if inputs.is_floating_point() else inputs
            return self.parallel(inputs, ids_RT[:, :-1], ids_RT[:, 1:] != PAD)  # type: ignore[no-any-return]

    def _features(self, model: CaptionModel, part: Batch) -> Tensor:
        inputs = part.inputs.to(self.device)
        features = inputs if inputs.is_floating_point() else model.encoder(inputs)
        return features.to(self.dtype)

    def _refresh_writer(self, model: CaptionModel) -> None:
        with torch.no_grad():
            for own, new in zip(self.writer.parameters(), model.decoder.parameters(), strict=True):
                own.copy_(new)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _unsynchronised(self) -> AbstractContextManager[object]:
        if isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return nullcontext()

    def _sum(self, value: float) -> float:
        """The sum over all workers."""
        if self.workers == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return float(tensor)

    @torch.no_grad()
    def validate(self, source: Source) -> tuple[float, dict[int, str]]:
        """The mean loss of a word without label smoothing, and this worker's greedy captions.

        The captions are those of the images ``rank``, ``rank + workers``, …, by their places;
        images that cannot be read or decoded are left out.
        """
        model = self.kept.eval()
        self._refresh_writer(model)
        decode = DecodeConfig(beam=1, attention="none", max_words=_LONGEST_GREEDY)
        mine = range(self.rank, len(source.examples), self.workers)
        size = self.config.batch_size
        batches = [
            [(i, 0) for i in mine[begin : begin + size]] for begin in range(0, len(mine), size)
        ]
        total = words = 0.0
        captions = {}
        for batch in prefetch.map_ahead(source.batch, batches, threads=os.cpu_count() or 1):
            ids_RT = batch.ids_RT.to(self.device)
            with self._autocast():
                features = self._features(model, batch)
                logits_NV, _ = model.decoder(ids_RT[:, :-1], features, ids_RT[:, 1:] != PAD)
            total += caption_loss(logits_NV, ids_RT).item()
            words += batch.words
            hypotheses = generate(self.writer, features, decode)
            readable = batch.readable.tolist()
            for image, kept, hypothesis in zip(batch.images, readable, hypotheses, strict=True):
                if kept:
                    captions[image] = self.vocabulary.join(self.vocabulary.words(hypothesis.ids))
        return self._sum(total) / max(1.0, self._sum(words)), captions
