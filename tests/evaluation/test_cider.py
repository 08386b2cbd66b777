import random

import pytest
from pycocoevalcap.cider.cider import Cider

from captioner.evaluation.cider import CiderD, content_words

WORDS = ["a", "the", "dog", "cat", "man", "runs", "on", "in", "red", "grass", "two", "with"]


def test_it_is_pycocoevalcaps_cider():
    generator = random.Random(0)
    references = [
        [" ".join(generator.choices(WORDS, k=generator.randint(1, 12))) for _ in range(n)]
        for n in (5, 5, 1, 3, 2, 5)
    ]
    hypotheses = ["a dog runs on the grass", "unheard of", "", "a", *(r[0] for r in references[4:])]
    reward = CiderD([[text.split() for text in texts] for texts in references])
    scores = [reward.score(i, text.split()) for i, text in enumerate(hypotheses)]
    _, expected = Cider().compute_score(
        dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)}
    )
    assert scores == pytest.approx(expected.tolist())
    assert max(scores) > 1


def test_punctuation_by_itself_and_case_do_not_count():
    words = ["a", '"dog"', "'s", "ball", "on-line,", "ends."]
    assert content_words('A "dog" \'s ball , on-line, ends. .') == words
