import math
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from captioner.errors import InputError
from captioner.evaluation import metrics
from captioner.evaluation.metrics import score, tokenize
from conftest import shared_data
from ptb_words import PTB_WORDS

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java here")

CAPTIONS = ["A dog runs on the grass .", "two men in red", "", "a cat sits on a café's roof"]
REFERENCES = [
    ["A dog runs on the grass .", "A brown dog is running ."],
    ["Two men sit on a bench .", "Two men in red shirts aren't standing .", "men"],
    ["A ball in the water ."],
    ["A cat's on the café's roof .", "The cat sits (on a roof) ."],
]


def test_a_perfect_caption():
    texts = ["a dog runs on grass", "two men in red shirts sit"]
    scores = score(texts, [[text.upper() + " ."] for text in texts], tokenizer="simple")
    assert scores.tokenizer == "simple"
    assert scores.corpus == pytest.approx(
        {**{f"bleu_{n}": 1.0 for n in range(1, 5)}, "rouge_l": 1.0, "cider": 10.0}
    )


def test_scores_by_hand():
    scores = score(["a dog runs"], [["the dog runs fast", "cat"]], tokenizer="simple")
    # Two of three words, one of two pairs; the reference of the closest length is one longer.
    brevity = math.exp(1 - 4 / 3)
    assert scores.corpus["bleu_1"] == pytest.approx(brevity * 2 / 3)
    assert scores.corpus["bleu_2"] == pytest.approx(brevity * math.sqrt(2 / 3 * 1 / 2))
    assert scores.corpus["bleu_4"] < 1e-3
    precision, recall = 2 / 3, 2 / 4
    rouge = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert scores.corpus["rouge_l"] == pytest.approx(rouge)
    assert scores.corpus["cider"] == 0  # with one image, no word tells it from the others


def _library(tokenized_captions: list[str], tokenized_references: list[list[str]]):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions = {i: [each] for i, each in enumerate(tokenized_captions)}
    references = dict(enumerate(tokenized_references))
    scorers = {"bleu": Bleu(4), "rouge_l": Rouge(), "cider": Cider()}
    return {name: each.compute_score(references, captions) for name, each in scorers.items()}


def _assert_the_librarys(scores: metrics.Scores, expected) -> None:
    for n in range(4):
        assert scores.corpus[f"bleu_{n + 1}"] == expected["bleu"][0][n]
        assert scores.images[f"bleu_{n + 1}"] == expected["bleu"][1][n]
    for name in ("rouge_l", "cider"):
        assert scores.corpus[name] == expected[name][0]
        assert scores.images[name] == list(expected[name][1])


def test_simple_scores_are_the_librarys_and_nothing_is_printed(capfd):
    scores = score(CAPTIONS, REFERENCES, tokenizer="simple")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    references = [tokenize(each, "simple") for each in REFERENCES]
    _assert_the_librarys(scores, _library(tokenize(CAPTIONS, "simple"), references))
    assert set(scores.left_out) == {"meteor"}


@needs_java
@pytest.mark.slow
def test_scores_with_java_are_the_librarys_and_nothing_is_printed(capfd):
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The library reads Java's output in the locale's encoding.
    captions = [each.replace("é", "e") for each in CAPTIONS]
    references = [[each.replace("é", "e") for each in image] for image in REFERENCES]
    scores = score(captions, references, tokenizer="ptb")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert list(scores.corpus) == [name for name in metrics.NAMES if name != "spice"]
    assert scores.left_out == {}
    hypotheses = PTBTokenizer().tokenize({i: [{"caption": c}] for i, c in enumerate(captions)})
    targets = PTBTokenizer().tokenize(
        {i: [{"caption": each} for each in image] for i, image in enumerate(references)}
    )
    expected = _library([each for [each] in hypotheses.values()], list(targets.values()))
    _assert_the_librarys(scores, expected)
    meteor = Meteor()
    mean, images = meteor.compute_score(targets, hypotheses)
    meteor.meteor_p.kill()
    meteor.meteor_p.communicate()
    assert (scores.corpus["meteor"], scores.images["meteor"]) == (mean, images)
    assert scores.images["meteor"][CAPTIONS.index("")] == 0


@pytest.mark.parametrize("caption", ["", " ", ".", "? , ."])
def test_a_caption_without_a_word_scores_nothing(caption):
    scores = score([caption, "a dog"], [["a cat", "the cat"], ["a dog"]], tokenizer="simple")
    assert all(values[0] == pytest.approx(0, abs=1e-6) for values in scores.images.values())
    assert scores.images["bleu_1"][1] == pytest.approx(1)


def test_what_cannot_be_scored():
    with pytest.raises(InputError, match="at least one reference"):
        score(["a dog", "a cat"], [["a dog"], []], tokenizer="simple")
    with pytest.raises(InputError, match="at least one reference"):
        score(["a dog"], [["a dog"], ["a cat"]], tokenizer="simple")
    with pytest.raises(InputError, match="no reference contains a word"):
        score(["a dog"], [["."]], tokenizer="simple")


def test_without_java(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert metrics.choose_tokenizer("auto") == "simple"
    with pytest.raises(InputError, match="needs Java"):
        metrics.choose_tokenizer("ptb")
    fake = tmp_path / "java"  # as on macOS where no Java is installed
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    assert metrics.choose_tokenizer("auto") == "simple"
    scores = score(["a dog"], [["a dog"]], spice=True)
    assert set(scores.left_out) == {"meteor", "spice"}


def test_without_the_extra():
    code = (
        "import sys; sys.modules['pycocoevalcap'] = None\n"
        "from captioner import errors; from captioner.evaluation import metrics\n"
        "try: metrics.score(['a'], [['a']])\n"
        "except errors.InputError as error: assert 'captioner[eval]' in str(error)\n"
        "else: sys.exit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@needs_java
def test_a_metric_whose_program_fails_is_left_out(monkeypatch, tmp_path, capfd):
    from pycocoevalcap.spice import get_stanford_models as models

    if (Path(models.SPICEDIR) / models.SPICELIB / f"{models.JAR}.jar").exists():
        pytest.skip("SPICE has its models")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    broken = tmp_path / "java"
    java = shutil.which("java")
    broken.write_text(f'#!/bin/sh\ncase "$*" in *meteor*) exit 1;; esac\nexec {java} "$@"\n')
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    scores = score(CAPTIONS, REFERENCES, tokenizer="ptb", spice=True)
    assert set(scores.left_out) == {"meteor", "spice"}
    assert "its Java program failed" in scores.left_out["meteor"]
    assert "URLError" in scores.left_out["spice"]
    assert len(scores.left_out["spice"].splitlines()) == 1
    assert scores.corpus["cider"] > 0
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_words_of_the_simple_tokenizer():
    text = "A dog's \"T-shirt\" isn't (very) red , at 10:30 ... OK?"
    assert tokenize([text, "", "."], "simple") == [
        "a dog 's t-shirt is n't -lrb- very -rrb- red at 10:30 ok",
        "",
        "",
    ]


@needs_java
def test_the_recorded_words_are_those_of_ptb():
    assert tokenize(list(PTB_WORDS), "ptb") == list(PTB_WORDS.values())


@needs_java
def test_the_simple_tokenizer_cuts_flickr8ks_captions_as_ptb_does():
    table = pd.read_csv(shared_data() / "captions.txt", dtype=str, keep_default_na=False)
    captions = table["caption"].tolist()
    pairs = zip(tokenize(captions, "simple"), tokenize(captions, "ptb"), strict=True)
    equal = sum(simple == ptb for simple, ptb in pairs)
    assert equal == len(captions)


@needs_java
def test_unicode_survives_java():
    captions = ["Ein Müßiggänger im Café", "日本語 の 字幕", "naïve \ud800 half"]
    assert tokenize(captions, "ptb") == [
        "ein müßiggänger im café",
        "日本語 の 字幕",
        "naïve half",
    ]
