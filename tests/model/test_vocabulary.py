import csv
import json
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from captioner.errors import BundleError
from captioner.model.vocabulary import EOS, PAD, SPECIAL, START, UNKNOWN, Vocabulary
from conftest import shared_data

CAPTIONS = ["A dog runs .", "a  DOG\tsits .\n", "the dog ."]


@pytest.fixture
def small() -> Vocabulary:
    """``.`` and ``dog`` three times, ``a`` twice, the rest once."""
    return Vocabulary.from_captions(CAPTIONS, minimum_count=1)


def _words(vocabulary: Vocabulary) -> list[str]:
    return vocabulary.words(range(len(vocabulary)))


def test_the_first_ids_are_the_special_ones(small):
    assert (PAD, START, EOS, UNKNOWN) == (0, 1, 2, 3)
    assert SPECIAL == ("<pad>", "<start>", "<eos>", "<unk>")
    assert small.words([0, 1, 2, 3]) == list(SPECIAL)
    assert _words(Vocabulary.from_captions([])) == list(SPECIAL)


def test_words_are_lower_case_and_the_most_frequent_come_first(small):
    assert _words(small) == [*SPECIAL, ".", "dog", "a", "runs", "sits", "the"]


@pytest.mark.parametrize(
    ("minimum", "words"),
    [(2, [".", "dog", "a"]), (3, [".", "dog"]), (4, [])],
)
def test_rare_words_are_left_out(minimum, words):
    vocabulary = Vocabulary.from_captions(CAPTIONS, minimum_count=minimum)
    assert _words(vocabulary) == [*SPECIAL, *words]
    assert len(vocabulary) == 4 + len(words)


def test_five_occurrences_are_enough_unless_asked_otherwise():
    vocabulary = Vocabulary.from_captions(["five four"] * 4 + ["five"])
    assert _words(vocabulary) == [*SPECIAL, "five"]


def test_a_caption_becomes_ids_between_start_and_end(small):
    assert small.encode(" The DOG  flies\n. ", 50) == [START, 9, 5, UNKNOWN, 4, EOS]
    assert small.encode("", 50) == [START, EOS]
    assert small.encode("dog.", 50) == [START, UNKNOWN, EOS], "words end at white space only"


def test_punctuation_is_apart_in_a_ptb_vocabulary():
    captions = ["A dog's ball, on grass.", "a dog isn't (here)."]
    vocabulary = Vocabulary.from_captions(captions, minimum_count=1, kind="ptb")
    assert {"dog", "'s", ",", "grass", ".", "n't", "("} < set(_words(vocabulary))
    ids = vocabulary.encode("A dog's ball.", 50)
    assert UNKNOWN not in ids
    words = vocabulary.words(ids[1:-1])
    assert words == ["a", "dog", "'s", "ball", "."]
    assert vocabulary.split(ids[1:-1]) == ("a dog's ball.", words, [[0], [1], [2], [3], [4]])
    assert vocabulary.decode(ids[1:-1]) == "a dog's ball."


def test_a_vocabulary_of_white_space_joins_words_with_spaces(small):
    assert small.kind == "whitespace"
    assert small.decode(small.encode("the dog .", 9)[1:-1]) == "the dog ."


def test_a_datasets_own_words_are_taken_as_they_are():
    vocabulary = Vocabulary.from_captions(
        [["A", "rock'n'roll", "t-shirt."]], minimum_count=1, kind="ptb"
    )
    assert _words(vocabulary) == [*SPECIAL, "a", "rock'n'roll", "t-shirt."]
    assert vocabulary.encode(["a", "t-shirt.", "dog"], 50) == [START, 4, 6, UNKNOWN, EOS]
    assert vocabulary.encode(["a"] * 9, 4) == [START, 4, 4, EOS]


def test_the_kind_of_a_vocabulary_is_given_when_it_is_read(small):
    text = Vocabulary.from_captions(["a dog."], minimum_count=1, kind="ptb").to_json()
    assert Vocabulary.from_json(text, "ptb").encode("dog.", 9) == [START, 6, 4, EOS]
    assert Vocabulary.from_json(text).encode("dog.", 9) == [START, UNKNOWN, EOS]


def test_no_break_and_ideographic_spaces_are_white_space(small):
    assert small.encode("a\u00a0dog\u3000.", 50) == [START, 6, 5, 4, EOS]


@pytest.mark.parametrize(
    ("length", "ids"),
    [(6, [6, 5, 7, 4]), (5, [6, 5, 7]), (4, [6, 5]), (3, [6]), (2, [])],
)
def test_a_long_caption_is_cut_to_the_maximum_length(small, length, ids):
    assert small.encode("a dog runs .", length) == [START, *ids, EOS]


@pytest.mark.parametrize("word", [*SPECIAL, "<EOS>", "<Pad>", "dog<eos>", "<unk>dog", "a<pad>dog"])
def test_a_caption_that_spells_out_a_special_word_has_an_unknown_word(small, word):
    assert small.encode(f"a {word} dog", 50) == [START, 6, UNKNOWN, 5, EOS]


def test_captions_that_spell_out_special_words_do_not_make_them_twice():
    vocabulary = Vocabulary.from_captions(["a <eos> <unk> dog"] * 5 + ["<PAD> <start>"] * 9)
    assert _words(vocabulary) == [*SPECIAL, "a", "dog"]
    assert Vocabulary.from_json(vocabulary.to_json()).encode("dog <eos>", 9) == [1, 5, 3, 2]


def test_the_order_of_the_captions_does_not_matter():
    orders = CAPTIONS, CAPTIONS[::-1]
    first, second = (Vocabulary.from_captions(order, minimum_count=1) for order in orders)
    assert first.to_json() == second.to_json()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text(), max_size=5), st.text())
def test_json_says_all_there_is(captions, caption):
    vocabulary = Vocabulary.from_captions(captions, minimum_count=1)
    read = Vocabulary.from_json(vocabulary.to_json())
    assert _words(read) == _words(vocabulary)
    assert read.to_json() == vocabulary.to_json()
    assert read.encode(caption, 50) == vocabulary.encode(caption, 50)
    assert max(read.encode(caption, 50)) < len(read)
    for known in captions:
        assert UNKNOWN not in vocabulary.encode(known, 10**6) or "<" in known


def test_a_copy_for_another_process_is_the_same(small):
    copy = pickle.loads(pickle.dumps(small))
    assert copy.to_json() == small.to_json()
    assert copy.encode("a dog<eos>", 50) == [START, 6, UNKNOWN, EOS]


def test_hugging_face_reads_the_json(small):
    tokenizer = Tokenizer.from_str(small.to_json())
    assert tokenizer.encode("A dog flies .").ids == [6, 5, UNKNOWN, 4]
    assert tokenizer.get_vocab_size() == len(small)


# Files that somebody else made.


def _changed(small: Vocabulary, **words: object) -> str:
    description = json.loads(small.to_json())
    description["model"]["vocab"].update(words)
    return json.dumps(description)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "7",
        "[]",
        "{}",
        "not JSON",
        "[" * 100_000,
        '{"model": null}',
        '{"model": []}',
        '{"model": {}}',
        '{"model": {"type": "WordLevel"}}',
        '{"model": {"vocab": {}}}',
        '{"model": {"type": "WordLevel", "vocab": {"a": ' + "9" * 5000 + "}}}",
    ],
)
def test_what_is_no_tokenizer_is_refused(text):
    with pytest.raises(BundleError, match=r"^tokenizer\.json cannot be read: .+$"):
        Vocabulary.from_json(text)


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "WordLevel", "vocab": []},
        {"type": "WordLevel", "vocab": "words.json"},
        {"type": ["WordLevel"], "vocab": {}},
    ],
)
def test_another_kind_of_tokenizer_is_refused(model):
    with pytest.raises(BundleError, match=r"^tokenizer\.json is not a WordLevel tokenizer$"):
        Vocabulary.from_json(json.dumps({"model": model}))


@pytest.mark.parametrize(
    "value", ["5", 5.0, None, [5], {}, True, -1, 4, 10, 10**30, float("nan"), float("inf")]
)
def test_ids_that_are_not_0_1_2_are_refused(small, value):
    with pytest.raises(BundleError, match=r"^tokenizer\.json's ids are not 0, 1, 2, …$"):
        Vocabulary.from_json(_changed(small, dog=value))


def test_ids_that_are_truth_values_are_refused(small):
    changed = _changed(small, **{"<pad>": False, "<start>": True})
    with pytest.raises(BundleError, match=r"^tokenizer\.json's ids are not 0, 1, 2, …$"):
        Vocabulary.from_json(changed)


@pytest.mark.parametrize(
    "words",
    [
        {"<pad>": 1, "<start>": 0},
        {"<eos>": 4, ".": 2},
        {"<unk>": 5, "dog": 3},
    ],
)
def test_special_words_elsewhere_are_refused(small, words):
    with pytest.raises(BundleError, match=r"does not begin with <pad> <start> <eos> <unk>$"):
        Vocabulary.from_json(_changed(small, **words))


def test_a_vocabulary_without_special_words_is_refused():
    text = json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0, "dog": 1}}})
    with pytest.raises(BundleError, match=r"does not begin with <pad> <start> <eos> <unk>$"):
        Vocabulary.from_json(text)


def test_a_word_that_is_no_text_is_refused(small):
    with pytest.raises(BundleError, match=r"has a word that is not Unicode text$"):
        Vocabulary.from_json(_changed(small, **{"\ud800": 10}))


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": None},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}},
        {"pre_tokenizer": {"type": "Punctuation", "behavior": "Isolated"}},
        {"truncation": {"max_length": 1}},
        {"padding": {"strategy": {"Fixed": 9}}},
        {"added_tokens": [{"id": 99, "content": "dog", "special": True}]},
        {"post_processor": {"type": "nonsense"}},
    ],
)
def test_nothing_but_the_words_of_a_file_counts(small, change):
    read = Vocabulary.from_json(json.dumps(json.loads(small.to_json()) | change))
    assert read.encode("A dog<eos> dog .", 50) == [START, 6, UNKNOWN, 5, 4, EOS]
    assert read.to_json() == small.to_json()


# The real captions.


def _flickr8k_captions() -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    with (shared_data() / "captions.txt").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    return captions


def test_the_first_captions_of_flickr8k_have_the_notebooks_number_of_words():
    captions = _flickr8k_captions()
    assert len(captions) == 7000
    first = [of_image[0] for of_image in captions.values()]
    assert len(Vocabulary.from_captions(first)) == 1118


@pytest.mark.parametrize(("kind", "size"), [("whitespace", 2549), ("ptb", 2550)])
def test_the_words_of_all_captions_of_the_training_split(kind, size):
    captions = _flickr8k_captions()
    names = (shared_data() / "train.txt").read_text().split()
    of_split = [caption for name in names for caption in captions[name]]
    # Apart from "&", which "at&t" makes frequent enough, they are the same words.
    assert len(Vocabulary.from_captions(of_split, kind=kind)) == size
