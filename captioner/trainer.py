"""One worker's part of training: a step, an epoch, a validation.

The loss is the notebook's: cross-entropy of each next word, padding ignored. Self-critical training
(Rennie et al. 2017) then raises the CIDEr of sampled captions, each against the mean of the image's
other samples.

The batches are the same on any number of workers: all draw the same plan of them, each takes its
share of a batch, and the sum of their gradients is that of the whole batch. Dropout and samples are
each worker's own, and differ with their number.

Shapes in names: as in :mod:`captioner.model`.
"""

import copy
import itertools
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from captioner import dataset
from captioner.captioning import choose_device, choose_dtype
from captioner.config import DecodeConfig, ModelConfig, TrainConfig
from captioner.dataset import CaptionedImage
from captioner.errors import InputError
from captioner.features import Features, load_view
from captioner.generate import generate, sample
from captioner.memory import keep_freed_memory
from captioner.model import CaptionModel
from captioner.reward import ConsensusReward, content_words
from captioner.vocabulary import EOS, PAD, SPECIAL, START, UNKNOWN, Vocabulary

__all__ = ["Source", "Trainer", "caption_loss", "learning_rate_factor", "plan_batches"]

_SIDE = re.compile(r"(left|right)(most|wards?|hand|handed)?")
_LETTERS = re.compile(r"[^\W\d_]+")
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


def plan_batches(lengths: Sequence[int], config: TrainConfig, epoch: int) -> list[list[int]]:
    """The batches of an epoch: each image once, in batches whose sizes differ by one at most.

    Where ``config.sort_batches`` is above 1, images with captions of like length come together, so
    that less is padding; which, and in what order, still is random.
    """
    generator = random.Random(f"{config.seed} {epoch}")  # noqa: S311
    order = list(range(len(lengths)))
    generator.shuffle(order)
    if config.sort_batches > 1:
        window = config.batch_size * config.sort_batches
        windows = [order[begin : begin + window] for begin in range(0, len(order), window)]
        order = [index for each in windows for index in sorted(each, key=lengths.__getitem__)]
    count = math.ceil(len(order) / config.batch_size)
    bounds = [len(order) * i // count for i in range(count + 1)]
    batches = [order[begin:end] for begin, end in itertools.pairwise(bounds)]
    if config.sort_batches > 1:
        generator.shuffle(batches)
    return batches


@dataclass(frozen=True)
class Batch:
    """Some images: ``inputs`` are features ``(B, h, w, C)`` or images ``(B, size, size, 3)``.

    ``ids_RT`` are their captions and ``images`` their places in the source; an image that cannot be
    read is black, or has features of zeros, and has captions of nothing but padding.
    """

    inputs: Tensor
    ids_RT: Tensor
    images: list[int]

    @property
    def readable(self) -> Tensor:
        """Whether each image could be read: ``(B,)``."""
        return (self.ids_RT.view(len(self.images), -1) != PAD).any(1)

    @property
    def words(self) -> int:
        """How many words are predicted in the captions, their ends counted."""
        return int((self.ids_RT[:, 1:] != PAD).sum())


@dataclass
class Source:
    """The images of one side of the split.

    ``views`` are the features of each view of them, where the encoder is frozen. ``unreadable`` are
    the URIs of images that could not be read or decoded: with features those that lack a view, and
    what others add; else those that were found so far. They stay in the plan of batches, so that it
    is the same for all workers and after a resume, whatever each of them could read.
    """

    examples: Sequence[CaptionedImage]
    views: list[Features] | None
    model: ModelConfig
    vocabulary: Vocabulary
    captions: str = "all"
    augmentation: str = "crops"
    unreadable: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        chosen = [e.captions[:1] if self.captions == "first" else e.captions for e in self.examples]
        encode = partial(self.vocabulary.encode, max_length=self.model.max_length)
        self.ids = [[encode(text) for text in texts] for texts in chosen]
        self.unsided = [
            [ids for ids, text in zip(encoded, texts, strict=True) if not _names_a_side(text)]
            for encoded, texts in zip(self.ids, chosen, strict=True)
        ]
        self.lengths = [max(map(len, encoded)) for encoded in self.ids]
        for view in self.views or []:
            decodable = zip(self.examples, view.decodable(), strict=True)
            self.unreadable |= {example.uri for example, good in decodable if not good}

    def choose(self, image: int, view: int) -> tuple[int, list[list[int]]]:
        """The view to take in place of ``view``, and the captions that are true of it."""
        if view % 2 == 0 or len(self.unsided[image]) == len(self.ids[image]):
            return view, self.ids[image]
        if self.unsided[image]:
            return view, self.unsided[image]
        return view - 1, self.ids[image]

    def batch(self, chosen: Sequence[tuple[int, int]]) -> Batch:
        """The images and views of ``chosen``."""
        inputs, sequences = [], []
        for image, view in chosen:
            true_view, captions = self.choose(image, view)
            values, readable = self._load(image, true_view)
            inputs.append(values)
            sequences.append(captions if readable else [[]])
        images = [image for image, _ in chosen]
        return Batch(torch.from_numpy(np.stack(inputs)), dataset.collate(sequences), images)

    def _load(self, image: int, view: int) -> tuple[np.ndarray, bool]:
        """Features or pixels, and whether the image could be read; without them zeros."""
        uri = self.examples[image].uri
        if self.views is not None:
            features = self.views[view][image]
            readable = uri not in self.unreadable
            return (features, True) if readable else (np.zeros_like(features), False)
        size = self.model.image_size
        pixels = load_view(uri, size, view, self.augmentation)
        if pixels is None:
            self.unreadable.add(uri)
            return np.zeros((size, size, 3), np.uint8), False
        return pixels, True


def _names_a_side(caption: str) -> bool:
    return any(_SIDE.fullmatch(letters) for letters in _LETTERS.findall(caption.lower()))


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
            self.model.encoder.drop_paths(config.drop_path)
        self.parallel: nn.Module = self.model
        if workers > 1:
            self.parallel = DistributedDataParallel(self.model)
        self.average = None
        if config.average:
            self.average = AveragedModel(model, multi_avg_fn=partial(_move, config.average))
        self.writer = copy.deepcopy(model.decoder).to(self.dtype).eval()
        self.begin_phase()
        self.reward: ConsensusReward | None = None

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

        return dataset.ahead(load, chosen, threads=os.cpu_count() or 1)

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
        return [*content_words(" ".join(words)), *([SPECIAL[EOS]] if ended else [])]

    def reward_for(self, examples: Sequence[CaptionedImage]) -> None:
        """Prepares self-critical training on these images."""
        end = [SPECIAL[EOS]]
        self.reward = ConsensusReward(
            [[content_words(text) + end for text in each.captions] for each in examples]
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
        for batch in dataset.ahead(source.batch, batches, threads=os.cpu_count() or 1):
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
                    captions[image] = " ".join(self.vocabulary.words(hypothesis.ids))
        return self._sum(total) / max(1.0, self._sum(words)), captions
