"""The words of a pretrained model's captions."""

from collections.abc import Sequence
from typing import Any

from captioner.model.words import Spans, group_tokens

__all__ = ["split_words"]


def split_words(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[str], list[list[int]]]:
    """What :func:`captioner.model.words.group_tokens` returns for transformers' tokenizer."""

    def decode(some: list[int]) -> str:
        text: str = tokenizer.decode(some, skip_special_tokens=True)
        return text

    def encode(text: str) -> tuple[list[int], Spans]:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    has_places = getattr(tokenizer, "is_fast", False)
    return group_tokens(ids, set(tokenizer.all_special_ids), decode, encode if has_places else None)
