"""Captions that look wrong, as the report tells of them."""

import pytest

from captioner.review.findings import Findings, is_refusal, is_repetitive


@pytest.mark.parametrize(
    "caption",
    [
        "a dog a dog a dog a dog",
        "the red red red red ball",
        "A man, and a man, and a man, and a man, and a man",
        "!!!!!!!!!!!!",
        "it shows a cat on the mat . on the mat . on the mat . on the mat . on",
    ],
)
def test_phrases_over_and_over_are_found(caption: str) -> None:
    assert is_repetitive(caption)


@pytest.mark.parametrize(
    "caption",
    ["", "a dog", "a man and a woman and a child", "two dogs, two cats, two birds", "wait..."],
)
def test_other_captions_are_not_repetitive(caption: str) -> None:
    assert not is_repetitive(caption)


@pytest.mark.parametrize(
    ("caption", "refuses"),
    [
        ("I'm sorry, but I cannot help with that.", True),
        ("I’m unable to see the image.", True),
        ("As an AI language model, I do not", True),
        ("a sorry dog in the rain", False),
        ("a can of paint", False),
    ],
)
def test_refusals_are_found(caption: str, refuses: bool) -> None:
    assert is_refusal(caption) == refuses


def test_each_finding_has_its_number_and_examples() -> None:
    findings = Findings()
    captions = ["This image shows a " + word for word in ("dog", "cat", "car") * 5]
    captions += ["", "go go go go go", "I cannot describe this"]
    findings.add(
        {
            "uri": f"{number}.jpg",
            "caption": caption,
            "finish": "stop",
            "status": "ok",
            "score": -1.0,
        }
        for number, caption in enumerate(captions)
    )
    findings.add(
        [{"uri": "c.jpg", "caption": "a cut", "finish": "length", "status": "ok", "score": -1.0}]
    )
    findings.add(
        [{"uri": "d.jpg", "caption": None, "finish": None, "status": "failed", "score": None}]
    )
    assert findings.lines() == [
        "captions that reach the length limit (--max-new-tokens, or --max-words): 1 of 19",
        "  a cut  c.jpg",
        "captions that are empty: 1 of 19",
        "    15.jpg",
        "captions that repeat a phrase over and over (try --repetition-penalty 1.1): 1 of 19",
        "  go go go go go  16.jpg",
        "captions that look like refusals (try another --prompt): 1 of 19",
        "  I cannot describe this  17.jpg",
        "captions that begin with 'this image shows a': 15",
        "  This image shows a dog  0.jpg",
    ]


def test_a_rare_opening_is_not_told() -> None:
    findings = Findings()
    findings.add(
        {
            "uri": "a",
            "caption": f"{number} dogs run on the grass",
            "finish": "stop",
            "status": "ok",
            "score": -1.0,
        }
        for number in range(30)
    )
    assert findings.lines() == []
