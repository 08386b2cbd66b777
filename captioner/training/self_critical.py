"""Self-critical training (Rennie et al. 2017, arXiv 1612.00563): sampled captions are reinforced.

The reward of a sample is its CIDEr against the image's captions; the baseline is the mean reward of
the image's other samples.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from captioner.data.dataset import CaptionedImage
from captioner.evaluation.cider import CiderD
from captioner.model.decoder import CaptionDecoder
from captioner.model.generate import sample
from captioner.model.network import CaptionModel
from captioner.model.tokenization import scoring_words
from captioner.model.vocabulary import EOS, PAD, SPECIAL, START, UNKNOWN
from captioner.training.batches import Batch
from captioner.training.trainer import Trainer

__all__ = ["SelfCriticalTraining", "inference_decoder", "update_decoder"]

_LONGEST = 18  # words of a sample


def inference_decoder(model: CaptionModel, dtype: torch.dtype) -> CaptionDecoder:
    """A copy of a model's decoder to generate with, in another dtype and without dropout."""
    return copy.deepcopy(model.decoder).to(dtype).eval()


@torch.no_grad()
def update_decoder(decoder: nn.Module, model: CaptionModel) -> None:
    """Copies a model's weights into its :func:`inference_decoder`."""
    for own, new in zip(decoder.parameters(), model.decoder.parameters(), strict=True):
        own.copy_(new)


class SelfCriticalTraining:
    """Steps that make samples likelier the more their CIDEr exceeds the other samples'.

    Args:
        trainer: the model in training.
        examples: the images to train on, whose captions are the references.
    """

    def __init__(self, trainer: Trainer, examples: Sequence[CaptionedImage]):
        self._trainer = trainer
        self._decoder = inference_decoder(trainer.model, trainer.dtype)
        # How many subwords the longest sample may have depends on the vocabulary.
        self._longest = None if trainer.vocabulary.kind == "bpe" else _LONGEST
        end = [SPECIAL[EOS]]
        self._cider = CiderD(
            [[scoring_words(text) + end for text in each.captions] for each in examples]
        )

    def begin(self) -> None:
        """Before the first self-critical epoch: continues from the moving average."""
        trainer = self._trainer
        if trainer.average is not None:
            trainer.model.load_state_dict(trainer.average.model.state_dict())
            trainer.average.restart()
        trainer.reset_optimizer()

    def step(self, parts: Sequence[Batch]) -> tuple[float, float]:
        """Takes one step.

        Returns:
            The sum of the images' mean CIDEr over the whole batch, and how many could be read.
        """
        trainer = self._trainer
        n = trainer.config.scst_samples
        images = trainer.sum(sum(int(part.readable.sum()) for part in parts))

        def backward(part: Batch) -> float:
            with trainer.autocast():
                features = trainer.features(trainer.model, part)  # for the samples and gradients
            update_decoder(self._decoder, trainer.model)
            ids_RT = sample(self._decoder, features.detach(), n, self._longest).clone()
            rewards_BN = self._rewards(part, ids_RT)
            others_BN = (rewards_BN.sum(1, keepdim=True) - rewards_BN) / (n - 1)
            advantage_BN = (rewards_BN - others_BN) * part.readable[:, None]
            counted_RT = ids_RT[:, 1:] != PAD
            words_N = ids_RT[:, 1:][counted_RT]
            advantage_R1 = advantage_BN.to(trainer.device).view(-1, 1)
            advantage_N = advantage_R1.expand(counted_RT.shape)[counted_RT]
            logits_NV = trainer.logits(features, ids_RT).float()
            logits_NV[:, [PAD, START, UNKNOWN]] = -torch.inf  # never sampled
            logprobs_N = logits_NV.log_softmax(-1).gather(-1, words_N[:, None])[:, 0]
            loss = -(advantage_N * logprobs_N).sum() / (max(1.0, images) * n)
            (loss * trainer.workers).backward()  # type: ignore[no-untyped-call]
            return float(rewards_BN.mean(1)[part.readable].sum())

        return trainer.sum(trainer.descend(parts, backward)), images

    def _rewards(self, part: Batch, ids_RT: Tensor) -> Tensor:
        """CIDEr ``(B, N)``; a caption's end counts as a word, so that captions learn to end."""
        samples = self._trainer.config.scst_samples
        rows = ids_RT.cpu().view(len(part.images), samples, -1).tolist()
        return torch.tensor(
            [
                [self._cider.score(image, self._words(ids)) for ids in of_image]
                for image, of_image in zip(part.images, rows, strict=True)
            ]
        )

    def _words(self, ids: Sequence[int]) -> list[str]:
        ended = EOS in ids
        text = self._trainer.vocabulary.decode(ids[1 : ids.index(EOS)] if ended else ids[1:])
        return [*scoring_words(text), *([SPECIAL[EOS]] if ended else [])]
