"""Subwords: what is learned, how captions become ids and words again, which files are refused."""

import dataclasses
import json
import pickle
import sys
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from captioner.config import DecodeConfig
from captioner.errors import BundleError, InputError
from captioner.model import bundle
from captioner.model.generate import generate
from captioner.model.native import Captioner
from captioner.model.subwords import SubwordVocabulary
from captioner.model.vocabulary import EOS, SPECIAL, START, UNKNOWN, Vocabulary
from conftest import tiny_model

CAPTIONS = [
    "A brown dog runs on the grass .",
    "a  BROWN\tdog jumps over the dog 's ball .\n",
    "Two dogs, jumping; the grass is brown.",
] * 5


def _learn(largest: int | None = None, minimum: int = 2) -> SubwordVocabulary:
    vocabulary = Vocabulary.from_captions(
        CAPTIONS, minimum_count=minimum, largest=largest, kind="bpe"
    )
    assert isinstance(vocabulary, SubwordVocabulary)
    return vocabulary


@pytest.fixture(scope="module")
def small() -> SubwordVocabulary:
    return _learn(300)


def _coded(vocabulary: Vocabulary, caption: str | list[str]) -> str:
    ids = vocabulary.encode(caption, 10_000)
    assert (ids[0], ids[-1]) == (START, EOS)
    assert min(ids[1:-1], default=UNKNOWN + 1) > UNKNOWN
    return vocabulary.decode(ids[1:-1])


@pytest.mark.parametrize("largest", [256, 257, 280, 290])
def test_the_size_of_the_vocabulary_is_what_was_asked_for(largest: int):
    vocabulary = _learn(largest)
    assert len(vocabulary) == len(SPECIAL) + largest
    words = vocabulary.words(range(len(vocabulary)))
    assert tuple(words[:4]) == SPECIAL
    assert set(words[4:260]) == set(pre_tokenizers.ByteLevel.alphabet())
    assert len(set(words)) == len(words)


def test_rare_pairs_make_no_subword():
    assert len(_learn(8000, minimum=16)) < len(_learn(8000, minimum=6)) < len(_learn()) < 400
    assert len(Vocabulary.from_captions([], kind="bpe")) == 260


def test_a_size_below_the_number_of_bytes_is_refused():
    with pytest.raises(InputError, match=r"^--vocabulary-size 255: .* needs at least 256, one for"):
        _learn(255)


def test_a_frequent_word_is_one_subword_wherever_it_stands(small):
    [first] = small.encode("dog", 9)[1:-1]
    assert small.encode("the dog", 9)[2] == first
    assert len(small.encode("zebra", 99)) > 4


@pytest.mark.parametrize(
    ("caption", "natural"),
    [
        ("A Brown DOG.", "a brown dog."),
        ("a dog 's ball , on ( green ) grass .", "a dog's ball, on (green) grass."),
        ('a sign that says " stop " !', 'a sign that says "stop"!'),
        ("the dog's ball — “fetch…” it’s 50% off: $5.99, isn't it?", None),
        ("  spaces\u00a0\u3000of\tall\nkinds ", "spaces of all kinds"),
        ("ein großer Hund läuft über die Straße", None),
        ("decomposed cafe\u0301", "decomposed caf\u00e9"),
        ("一只狗，在草地上奔跑。", None),
        ("собака бежит по траве", None),
        ("कुत्ता घास पर दौड़ता है।", None),
        ("الكلب يجري على العشب؟", None),
        ("a dog 🐕 and a family 👨\u200d👩\u200d👧", None),
        ("<eos> a <PAD> dog<unk> <start>", "<eos> a <pad> dog<unk> <start>"),
        ("nul \x00 and \x7f", None),
        ("", ""),
    ],
)
def test_a_caption_comes_back_as_people_write_it(small, caption, natural):
    expected = unicodedata.normalize("NFC", caption.lower()) if natural is None else natural
    assert _coded(small, caption) == expected
    assert _coded(small, expected) == expected


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text())
def test_any_text_has_ids_that_stand_for_it(caption: str):
    vocabulary = _VOCABULARY
    ids = vocabulary.encode(caption, 10**6)[1:-1]
    text, words, members = vocabulary.split(ids)
    assert text == vocabulary.decode(ids) == " ".join(words)
    assert len(words) == len(members)
    placed = [place for places in members for place in places]
    assert placed == list(range(len(ids) if words else 0)), "each id belongs to one word, in order"
    assert all(members)
    for word, places in zip(words, members, strict=True):
        assert vocabulary.decode([ids[place] for place in places]) == word


_VOCABULARY = _learn(300)


def test_a_datasets_own_words_are_joined(small):
    assert _coded(small, ["A", "dog", "'s", "t-shirt", "."]) == "a dog's t-shirt."


def test_ids_that_no_text_has_are_grouped_into_words_too(small):
    """A model may spell a word in another way than the tokenizer does."""
    alphabet = {word: id_ for id_, word in enumerate(small.words(range(len(small))))}
    ids = [alphabet[each] for each in ("Ġ", "Ġ", "d", "o", "g", "Ġ", "Ġ", "a", "Ã", "©", "Ã")]
    text, words, members = small.split(ids)
    assert (text, words) == ("dog aé\ufffd", ["dog", "aé\ufffd"])
    assert members == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]], "spaces belong to the next word"
    assert small.split([*ids[:5], alphabet["Ġ"]])[2] == [[0, 1, 2, 3, 4, 5]], "or to the last"
    assert small.split([alphabet["Ġ"]]) == ("", [], [])
    assert small.split([]) == ("", [], [])


def test_a_long_caption_is_cut_between_words(small):
    caption = "the brown zebra quickly jumps"
    whole = small.encode(caption, 100)
    cuts = {small.decode(small.encode(caption, length)[1:-1]) for length in range(2, 40)}
    assert cuts == {"the", "the brown", "the brown zebra", "the brown zebra quickly", caption, ""}
    for length in range(2, 40):
        assert len(small.encode(caption, length)) <= length
    assert small.encode(caption, len(whole)) == whole
    assert len(small.encode("x" * 50, 12)) == 12, "a single word is cut inside"


def test_the_order_of_the_captions_does_not_matter(small):
    other = Vocabulary.from_captions(CAPTIONS[::-1], minimum_count=2, largest=300, kind="bpe")
    assert other.to_json() == small.to_json()


def test_a_copy_for_another_process_is_the_same(small):
    copy = pickle.loads(pickle.dumps(small))
    assert copy.to_json() == small.to_json()
    assert copy.encode("a dog <eos>", 50) == small.encode("a dog <eos>", 50)


def test_json_says_all_there_is(small):
    read = Vocabulary.from_json(small.to_json(), "bpe")
    assert (read.kind, len(read)) == ("bpe", len(small))
    assert read.to_json() == small.to_json()
    assert read.encode("A brown zebra <eos>", 50) == small.encode("A brown zebra <eos>", 50)


def test_hugging_face_reads_the_json(small):
    tokenizer = Tokenizer.from_str(small.to_json())
    encoded = tokenizer.encode("A brown dog.")
    assert encoded.ids == small.encode("A brown dog.", 50)[1:-1]
    assert tokenizer.decode(encoded.ids) == " a brown dog."


@pytest.mark.parametrize("beam", [1, 3])
def test_a_words_logprob_and_map_are_those_of_its_subwords(small, beam: int):
    model = tiny_model(tokenizer="bpe", vocabulary_size=len(small), max_length=24)
    decode = DecodeConfig(beam=beam)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    read = bundle.Bundle(model, small, {}, (3, 3))
    captions = Captioner(read, decode, device="cpu", precision="fp32")(pixels)
    means = Captioner(
        read, dataclasses.replace(decode, attention="mean"), device="cpu", precision="fp32"
    )(pixels)
    with torch.no_grad():
        hypotheses = generate(model.decoder, model.encoder(torch.from_numpy(pixels)), decode)
    assert len({caption.text for caption in captions}) > 1
    assert any(
        len(each.ids) > len(one.tokens) for each, one in zip(hypotheses, captions, strict=True)
    )
    for caption, mean, hypothesis in zip(captions, means, hypotheses, strict=True):
        text, words, members = small.split(hypothesis.ids)
        assert (caption.text, caption.tokens) == (text, words)
        assert caption.score == pytest.approx(np.mean(hypothesis.logprobs), abs=1e-4)
        own = hypothesis.logprobs[: len(hypothesis.ids)]
        assert sum(caption.token_logprobs) == pytest.approx(sum(own), abs=1e-3)
        maps_THW = hypothesis.attention_SP.reshape(-1, 3, 3)
        for word, places in enumerate(members):
            expected = sum(own[place] for place in places)
            assert caption.token_logprobs[word] == pytest.approx(expected, abs=1e-3)
            np.testing.assert_allclose(
                caption.attention_THW[word], maps_THW[places].mean(0), atol=1e-4
            )
        np.testing.assert_allclose(mean.attention_THW, maps_THW.mean(0)[None], atol=1e-4)


# Files that somebody else made.


def _changed(small: SubwordVocabulary, **changes: object) -> str:
    description = json.loads(small.to_json())
    description["model"].update(changes)
    return json.dumps(description)


def test_words_and_subwords_are_not_taken_for_each_other(small):
    words = Vocabulary.from_captions(["a dog"] * 5)
    with pytest.raises(BundleError, match=r"^tokenizer\.json is not a BPE tokenizer$"):
        Vocabulary.from_json(words.to_json(), "bpe")
    with pytest.raises(BundleError, match=r"^tokenizer\.json is not a WordLevel tokenizer$"):
        Vocabulary.from_json(small.to_json())


@pytest.mark.parametrize(
    "merges",
    [
        None,
        {},
        "a b",
        [["d"]],
        [["d", "o", "g"]],
        [["d", 1]],
        ["d o"],
        [["d", "zebra"]],
        [["zz", "top"]],
        [["<", "pad>"]],
        [["<pad>", ""]],
        [[["d"], "o"]],
    ],
)
def test_what_is_no_list_of_merges_is_refused(small, merges):
    with pytest.raises(BundleError, match=r"^tokenizer\.json's merges are not pairs of subwords$"):
        Vocabulary.from_json(_changed(small, merges=merges), "bpe")


def test_a_vocabulary_without_some_bytes_is_refused(small):
    vocabulary = {word: id_ for id_, word in enumerate([*SPECIAL, "a", "b", "ab"])}
    text = _changed(small, vocab=vocabulary, merges=[["a", "b"]])
    with pytest.raises(BundleError, match=r"^tokenizer\.json has no subword for some bytes$"):
        Vocabulary.from_json(text, "bpe")


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}},
        {"pre_tokenizer": None},
        {"truncation": {"max_length": 1}},
        {"added_tokens": [{"id": 99, "content": "dog", "special": True}]},
        {"post_processor": {"type": "nonsense"}},
        {"decoder": None},
    ],
)
def test_nothing_but_the_subwords_and_merges_of_a_file_counts(small, change):
    read = Vocabulary.from_json(json.dumps(json.loads(small.to_json()) | change), "bpe")
    assert read.to_json() == small.to_json()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:-9], "tokenizer.json cannot be read"),
        (lambda text: "{}", "tokenizer.json cannot be read"),
        (lambda text: text.replace('"Ġ",', '"Ġzebra",', 1), "tokenizer.json"),
        (lambda text: text.replace('"merges":', '"pairs":'), "tokenizer.json's merges are not"),
    ],
)
def test_a_damaged_file_makes_a_bundle_unusable_in_one_line(tmp_path, small, damage, reason):
    model = tiny_model(tokenizer="bpe", vocabulary_size=len(small))
    bundle.save(str(tmp_path), model, small)
    assert bundle.load(str(tmp_path)).vocabulary.to_json() == small.to_json()
    path = tmp_path / "tokenizer.json"
    path.write_text(damage(json.dumps(json.loads(path.read_text()), ensure_ascii=False)))
    with pytest.raises(BundleError) as error:
        bundle.load(str(tmp_path))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_only_a_model_of_subwords_needs_the_package(tmp_path, small, model_directory, monkeypatch):
    model = tiny_model(tokenizer="bpe", vocabulary_size=len(small))
    bundle.save(str(tmp_path), model, small)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    words = bundle.load(str(model_directory)).vocabulary
    assert words.decode([4, 5]) == "a and"
    with pytest.raises(BundleError, match=r"subwords need .* tokenizers: pip install tokenizers$"):
        bundle.load(str(tmp_path))
