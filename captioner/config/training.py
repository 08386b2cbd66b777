"""Settings of training, and the presets."""

from dataclasses import dataclass
from typing import Any, Literal

from captioner.config.model import ModelConfig
from captioner.config.run import Precision
from captioner.config.settings import SettingError, Settings, setting

__all__ = ["PRESETS", "LaunchConfig", "LogKind", "Preset", "TrainConfig"]

LogKind = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """How a model is trained. The defaults are the notebook's."""

    GROUP = "Training"

    epochs: int = setting(4, "Passes over the training images.", minimum=0)
    early_stopping: int | None = setting(
        None,
        "Stop after N epochs in a row without a higher validation CIDEr; none never stops.",
        minimum=1,
    )
    validate_every: int | None = setting(
        None,
        "Also validate after every N steps, and consider these weights for the model; none "
        "validates after each epoch only.",
        minimum=1,
    )
    batch_size: int = setting(64, "Images per step, over all workers.", minimum=1)
    accumulate: int = setting(
        1,
        "Number of parts into which a worker splits its share of a batch; more parts need less "
        "memory.",
        minimum=1,
    )
    captions: Literal["first", "all"] = setting(
        "first", "Which captions of an image to train on.", group="Data"
    )
    views: int = setting(
        1,
        "Number of versions of each image: the image, its mirror image, then random crops.",
        minimum=1,
        group="Data",
    )
    augmentation: Literal["crops", "strong"] = setting(
        "crops",
        "Changes to the views: random crops; strong also varies brightness, contrast and "
        "saturation, and erases a part.",
        group="Data",
    )
    sort_batches: int = setting(
        1,
        "Number of batches whose images are sorted together by caption length, which saves "
        "computation; 1 disables sorting.",
        minimum=1,
    )
    minimum_count: int = setting(
        5,
        "Number of times that a word or subword must occur in the training captions to enter the "
        "vocabulary.",
        minimum=1,
        group="Vocabulary",
    )
    largest_vocabulary: int | None = setting(
        None,
        "Largest number of words (the most frequent) or of subwords; none allows all words, or "
        "8000 subwords.",
        minimum=1,
        option="--vocabulary-size",
        group="Vocabulary",
    )
    extend_vocabulary: bool = setting(
        False,
        "With --model, add the frequent words of the training captions to its vocabulary.",
        group="Vocabulary",
    )
    largest_unknown: float = setting(
        0.3,
        "With --model, largest share of training words that may be missing in its vocabulary, "
        "0 to 1.",
        minimum=0,
        maximum=1,
        group="Vocabulary",
    )
    learning_rate: float = setting(
        1e-4,
        "Peak learning rate of AdamW, reached after the warm-up.",
        minimum=0,
        group="Optimiser",
    )
    encoder_learning_rate: float | None = setting(
        None,
        "Peak learning rate of the encoder, except in self-critical training; none is the value "
        "of --learning-rate.",
        minimum=0,
        group="Encoder fine-tuning",
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
        "Epochs of self-critical training on CIDEr (Rennie et al. 2017), after --epochs.",
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
        "Stochastic depth: probability of dropping the last residual branch of a trained encoder; "
        "earlier branches have a lower probability.",
        minimum=0,
        maximum=0.9,
        group="Encoder fine-tuning",
    )
    precision: Precision = setting(
        "auto", "Precision of matrix products; auto chooses bf16 if the hardware computes in bf16."
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
            raise SettingError("drop_path", "needs a trained encoder; add --fine-tune-from")
        if self.encoder_learning_rate is not None and self.fine_tune_from is None:
            raise SettingError(
                "encoder_learning_rate",
                "needs a trained encoder; add --fine-tune-from",
            )
        if self.augmentation == "strong" and self.views < 3:
            raise SettingError(
                "augmentation",
                f"strong changes random crops, and --views {self.views} has none; "
                "use --views 3 or more",
            )


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Settings):
    """Where a model is trained; a resumed run may use other values, and its batches are the same.

    Dropout and the samples of self-critical training differ with the number of workers.
    """

    GROUP = "Where it runs"

    workers: int = setting(
        0, "Ray Train workers; 0 trains in this process, without Ray.", minimum=0
    )
    device: str = setting(
        "auto", "Device: auto, cpu, cuda, cuda:1 or mps; auto chooses a GPU if there is one."
    )
    cpus_per_worker: float = setting(0.75, "Logical CPUs that Ray reserves per worker.", minimum=0)
    max_failures: int = setting(
        3,
        "Number of times that failed workers are replaced; training resumes from the last epoch.",
        minimum=0,
    )
    log: tuple[LogKind, ...] = setting(
        ("tensorboard",),
        "Where to log the figures of steps and epochs, in addition to metrics.jsonl; wandb and "
        "mlflow need the extra of the same name. Repeatable.",
        group="Logging",
    )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model and how it is trained."""

    model: ModelConfig
    train: TrainConfig

    def value(self, name: str) -> Any:
        """The value of a setting of the model or of training; no two have the same name."""
        return getattr(self.train if hasattr(self.train, name) else self.model, name)


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
            attention_norms=True,
            attention_blur=1.3,
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
