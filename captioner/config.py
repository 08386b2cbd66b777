"""Settings: frozen, keyword-only dataclasses, checked once, when they are made.

A field carries its one line of help; the command line's options and ``config.json`` are both made
from the fields, so that nothing is written twice. Torch and Ray are not needed to read settings.
"""

import dataclasses
import json
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from captioner.errors import InputError

__all__ = [
    "PRESETS",
    "DecodeConfig",
    "LaunchConfig",
    "ListingConfig",
    "ModelConfig",
    "Preset",
    "RunConfig",
    "TrainConfig",
    "from_mapping",
    "parse_json",
]

Config = TypeVar("Config")
Precision = Literal["auto", "fp32", "bf16"]


def setting(
    default: Any,
    text: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    option: str | None = None,
) -> Any:
    """A dataclass field: its default, line of help, least and greatest value, option's name."""
    metadata = {"help": text, "minimum": minimum, "maximum": maximum, "option": option}
    return field(default=default, metadata=metadata)


class _Checked:
    """Checks every field against its annotation and limits when the settings are made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            minimum, maximum = each.metadata["minimum"], each.metadata["maximum"]
            if not _fits(value, hints[each.name]):
                expected = _describe(hints[each.name])
                raise InputError(f"{each.name} must be {expected}, not {value!r}")
            if not isinstance(value, (int, float)):
                continue
            if minimum is not None and not value >= minimum:
                raise InputError(f"{each.name} must be at least {minimum}, not {value!r}")
            if maximum is not None and not value <= maximum:
                raise InputError(f"{each.name} must be at most {maximum}, not {value!r}")
            if hints[each.name] is float:  # 1 and 1.0 are one setting: their JSON is to be the same
                object.__setattr__(self, each.name, float(value))


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(map(_fits, value, arguments))
        )
    if isinstance(value, bool):  # which Python takes for a whole number
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        choices = [str(choice) for choice in typing.get_args(hint)]
        return "one of " + ", ".join(choices) if len(choices) > 1 else choices[0]
    if hint is type(None):
        return "null"
    if arguments := typing.get_args(hint):
        separator = ", " if typing.get_origin(hint) is tuple else " or "
        return separator.join(_describe(argument) for argument in arguments)
    return {
        int: "a whole number",
        float: "a finite number",
        str: "text",
        bool: "true or false",
    }.get(hint, getattr(hint, "__name__", str(hint)))


def parse_json(text: str | bytes) -> Any:
    """Parses JSON in which no object has a name twice.

    Raises:
        InputError: it is not, or it is nested too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_named_once)
    except (ValueError, RecursionError) as error:
        raise InputError(str(error)) from error


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise InputError(f"{name[:100]!r} is there twice")
        values[name] = value
    return values


def from_mapping(config: type[Config], values: Mapping[str, Any]) -> Config:
    """Makes settings out of parsed JSON.

    Raises:
        InputError: a key is unknown, or a value has the wrong type or is out of range.
    """
    if not isinstance(values, Mapping):
        raise InputError("the settings are not an object")
    known = {each.name for each in dataclasses.fields(config)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise InputError(f"unknown setting {', '.join(unknown)}")
    return config(
        **{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()},
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """The encoder-decoder. The defaults are the notebook's model."""

    backbone: str = setting("resnet50.tv_in1k", "name of the image encoder in timm")
    image_size: int = setting(
        256, "height and width that images are resized to", minimum=32, maximum=2048
    )
    mean: tuple[float, float, float] = setting(
        (0.485, 0.456, 0.406), "mean of the red, green and blue values, of 1"
    )
    std: tuple[float, float, float] = setting(
        (0.229, 0.224, 0.225), "standard deviation of the red, green and blue values, of 1"
    )
    grid: int | None = setting(
        14,
        "the feature map is average-pooled to grid×grid; null keeps its own grid",
        minimum=1,
        maximum=128,
    )
    vocabulary_size: int = setting(4, "entries of the vocabulary", minimum=4)
    max_length: int = setting(50, "positions the decoder knows", minimum=2, maximum=1024)
    width: int = setting(1024, "width of the decoder", minimum=1)
    layers: int = setting(6, "blocks of the decoder", minimum=1, maximum=128)
    heads: int = setting(8, "attention heads of a block", minimum=1)
    embedding_dropout: float = setting(0.2, "dropout after the embeddings", minimum=0, maximum=1)
    attention_dropout: float = setting(0.2, "dropout after both attentions", minimum=0, maximum=1)
    residual_dropout: float = setting(
        0.2, "dropout in and after the feed-forward", minimum=0, maximum=1
    )
    head_dropout: float = setting(
        0.2, "dropout before the language model head", minimum=0, maximum=1
    )
    pre_norm: bool = setting(False, "normalise before each sublayer instead of after it")
    tied_embeddings: bool = setting(False, "the head's weight is the embedding's")
    shared_dropout: bool = setting(
        False, "one dropout mask for all words of a caption (Gal and Ghahramani 2016)"
    )
    beam: int = setting(
        1, "beam width of a job that does not ask for another", minimum=1, maximum=100
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise InputError(f"width {self.width} does not divide into {self.heads} heads")
        if min(self.std) <= 0:
            raise InputError("std must be above 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Checked):
    """How a model is trained. The defaults are the notebook's."""

    epochs: int = setting(4, "passes over the training images", minimum=0)
    batch_size: int = setting(64, "images a step", minimum=1)
    accumulate: int = setting(
        1, "parts that a worker computes its share of a step in, to save memory", minimum=1
    )
    captions: Literal["first", "all"] = setting("first", "which captions of an image to train on")
    views: int = setting(
        1, "versions of an image: itself, its mirror image, then random crops", minimum=1
    )
    augmentation: Literal["crops", "strong"] = setting(
        "crops", "strong: crops also of other brightness, contrast, saturation, and a part erased"
    )
    sort_batches: int = setting(
        1, "batches whose images are sorted by caption length together; 1 sorts none", minimum=1
    )
    minimum_count: int = setting(5, "a word needs this many occurrences", minimum=1)
    learning_rate: float = setting(1e-4, "AdamW's learning rate after the warm-up", minimum=0)
    weight_decay: float = setting(0.01, "AdamW's weight decay", minimum=0)
    weight_decay_of: Literal["all", "matrices"] = setting(
        "all", "weights that decay; matrices: not biases, nor the scales of normalisations"
    )
    warmup_steps: int = setting(0, "steps over which the learning rate rises", minimum=0)
    schedule: Literal["constant", "cosine"] = setting("constant", "learning rate after the warm-up")
    label_smoothing: float = setting(
        0.0, "share of the target spread over all words", minimum=0, maximum=1
    )
    clip_norm: float | None = setting(None, "largest norm of the gradient", minimum=0)
    average: float = setting(
        0.0,
        "decay a step of the weights' moving average, which is kept; 0: none",
        minimum=0,
        maximum=1,
    )
    scst_epochs: int = setting(
        0, "more epochs, of self-critical training on CIDEr (Rennie et al. 2017)", minimum=0
    )
    scst_learning_rate: float = setting(3e-5, "learning rate of these epochs", minimum=0)
    scst_samples: int = setting(5, "captions sampled an image in these epochs", minimum=2)
    fine_tune_from: int | None = setting(
        2, "first encoder stage to train, 0 is the stem; none freezes the encoder", minimum=0
    )
    drop_path: float = setting(
        0.0,
        "how often a trained encoder goes without its last residual branch; earlier ones less",
        minimum=0,
        maximum=0.9,
    )
    precision: Precision = setting("auto", "bf16 computes matrix products in bfloat16")
    seed: int = setting(
        0, "seed of the weights, the shuffling and dropout", minimum=0, maximum=2**32 - 1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_path and self.fine_tune_from is None:
            raise InputError("drop_path is for an encoder that is trained: give fine_tune_from")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(_Checked):
    """On what a model is trained: none of this changes the batches, or what a run goes on with.

    Dropout and the samples of self-critical training differ with the number of workers.
    """

    workers: int = setting(0, "Ray Train workers; 0 trains in this process, without Ray", minimum=0)
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto takes a GPU where there is one")
    cpus_per_worker: float = setting(0.75, "logical CPUs that Ray sets aside a worker", minimum=0)
    max_failures: int = setting(
        3, "times that dead workers are replaced; training goes on from the last epoch", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(_Checked):
    """What decides a caption besides the model: part of a job's fingerprint."""

    beam: int | None = setting(
        None, "beam width; 1 is greedy; none: the model's own, see its config.json", minimum=1
    )
    length_penalty: float = setting(
        1.0, "beams are ranked by log-probability over length to this power", minimum=0, maximum=10
    )
    max_words: int | None = setting(
        None, "longest caption, its end counted; none: what the model knows", minimum=1
    )
    allow_unknown: bool = setting(
        False, "let <unk>, <pad> and <start> be chosen, as the notebook does"
    )
    attention: Literal["tokens", "mean", "none"] = setting(
        "tokens", "maps to keep: one a word, their mean, or none"
    )
    attention_levels: Literal[15, 31, 63, 127, 255] = setting(
        127, "steps between 0 and a map's largest value"
    )

    def with_model_defaults(self, model: ModelConfig) -> "DecodeConfig":
        """These settings, with the model's beam where none is asked for."""
        return self if self.beam else dataclasses.replace(self, beam=model.beam)


@dataclass(frozen=True, kw_only=True)
class ListingConfig(_Checked):
    """Which images of a source are captioned."""

    extensions: str = setting(
        "jpg,jpeg,png,webp,bmp,gif,tif,tiff", "endings of the files to list", option="--ext"
    )
    limit: int | None = setting(
        None, "list only the first N images, those that are captioned already too", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.endings):
            raise InputError(f"extensions must be words between commas, not {self.extensions!r}")

    @property
    def endings(self) -> tuple[str, ...]:
        """The extensions, lower case, each with its dot."""
        words = (word.strip().lstrip(".").lower() for word in self.extensions.split(","))
        return tuple(f".{word}" if word else "" for word in words)


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Checked):
    """How a caption job runs. None of this changes a caption, so a resumed job may change it."""

    engine: Literal["auto", "local", "ray"] = setting(
        "auto", "local: in this process; ray: on the cluster"
    )
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto takes a GPU where there is one")
    precision: Precision = setting("auto", "auto: bf16 where the hardware computes in it")
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "compile the encoder; auto: on a CPU, where the job is long enough for it to pay"
    )
    batch_size: int | Literal["auto"] = setting(
        64,
        "images a forward pass; auto: doubled from 8 on while that is faster",
        minimum=1,
        maximum=1_000_000,
    )
    shard_size: int = setting(
        256, "images a shard, which is one part file", minimum=1, maximum=1_000_000
    )
    decoders: int | None = setting(
        None,
        "threads that read and decode images, on Ray those of a task; none: one a CPU, on Ray 4",
        minimum=1,
    )
    actors: str | None = setting(
        None, "captioning processes on Ray: N, or MIN:MAX to scale; none: by the cluster's size"
    )
    cpus_per_actor: float | None = setting(
        None,
        "logical CPUs of an actor, without a GPU its threads too; none: they share the cluster's",
        minimum=0.1,
    )
    gpus_per_actor: float | None = setting(
        None, "GPUs of an actor, fractions too; none: 1 where the cluster has any", minimum=0
    )
    cpus_per_decode: float = setting(
        0.5, "logical CPUs of a task on Ray that reads and decodes a shard", minimum=0
    )
    wait_for_nodes: bool = setting(
        False, "where the cluster has no room for the actors yet, wait for it to grow"
    )
    max_pixels: int = setting(
        256_000_000, "an image with more pixels is rejected unread", minimum=1
    )
    max_bytes: int = setting(256_000_000, "a larger file is rejected unread", minimum=1)
    retries: int = setting(3, "tries after the first to read an image", minimum=0)
    retry_failed: bool = setting(False, "caption again the images whose rows are not ok")
    profile: str | None = setting(
        None, "file for a trace of what torch does in three batches, which Chrome opens (local)"
    )
    max_error_rate: float = setting(
        0.1, "exit with 3 if more than this share of OUTPUT's rows is not ok", minimum=0, maximum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.actors is not None:
            self.actor_range  # noqa: B018

    @property
    def actor_range(self) -> tuple[int, int] | None:
        """The least and the largest number of actors, where they are given.

        Raises:
            InputError: ``actors`` is not two numbers, or not in order.
        """
        if self.actors is None:
            return None
        match = re.fullmatch(r"(\d+)(?::(\d+))?", self.actors, re.ASCII)
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            raise InputError(f"actors must be N or MIN:MAX, not {self.actors!r}")
        return least, most


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model and how it is trained."""

    model: ModelConfig
    train: TrainConfig


PRESETS = {
    "notebook": Preset(model=ModelConfig(), train=TrainConfig()),
    "small": Preset(
        model=ModelConfig(
            backbone="tf_efficientnet_lite2",
            image_size=260,
            mean=(127 / 255,) * 3,
            std=(128 / 255,) * 3,
            grid=None,
            width=384,
            layers=3,
            heads=6,
            pre_norm=True,
            tied_embeddings=True,
            shared_dropout=True,
            beam=3,
        ),
        train=TrainConfig(
            epochs=14,
            batch_size=32,
            captions="all",
            views=4,
            sort_batches=16,
            learning_rate=5e-4,
            weight_decay_of="matrices",
            warmup_steps=200,
            schedule="cosine",
            label_smoothing=0.1,
            clip_norm=1.0,
            average=0.998,
            fine_tune_from=None,
        ),
    ),
}
