"""Greedy search, beam search and sampling over a batch of images.

Greedy search is beam search of width 1. The image's keys and values are projected once, the words'
keys and values are cached, and finished images leave the batch.

A beam that chooses ``<eos>`` becomes a finished hypothesis and its place stays empty, so the beam
narrows until no beam is left (Sutskever et al. 2014; for captions Xu et al. 2015). A beam that is
wide enough for every prefix makes the search exhaustive. Hypotheses are ranked by the sum of their
log-probabilities divided by ``length ** length_penalty``; the length includes the end.

Shapes in names: as in :mod:`captioner.model.layers`, and ``V`` words of the vocabulary, ``K``
beams, ``S`` steps.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from captioner.config import DecodeConfig
from captioner.model.decoder import CaptionDecoder
from captioner.model.layers import CrossAttentionCache, SelfAttentionCache
from captioner.model.vocabulary import EOS, PAD, START, UNKNOWN

__all__ = ["Hypothesis", "generate", "sample"]

# Copying the images' keys and values costs about as much as one step. Finished images therefore
# stay in the batch until they make up this share.
_FINISHED_SHARE = 0.25


@dataclass(frozen=True)
class Hypothesis:
    """A generated caption.

    ``ids`` are its words without ``<eos>``. ``ended`` says whether the model chose ``<eos>`` before
    the length limit. ``logprobs`` (natural) and ``attention_SP`` have an entry for each word, and
    one for ``<eos>`` if the caption ended. ``attention_SP`` is None if it was not requested.
    """

    ids: list[int]
    logprobs: list[float]
    attention_SP: np.ndarray | None
    ended: bool


@torch.inference_mode()
def generate(
    decoder: CaptionDecoder, features_BhwC: Tensor, config: DecodeConfig | None = None
) -> list[Hypothesis]:
    """Searches for the best caption of each image.

    Args:
        decoder: in eval mode.
        features_BhwC: the encoder's features, in the decoder's dtype and on its device.
        config: beam width, length penalty, length limit, whether ``<unk>`` may be chosen.

    Returns:
        The best hypothesis for each image, in order.
    """
    config = (config or DecodeConfig()).with_model_defaults(decoder.config)
    image_cache = decoder.project_image(features_BhwC)
    search = _Search(decoder, image_cache, len(features_BhwC), config)
    for step in range(search.limit):
        search.advance(step)
        if not len(search.live):
            break
    return search.hypotheses()


@torch.inference_mode()
def sample(
    decoder: CaptionDecoder, features_BhwC: Tensor, samples: int, longest: int | None = None
) -> Tensor:
    """Samples captions from the model.

    Args:
        decoder: in eval mode.
        features_BhwC: the encoder's features, in the decoder's dtype and on its device.
        samples: captions per image.
        longest: the largest number of words, including the end; None uses the decoder's limit.

    Returns:
        Ids ``(B·samples, T)``, an image's rows together. Each row begins with ``<start>`` and is
        padded; it ends with ``<eos>`` unless it reached the limit.
    """
    image_cache = decoder.project_image(features_BhwC)
    rows = len(features_BhwC) * samples
    limit = min(longest or decoder.config.max_length, decoder.config.max_length) - 1
    word_cache = SelfAttentionCache(decoder.config, rows, limit, image_cache.keys[0])
    device = features_BhwC.device
    ids_RT = torch.full((rows, limit + 1), PAD, device=device)
    ids_RT[:, 0] = START
    forbidden = torch.tensor([PAD, START, UNKNOWN], device=device)
    ended_R = torch.zeros(rows, dtype=torch.bool, device=device)
    for step in range(limit):
        logits_RV, _ = decoder.step(ids_RT[:, step], image_cache, word_cache)
        logits_RV = logits_RV.float().index_fill(1, forbidden, -torch.inf)
        chosen_R = _draw(logits_RV)
        ids_RT[:, step + 1] = chosen_R.masked_fill(ended_R, PAD)
        ended_R |= chosen_R == EOS
        if ended_R.all():
            return ids_RT[:, : step + 2]
    return ids_RT


def _draw(logits_RV: Tensor) -> Tensor:
    """Draws a word of each row from the softmax, with one random number per row."""
    cumulative_RV = logits_RV.softmax(-1).cumsum(-1)
    # Above 0, so a word of probability 0 is never drawn.
    share_R1 = 1 - torch.rand_like(cumulative_RV[:, :1])
    return torch.searchsorted(cumulative_RV, share_R1 * cumulative_RV[:, -1:])[:, 0]


class _Search:
    """The state of a search: the beams of the live images, and the history of all steps."""

    def __init__(
        self,
        decoder: CaptionDecoder,
        image_cache: CrossAttentionCache,
        images: int,
        config: DecodeConfig,
    ):
        self.decoder, self.image_cache, self.config = decoder, image_cache, config
        longest = decoder.config.max_length
        self.limit = min(config.max_words or longest, longest)
        device = image_cache.keys[0].device
        K = config.beam or 1
        self.live = torch.arange(images, device=device)  # the image of each row group
        self.ids_R = torch.full((images * K,), START, device=device)
        self.word_cache = SelfAttentionCache(
            decoder.config, images * K, self.limit, image_cache.keys[0]
        )
        # The beams of an image begin alike, so only the first one counts in the first step.
        self.sums_BK = torch.full((images, K), -torch.inf, device=device)
        self.sums_BK[:, 0] = 0
        self.open_B = torch.full((images,), K, device=device)  # beams not yet finished
        # For all images, live or finished: the last step and beam of the best hypothesis so far.
        self.best_B = torch.full((images,), -torch.inf, device=device)
        self.best_step_B = torch.zeros(images, dtype=torch.long, device=device)
        self.best_beam_B = torch.zeros(images, dtype=torch.long, device=device)
        self.parents_SBK = torch.zeros(self.limit, images, K, dtype=torch.long, device=device)
        self.words_SBK = torch.zeros_like(self.parents_SBK)
        self.logprobs_SBK = torch.zeros(self.limit, images, K, device=device)
        self.attention_SBKP: Tensor | None = None
        self.forbidden = torch.tensor(
            [] if config.allow_unknown else [PAD, START, UNKNOWN], dtype=torch.long, device=device
        )

    def advance(self, step: int) -> None:
        """Adds a word to every live beam and removes finished images."""
        b, K = self.sums_BK.shape
        logits_RV, attention_RP = self.decoder.step(self.ids_R, self.image_cache, self.word_cache)
        logits_RV = logits_RV.float().index_fill(1, self.forbidden, -torch.inf)
        logprobs_BKV = logits_RV.log_softmax(-1).view(b, K, -1)
        totals_BKV = self.sums_BK[:, :, None] + logprobs_BKV
        sums_BK, chosen_BK = totals_BKV.flatten(1).topk(K)
        taken_BK = torch.arange(K, device=sums_BK.device) < self.open_B[:, None]
        sums_BK = sums_BK.masked_fill(~taken_BK, -torch.inf)
        vocabulary_size = logprobs_BKV.size(-1)
        parents_BK, words_BK = chosen_BK // vocabulary_size, chosen_BK % vocabulary_size

        self.parents_SBK[step, self.live] = parents_BK
        self.words_SBK[step, self.live] = words_BK
        self.logprobs_SBK[step, self.live] = logprobs_BKV.flatten(1).gather(1, chosen_BK)
        if self.config.attention != "none":
            self._keep_attention(step, attention_RP)

        last = step == self.limit - 1
        finished_BK = (sums_BK > -torch.inf) & ((words_BK == EOS) | last)
        self._keep_best(step, sums_BK.masked_fill(~finished_BK, -torch.inf))
        self.sums_BK = sums_BK.masked_fill(finished_BK, -torch.inf)
        self.open_B = self.open_B - finished_BK.sum(1)
        # The best score that a live beam can still reach: its sum of log-probabilities only falls.
        bound_B = self.sums_BK.amax(1) / self.limit**self.config.length_penalty
        alive_B = bound_B > self.best_B[self.live]
        self._select(alive_B, parents_BK, words_BK)

    def _keep_attention(self, step: int, attention_RP: Tensor) -> None:
        _, images, K = self.parents_SBK.shape
        if self.attention_SBKP is None:
            shape = (self.limit, images, K, attention_RP.size(-1))
            self.attention_SBKP = attention_RP.new_zeros(shape)
        self.attention_SBKP[step, self.live] = attention_RP.view(len(self.live), K, -1)

    def _keep_best(self, step: int, finished_BK: Tensor) -> None:
        score_B, beam_B = (finished_BK / (step + 1) ** self.config.length_penalty).max(1)
        best_B = self.best_B[self.live]
        better_B = score_B > best_B
        # torch.where instead of indexing by a mask, which would wait for the GPU.
        for kept, new, old in (
            (self.best_B, score_B, best_B),
            (self.best_step_B, step, self.best_step_B[self.live]),
            (self.best_beam_B, beam_B, self.best_beam_B[self.live]),
        ):
            kept[self.live] = torch.where(better_B, new, old)

    def _select(self, alive_B: Tensor, parents_BK: Tensor, words_BK: Tensor) -> None:
        """Makes the chosen words the next rows; removes finished images once they are many."""
        b, K = parents_BK.shape
        alive = int(alive_B.sum())
        groups = torch.arange(b, device=alive_B.device)
        if alive <= b * (1 - _FINISHED_SHARE):
            groups = groups[alive_B]
            self.live, self.open_B = self.live[groups], self.open_B[groups]
            self.sums_BK = self.sums_BK[groups]
            if alive:
                self.image_cache = self.image_cache.select(groups)
        if K > 1 or len(groups) < b:
            rows = (groups[:, None] * K + parents_BK[groups]).flatten()
            self.word_cache.select(rows)
        self.ids_R = words_BK[groups].flatten()

    def hypotheses(self) -> list[Hypothesis]:
        """The best hypothesis of each image."""
        words_SB, logprobs_SB, attention_SBP = self._trace_back()
        hypotheses = []
        for image, last in enumerate(self.best_step_B.tolist()):
            ids = words_SB[: last + 1, image].tolist()
            ended = ids[-1] == EOS
            maps = None if attention_SBP is None else attention_SBP[: last + 1, image]
            hypotheses.append(
                Hypothesis(
                    ids=ids[:-1] if ended else ids,
                    logprobs=logprobs_SB[: last + 1, image].tolist(),
                    attention_SP=maps,
                    ended=ended,
                )
            )
        return hypotheses

    def _trace_back(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Follows the best hypotheses back to their first words.

        Returns:
            ``words_SB``, ``logprobs_SB`` and, if maps are kept, ``attention_SBP``.
        """
        last_B = self.best_step_B.cpu().numpy()
        beam_B = self.best_beam_B.cpu().numpy()
        steps, images = int(last_B.max(initial=0)) + 1, np.arange(len(last_B))
        parents_SBK = self.parents_SBK[:steps].cpu().numpy()
        words_SBK = self.words_SBK[:steps].cpu().numpy()
        logprobs_SBK = self.logprobs_SBK[:steps].cpu().numpy()
        words_SB, rows_SB = np.zeros((2, steps, len(images)), dtype=np.int64)
        logprobs_SB = np.zeros((steps, len(images)), dtype=np.float32)
        for step in reversed(range(steps)):
            words_SB[step] = words_SBK[step, images, beam_B]
            logprobs_SB[step] = logprobs_SBK[step, images, beam_B]
            parent_B = parents_SBK[step, images, beam_B]
            # A word is chosen from its parent's row, which therefore holds its attention.
            rows_SB[step] = parent_B
            beam_B = np.where(step <= last_B, parent_B, beam_B)
        attention_SBP = None
        if self.attention_SBKP is not None:
            step_S1, image_B = torch.arange(steps)[:, None], torch.from_numpy(images)
            chosen = self.attention_SBKP[step_S1, image_B, torch.from_numpy(rows_SB)]
            attention_SBP = chosen.cpu().numpy()
        return words_SB, logprobs_SB, attention_SBP
