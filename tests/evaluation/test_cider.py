import random

import pytest
from pycocoevalcap.cider.cider import Cider

from captioner.evaluation.cider import CiderD
from captioner.evaluation.metrics import choose_tokenizer, score, tokenize
from captioner.model.tokenization import scoring_words

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


#: Captions as COCO has them: punctuation stands beside the words.
COCO_REFERENCES = [
    ["A dog's ball, on the grass.", "The dog isn't on the grass!", '"A ball" (red) on grass...'],
    ["Two men sit on a bench.", "Two men, in red shirts; one with a T-shirt."],
    ["A plate of food at 5:30 p.m. in the U.S.", "It's a plate: rice & beans, 50% eaten."],
]
COCO_CAPTIONS = ["the dog's ball, on the grass.", "two men in red shirts.", "a plate of rice."]


@pytest.mark.parametrize("tokenizer", ["simple", "ptb"])
def test_with_punctuation_it_equals_pycocoevalcaps_with_either_tokenizer(tokenizer):
    if tokenizer == "ptb" and choose_tokenizer("auto") != "ptb":
        pytest.skip("no Java here")
    judge = CiderD([[scoring_words(text) for text in texts] for texts in COCO_REFERENCES])
    scores = [judge.score(i, scoring_words(text)) for i, text in enumerate(COCO_CAPTIONS)]
    _, expected = Cider().compute_score(
        {i: tokenize(texts, tokenizer) for i, texts in enumerate(COCO_REFERENCES)},
        {i: tokenize([text], tokenizer) for i, text in enumerate(COCO_CAPTIONS)},
    )
    assert scores == pytest.approx(expected.tolist())
    assert scores == pytest.approx(
        score(COCO_CAPTIONS, COCO_REFERENCES, tokenizer=tokenizer).images["cider"]
    )
    assert min(scores) > 0.5
