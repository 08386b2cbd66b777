"""Subwords: pieces of words that are learned on captions and spell any text (Sennrich et al. 2016).

They are made of bytes (Radford et al. 2019): the 256 bytes are subwords themselves, and the pair
that is the most frequent becomes the next subword, again and again, never across words. The package
tokenizers learns and applies them.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from captioner.errors import BundleError, InputError
from captioner.model.tokenization import TokenizerKind, join_words
from captioner.model.vocabulary import EOS, SPECIAL, START, Vocabulary
from captioner.model.words import Spans, group_tokens

__all__ = ["LARGEST", "SubwordVocabulary"]

#: The largest number of subwords, where no other is asked for.
LARGEST = 8000

_BYTES = 256
_SPACE = "Ġ"  # in the notation of bytes; a subword that begins a word begins with it

Merges = Sequence[tuple[str, str]]


class SubwordVocabulary(Vocabulary):
    """The subwords that a model knows.

    Args:
        subwords: the special ones, the bytes, and what pairs are merged into; the place of a
            subword is its id.
        merges: the pairs, in the order in which they are merged.

    Raises:
        InputError: the package tokenizers is missing.
    """

    kind: TokenizerKind = "bpe"

    def __init__(self, subwords: Sequence[str], merges: Merges):
        self._subwords, self._merges = list(subwords), merges
        self._tokenizer = _tokenizer(self._subwords, merges)

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled tokenizer forgets how it treats special tokens.
        return SubwordVocabulary, (self._subwords, self._merges)

    @classmethod
    def learn(
        cls,
        captions: Iterable[str | Sequence[str]],
        *,
        minimum_count: int,
        largest: int | None = None,
    ) -> "SubwordVocabulary":
        """Learns the subwords of captions.

        Args:
            captions: texts, or the words of each if the dataset is tokenized.
            minimum_count: how often a pair must occur to become a subword.
            largest: the largest number of subwords, by default :data:`LARGEST`.

        Raises:
            InputError: ``largest`` is smaller than the number of bytes, or the package tokenizers
                is missing.
        """
        largest = LARGEST if largest is None else largest
        if largest < _BYTES:
            raise InputError(
                f"--vocabulary-size {largest}: --tokenizer bpe needs at least {_BYTES}, one for "
                "each byte"
            )
        tokenizer = _tokenizer([*SPECIAL, *_alphabet()], [])
        trainer = _library().trainers.BpeTrainer(
            vocab_size=len(SPECIAL) + largest,
            min_frequency=minimum_count,
            special_tokens=list(SPECIAL),
            initial_alphabet=_alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(_text, captions), trainer)
        model = json.loads(tokenizer.to_str())["model"]
        subwords = sorted(model["vocab"], key=model["vocab"].__getitem__)
        return cls(subwords, [(first, second) for first, second in model["merges"]])

    @classmethod
    def checked(cls, subwords: Sequence[str], merges: Any) -> "SubwordVocabulary":
        """The subwords and merges of a file.

        Raises:
            BundleError: the bytes are missing, or a merge is not a pair of subwords that makes one.
            InputError: the package tokenizers is missing.
        """
        known = set(subwords[len(SPECIAL) :])
        if not known.issuperset(_alphabet()):
            raise BundleError("tokenizer.json has no subword for some bytes")
        if not isinstance(merges, list) or not all(_is_merge(each, known) for each in merges):
            raise BundleError("tokenizer.json's merges are not pairs of subwords")
        return cls(subwords, [(first, second) for first, second in merges])

    def to_json(self) -> str:
        """The subwords and merges in Hugging Face's ``tokenizer.json`` format."""
        return str(self._tokenizer.to_str())

    def __len__(self) -> int:
        return len(self._subwords)

    def encode(self, caption: str | Sequence[str], max_length: int) -> list[int]:
        """Encodes a caption, see :meth:`Vocabulary.encode`.

        A caption that is too long is cut between words, unless it has a single word.
        """
        ids = self._tokenizer.encode(_text(caption)).ids
        end = most = max_length - 2
        if len(ids) > most:
            while end and not self._subwords[ids[end]].startswith(_SPACE):
                end -= 1
        return [START, *ids[: end or most], EOS]

    def words(self, ids: Sequence[int]) -> list[str]:
        """The subwords of ids, in the notation of bytes: ``Ġ`` is a space."""
        return [self._subwords[i] for i in ids]

    def split(self, ids: Sequence[int]) -> tuple[str, list[str], list[list[int]]]:
        """The caption, its words, which white space separates, and the places of their ids."""
        special = range(len(SPECIAL))
        _, words, members = group_tokens(ids, special, self._tokenizer.decode, self._encode_again)
        spelling = [place for place, id_ in enumerate(ids) if id_ not in special]
        return " ".join(words), words, _with_spaces(members, spelling)

    def decode(self, ids: Sequence[int]) -> str:
        """The caption that some ids are."""
        return " ".join(self._tokenizer.decode(list(ids)).split())

    def _encode_again(self, text: str) -> tuple[list[int], Spans]:
        encoded = self._tokenizer.encode(text)
        return encoded.ids, encoded.offsets


def _text(caption: str | Sequence[str]) -> str:
    """A caption in lower case and with natural spacing, which tokenized captions do not have."""
    words = caption.split() if isinstance(caption, str) else caption
    return join_words([word.lower() for word in words])


def _with_spaces(members: Sequence[Sequence[int]], places: Sequence[int]) -> list[list[int]]:
    """Adds the places of subwords that are a space alone to the word after it, or to the last."""
    owners = {place: word for word, of_word in enumerate(members) for place in of_word}
    complete: list[list[int]] = [[] for _ in members]
    word = len(members) - 1
    for place in reversed(places) if members else []:
        word = owners.get(place, word)
        complete[word].insert(0, place)
    return complete


def _is_merge(merge: Any, known: set[str]) -> bool:
    return (
        isinstance(merge, list)
        and len(merge) == 2
        and all(isinstance(each, str) for each in merge)
        and known.issuperset((*merge, "".join(merge)))
    )


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise InputError("subwords need the package tokenizers: pip install tokenizers") from error
    return tokenizers


def _alphabet() -> list[str]:
    """The 256 bytes, each written as a character."""
    return sorted(_library().pre_tokenizers.ByteLevel.alphabet())


def _tokenizer(subwords: Sequence[str], merges: Merges) -> Any:
    """A tokenizer of bytes; the id of a subword is its place."""
    library = _library()
    vocabulary = {subword: i for i, subword in enumerate(subwords)}
    tokenizer = library.Tokenizer(library.models.BPE(vocabulary, list(merges)))
    tokenizer.normalizer = library.normalizers.Sequence(
        [library.normalizers.NFC(), library.normalizers.Lowercase()]
    )
    # The first word begins with a space as the others do: it has the same subwords.
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.encode_special_tokens = True  # a caption that spells out "<eos>" is not at its end
    return tokenizer
