"""Validation: the loss on held-out images, and greedy captions with their CIDEr."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from captioner.config import DecodeConfig
from captioner.data.splits import Portion
from captioner.evaluation.cider import CiderD
from captioner.model.generate import generate
from captioner.model.tokenization import scoring_words
from captioner.model.vocabulary import PAD
from captioner.runtime import prefetch
from captioner.training.batches import TrainingImages
from captioner.training.self_critical import inference_decoder, update_decoder
from captioner.training.trainer import Trainer, caption_loss

__all__ = ["Validated", "Validation"]

_LONGEST = 30  # words of a caption


@dataclass(frozen=True)
class Validated:
    """The figures of a validation.

    Attributes:
        loss: the mean of a word in nats; over several data sets, the weighted mean of their losses.
        cider: the mean CIDEr times 100; over several data sets, the weighted mean of theirs.
        by_data: of several data sets, ``loss`` and ``cider`` by the name of each.
    """

    loss: float
    cider: float
    by_data: dict[str, dict[str, float]]


class Validation:
    """Validates a model in training.

    Args:
        trainer: the model.
        images: the images to validate on.
    """

    def __init__(self, trainer: Trainer, images: TrainingImages):
        self._trainer, self.images = trainer, images
        self._decoder = inference_decoder(trainer.model, trainer.dtype)
        ends = itertools.accumulate((each.validation for each in images.portions), initial=0)
        #: the indices of each data set's images
        self.ranges = [range(*bounds) for bounds in itertools.pairwise(ends)]
        self._ciders = [
            CiderD([[scoring_words(text) for text in images.examples[i].captions] for i in each])
            for each in self.ranges
        ]

    @torch.no_grad()
    def run(self, advance: Callable[[int], object]) -> tuple[list[float], dict[int, str]]:
        """Computes the losses and this worker's captions.

        Args:
            advance: receives the number of images of each batch.

        Returns:
            Each data set's mean loss of a word over all workers, without label smoothing; and the
            greedy captions of every ``workers``-th image, by their index. Images that cannot be
            read or decoded are left out.
        """
        trainer = self._trainer
        update_decoder(self._decoder, trainer.result.eval())
        losses = []
        captions: dict[int, str] = {}
        for indices in self.ranges:
            loss, own = self._run_on(indices[trainer.rank :: trainer.workers], advance)
            losses.append(loss)
            captions |= own
        return losses, captions

    def _run_on(
        self, mine: Sequence[int], advance: Callable[[int], object]
    ) -> tuple[float, dict[int, str]]:
        """The mean loss over all workers, and the captions of the images ``mine``."""
        trainer = self._trainer
        model = trainer.result
        longest = None if trainer.vocabulary.kind == "bpe" else _LONGEST
        decode = DecodeConfig(beam=1, attention="none", max_words=longest)
        size = trainer.config.batch_size
        batches = [
            [(i, 0) for i in mine[begin : begin + size]] for begin in range(0, len(mine), size)
        ]
        total = words = 0.0
        captions = {}
        threads = os.cpu_count() or 1
        for batch in prefetch.map_ahead(self.images.batch, batches, threads=threads):
            ids_RT = batch.ids_RT.to(trainer.device)
            with trainer.autocast():
                features = trainer.features(model, batch)
                logits_NV, _ = model.decoder(ids_RT[:, :-1], features, ids_RT[:, 1:] != PAD)
            total += caption_loss(logits_NV, ids_RT).item()
            words += batch.words
            hypotheses = generate(self._decoder, features, decode)
            readable = batch.readable.tolist()
            for image, kept, hypothesis in zip(batch.images, readable, hypotheses, strict=True):
                if kept:
                    captions[image] = trainer.vocabulary.decode(hypothesis.ids)
            advance(len(batch.images))
        return trainer.sum(total) / max(1.0, trainer.sum(words)), captions

    def figures(self, losses: Sequence[float], captions: Mapping[int, str]) -> Validated:
        """The figures of what all workers' :meth:`run` returned."""
        portions = self.images.portions
        ciders = [
            _mean_cider(score, indices, captions)
            for score, indices in zip(self._ciders, self.ranges, strict=True)
        ]
        by_data = {
            portion.name: {"loss": loss, "cider": cider}
            for portion, loss, cider in zip(portions, losses, ciders, strict=True)
        }
        return Validated(
            _weighted_mean(losses, portions),
            _weighted_mean(ciders, portions),
            by_data if len(portions) > 1 else {},
        )


def _mean_cider(score: CiderD, indices: range, captions: Mapping[int, str]) -> float:
    """The mean CIDEr of the captions of a data set's images, times 100."""
    scores = [
        score.score(place, scoring_words(captions[i]))
        for place, i in enumerate(indices)
        if i in captions
    ]
    return 100 * sum(scores) / len(scores)


def _weighted_mean(values: Sequence[float], portions: Sequence[Portion]) -> float:
    if len(values) == 1:
        return values[0]
    total = sum(portion.weight for portion in portions)
    pairs = zip(values, portions, strict=True)
    return sum(value * portion.weight for value, portion in pairs) / total
