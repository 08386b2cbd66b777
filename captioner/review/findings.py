"""Finds captions that look wrong: a low score, cut off, empty, repetitive, refusals, openings.

Pretrained models fail in these ways when a prompt or a setting does not suit them. A report on the
first few hundred images shows it early enough to change the setting.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["COLUMNS", "Finding", "Findings", "is_refusal", "is_repetitive"]

#: The columns that :meth:`Findings.add` reads.
COLUMNS = ("uri", "caption", "finish", "status", "score")

_EXAMPLES = 2  # captions shown for each problem
_OPENING_WORDS = 4
_OPENINGS_SHOWN = 3
# An opening is shown from this share of the captions, and from this many captions, on.
_OPENING_SHARE, _OPENING_COUNT = 0.2, 10
_LONGEST_PHRASE = 8  # words
_REPEATS = 4  # times in a row
_REPEATED_CHARACTER = re.compile(r"(\S)\1{7,}")
_REFUSAL = re.compile(
    r"\b(i'?m|i am) (sorry|unable|not able)\b|\bi (can'?t|cannot|can not)\b|\bas an ai\b"
    r"|\bunable to (assist|help|provide|describe|view|see)\b|\bno image (was|is|has been)\b",
    re.IGNORECASE,
)


@dataclass
class Finding:
    """The captions with one problem.

    Attributes:
        count: the number of captions.
        examples: a few captions, each with the URI of its image.
    """

    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def add(self, caption: str, uri: str) -> None:
        """Counts a caption; keeps the first few as examples."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append((caption, uri))


class Findings:
    """Collects the captions of an output that look wrong.

    Args:
        low_score: the score below which captions are probably wrong; -inf if nobody measured it.
    """

    def __init__(self, low_score: float = -math.inf) -> None:
        self._low_score = low_score
        self._captions = 0
        self._found = {name: Finding() for name in _TITLES}
        self._openings: Counter[str] = Counter()
        self._first: dict[str, tuple[str, str]] = {}

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Checks the captions of rows that have :data:`COLUMNS`."""
        for row in rows:
            if row["status"] != "ok":
                continue
            self._captions += 1
            caption, uri = row["caption"] or "", row["uri"]
            if row["score"] < self._low_score:
                self._found["low"].add(caption, uri)
            if row["finish"] == "length":
                self._found["cut"].add(caption, uri)
            if not caption.strip():
                self._found["empty"].add(caption, uri)
            if is_repetitive(caption):
                self._found["repetitive"].add(caption, uri)
            if is_refusal(caption):
                self._found["refusal"].add(caption, uri)
            words = caption.lower().split()
            if len(words) > _OPENING_WORDS:
                opening = " ".join(words[:_OPENING_WORDS])
                self._openings[opening] += 1
                self._first.setdefault(opening, (caption, uri))

    def lines(self) -> list[str]:
        """Returns a line for each problem found, with examples below it."""
        lines = []
        for name, finding in self._found.items():
            if finding.count:
                title = _TITLES[name].format(low_score=self._low_score)
                lines.append(f"captions that {title}: {finding.count} of {self._captions}")
                lines += [f"  {_short(caption)}  {uri}" for caption, uri in finding.examples]
        for opening, count in self._openings.most_common(_OPENINGS_SHOWN):
            if count >= max(_OPENING_COUNT, _OPENING_SHARE * self._captions):
                caption, uri = self._first[opening]
                lines.append(f"captions that begin with {opening!r}: {count}")
                lines.append(f"  {_short(caption)}  {uri}")
        return lines


_TITLES = {
    "low": "have a score below {low_score:g}, where this model is probably wrong",
    "cut": "reach the length limit (--max-new-tokens, or --max-words)",
    "empty": "are empty",
    "repetitive": "repeat a phrase over and over (try --repetition-penalty 1.1)",
    "refusal": "look like refusals (try another --prompt)",
}


def _short(caption: str) -> str:
    text = " ".join(caption.split())
    return text if len(text) <= 80 else text[:77] + "…"


def is_repetitive(caption: str) -> bool:
    """Whether a phrase or a character repeats many times in a row."""
    if _REPEATED_CHARACTER.search(caption):
        return True
    words = caption.lower().split()
    for length in range(1, min(_LONGEST_PHRASE, len(words) // _REPEATS) + 1):
        same = 0  # words that equal the word one phrase before
        for place in range(length, len(words)):
            same = same + 1 if words[place] == words[place - length] else 0
            if same >= length * (_REPEATS - 1):
                return True
    return False


def is_refusal(caption: str) -> bool:
    """Whether a caption is a model's refusal to describe the image."""
    return _REFUSAL.search(caption.replace("’", "'")) is not None
