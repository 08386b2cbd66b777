"""The words that a model knows and their ids, stored as a Hugging Face tokenizer."""

from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from captioner.config import parse_json
from captioner.errors import BundleError, InputError
from captioner.model.tokenization import (
    TokenizerKind,
    join_words,
    split_ptb,
    split_whitespace,
)

__all__ = ["EOS", "PAD", "SPECIAL", "START", "UNKNOWN", "Vocabulary"]

PAD, START, EOS, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<start>", "<eos>", "<unk>")


class Vocabulary:
    """The words that a model knows; ids 0 to 3 are ``<pad> <start> <eos> <unk>``.

    Attributes:
        kind: how captions are split into words, see :mod:`captioner.model.tokenization`.
    """

    def __init__(self, tokenizer: Tokenizer, kind: TokenizerKind = "whitespace"):
        self.kind = kind
        self._tokenizer = tokenizer
        self._words = [str(tokenizer.id_to_token(i)) for i in range(len(self))]
        # A caption that spells out "<eos>" has an unknown word there, not its end.
        self._ids = {word: i for i, word in enumerate(self._words) if i >= len(SPECIAL)}

    @classmethod
    def from_captions(
        cls,
        captions: Iterable[str | Sequence[str]],
        *,
        minimum_count: int = 5,
        kind: TokenizerKind = "whitespace",
    ) -> "Vocabulary":
        """Collects the words of captions, the most frequent first.

        Args:
            captions: texts, or the words of each if the dataset is tokenized.
            minimum_count: how often a word must occur.
            kind: how texts are split into words.
        """
        return cls(_tokenizer([*SPECIAL, *_frequent(captions, minimum_count, kind)]), kind)

    def extended(
        self, captions: Iterable[str | Sequence[str]], *, minimum_count: int = 5
    ) -> "Vocabulary":
        """This vocabulary with the frequent words of captions after its own."""
        new = _frequent(captions, minimum_count, self.kind)
        words = [*self._words, *(word for word in new if word not in self._ids)]
        return Vocabulary(_tokenizer(words), self.kind)

    @classmethod
    def from_json(cls, text: str, kind: TokenizerKind = "whitespace") -> "Vocabulary":
        """Reads the words that :meth:`to_json` wrote, and nothing else.

        Args:
            text: the contents of tokenizer.json.
            kind: how captions are split into words, which the model's config.json records.

        Raises:
            BundleError: the text is not a vocabulary that :meth:`to_json` writes.
        """
        try:
            model = parse_json(text)["model"]
            algorithm, vocabulary = model["type"], model["vocab"]
        except (InputError, KeyError, TypeError) as error:
            raise BundleError(f"tokenizer.json cannot be read: {error}") from error
        if algorithm != "WordLevel" or not isinstance(vocabulary, dict):
            raise BundleError("tokenizer.json is not a WordLevel tokenizer")
        ids = list(vocabulary.values())
        if any(type(i) is not int for i in ids) or sorted(ids) != list(range(len(ids))):
            raise BundleError("tokenizer.json's ids are not 0, 1, 2, …")
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        if tuple(words[: len(SPECIAL)]) != SPECIAL:
            raise BundleError(f"tokenizer.json does not begin with {' '.join(SPECIAL)}")
        try:
            return cls(_tokenizer(words), kind)
        except (TypeError, ValueError) as error:  # half of a surrogate pair
            raise BundleError("tokenizer.json has a word that is not Unicode text") from error

    def to_json(self) -> str:
        """The words in Hugging Face's ``tokenizer.json`` format.

        The tokenizer splits at white space: for the kind ``ptb``, join the words with spaces first.
        """
        return self._tokenizer.to_str()

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, caption: str | Sequence[str], max_length: int) -> list[int]:
        """Encodes a caption as ``<start>``, the ids of its words, ``<eos>``, without padding.

        Args:
            caption: a text, or its words if the dataset is tokenized.
            max_length: the largest number of ids; further words are cut off.
        """
        words = _words(caption, self.kind)[: max_length - 2]
        return [START, *(self._ids.get(word, UNKNOWN) for word in words), EOS]

    def words(self, ids: Sequence[int]) -> list[str]:
        """The words of ids."""
        return [self._words[i] for i in ids]

    def join(self, words: Sequence[str]) -> str:
        """Joins words to a caption: with natural spacing for ``ptb``, else with single spaces."""
        return join_words(words) if self.kind == "ptb" else " ".join(words)


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


def _tokenizer(words: Sequence[str]) -> Tokenizer:
    """A tokenizer that splits at white space; the id of a word is its place."""
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
