"""Scores captions against references: BLEU, METEOR, ROUGE-L, CIDEr, SPICE.

The scorers are pycocoevalcap's, which the extra ``eval`` installs. METEOR, SPICE and PTBTokenizer
are Java programs that come with it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from captioner.errors import CaptionerError, InputError
from captioner.model.tokenization import scoring_words

__all__ = ["NAMES", "Scores", "Tokenizer", "choose_tokenizer", "score", "tokenize"]

Tokenizer = Literal["ptb", "simple"]

#: The metrics and their names, in the order of papers' tables.
NAMES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "spice": "SPICE",
}


@dataclass(frozen=True)
class Scores:
    """Scores of captions by metric, for example ``bleu_4``, ``meteor`` or ``cider``.

    Attributes:
        corpus: the score of all captions together; between 0 and 1, CIDEr between 0 and 10.
        images: the score of each caption, in the captions' order.
        tokenizer: the tokenizer that split the captions into words.
        left_out: the metrics that could not be computed, with the reason.
    """

    corpus: dict[str, float]
    images: dict[str, list[float]]
    tokenizer: Tokenizer
    left_out: dict[str, str]

    def describe_left_out(self) -> list[str]:
        """A line for each metric that could not be computed."""
        return [f"left out: {NAMES[name]}: {reason}" for name, reason in self.left_out.items()]


def choose_tokenizer(name: str) -> Tokenizer:
    """Chooses a tokenizer: ``auto`` is ``ptb`` if Java runs, else ``simple``.

    Raises:
        InputError: pycocoevalcap is not installed, or ``ptb`` is chosen and Java does not run.
    """
    try:
        import pycocoevalcap.cider.cider  # noqa: F401
    except ImportError as error:
        raise InputError(
            "scores need pycocoevalcap: install the extra eval (pip install 'captioner[eval]')"
        ) from error
    if name == "simple":
        return "simple"
    if _java_runs():
        return "ptb"
    if name == "ptb":
        raise InputError(
            "--tokenizer ptb needs Java, which does not run here: use --tokenizer simple"
        )
    return "simple"


def _java_runs() -> bool:
    """Whether Java runs. macOS has a ``java`` that only says where to download Java."""
    if shutil.which("java") is None:
        return False
    return subprocess.run(["java", "-version"], capture_output=True).returncode == 0  # noqa: S607


def score(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: str = "auto",
    spice: bool = False,
) -> Scores:
    """Scores captions against reference captions of the same images.

    CIDEr weighs words by the number of images that have them in their references. Scores of
    different sets of images therefore do not compare, and the CIDEr of a single image is 0.

    Args:
        captions: one per image.
        references: one or more per image, in the captions' order.
        tokenizer: ``ptb``; ``simple``, which needs no Java and leaves out METEOR and SPICE; or
            ``auto``, see :func:`choose_tokenizer`.
        spice: compute SPICE, which is slow and downloads its models at its first use.

    Raises:
        InputError: as :func:`choose_tokenizer`; or an image has no reference; or no reference has
            a word.
        CaptionerError: PTBTokenizer failed.
    """
    chosen = choose_tokenizer(tokenizer)
    if len(captions) != len(references) or not all(references):
        raise InputError("every caption needs at least one reference")
    flat = tokenize([*captions, *(each for image in references for each in image)], chosen)
    tokenized = iter(flat)
    # Keys of equal length: the scorers sort them as text.
    hypotheses = {f"{i:012d}": [next(tokenized)] for i in range(len(captions))}
    targets = {
        key: [next(tokenized) for _ in image]
        for key, image in zip(hypotheses, references, strict=True)
    }
    if not any(flat[len(captions) :]):
        raise InputError("no reference contains a word; check the dataset's captions")
    return _score_tokenized(hypotheses, targets, chosen, spice)


def _score_tokenized(
    hypotheses: dict[str, list[str]],
    targets: dict[str, list[str]],
    tokenizer: Tokenizer,
    spice: bool,
) -> Scores:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    results: dict[str, tuple[float, Sequence[float]]] = {}
    bleu, bleu_images = Bleu(4).compute_score(targets, hypotheses, verbose=0)
    for n in range(4):
        results[f"bleu_{n + 1}"] = bleu[n], bleu_images[n]
    results["rouge_l"] = Rouge().compute_score(targets, hypotheses)
    results["cider"] = Cider().compute_score(targets, hypotheses)
    left_out: dict[str, str] = {}
    java = {"meteor": _meteor} | ({"spice": _spice} if spice else {})
    for name, compute in java.items():
        if tokenizer == "simple":
            left_out[name] = "it needs Java and --tokenizer ptb"
            continue
        try:
            results[name] = compute(targets, hypotheses)
        except _JavaError as error:
            left_out[name] = str(error)
    ordered = [name for name in NAMES if name in results]
    return Scores(
        corpus={name: float(results[name][0]) for name in ordered},
        images={name: [float(each) for each in results[name][1]] for name in ordered},
        tokenizer=tokenizer,
        left_out=left_out,
    )


class _JavaError(Exception):
    """The Java program of a metric, or the download of its models, failed."""


def _meteor(targets: dict[str, list[str]], hypotheses: dict[str, list[str]]) -> Any:
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        return meteor.compute_score(targets, hypotheses)
    except (OSError, ValueError) as error:  # the pipe broke, or the answer is not a number
        raise _JavaError(f"its Java program failed ({type(error).__name__})") from error
    finally:
        if meteor.lock.locked():  # it failed with the lock held, which its destructor waits for
            meteor.lock.release()
        meteor.meteor_p.kill()
        meteor.meteor_p.communicate()


# In a separate process, because SPICE and its Java program write to stdout and stderr.
_SPICE = """
import json, socket, sys
from pycocoevalcap.spice.spice import Spice
socket.setdefaulttimeout(30)
mean, images = Spice().compute_score(*json.load(sys.stdin))
print()
print(json.dumps([float(mean), [each["All"]["f"] for each in images]], allow_nan=False))
"""


def _spice(targets: dict[str, list[str]], hypotheses: dict[str, list[str]]) -> Any:
    process = subprocess.run(  # noqa: S603
        [sys.executable, "-c", _SPICE],
        input=json.dumps([targets, hypotheses]),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise _JavaError(_reason(process.stderr))
    return json.loads(process.stdout.splitlines()[-1])


def _reason(stderr: str) -> str:
    """The line of a Python or Java traceback that states the error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    java = [line for line in lines if line.startswith(("Exception in", "Caused by", "Error:"))]
    return (java or lines or ["the program gave no message"])[-1][:200]


def tokenize(captions: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Splits captions into lower-case words, joined by spaces, without most punctuation.

    ``ptb`` is Stanford's PTBTokenizer, run and cleaned as pycocoevalcap does. ``simple`` is
    :func:`captioner.model.tokenization.scoring_words`, which needs no Java and gives the same words
    except in rare cases.

    Raises:
        CaptionerError: PTBTokenizer failed.
    """
    if tokenizer == "simple":
        return [" ".join(scoring_words(caption)) for caption in captions]
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    # One line per caption: the Java program answers line by line.
    lines = [" ".join(caption.split()) for caption in captions]
    removed = frozenset(PUNCTUATIONS)
    return [" ".join(word for word in each if word not in removed) for each in _ptb(lines)]


def _ptb(lines: list[str]) -> list[list[str]]:
    """Runs PTBTokenizer; pycocoevalcap's own class writes into its folder and to stderr."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    folder = os.path.dirname(ptbtokenizer.__file__)
    jar = os.path.join(folder, ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    program = "edu.stanford.nlp.process.PTBTokenizer"
    encoding = "-Dfile.encoding=UTF-8"
    command = ["java", encoding, "-cp", jar, program, "-preserveLines", "-lowerCase"]
    process = subprocess.run(  # noqa: S603
        command,
        input="".join(f"{line}\n" for line in lines).encode(errors="replace"),
        capture_output=True,
    )
    tokenized = process.stdout.decode().split("\n")[:-1]
    if process.returncode or len(tokenized) != len(lines):
        reason = _reason(process.stderr.decode(errors="replace"))
        raise CaptionerError(f"PTBTokenizer failed: {reason}; use --tokenizer simple")
    return [line.split(" ") for line in tokenized]
