"""CIDEr-D of single captions against fixed references, fast enough for a training reward.

CIDEr-D (Vedantam et al. 2015) as pycocoevalcap computes it: n-grams of 1 to 4 words, weighted by
how rare they are among the images; counts clipped to the reference's counts; a Gaussian penalty for
a difference in length. This class weights the references once, pycocoevalcap at every call.
"""

import math
from collections import Counter
from collections.abc import Sequence

__all__ = ["CiderD"]

_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # of the length penalty

Vector = dict[tuple[str, ...], float]


class CiderD:
    """Scores captions of known images.

    With words from :func:`captioner.model.tokenization.scoring_words`, the scores equal those of
    pycocoevalcap's CIDEr with PTB tokens.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]]):
        """Weights the references.

        Args:
            references: for each image its captions, each a sequence of words.
        """
        counted = [[_count(words) for words in captions] for captions in references]
        frequency = Counter(
            ngram for captions in counted for ngram in {n for count in captions for n in count}
        )
        self._log_images = math.log(len(references))
        self._weights = {
            ngram: self._log_images - math.log(count) for ngram, count in frequency.items()
        }
        self._references = [
            [self._weight(count, len(words)) for count, words in zip(each, texts, strict=True)]
            for each, texts in zip(counted, references, strict=True)
        ]

    def score(self, image: int, words: Sequence[str]) -> float:
        """Returns the CIDEr-D of an image's caption: between 0 and 10, rarely above 1."""
        vectors, norms, length = self._weight(_count(words), len(words))
        total = 0.0
        for reference_vectors, reference_norms, reference_length in self._references[image]:
            penalty = math.exp(-((length - reference_length) ** 2) / (2 * _SIGMA**2))
            for n in range(_LONGEST):
                if norms[n] == 0 or reference_norms[n] == 0:
                    continue
                reference = reference_vectors[n]
                product = sum(
                    min(weight, reference[ngram]) * reference[ngram]
                    for ngram, weight in vectors[n].items()
                    if ngram in reference
                )
                total += penalty * product / (norms[n] * reference_norms[n])
        return 10 * total / (_LONGEST * len(self._references[image]))

    def _weight(
        self, count: Counter[tuple[str, ...]], words: int
    ) -> tuple[list[Vector], list[float], int]:
        """Weighted n-grams and their norm for each n, and the number of word pairs."""
        vectors: list[Vector] = [{} for _ in range(_LONGEST)]
        for ngram, times in count.items():
            weight = self._weights.get(ngram, self._log_images)
            vectors[len(ngram) - 1][ngram] = times * weight
        norms = [math.sqrt(sum(value * value for value in each.values())) for each in vectors]
        return vectors, norms, max(0, words - 1)


def _count(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[begin : begin + n])
        for n in range(1, _LONGEST + 1)
        for begin in range(len(words) - n + 1)
    )
