"""Validation: the loss on held-out images, and greedy captions with their CIDEr."""

import os
from collections.abc import Callable, Mapping

import torch

from captioner.config import DecodeConfig
from captioner.evaluation.cider import CiderD
from captioner.model.generate import generate
from captioner.model.tokenization import scoring_words
from captioner.model.vocabulary import PAD
from captioner.runtime import prefetch
from captioner.training.batches import TrainingImages
from captioner.training.self_critical import inference_decoder, update_decoder
from captioner.training.trainer import Trainer, caption_loss

__all__ = ["Validation"]

_LONGEST = 30  # words of a caption


class Validation:
    """Validates a model in training.

    Args:
        trainer: the model.
        images: the images to validate on.
    """

    def __init__(self, trainer: Trainer, images: TrainingImages):
        self._trainer, self.images = trainer, images
        self._decoder = inference_decoder(trainer.model, trainer.dtype)
        self._cider = CiderD(
            [[scoring_words(text) for text in each.captions] for each in images.examples]
        )

    @torch.no_grad()
    def run(self, advance: Callable[[int], object]) -> tuple[float, dict[int, str]]:
        """Computes the loss and this worker's captions.

        Args:
            advance: receives the number of images of each batch.

        Returns:
            The mean loss of a word over all workers, without label smoothing; and the greedy
            captions of the images ``rank``, ``rank + workers``, …, by their index. Images that
            cannot be read or decoded are left out.
        """
        trainer = self._trainer
        model = trainer.result.eval()
        update_decoder(self._decoder, model)
        decode = DecodeConfig(beam=1, attention="none", max_words=_LONGEST)
        mine = range(trainer.rank, len(self.images.examples), trainer.workers)
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
                    words_of = trainer.vocabulary.words(hypothesis.ids)
                    captions[image] = trainer.vocabulary.join(words_of)
            advance(len(batch.images))
        return trainer.sum(total) / max(1.0, trainer.sum(words)), captions

    def cider(self, captions: Mapping[int, str]) -> float:
        """The mean CIDEr of captions by the index of their image, times 100."""
        scores = [self._cider.score(i, scoring_words(text)) for i, text in captions.items()]
        return 100 * sum(scores) / len(scores)
