"""Joins a table of captions with the images of a directory."""

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TypeGuard

from captioner.data.names import ImageIndex
from captioner.data.splits import MOST_MISSING, CaptionedImage
from captioner.data.tables import Entry
from captioner.errors import InputError, first_of

__all__ = ["Gathering"]

_SHOWN = 5  # names in a message

_logger = logging.getLogger(__name__)


class Gathering:
    """Joins the entries of a table with the files of a directory, and counts what is left out.

    Attributes:
        kept: the images that are found and have a caption, by URI.
        splits: the split of each of them, None where the table has no splits.
        missing: names of captioned images that are not found, with their split.
        ambiguous: names of captioned images that several files fit, with these files.
        empty_captions: how many captions are empty or not text.
    """

    def __init__(self, table: str, directory: str, files: Sequence[str]):
        self._table, self._directory = table, directory
        self._index = ImageIndex(directory, files)
        self._has_files = bool(files)
        self.kept: dict[str, CaptionedImage] = {}
        self.splits: dict[str, str | None] = {}
        self.missing: dict[str, str | None] = {}
        self.ambiguous: dict[str, list[str]] = {}
        self._silent: set[str] = set()
        self.empty_captions = 0

    def add(self, entry: Entry) -> None:
        """Takes an entry; raises where its image is in another split already."""
        found = self._index.find(entry.name)
        image = _captioned(found[0] if found else entry.name, entry)
        self.empty_captions += len(entry.captions) - len(image.captions)
        uri = image.uri
        if not image.captions:
            self._silent.add(uri)
        elif not found:
            self.missing[entry.name] = entry.split
        elif len(found) > 1:
            self.ambiguous[entry.name] = found
        elif uri not in self.kept:
            self.kept[uri], self.splits[uri] = image, entry.split
        elif self.splits[uri] != entry.split:
            raise InputError(f"{self._table}: {entry.name} is in two splits")
        else:
            self.kept[uri] = _merged(self.kept[uri], image)

    def check(self, needed: Collection[str] | None, *, allow_missing: bool, hint: str) -> None:
        """Refuses a table that does not belong to the directory; logs which images are left out.

        Args:
            needed: the splits whose images are needed, where the table has splits; None: all.
            allow_missing: accept that more than half of the images are not found.
            hint: ends a message about images that are not found.

        Raises:
            InputError: no image is found with a caption, or more than half are not found.
        """
        named = len(self.kept) + len(self.missing) + len(self.ambiguous)
        if not named:
            raise InputError(self._describe_no_caption())
        problems = []
        if self.missing:
            problems.append((len(self.missing), self._describe_missing(named) + hint))
        if self.ambiguous:
            problems.append((len(self.ambiguous), self._describe_ambiguous(named)))
        if not self.kept:
            raise InputError(max(problems)[1])
        if self._share_of_lost(needed) > MOST_MISSING and not allow_missing:
            raise InputError(f"{max(problems)[1]}; to accept this, add --allow-missing")
        for _, problem in problems:
            _logger.warning("left out: %s", problem)

    def _share_of_lost(self, needed: Collection[str] | None) -> float:
        """The share of the needed images that is not found, from 0 to 1."""

        def count(splits: Iterable[str | None]) -> int:
            return sum(needed is None or each is None or each in needed for each in splits)

        lost = count(self.missing.values()) + len(self.ambiguous)
        return lost / max(1, lost + count(self.splits.values()))

    @property
    def repeated_captions(self) -> int:
        """How many captions their image has already."""
        return sum(len(each.captions) - len(set(each.captions)) for each in self.kept.values())

    def without_caption(self, pictures: Sequence[str]) -> int:
        """How many images have no caption, with those of ``pictures`` that the table lacks."""
        ambiguous = {uri for uris in self.ambiguous.values() for uri in uris}
        silent = self._silent.union(pictures)
        return len(silent - self.kept.keys() - self.missing.keys() - ambiguous)

    def _describe_no_caption(self) -> str:
        if self.empty_captions:
            return f"{self._table}: all {self.empty_captions} captions are empty or not text"
        if self._silent:
            return f"{self._table}: none of its {len(self._silent)} images has a caption"
        return f"{self._table} lists no images"

    def _describe_missing(self, named: int) -> str:
        if not self._has_files:
            return f"{self._directory} holds no files, but {self._table} names {named} images"
        names = list(self.missing)
        text = (
            f"{len(names)} of the {named} images that {self._table} names are not in "
            f"{self._directory}: {first_of(names, _SHOWN)}"
        )
        similar = self._index.similar(names[0])
        return text if similar is None else f"{text} (is {names[0]} the file {similar}?)"

    def _describe_ambiguous(self, named: int) -> str:
        name, uris = next(iter(self.ambiguous.items()))
        return (
            f"{len(self.ambiguous)} of the {named} names in {self._table} fit several images: "
            f"{name} is {' or '.join(uris[:_SHOWN])}; name the folder too"
        )


def _captioned(uri: str, entry: Entry) -> CaptionedImage:
    """An entry's image, with its captions that are text."""
    tokens = entry.tokens or [None] * len(entry.captions)
    texts, words = [], []
    for caption, each in zip(entry.captions, tokens, strict=True):
        if _is_text(caption):
            texts.append(caption)
            words.append(each)
    return CaptionedImage(uri, texts, entry.name, _all_given(words))


def _all_given(words: list[list[str] | None]) -> list[list[str]] | None:
    given = [each for each in words if each is not None]
    return given if given and len(given) == len(words) else None


def _merged(first: CaptionedImage, second: CaptionedImage) -> CaptionedImage:
    """One image with the captions of two entries."""
    tokens = None
    if first.tokens is not None and second.tokens is not None:
        tokens = first.tokens + second.tokens
    captions = first.captions + second.captions
    return replace(first, captions=captions, tokens=tokens)


def _is_text(caption: object) -> TypeGuard[str]:
    if not isinstance(caption, str) or not caption.strip():
        return False
    try:
        caption.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True
