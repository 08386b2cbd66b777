"""Words ↔ ids: lower-cased, split on white space, rare words unknown (Hugging Face tokenizers)."""

from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from captioner.config import parse_json
from captioner.errors import BundleError, InputError

__all__ = ["EOS", "PAD", "SPECIAL", "START", "UNKNOWN", "Vocabulary"]

PAD, START, EOS, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<start>", "<eos>", "<unk>")


class Vocabulary:
    """The words that a model knows; ids 0 to 3 are ``<pad> <start> <eos> <unk>``."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._words = [str(tokenizer.id_to_token(i)) for i in range(len(self))]
        # A caption that spells out "<eos>" has an odd word there, not its end.
        self._ids = {word: i for i, word in enumerate(self._words) if i >= len(SPECIAL)}

    @classmethod
    def from_captions(cls, captions: Iterable[str], *, minimum_count: int = 5) -> "Vocabulary":
        """The words that occur at least ``minimum_count`` times, the most frequent first."""
        counts = Counter(word for caption in captions for word in _split(caption))
        for word in SPECIAL:  # a caption that spells one out must not give it a second entry
            del counts[word]
        frequent = (word for word, count in counts.items() if count >= minimum_count)
        ordered = sorted(frequent, key=lambda word: (-counts[word], word))
        return cls(_tokenizer([*SPECIAL, *ordered]))

    @classmethod
    def from_json(cls, text: str) -> "Vocabulary":
        """Reads what :meth:`to_json` wrote; nothing but the words is taken from it.

        Raises:
            BundleError: it is not a vocabulary of ours.
        """
        try:
            model = parse_json(text)["model"]
            kind, vocabulary = model["type"], model["vocab"]
        except (InputError, KeyError, TypeError) as error:
            raise BundleError(f"tokenizer.json cannot be read: {error}") from error
        if kind != "WordLevel" or not isinstance(vocabulary, dict):
            raise BundleError("tokenizer.json is not a WordLevel tokenizer")
        ids = list(vocabulary.values())
        if any(type(i) is not int for i in ids) or sorted(ids) != list(range(len(ids))):
            raise BundleError("tokenizer.json's ids are not 0, 1, 2, …")
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        if tuple(words[: len(SPECIAL)]) != SPECIAL:
            raise BundleError(f"tokenizer.json does not begin with {' '.join(SPECIAL)}")
        try:
            return cls(_tokenizer(words))
        except (TypeError, ValueError) as error:  # half of a surrogate pair
            raise BundleError("tokenizer.json has a word that is not Unicode text") from error

    def to_json(self) -> str:
        """The tokenizer in Hugging Face's ``tokenizer.json`` format."""
        return self._tokenizer.to_str()

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, caption: str, max_length: int) -> list[int]:
        """``<start>``, the ids of the first ``max_length - 2`` words, ``<eos>``; not padded."""
        words = _split(caption)[: max_length - 2]
        return [START, *(self._ids.get(word, UNKNOWN) for word in words), EOS]

    def words(self, ids: Sequence[int]) -> list[str]:
        """The words of ids."""
        return [self._words[i] for i in ids]


def _split(caption: str) -> list[str]:
    lower = normalizers.Lowercase().normalize_str(caption)
    return [word for word, _ in pre_tokenizers.WhitespaceSplit().pre_tokenize_str(lower)]


def _tokenizer(words: Sequence[str]) -> Tokenizer:
    """A tokenizer that splits as ``_split`` does; a word's id is its place."""
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
