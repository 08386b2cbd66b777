"""A caption's tokens grouped into its words, with each word's log-probability and map."""

import re
from collections.abc import Callable, Collection, Sequence

import numpy as np

__all__ = [
    "Spans",
    "group_tokens",
    "join_logprobs",
    "join_maps",
    "normalise",
    "remove_sinks",
]

#: Where each token begins and ends in a text.
Spans = Sequence[tuple[int, int]]


def group_tokens(
    ids: Sequence[int],
    special: Collection[int],
    decode: Callable[[list[int]], str],
    encode: Callable[[str], tuple[list[int], Spans]] | None,
) -> tuple[str, list[str], list[list[int]]]:
    """The text of some tokens, its words, and the tokens of each word.

    Args:
        ids: the caption's tokens, its end not included.
        special: the tokens that stand for no text.
        decode: the text of tokens, the special ones left out.
        encode: the tokens of a text and their places in it; None if the tokenizer has no places.

    Returns:
        The text without white space around it; the words, which white space separates; for each
        word the indices of its tokens in ``ids``. Special tokens belong to no word.
    """
    kept = [index for index, token in enumerate(ids) if token not in special]
    text, spans = _locate_tokens([ids[index] for index in kept], decode, encode)
    words = list(re.finditer(r"\S+", text))
    members: list[list[int]] = [[] for _ in words]
    current = 0
    for index, (begin, end) in zip(kept, spans, strict=True):
        while current < len(words) and words[current].end() <= begin:
            current += 1
        if current < len(words) and words[current].start() < end:
            members[current].append(index)
    return text.strip(), [word[0] for word in words], members


def _locate_tokens(
    ids: list[int],
    decode: Callable[[list[int]], str],
    encode: Callable[[str], tuple[list[int], Spans]] | None,
) -> tuple[str, Spans]:
    """The text of some tokens, and where in it each token stands.

    The text is encoded again, which gives each token's place; where that gives other tokens, longer
    and longer beginnings of the caption are decoded instead, which takes longer.
    """
    text = decode(ids)
    if encode is not None:
        again, offsets = encode(text)
        if again == ids:
            return text, offsets
    ends = [0]
    for count in range(1, len(ids) + 1):
        part = decode(ids[:count])
        # Of a character that is not whole yet, a mark stands there that the text does not have.
        ends.append(max(ends[-1], _common(part, text)))
    spans = []
    for count in range(len(ids)):
        # A token that only begins a character shares the place of the token that finishes it.
        end = next((each for each in ends[count + 1 :] if each > ends[count]), ends[count])
        spans.append((ends[count], end))
    return text, spans


def _common(one: str, other: str) -> int:
    """The length of what two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def join_logprobs(logprobs: Sequence[float], members: Sequence[Sequence[int]]) -> list[float]:
    """Each word's log-probability: the sum of its tokens'."""
    return [float(sum(logprobs[index] for index in word)) for word in members]


def join_maps(maps_KHW: np.ndarray, members: Sequence[Sequence[int]]) -> np.ndarray:
    """Each word's map: the mean of its tokens' maps, scaled to sum to 1."""
    height, width = maps_KHW.shape[1:]
    joined = np.zeros((len(members), height, width), np.float32)
    for place, word in enumerate(members):
        if word:
            joined[place] = maps_KHW[list(word)].mean(0)
    return normalise(joined)


def remove_sinks(maps_THW: np.ndarray) -> np.ndarray:
    """Maps divided by their mean map, scaled to sum to 1.

    In the self-attention of language models some image tokens draw attention whatever the word
    (Kang et al. 2025, arXiv 2503.03321). Dividing by the caption's mean map removes them. A single
    map is returned as it is.
    """
    if len(maps_THW) < 2:
        return maps_THW
    mean_HW = maps_THW.mean(0)
    return normalise(maps_THW / np.where(mean_HW > 0, mean_HW, 1))


def normalise(maps_THW: np.ndarray) -> np.ndarray:
    """Maps scaled to sum to 1; a map of zeros becomes uniform."""
    totals = maps_THW.sum(axis=(1, 2), keepdims=True)
    uniform = 1 / max(1, maps_THW.shape[1] * maps_THW.shape[2])
    scaled = np.where(totals > 0, maps_THW / np.where(totals > 0, totals, 1), uniform)
    return scaled.astype(np.float32)
