"""Captions to words and back: split as the Penn Treebank does, or at white space.

The vocabulary, the reward of self-critical training and the scores all split captions here, so the
words that a model learns are the words that it is scored on.

``ptb`` follows Stanford's PTBTokenizer, which COCO's evaluation uses: punctuation, brackets and
clitics (``n't``, ``'s``) become words of their own; abbreviations, decimals, dates, hyphenated
words, tags, user names and web addresses stay whole. Typographic quotes, dashes and ellipses become
``"``, ``'``, ``--`` and ``...``.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

__all__ = ["TokenizerKind", "join_words", "scoring_words", "split_ptb", "split_whitespace"]

#: How a model's captions are split: into words, or into subwords.
TokenizerKind = Literal["whitespace", "ptb", "bpe"]

# Words that COCO's evaluation does not count. The names of brackets count: PTBTokenizer writes them
# in lower case, and COCO's list has them in upper case.
_NOT_COUNTED = frozenset(
    ("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"')
)

# What PTBTokenizer writes for these characters.
_PTB_NAMES = str.maketrans(
    {
        "(": "-lrb-",
        ")": "-rrb-",
        "[": "-lsb-",
        "]": "-rsb-",
        "{": "-lcb-",
        "}": "-rcb-",
        "½": "1/2",
        "¼": "1/4",
        "¾": "3/4",
        "€": "$",
        "£": "#",
        "¢": "cents",
        "\ufe0f": None,  # selects the emoji's picture
    }
)

_TYPOGRAPHY = str.maketrans(
    {
        "‘": "`",
        "‛": "`",
        "‹": "`",
        "’": "'",
        "›": "'",
        "“": '"',
        "”": '"',
        "«": '"',
        "»": '"',
        "…": "...",
        "–": "--",
        "—": "--",
        "\u00ad": None,  # soft hyphen
        "\u200b": " ",  # zero-width space
        "\ufeff": " ",  # byte order mark
    }
)

_CONTRACTIONS = re.compile(
    r"(?<=\w)(?=n't\b)|(?<=\bcan)(?=not\b)|(?<=\bgon)(?=na\b)|(?<=\bgot)(?=ta\b)"
    r"|(?<=\bwan)(?=na\b)|(?<=\bgim)(?=me\b)|(?<=\blem)(?=me\b)|(?<=\B't)(?=is\b|was\b)",
    re.IGNORECASE,
)

_WORD = r"""
      https?://[^\s"<>]*[^\s"<>.,!?;:')\]]
    | [^\W_][\w.+-]*@[^\W_][\w-]*(?:\.[^\W_][\w-]*)+              # an e-mail address
    | </?[A-Za-z][^<>\s]*>                                       # a tag
    | [:;=][-o*']?[()DPdpO\\{@|\[\]](?!\w)                       # a smiley
    | (?i:n't|'(?:s|m|d|re|ve|ll|em|til|cause)\b|(?<!\d)'\d\ds?\b|'n\b'?|y'(?=all\b)|ma'am\b
        |'t(?=\ (?:is|was)\b))
    | (?i:\b(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|mt|ft|rd|ave|blvd|co|corp|inc|ltd|bros|dept|univ|prof
        |sgt|lt|capt|col|cpl|gen|maj|gov|rev|hon|sen|rep|pres|ph\.d|no(?=\.\ ?\d)
        |jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri)\.(?!\w))
    | LETTER(?:\.LETTER)*\.(?![^\W_])                        # U.S., p.m., plan B.
    | (?<!\w)[-+]?\.?\d+(?:[.,:]\d+)+(?:-CHARACTER+)*          # 3,000 and 10:30
    | (?<!\w)[-+]?\.?\d+(?![\w/])(?:-CHARACTER+)*
    | [#@]LETTER(?:LETTER|\d)*(?:(?<=@\S)_\w*)?
    | \b[cC](?:\+\+|\#)
    | CHARACTER+
      (?: (?: [-‐‑/_]
            | (?<=LETTER)[.!?](?=LETTER)                     # jumps.A
            | (?<=\b[odl])'(?=\w\w)                              # o'clock
            | (?<=\b[ODL])'(?=\w\w)
            | (?<=[A-Z])&(?=[A-Z])                               # AT&T
          ) CHARACTER+ )*
    | [!?]{2,} | _+ | \*+ | \.\.\.  | -{2,} | ``|''
    | [\U00010000-\U0010FFFF](?:[\u200d\ufe0f\U00010000-\U0010FFFF]|(?<=\u200d)\S)*   # emoji
    | [^\s\u200d\ufe0f]\ufe0f?
"""


def split_whitespace(caption: str) -> list[str]:
    """Splits a caption at white space, in lower case.

    ``A dog's ball, on grass.`` is ``a``, ``dog's``, ``ball,``, ``on``, ``grass.``.
    """
    from tokenizers import normalizers, pre_tokenizers

    lower = normalizers.Lowercase().normalize_str(caption)
    return [word for word, _ in pre_tokenizers.WhitespaceSplit().pre_tokenize_str(lower)]


def split_ptb(caption: str) -> list[str]:
    """Splits a caption into words and punctuation, in lower case.

    ``A dog's ball, on grass.`` is ``a``, ``dog``, ``'s``, ``ball``, ``,``, ``on``, ``grass``,
    ``.``.
    """
    text = _CONTRACTIONS.sub(" ", caption.translate(_TYPOGRAPHY))
    return [_plain(word) for word in _word_pattern().findall(text)]


def scoring_words(caption: str) -> list[str]:
    """The words that COCO's evaluation counts in a caption: PTBTokenizer's, without punctuation."""
    # PTBTokenizer drops characters outside the Basic Multilingual Plane, as most emoji are.
    named = (word.translate(_PTB_NAMES) for word in split_ptb(caption) if word[0] <= "\uffff")
    return [word for word in named if word not in _NOT_COUNTED]


def _plain(word: str) -> str:
    if word in ("``", "''"):
        return '"'
    if word == "`":
        return "'"
    return "--" if word.startswith("--") else word.lower()


@lru_cache(maxsize=1)
def _word_pattern() -> re.Pattern[str]:
    # \w has no combining marks, which Hindi, Arabic with vowels and decomposed accents need, but
    # has superscripts and fractions, which PTBTokenizer splits off.
    marks = "".join(
        chr(code)
        for code in range(0x300, 0xFE00)
        if unicodedata.category(chr(code)).startswith("M")
    )
    odd = r"½¼¾¹²³\U00010000-\U0010FFFF"
    character = rf"(?:[^\W_{odd}]|[{marks}])"
    letter = rf"[^\W\d_{odd}]"
    pattern = _WORD.replace("CHARACTER", character).replace("LETTER", letter)
    return re.compile(pattern, re.VERBOSE)


_ATTACHED_LEFT = frozenset(
    (*".,;:!?%)]}°…", "...", "n't", "'s", "'m", "'d", "'re", "'ve", "'ll", *"。、，！？；：।،؟؛")
)
_ATTACHED_RIGHT = frozenset((*"([{$£€¥#¿¡", "y'", "'t"))
_JOINED = frozenset(
    (("can", "not"), ("gon", "na"), ("got", "ta"), ("wan", "na"), ("gim", "me"), ("lem", "me"))
)


def join_words(words: Sequence[str]) -> str:
    """Joins words of :func:`split_ptb` to a caption as people write: ``the dog's ball, on grass.``.

    Punctuation and clitics attach to the word before them, opening brackets and quotes to the word
    after them. Quotes open and close by turns; ``'`` after a word that ends in s is a possessive.
    """
    caption = ""
    attach = True  # the next word to the caption so far
    open_quotes: set[str] = set()
    for place, word in enumerate(words):
        previous = words[place - 1] if place else ""
        quote = _quote(word, previous, words[place + 1 :], open_quotes)
        left = quote == "close" or word in _ATTACHED_LEFT or (previous, word) in _JOINED
        caption += word if attach or left else f" {word}"
        attach = quote == "open" or word in _ATTACHED_RIGHT
    return caption


def _quote(
    word: str, previous: str, following: Sequence[str], open_quotes: set[str]
) -> Literal["open", "close", ""]:
    """Whether a word is an opening or a closing quote; keeps track of what is open."""
    if word not in ('"', "'"):
        return ""
    if word in open_quotes:
        open_quotes.discard(word)
        return "close"
    if word in following and not (word == "'" and previous.endswith("s")):
        open_quotes.add(word)
        return "open"
    return "close"  # a possessive, or feet and inches
