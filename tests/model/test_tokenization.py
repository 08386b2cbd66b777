import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.model.tokenization import join_words, scoring_words, split_ptb, split_whitespace
from conftest import shared_data
from ptb_words import PTB_WORDS


@pytest.mark.parametrize(("caption", "words"), PTB_WORDS.items())
def test_scoring_words_are_those_of_ptb_tokenizer(caption: str, words: str):
    assert " ".join(scoring_words(caption)) == words


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog's ball, on the grass.", "a dog 's ball , on the grass ."),
        ("It isn't; can't, cannot!", "it is n't ; ca n't , can not !"),
        ("a “quoted” 'word' (in [brackets])", "a \" quoted \" ' word ' ( in [ brackets ] )"),
        ("Wait… five-year-old -- a T-shirt—no", "wait ... five-year-old -- a t-shirt -- no"),
        ("1.5 metres at 10:30 p.m. in the U.S.", "1.5 metres at 10:30 p.m. in the u.s."),
        ("£5 or €6, 50% & ½", "£ 5 or € 6 , 50 % & ½"),
        ("@user #tag #1 <eos>", "@user #tag # 1 <eos>"),
        ("a cat😀 👍🏽 👨‍👩‍👧 ❤️", "a cat 😀 👍🏽 👨‍👩‍👧 ❤️"),
        ("cafe\u0301 कुत्ता है।", "cafe\u0301 कुत्ता है ।"),
        ("", ""),
    ],
)
def test_ptb_keeps_punctuation_as_words(caption: str, words: str):
    assert split_ptb(caption) == words.split()


def test_white_space_keeps_punctuation_beside_the_words():
    assert split_whitespace("A dog's ball, on grass. ") == ["a", "dog's", "ball,", "on", "grass."]


@pytest.mark.parametrize(
    "caption",
    [
        "the dog's ball, on the grass.",
        "the dogs' ball isn't here, and they're gone!",
        'a sign says "do not enter" (in red)...',
        'a "t-shirt" and a "hat".',
        "a 'small' boy; his dad's: two [or three]?",
        "he cannot run, but he's gonna walk",
        "50% of $5, £6 and €7.50 at 10:30 p.m. -- maybe #1",
        "a 5' 10\" man",
        "¿qué? ¡hola!",
        "两只狗在草地上奔跑。",
        "y'all see the rock 'n' roll band & a cat 😀",
    ],
)
def test_words_are_joined_as_people_write(caption: str):
    assert join_words(split_ptb(caption)) == caption


@given(st.lists(st.sampled_from(["a", "dogs", "n't", "'s", "'", '"', "(", ")", ",", ".", "can"])))
def test_joining_keeps_every_word(words: list[str]):
    joined = join_words(words)
    assert joined.replace(" ", "") == "".join(words)
    assert "  " not in joined
    assert joined == joined.strip()


@given(st.text())
def test_any_text_is_split_into_words_without_white_space(caption: str):
    for word in split_ptb(caption):
        assert word
        assert not any(character.isspace() for character in word.rstrip())
    scoring_words(caption)
    join_words(split_ptb(caption))


def _flickr8k_captions() -> list[str]:
    with (shared_data() / "captions.txt").open(newline="", encoding="utf-8") as file:
        return [row["caption"] for row in csv.DictReader(file)]


def test_flickr8ks_captions_have_the_same_words_either_way():
    captions = _flickr8k_captions()
    differing = [each for each in captions if split_ptb(each) != split_whitespace(each)]
    # Typing errors and the like: "cannot", "at&t", "RIF=ding", "ant 's-eye-view", "bro!".
    assert len(captions) == 35_000
    assert len(differing) == 8


def test_flickr8ks_words_survive_joining_and_splitting():
    words = [split_ptb(each) for each in _flickr8k_captions()]
    changed = [each for each in words if split_ptb(join_words(each)) != each]
    assert len(changed) == 1, "3rd st . at the end of a caption"
