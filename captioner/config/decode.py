"""Settings of decoding: what decides a caption besides the model."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from captioner.config.model import ModelConfig
from captioner.config.settings import Settings, setting

__all__ = ["PRETRAINED_SETTINGS", "TEXT_SETTINGS", "DecodeConfig"]

_PRETRAINED = "Pretrained models"


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(Settings):
    """What decides a caption besides the model: part of a job's fingerprint."""

    GROUP = "Captions"

    beam: int | None = setting(
        None,
        "Beam width, in captions; 1 is greedy search.",
        minimum=1,
        maximum=100,
        unset="the model's own; 3 for the bundled model",
    )
    length_penalty: float = setting(
        1.0,
        "Beams are ranked by log-probability divided by length to this power.",
        minimum=0,
        maximum=10,
    )
    max_words: int | None = setting(
        None,
        "Longest caption, in words, including its end; for a model with subwords, in subwords.",
        minimum=1,
        maximum=1024,
        unset="the model's longest",
    )
    allow_unknown: bool = setting(
        False, "Allow <unk>, <pad> and <start> in captions, as the notebook does."
    )
    prompt: str | None = setting(
        None,
        "Prompt for a pretrained model: the beginning of the caption, a task or a question, "
        "depending on its family.",
        unset="the family's own",
        group=_PRETRAINED,
    )
    system_prompt: str | None = setting(
        None, "System prompt for a chat model.", unset="none", group=_PRETRAINED
    )
    max_new_tokens: int | None = setting(
        None,
        "Longest caption of a pretrained model, in its tokens.",
        minimum=1,
        maximum=100_000,
        unset="64, or 256 for chat models and Florence-2",
        group=_PRETRAINED,
    )
    temperature: float = setting(
        0.0,
        "Temperature of sampling; 0 disables sampling and chooses the likeliest words.",
        minimum=0,
        maximum=100,
        group=_PRETRAINED,
    )
    top_p: float = setting(
        1.0,
        "Sample only among the likeliest tokens whose probabilities add up to this share.",
        minimum=0,
        maximum=1,
        group=_PRETRAINED,
    )
    repetition_penalty: float | None = setting(
        None,
        "Divide the scores of tokens that are already in the caption by this factor.",
        minimum=0.01,
        maximum=100,
        unset="the model's own",
        group=_PRETRAINED,
    )
    seed: int = setting(
        0,
        "Seed of --sample and of sampled captions; a caption depends only on the seed and its "
        "image.",
        minimum=0,
        maximum=2**32 - 1,
        group=_PRETRAINED,
    )
    captions: int = setting(
        1,
        "Captions to sample for each image; the first becomes the column caption.",
        minimum=1,
        maximum=1000,
        group=_PRETRAINED,
    )
    attention: Literal["auto", "tokens", "mean", "none"] = setting(
        "auto",
        "Attention maps to keep: one per word (tokens), their mean, or none; auto is none for chat "
        "models, PaliGemma and BLIP-2, and tokens for others.",
    )
    attention_levels: Literal[15, 31, 63, 127, 255] = setting(
        127, "Steps between 0 and the largest value of an attention map; fewer compress better."
    )

    def with_model_defaults(self, model: ModelConfig) -> "DecodeConfig":
        """These settings, with the model's beam width if none is given."""
        return self if self.beam else dataclasses.replace(self, beam=model.beam)


#: The settings that only pretrained models take.
PRETRAINED_SETTINGS = tuple(
    each.name
    for each in dataclasses.fields(DecodeConfig)
    if each.metadata["group"] == _PRETRAINED and each.name != "seed"  # listing takes it too
)
#: The settings that decide the text of an image's caption, not its number or its maps.
TEXT_SETTINGS = tuple(
    each.name
    for each in dataclasses.fields(DecodeConfig)
    if each.name not in ("captions", "attention", "attention_levels")
)
