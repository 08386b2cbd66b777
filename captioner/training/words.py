"""The words of a run: does a vocabulary fit the captions, and which words does it get?

Subwords spell any word: the checks of unknown words find none, and no words are added to them.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from captioner.config import TrainConfig
from captioner.errors import InputError
from captioner.model import bundle
from captioner.model.bundle import Bundle
from captioner.model.network import CaptionModel
from captioner.model.vocabulary import SPECIAL, UNKNOWN, Vocabulary, WordVocabulary

__all__ = ["LARGEST_UNKNOWN", "check_tokenizer", "check_vocabulary", "prepare_vocabulary"]

#: The largest share of unknown words in the training captions that a run accepts.
LARGEST_UNKNOWN = 0.3

_LONG = 1 << 20  # ids of a caption: none is cut off
_FEW = 0.01  # captions that are cut off without a warning

_logger = logging.getLogger(__name__)


def check_tokenizer(model: str, tokenizer: str) -> None:
    """Checks that a model to continue from has the requested tokenizer.

    Args:
        model: the model's directory.
        tokenizer: ``words`` or ``bpe``.

    Raises:
        InputError: it does not.
        BundleError: its settings cannot be read.
    """
    own = "bpe" if bundle.load_config(model).tokenizer == "bpe" else "words"
    if tokenizer != own:
        raise InputError(
            f"--tokenizer {tokenizer}: the model {model} was trained with --tokenizer {own} and "
            "keeps it: remove --tokenizer or --model"
        )


def check_vocabulary(
    vocabulary: Vocabulary, captions: Sequence[str | Sequence[str]], positions: int
) -> None:
    """Checks that a new vocabulary fits the captions that it was made from.

    Args:
        vocabulary: the new one.
        captions: the training captions.
        positions: how many ids of a caption the model takes.

    Raises:
        InputError: it knows too few words, as of captions without spaces between words.
    """
    coverage = _cover(vocabulary, captions, positions)
    if coverage.unknown_share > LARGEST_UNKNOWN:
        raise InputError(
            f"{coverage.unknown_share:.0%} of the {coverage.words} words in the training captions "
            f"are too rare for the vocabulary, which has {len(vocabulary) - len(SPECIAL)} words: "
            "use a lower --minimum-count or a larger --vocabulary-size; captions in a language "
            "without spaces between words need --tokenizer bpe"
        )
    coverage.warn_of_cut(positions)


def prepare_vocabulary(
    start: Bundle, captions: Sequence[str | Sequence[str]], config: TrainConfig
) -> tuple[CaptionModel, Vocabulary]:
    """The model to continue from, with new words where the settings ask for them.

    Args:
        start: the model and its vocabulary.
        captions: the training captions.
        config: how to train.

    Raises:
        InputError: the vocabulary knows too few words of the captions, or the settings ask for
            another one.
    """
    model, vocabulary = start.model, start.vocabulary
    if config.largest_vocabulary is not None:
        raise InputError("give --model or --vocabulary-size, not both: a model has a vocabulary")
    if config.extend_vocabulary:
        if not isinstance(vocabulary, WordVocabulary):
            raise InputError(
                "--extend-vocabulary is for models with words, but this model has subwords, which "
                "can spell any word; remove --extend-vocabulary"
            )
        model, vocabulary = _extend(model, vocabulary, captions, config.minimum_count)
    coverage = _cover(vocabulary, captions, model.config.max_length)
    share = coverage.unknown_share
    if share > config.largest_unknown:
        raise InputError(
            f"{share:.0%} of the words in the training captions are unknown to the model's "
            f"vocabulary, more than --largest-unknown {config.largest_unknown:g}: add them with "
            "--extend-vocabulary, or accept them with a larger --largest-unknown"
        )
    if coverage.unknown:
        _logger.info(
            "%.1f%% of the words in the training captions are unknown to the model's vocabulary",
            100 * share,
        )
    coverage.warn_of_cut(model.config.max_length)
    return model, vocabulary


@dataclass(frozen=True)
class _Coverage:
    """How a vocabulary and a model fit captions.

    Attributes:
        words: words, or subwords, of the captions.
        unknown: those that the vocabulary does not know.
        captions: the number of captions.
        cut: those that are longer than the model's positions.
    """

    words: int
    unknown: int
    captions: int
    cut: int

    @property
    def unknown_share(self) -> float:
        return self.unknown / max(1, self.words)

    def warn_of_cut(self, positions: int) -> None:
        """Warns where more than a few captions lose their last words."""
        if self.cut > _FEW * self.captions:
            _logger.warning(
                "%.1f%% of the training captions are longer than the model's %d positions and lose "
                "their last words",
                100 * self.cut / self.captions,
                positions,
            )


def _cover(
    vocabulary: Vocabulary, captions: Sequence[str | Sequence[str]], positions: int
) -> _Coverage:
    words = unknown = cut = 0
    for caption in captions:
        ids = vocabulary.encode(caption, _LONG)
        unknown += ids.count(UNKNOWN)
        words += len(ids) - 2  # without the start and the end
        cut += len(ids) > positions
    return _Coverage(words, unknown, len(captions), cut)


def _extend(
    model: CaptionModel,
    vocabulary: WordVocabulary,
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
