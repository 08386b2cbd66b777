"""Settings: frozen, keyword-only dataclasses, validated when they are made.

A field carries its help, limits and group. The command-line options (:mod:`captioner.options`)
and ``config.json`` both come from the fields. Reading settings needs neither torch nor Ray.
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
    "ExportConfig",
    "LaunchConfig",
    "ListingConfig",
    "ModelConfig",
    "Preset",
    "RunConfig",
    "SettingError",
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
    group: str | None = None,
    unset: str | None = None,
) -> Any:
    """A dataclass field that can become a command-line option.

    Args:
        default: the field's default.
        text: what the setting does and its unit, in one or two short sentences.
        minimum: the smallest value allowed.
        maximum: the largest value allowed.
        option: the option's name, where it is not ``--field-name``.
        group: the heading that ``--help`` lists the option under, where it is not the class's.
        unset: what happens where the value is None, for ``--help``: "the model's own".
    """
    return field(
        default=default,
        metadata={
            "help": text,
            "minimum": minimum,
            "maximum": maximum,
            "option": option,
            "group": group,
            "unset": unset,
        },
    )


class SettingError(InputError):
    """A setting has a wrong value: ``name`` is the setting, ``problem`` says what is wrong."""

    def __init__(self, name: str, problem: str):
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"{self.name} {self.problem}"


class _Checked:
    """Checks every field against its annotation and limits when the settings are made.

    ``GROUP`` is the heading that ``--help`` lists the options under.
    """

    GROUP: typing.ClassVar[str] = "Options"

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            minimum, maximum = each.metadata["minimum"], each.metadata["maximum"]
            if not _fits(value, hints[each.name]):
                expected = _describe(hints[each.name])
                raise SettingError(each.name, f"must be {expected}, not {value!r}")
            if not isinstance(value, (int, float)):
                continue
            if minimum is not None and not value >= minimum:
                raise SettingError(each.name, f"must be at least {minimum}, not {value!r}")
            if maximum is not None and not value <= maximum:
                raise SettingError(each.name, f"must be at most {maximum}, not {value!r}")
            if hints[each.name] is float:  # 1 and 1.0 are one setting: their JSON is to be the same
                object.__setattr__(self, each.name, float(value))


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple and arguments[1:] == (...,):
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
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
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,):
        return f"a tuple, each {_describe(typing.get_args(hint)[0])}"
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

    backbone: str = setting("resnet50.tv_in1k", "Name of the image encoder in timm.")
    image_size: int = setting(
        256, "Height and width that images are resized to.", minimum=32, maximum=2048
    )
    mean: tuple[float, float, float] = setting(
        (0.485, 0.456, 0.406), "Mean of the red, green and blue values, of 1."
    )
    std: tuple[float, float, float] = setting(
        (0.229, 0.224, 0.225), "Standard deviation of the red, green and blue values, of 1."
    )
    grid: int | None = setting(
        14,
        "The feature map is average-pooled to grid×grid; null keeps its own grid.",
        minimum=1,
        maximum=128,
    )
    tokenizer: Literal["whitespace", "ptb"] = setting(
        "whitespace",
        "How captions are split into words: at white space, or with punctuation apart (ptb).",
    )
    vocabulary_size: int = setting(4, "Entries of the vocabulary.", minimum=4)
    attention_map: Literal["last", "mean"] = setting(
        "last",
        "Cross-attention that a word's map shows: the last block's, or the mean over all blocks.",
    )
    max_length: int = setting(50, "Positions the decoder knows.", minimum=2, maximum=1024)
    width: int = setting(1024, "Width of the decoder.", minimum=1)
    layers: int = setting(6, "Blocks of the decoder.", minimum=1, maximum=128)
    heads: int = setting(8, "Attention heads of a block.", minimum=1)
    embedding_dropout: float = setting(0.2, "Dropout after the embeddings.", minimum=0, maximum=1)
    attention_dropout: float = setting(0.2, "Dropout after both attentions.", minimum=0, maximum=1)
    residual_dropout: float = setting(
        0.2, "Dropout in and after the feed-forward.", minimum=0, maximum=1
    )
    head_dropout: float = setting(
        0.2, "Dropout before the language model head.", minimum=0, maximum=1
    )
    pre_norm: bool = setting(False, "Normalise before each sublayer instead of after it.")
    tied_embeddings: bool = setting(False, "The head's weight is the embedding's.")
    shared_dropout: bool = setting(
        False, "One dropout mask for all words of a caption (Gal and Ghahramani 2016)."
    )
    beam: int = setting(
        1, "Beam width of a job that does not ask for another.", minimum=1, maximum=100
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise SettingError("width", f"{self.width} does not divide into {self.heads} heads")
        if min(self.std) <= 0:
            raise SettingError("std", "must be above 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Checked):
    """How a model is trained. The defaults are the notebook's."""

    GROUP = "Training"

    epochs: int = setting(4, "Passes over the training images.", minimum=0)
    batch_size: int = setting(64, "Images per step, over all workers.", minimum=1)
    accumulate: int = setting(
        1,
        "Parts into which a worker splits its share of a step; more parts need less memory.",
        minimum=1,
    )
    captions: Literal["first", "all"] = setting(
        "first", "Which captions of an image to train on.", group="Data"
    )
    views: int = setting(
        1,
        "Versions of each image: the image, its mirror image, then random crops.",
        minimum=1,
        group="Data",
    )
    augmentation: Literal["crops", "strong"] = setting(
        "crops",
        "How crops are changed; strong also varies brightness, contrast and saturation, and "
        "erases a part.",
        group="Data",
    )
    sort_batches: int = setting(
        1,
        "Batches sorted together by caption length, which saves computation; 1 disables sorting.",
        minimum=1,
    )
    minimum_count: int = setting(
        5,
        "Occurrences in the training captions that a word needs to enter the vocabulary.",
        minimum=1,
        group="Data",
    )
    extend_vocabulary: bool = setting(
        False,
        "With --model, add the frequent words of the training captions to its vocabulary.",
        group="Data",
    )
    largest_unknown: float = setting(
        0.3,
        "With --model, largest share of training words that its vocabulary may not know, 0 to 1.",
        minimum=0,
        maximum=1,
        group="Data",
    )
    learning_rate: float = setting(
        1e-4,
        "Peak learning rate of AdamW, reached after the warm-up.",
        minimum=0,
        group="Optimiser",
    )
    weight_decay: float = setting(0.01, "Weight decay of AdamW.", minimum=0, group="Optimiser")
    weight_decay_of: Literal["all", "matrices"] = setting(
        "all",
        "Weights that decay; matrices leaves out biases and normalisation scales.",
        group="Optimiser",
    )
    warmup_steps: int = setting(
        0,
        "Steps over which the learning rate rises from 0 to its peak.",
        minimum=0,
        group="Optimiser",
    )
    schedule: Literal["constant", "cosine"] = setting(
        "constant",
        "Learning rate after the warm-up: constant, or cosine decay to 0.",
        group="Optimiser",
    )
    label_smoothing: float = setting(
        0.0,
        "Share of the target probability that is spread over all words, 0 to 1.",
        minimum=0,
        maximum=1,
        group="Optimiser",
    )
    clip_norm: float | None = setting(
        None, "Largest norm of the gradient; none disables clipping.", minimum=0, group="Optimiser"
    )
    average: float = setting(
        0.0,
        "Decay per step of the exponential moving average of the weights, which becomes the "
        "model; 0 disables it.",
        minimum=0,
        maximum=1,
        group="Optimiser",
    )
    scst_epochs: int = setting(
        0,
        "Epochs of self-critical training on CIDEr (Rennie et al. 2017), after the others.",
        minimum=0,
        group="Self-critical training",
    )
    scst_learning_rate: float = setting(
        3e-5,
        "Learning rate of the self-critical epochs.",
        minimum=0,
        group="Self-critical training",
    )
    scst_samples: int = setting(
        5,
        "Captions sampled per image in the self-critical epochs.",
        minimum=2,
        group="Self-critical training",
    )
    fine_tune_from: int | None = setting(
        2,
        "First encoder stage to train; 0 is the stem, none freezes the encoder.",
        minimum=0,
        group="Encoder fine-tuning",
    )
    drop_path: float = setting(
        0.0,
        "Stochastic depth: probability of dropping the last residual branch of a trained "
        "encoder; lower for earlier branches.",
        minimum=0,
        maximum=0.9,
        group="Encoder fine-tuning",
    )
    precision: Precision = setting(
        "auto", "Precision of matrix products; auto takes bf16 where the hardware computes in it."
    )
    seed: int = setting(
        0,
        "Seed of the initial weights, shuffling, dropout and sampling.",
        minimum=0,
        maximum=2**32 - 1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_path and self.fine_tune_from is None:
            raise SettingError(
                "drop_path", "needs an encoder that is trained: give --fine-tune-from too"
            )
        if self.augmentation == "strong" and self.views < 3:
            raise SettingError(
                "augmentation",
                f"strong changes random crops, and --views {self.views} has none: "
                "give --views 3 or more",
            )


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(_Checked):
    """On what a model is trained: none of this changes the batches, or what a run goes on with.

    Dropout and the samples of self-critical training differ with the number of workers.
    """

    GROUP = "Where it runs"

    workers: int = setting(
        0, "Ray Train workers; 0 trains in this process, without Ray.", minimum=0
    )
    device: str = setting(
        "auto", "Device: auto, cpu, cuda, cuda:1 or mps; auto takes a GPU where there is one."
    )
    cpus_per_worker: float = setting(0.75, "Logical CPUs that Ray reserves per worker.", minimum=0)
    max_failures: int = setting(
        3,
        "Times that failed workers are replaced; training resumes from the last epoch.",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(_Checked):
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
        "Longest caption, in words, its end included.",
        minimum=1,
        maximum=1024,
        unset="the longest that the model knows",
    )
    allow_unknown: bool = setting(
        False, "Allow <unk>, <pad> and <start> in captions, as the notebook does."
    )
    prompt: str | None = setting(
        None,
        "Prompt for a pretrained model: a beginning of the caption, a task or a question, as its "
        "family takes it.",
        unset="the family's own",
        group="Pretrained models",
    )
    system_prompt: str | None = setting(
        None, "System prompt for a chat model.", unset="none", group="Pretrained models"
    )
    max_new_tokens: int | None = setting(
        None,
        "Longest caption of a pretrained model, in its tokens.",
        minimum=1,
        maximum=100_000,
        unset="64, or 256 for chat models and Florence-2",
        group="Pretrained models",
    )
    temperature: float = setting(
        0.0,
        "Sample captions at this temperature; 0 takes the likeliest words.",
        minimum=0,
        maximum=100,
        group="Pretrained models",
    )
    top_p: float = setting(
        1.0,
        "Sample among the likeliest tokens that have this share of the probability together.",
        minimum=0,
        maximum=1,
        group="Pretrained models",
    )
    repetition_penalty: float | None = setting(
        None,
        "Divide the scores of tokens that the caption has already by this factor.",
        minimum=0.01,
        maximum=100,
        unset="the model's own",
        group="Pretrained models",
    )
    seed: int = setting(
        0,
        "Seed of sampling; a caption depends on it and on the image alone.",
        minimum=0,
        maximum=2**32 - 1,
        group="Pretrained models",
    )
    captions: int = setting(
        1,
        "Captions to sample for each image; the first is the caption.",
        minimum=1,
        maximum=1000,
        group="Pretrained models",
    )
    attention: Literal["auto", "tokens", "mean", "none"] = setting(
        "auto",
        "Attention maps to keep: one per word (tokens), their mean, or none; auto is none for "
        "chat models, PaliGemma and BLIP-2, else tokens.",
    )
    attention_levels: Literal[15, 31, 63, 127, 255] = setting(
        127, "Steps between 0 and the largest value of an attention map; fewer compress better."
    )

    def with_model_defaults(self, model: ModelConfig) -> "DecodeConfig":
        """These settings, with the model's beam width if none is given."""
        return self if self.beam else dataclasses.replace(self, beam=model.beam)


@dataclass(frozen=True, kw_only=True)
class ListingConfig(_Checked):
    """Which images of a source are captioned."""

    GROUP = "Images"

    extensions: str = setting(
        "jpg,jpeg,jfif,png,webp,avif,jp2,j2k,bmp,gif,tif,tiff",
        "Extensions of the image files in a folder, separated by commas.",
        option="--ext",
    )
    exclude: tuple[str, ...] = setting(
        (),
        "Pattern of names to leave out, files and folders, such as '*-draft.jpg'; one with a slash "
        "is for the path from SOURCE. Repeatable.",
    )
    column: str | None = setting(
        None,
        "Column of image URIs in a list.",
        unset="uri, or the only column with a usual name such as url, image, file_name or path",
    )
    limit: int | None = setting(
        None,
        "List only the first N images, including those already captioned.",
        minimum=1,
        unset="all images",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.endings):
            raise SettingError(
                "extensions", f"must be words separated by commas, not {self.extensions!r}"
            )
        if not all(pattern.strip("/") for pattern in self.exclude):
            raise SettingError("exclude", "must be a pattern, for example '*-draft.jpg' or old")

    @property
    def endings(self) -> tuple[str, ...]:
        """The extensions, lower case, each with its dot."""
        words = (word.strip().lstrip(".").lower() for word in self.extensions.split(","))
        return tuple(f".{word}" if word else "" for word in words)


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Checked):
    """How a caption job runs.

    ``precision``, ``max_pixels`` and ``max_bytes`` can change a row: they are part of a job's
    fingerprint, and a resumed job needs the same. All other fields may differ.
    """

    GROUP = "Speed"

    engine: Literal["auto", "local", "ray"] = setting(
        "auto",
        "Where the job runs: local, in this process, or ray, on a cluster; auto takes ray in "
        "a Ray job, where RAY_ADDRESS is set, and with several GPUs.",
    )
    device: str = setting(
        "auto", "Device: auto, cpu, cuda, cuda:1 or mps; auto takes a GPU where there is one."
    )
    precision: Precision = setting(
        "auto", "Precision of matrix products; auto takes bf16 where the hardware computes in it."
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto",
        "Compile the encoder, which takes seconds; auto compiles on a CPU for 10000 images "
        "and more.",
    )
    batch_size: int | Literal["auto"] = setting(
        64,
        "Images per forward pass; auto starts with 8 and doubles while that is faster.",
        minimum=1,
        maximum=1_000_000,
    )
    shard_size: int = setting(
        256, "Images per shard; each shard becomes one part file.", minimum=1, maximum=1_000_000
    )
    decoders: int | None = setting(
        None,
        "Threads that read and decode images; on Ray, per decode task.",
        minimum=1,
        unset="one per CPU; on Ray 4",
    )
    actors: str | None = setting(
        None,
        "Captioning processes: N, or MIN:MAX to scale.",
        unset="one per GPU, or one per 8 CPUs",
        group="Ray cluster",
    )
    cpus_per_actor: float | None = setting(
        None,
        "Logical CPUs per actor; without a GPU also its threads.",
        minimum=0.1,
        unset="an equal share of the cluster",
        group="Ray cluster",
    )
    gpus_per_actor: float | None = setting(
        None,
        "GPUs per actor; fractions share a GPU.",
        minimum=0,
        unset="1 where the cluster has GPUs, else 0",
        group="Ray cluster",
    )
    cpus_per_decode: float = setting(
        0.5, "Logical CPUs per task that reads and decodes a shard.", minimum=0, group="Ray cluster"
    )
    wait_for_nodes: bool = setting(
        False,
        "Wait for the cluster to grow where it has no room for the actors yet.",
        group="Ray cluster",
    )
    max_pixels: int = setting(
        256_000_000,
        "Largest image, in pixels; a larger one is rejected without decoding it.",
        minimum=1,
        group="Limits and failures",
    )
    max_bytes: int = setting(
        256_000_000,
        "Largest file, in bytes; a larger one is rejected without reading it.",
        minimum=1,
        group="Limits and failures",
    )
    retries: int = setting(
        3,
        "Retries after the first failure to read an image.",
        minimum=0,
        group="Limits and failures",
    )
    retry_failed: bool = setting(
        False, "Caption again the images whose status is not ok.", group="Limits and failures"
    )
    stop_after_failures: int | None = setting(
        50,
        "Stop before writing any row when the first N images all fail for the same kind of reason.",
        minimum=1,
        unset="never",
        group="Limits and failures",
    )
    profile: str | None = setting(
        None, "File for a Chrome trace of three batches; local engine only.", unset="no trace"
    )
    max_error_rate: float = setting(
        0.1,
        "Exit with 3 if more than this share of the listed images is not ok, 0 to 1.",
        minimum=0,
        maximum=1,
        group="Limits and failures",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.actors is not None:
            self.actor_range  # noqa: B018

    def row_settings(self) -> dict[str, Any]:
        """The settings that can change a row, by name; ``precision`` is not resolved."""
        return {name: getattr(self, name) for name in ("precision", "max_pixels", "max_bytes")}

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
            raise SettingError("actors", f"must be N or MIN:MAX, not {self.actors!r}")
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
            tokenizer="ptb",
            attention_map="mean",
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


@dataclass(frozen=True, kw_only=True)
class ExportConfig(_Checked):
    """What an export holds, and how it looks."""

    GROUP = "Content"

    where: str | None = setting(
        None,
        'SQL condition that exported rows meet, for example "score > -0.5".',
        unset="every row",
    )
    reviewed: Literal["ignore", "accepted", "edited", "all"] = setting(
        "ignore",
        "Review decisions that exported captions need: accepted (edited captions included), "
        "edited, or all but rejected; ignore exports the captions as the model wrote them.",
    )
    columns: str | None = setting(
        None, "Columns to export, separated by commas.", unset="those that the format needs"
    )
    prefix: str = setting("", "Text before every caption.")
    suffix: str = setting("", "Text after every caption.")
    existing: Literal["keep", "overwrite", "append", "prepend"] = setting(
        "keep",
        "What to do with a file that the export did not write: keep it and exit with 2, "
        "overwrite it, or, for a sidecar, append or prepend the caption to its text.",
        group="Files",
    )
    extension: str = setting("txt", "File name extension of sidecars.", group="Files")
    root: str | None = setting(
        None,
        "Folder that the paths of sidecars are relative to.",
        unset="the deepest folder that holds all images",
        group="Files",
    )
    id: str | None = setting(
        None,
        "Column with the image ids for the coco format.",
        unset="the number at the end of each file name",
    )
    shard_images: int = setting(
        10_000,
        "Images per tar file of a webdataset.",
        minimum=1,
        maximum=1_000_000,
        group="Files",
    )
