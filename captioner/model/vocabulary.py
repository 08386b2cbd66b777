"""What a model's captions are made of, words or subwords, and their ids.

Stored as a Hugging Face tokenizer. The package tokenizers is imported to write one, and to split
texts, but not to read the words of a model and to caption with it.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from captioner.config import parse_json
from captioner.errors import BundleError, InputError
from captioner.model.tokenization import (
    TokenizerKind,
    join_words,
    split_ptb,
    split_whitespace,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["EOS", "PAD", "SPECIAL", "START", "UNKNOWN", "Vocabulary", "WordVocabulary"]

PAD, START, EOS, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<start>", "<eos>", "<unk>")


class Vocabulary(ABC):
    """The words or subwords that a model knows; ids 0 to 3 are ``<pad> <start> <eos> <unk>``.

    Attributes:
        kind: how captions are split, see :mod:`captioner.model.tokenization`.
    """

    kind: TokenizerKind

    @staticmethod
    def from_captions(
        captions: Iterable[str | Sequence[str]],
        *,
        minimum_count: int = 5,
        largest: int | None = None,
        kind: TokenizerKind = "whitespace",
    ) -> "Vocabulary":
        """Collects the words of captions, the most frequent first; or learns subwords of them.

        Args:
            captions: texts, or the words of each if the dataset is tokenized.
            minimum_count: how often a word must occur, or the pair that makes a subword.
            largest: the largest number of words, or of subwords; None keeps all words, and as many
                subwords as :data:`captioner.model.subwords.LARGEST`.
            kind: how texts are split.

        Raises:
            InputError: ``largest`` is too small for subwords.
        """
        if kind == "bpe":
            from captioner.model.subwords import SubwordVocabulary

            return SubwordVocabulary.learn(captions, minimum_count=minimum_count, largest=largest)
        return WordVocabulary([*SPECIAL, *_frequent(captions, minimum_count, kind)[:largest]], kind)

    @staticmethod
    def from_json(text: str, kind: TokenizerKind = "whitespace") -> "Vocabulary":
        """Reads the words or subwords that :meth:`to_json` wrote, and nothing else.

        Args:
            text: the contents of tokenizer.json.
            kind: how captions are split, which the model's config.json records.

        Raises:
            BundleError: the text is not a vocabulary that :meth:`to_json` writes.
            InputError: the package tokenizers is missing, which subwords need.
        """
        try:
            model = parse_json(text)["model"]
            algorithm, vocabulary = model["type"], model["vocab"]
        except (InputError, KeyError, TypeError) as error:
            raise BundleError(f"tokenizer.json cannot be read: {error}") from error
        expected = "BPE" if kind == "bpe" else "WordLevel"
        if algorithm != expected or not isinstance(vocabulary, dict):
            raise BundleError(f"tokenizer.json is not a {expected} tokenizer")
        words = _in_order(vocabulary)
        if kind == "bpe":
            from captioner.model.subwords import SubwordVocabulary

            return SubwordVocabulary.checked(words, model.get("merges"))
        return WordVocabulary(words, kind)

    @abstractmethod
    def to_json(self) -> str:
        """The vocabulary in Hugging Face's ``tokenizer.json`` format."""

    @abstractmethod
    def __len__(self) -> int:
        """How many ids there are."""

    @abstractmethod
    def encode(self, caption: str | Sequence[str], max_length: int) -> list[int]:
        """Encodes a caption as ``<start>``, the ids of its words, ``<eos>``, without padding.

        Args:
            caption: a text, or its words if the dataset is tokenized.
            max_length: the largest number of ids; further words are cut off.
        """

    @abstractmethod
    def words(self, ids: Sequence[int]) -> list[str]:
        """The entries with these ids: words, or subwords in the notation of tokenizer.json."""

    @abstractmethod
    def split(self, ids: Sequence[int]) -> tuple[str, list[str], list[list[int]]]:
        """The caption that some ids are, its words, and for each word the places of its ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """The caption that some ids are, as people write it."""
        return self.split(ids)[0]


class WordVocabulary(Vocabulary):
    """The words that a model knows.

    Args:
        words: the special ones and those of captions; the place of a word is its id.
        kind: how captions are split into words.
    """

    def __init__(self, words: Sequence[str], kind: TokenizerKind = "whitespace"):
        self.kind = kind
        self._words = list(words)
        # A caption that spells out "<eos>" has an unknown word there, not its end.
        self._ids = {word: i for i, word in enumerate(self._words) if i >= len(SPECIAL)}

    def extended(
        self, captions: Iterable[str | Sequence[str]], *, minimum_count: int = 5
    ) -> "WordVocabulary":
        """This vocabulary with the frequent words of captions after its own."""
        new = _frequent(captions, minimum_count, self.kind)
        words = [*self._words, *(word for word in new if word not in self._ids)]
        return WordVocabulary(words, self.kind)

    def to_json(self) -> str:
        """The words in Hugging Face's ``tokenizer.json`` format.

        The tokenizer splits at white space: for the kind ``ptb``, join the words with spaces first.
        """
        return str(_tokenizer(self._words).to_str())

    def __len__(self) -> int:
        return len(self._words)

    def encode(self, caption: str | Sequence[str], max_length: int) -> list[int]:
        """Encodes a caption, see :meth:`Vocabulary.encode`."""
        words = _words(caption, self.kind)[: max_length - 2]
        return [START, *(self._ids.get(word, UNKNOWN) for word in words), EOS]

    def words(self, ids: Sequence[int]) -> list[str]:
        """The words of ids."""
        return [self._words[i] for i in ids]

    def split(self, ids: Sequence[int]) -> tuple[str, list[str], list[list[int]]]:
        """The caption: with natural spacing for ``ptb``, else the words with spaces between."""
        words = self.words(ids)
        text = join_words(words) if self.kind == "ptb" else " ".join(words)
        return text, words, [[place] for place in range(len(words))]


def _words(caption: str | Sequence[str], kind: TokenizerKind) -> list[str]:
    if isinstance(caption, str):
        return split_ptb(caption) if kind == "ptb" else split_whitespace(caption)
    return [word.lower() for word in caption]


def _frequent(
    captions: Iterable[str | Sequence[str]], minimum_count: int, kind: TokenizerKind
) -> list[str]:
    """The words that occur often enough, the most frequent first."""
    counts = Counter(word for caption in captions for word in _words(caption, kind))
    for word in SPECIAL:  # a caption that spells one out must not give it a second entry
        del counts[word]
    frequent = (word for word, count in counts.items() if count >= minimum_count)
    return sorted(frequent, key=lambda word: (-counts[word], word))


def _in_order(vocabulary: dict[str, Any]) -> list[str]:
    """The words of a file by their ids.

    Raises:
        BundleError: the ids are not 0, 1, 2, …, the first are not the special ones, or a word is
            not text.
    """
    ids = list(vocabulary.values())
    if any(type(i) is not int for i in ids) or sorted(ids) != list(range(len(ids))):
        raise BundleError("tokenizer.json's ids are not 0, 1, 2, …")
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    if tuple(words[: len(SPECIAL)]) != SPECIAL:
        raise BundleError(f"tokenizer.json does not begin with {' '.join(SPECIAL)}")
    try:
        "".join(words).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise BundleError("tokenizer.json has a word that is not Unicode text") from error
    return words


def _tokenizer(words: Sequence[str]) -> "Tokenizer":
    """A tokenizer that splits at white space; the id of a word is its place."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
