"""The words of a run: does a vocabulary fit the captions, and which words does it get?"""

import dataclasses
import logging
from collections.abc import Sequence

import torch

from captioner.config import TrainConfig
from captioner.errors import InputError
from captioner.model.bundle import Bundle
from captioner.model.network import CaptionModel
from captioner.model.vocabulary import SPECIAL, UNKNOWN, Vocabulary

__all__ = ["LARGEST_UNKNOWN", "check_vocabulary", "prepare_vocabulary"]

#: The largest share of unknown words in the training captions that a run accepts.
LARGEST_UNKNOWN = 0.3

_LONG = 1 << 20  # ids of a caption: none is cut off

_logger = logging.getLogger(__name__)


def check_vocabulary(vocabulary: Vocabulary, captions: Sequence[str | Sequence[str]]) -> None:
    """Checks that a new vocabulary knows most words of the captions that it was made from.

    Raises:
        InputError: it knows too few, as of captions whose words have no spaces between them.
    """
    unknown, total = _count_unknown(vocabulary, captions)
    if total and unknown / total > LARGEST_UNKNOWN:
        raise InputError(
            f"{unknown / total:.0%} of the {total} words in the training captions are too rare for "
            f"the vocabulary, which has {len(vocabulary) - len(SPECIAL)} words: use a lower "
            "--minimum-count; captions in a language without spaces between words need to be split "
            "into words first"
        )


def prepare_vocabulary(
    start: Bundle, captions: Sequence[str | Sequence[str]], config: TrainConfig
) -> tuple[CaptionModel, Vocabulary]:
    """The model to continue from, with new words where the settings ask for them.

    Args:
        start: the model and its vocabulary.
        captions: the training captions.
        config: how to train.

    Raises:
        InputError: the vocabulary knows too few words of the captions.
    """
    model, vocabulary = start.model, start.vocabulary
    if config.extend_vocabulary:
        model, vocabulary = _extend(model, vocabulary, captions, config.minimum_count)
    unknown, total = _count_unknown(vocabulary, captions)
    share = unknown / total if total else 0.0
    if share > config.largest_unknown:
        raise InputError(
            f"{share:.0%} of the words in the training captions are unknown to the model's "
            f"vocabulary, more than --largest-unknown {config.largest_unknown:g}: add them with "
            "--extend-vocabulary, or accept them with a larger --largest-unknown"
        )
    if unknown:
        _logger.info(
            "%.1f%% of the words in the training captions are unknown to the model's vocabulary",
            100 * share,
        )
    return model, vocabulary


def _count_unknown(
    vocabulary: Vocabulary, captions: Sequence[str | Sequence[str]]
) -> tuple[int, int]:
    """How many words of the captions a vocabulary does not know, and how many there are."""
    unknown = total = 0
    for caption in captions:
        ids = vocabulary.encode(caption, _LONG)[1:-1]
        unknown += ids.count(UNKNOWN)
        total += len(ids)
    return unknown, total


def _extend(
    model: CaptionModel,
    vocabulary: Vocabulary,
    captions: Sequence[str | Sequence[str]],
    minimum_count: int,
) -> tuple[CaptionModel, Vocabulary]:
    """A model that knows the frequent words of the captions too.

    The embedding of a new word, and its row of the head, begin at the mean of the known words.
    """
    larger = vocabulary.extended(captions, minimum_count=minimum_count)
    added = len(larger) - len(vocabulary)
    if not added:
        return model, vocabulary
    config = dataclasses.replace(model.config, vocabulary_size=len(larger))
    extended = CaptionModel(config)
    state = model.state_dict()
    for name, value in extended.state_dict().items():
        if value.shape != state[name].shape:
            known = state[name]
            mean = known.mean(0, keepdim=True)
            state[name] = torch.cat([known, mean.expand(added, *known.shape[1:])])
    extended.load_state_dict(state)
    examples = larger.words(range(len(vocabulary), len(larger)))[:5]
    _logger.info("%d new words in the vocabulary, such as %s", added, ", ".join(examples))
    return extended, larger
