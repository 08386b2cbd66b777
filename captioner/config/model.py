"""Settings of a model."""

from dataclasses import dataclass, replace
from typing import Literal

from captioner.config.settings import SettingError, Settings, setting

__all__ = ["ModelConfig"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """The encoder-decoder. The defaults are the notebook's model."""

    GROUP = "Model"

    backbone: str = setting(
        "resnet50.tv_in1k", "Image encoder: the name of a model in timm.", option="--encoder"
    )
    image_size: int = setting(
        256,
        "Height and width to which images are resized, in pixels; with --encoder, by default the "
        "size that it was trained on.",
        minimum=32,
        maximum=2048,
    )
    interpolation: Literal["bilinear", "bicubic"] = setting("bilinear", "How images are resized.")
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
    tokenizer: Literal["whitespace", "ptb", "bpe"] = setting(
        "whitespace",
        "How captions are split: into words at white space, into words with punctuation apart "
        "(ptb), or into subwords (bpe).",
    )
    vocabulary_size: int = setting(4, "Entries of the vocabulary.", minimum=4)
    attention_map: Literal["last", "mean"] = setting(
        "last",
        "Cross-attention that a word's map shows: the last block's, or the mean over all blocks.",
    )
    attention_norms: bool = setting(
        False,
        "Weight each head's attention to a cell by the norm of the vector that the head reads "
        "there (Kobayashi et al. 2020).",
    )
    attention_blur: float = setting(
        0.0,
        "Standard deviation, in cells, of the Gaussian that smooths each map; 0: none.",
        minimum=0,
        maximum=16,
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
    low_score: float | None = setting(
        None,
        "Captions with a lower score are shown as probably wrong; see benchmarks/calibration.py.",
        maximum=0,
        unset="no caption is",
    )

    def with_dropout(self, probability: float) -> "ModelConfig":
        """The settings with the same dropout everywhere in the decoder."""
        return replace(
            self,
            embedding_dropout=probability,
            attention_dropout=probability,
            residual_dropout=probability,
            head_dropout=probability,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise SettingError("width", f"{self.width} does not divide into {self.heads} heads")
        if min(self.std) <= 0:
            raise SettingError("std", "must be above 0")
