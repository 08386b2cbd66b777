"""Finds captions that look wrong: cut off, empty, repetitive, refusals, stock openings.

Pretrained models fail in these ways when a prompt or a setting does not suit them. Whoever reads
the report after some hundred images can then change it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["COLUMNS", "Finding", "Findings", "is_refusal", "is_repetitive"]

#: The columns of a row that are looked at.
COLUMNS = ("uri", "caption", "finish", "status")

_EXAMPLES = 2
_OPENING = 4  # words
_OPENINGS = 3  # shown
_COMMON, _OFTEN = 0.2, 10  # share of the captions, and captions, from which an opening is shown
_LONGEST_PHRASE = 8  # words
_REPEATS = 4  # times in a row
_RUN = re.compile(r"(\S)\1{7,}")  # of one character
_REFUSAL = re.compile(
    r"\b(i'?m|i am) (sorry|unable|not able)\b|\bi (can'?t|cannot|can not)\b|\bas an ai\b"
    r"|\bunable to (assist|help|provide|describe|view|see)\b|\bno image (was|is|has been)\b",
    re.IGNORECASE,
)


@dataclass
class Finding:
    """Captions that look wrong in one way.

    Attributes:
        count: how many.
        examples: some, each a caption and its image.
    """

    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def add(self, caption: str, uri: str) -> None:
        """Counts a caption."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append((caption, uri))


class Findings:
    """What is found in the rows of an output."""

    def __init__(self) -> None:
        self._captions = 0
        self._found = {name: Finding() for name in _TITLES}
        self._openings: Counter[str] = Counter()
        self._first: dict[str, tuple[str, str]] = {}

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Looks at rows that have :data:`COLUMNS`."""
        for row in rows:
            if row["status"] != "ok":
                continue
            self._captions += 1
            caption, uri = row["caption"] or "", row["uri"]
            if row["finish"] == "length":
                self._found["cut"].add(caption, uri)
            if not caption.strip():
                self._found["empty"].add(caption, uri)
            if is_repetitive(caption):
                self._found["repetitive"].add(caption, uri)
            if is_refusal(caption):
                self._found["refusal"].add(caption, uri)
            words = caption.lower().split()
            if len(words) > _OPENING:
                opening = " ".join(words[:_OPENING])
                self._openings[opening] += 1
                self._first.setdefault(opening, (caption, uri))

    def lines(self) -> list[str]:
        """A line for each way in which captions look wrong, with examples below it."""
        lines = []
        for name, finding in self._found.items():
            if finding.count:
                lines.append(f"captions that {_TITLES[name]}: {finding.count}")
                lines += [f"  {_short(caption)}  {uri}" for caption, uri in finding.examples]
        for opening, count in self._openings.most_common(_OPENINGS):
            if count >= max(_OFTEN, _COMMON * self._captions):
                caption, uri = self._first[opening]
                lines.append(f"captions that begin with {opening!r}: {count}")
                lines.append(f"  {_short(caption)}  {uri}")
        return lines


_TITLES = {
    "cut": "reach the length limit (--max-new-tokens, or --max-words)",
    "empty": "are empty",
    "repetitive": "repeat a phrase over and over (try --repetition-penalty 1.1)",
    "refusal": "look like refusals (try another --prompt)",
}


def _short(caption: str) -> str:
    text = " ".join(caption.split())
    return text if len(text) <= 80 else text[:77] + "…"


def is_repetitive(caption: str) -> bool:
    """Whether a phrase, or a character, follows itself many times."""
    if _RUN.search(caption):
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
    """Whether a model says that it does not caption the image."""
    return _REFUSAL.search(caption.replace("’", "'")) is not None
