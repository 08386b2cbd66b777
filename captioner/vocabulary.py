"""Words ↔ ids: lower-cased, split on white space, rare words unknown (Hugging Face tokenizers)."""

import json
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from captioner.errors import BundleError

__all__ = ["EOS", "PAD", "SPECIAL", "START", "UNKNOWN", "Vocabulary"]

PAD, START, EOS, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<start>", "<eos>", "<unk>")
_UNLIMITED = 2**31


class Vocabulary:
    """The words that a model knows; ids 0 to 3 are ``<pad> <start> <eos> <unk>``."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._words: list[str] = [tokenizer.id_to_token(i) for i in range(len(self))]

    @classmethod
    def from_captions(cls, captions: Iterable[str], *, minimum_count: int = 5) -> "Vocabulary":
        """The words that occur at least ``minimum_count`` times, the most frequent first."""
        tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL[UNKNOWN]))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(
            vocab_size=_UNLIMITED,
            min_frequency=minimum_count,
            special_tokens=list(SPECIAL),
            show_progress=False,
        )
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer)

    @classmethod
    def from_json(cls, text: str) -> "Vocabulary":
        """Reads what :meth:`to_json` wrote.

        Raises:
            BundleError: it is not a vocabulary of ours.
        """
        try:
            description = json.loads(text)
            vocabulary = description["model"]["vocab"]
            kind = description["model"]["type"]
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"tokenizer.json cannot be read: {error}") from error
        if kind != "WordLevel" or not isinstance(vocabulary, dict):
            raise BundleError("tokenizer.json is not a WordLevel tokenizer")
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise BundleError("tokenizer.json's ids are not 0, 1, 2, …")
        if [vocabulary.get(word) for word in SPECIAL] != [PAD, START, EOS, UNKNOWN]:
            raise BundleError(f"tokenizer.json does not begin with {' '.join(SPECIAL)}")
        try:
            return cls(Tokenizer.from_str(text))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"tokenizer.json cannot be read: {error}") from error

    def to_json(self) -> str:
        """The tokenizer in Hugging Face's ``tokenizer.json`` format."""
        return self._tokenizer.to_str()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()  # type: ignore[no-any-return]

    def encode(self, caption: str, max_length: int) -> list[int]:
        """``<start>``, the ids of the first ``max_length - 2`` words, ``<eos>``; not padded."""
        encoding = self._tokenizer.encode(caption, add_special_tokens=False)
        words = encoding.ids[: max_length - 2]
        # A caption that spells out "<eos>" has an odd word there, not its end.
        return [START, *(i if i >= len(SPECIAL) else UNKNOWN for i in words), EOS]

    def words(self, ids: Sequence[int]) -> list[str]:
        """The words of ids."""
        return [self._words[i] for i in ids]
