"""captioner: caption image folders and buckets into Parquet; train and score image captioners.

The names in ``__all__`` are the public interface; all others may change. A name is imported when
it is first used, so that ``import captioner`` loads neither torch nor Ray.

Example:
    >>> import captioner
    >>> summary = captioner.caption_images("photos/", "captions/", captioner.BUNDLED_MODEL)
    >>> print(summary.describe())
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captioner.caption.job import caption_images, plan_captioning
    from captioner.config import (
        PRESETS,
        DecodeConfig,
        LaunchConfig,
        ListingConfig,
        ModelConfig,
        RunConfig,
        TrainConfig,
    )
    from captioner.data.dataset import read_dataset
    from captioner.data.images import prepare_image
    from captioner.errors import CaptionerError
    from captioner.evaluation.captions import caption_dataset, join_output
    from captioner.evaluation.evaluation import evaluate
    from captioner.model.loading import load_model
    from captioner.output.attention import decode as decode_attention
    from captioner.training.run import train

__all__ = [
    "BUNDLED_MODEL",
    "PRESETS",
    "CaptionerError",
    "DecodeConfig",
    "LaunchConfig",
    "ListingConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "caption_dataset",
    "caption_images",
    "decode_attention",
    "evaluate",
    "join_output",
    "load_model",
    "plan_captioning",
    "prepare_image",
    "read_dataset",
    "train",
]

__version__ = "0.1.0"

#: The directory of the model that comes with captioner, trained on Flickr8k and everyday photos.
BUNDLED_MODEL = str(Path(__file__).parent / "bundled" / "flickr8k")

_PLACES = {
    "caption_dataset": "captioner.evaluation.captions:caption_dataset",
    "caption_images": "captioner.caption.job:caption_images",
    "CaptionerError": "captioner.errors:CaptionerError",
    "decode_attention": "captioner.output.attention:decode",
    "evaluate": "captioner.evaluation.evaluation:evaluate",
    "join_output": "captioner.evaluation.captions:join_output",
    "load_model": "captioner.model.loading:load_model",
    "plan_captioning": "captioner.caption.job:plan_captioning",
    "prepare_image": "captioner.data.images:prepare_image",
    "read_dataset": "captioner.data.dataset:read_dataset",
    "train": "captioner.training.run:train",
    **{
        name: f"captioner.config:{name}"
        for name in (
            "DecodeConfig",
            "LaunchConfig",
            "ListingConfig",
            "ModelConfig",
            "PRESETS",
            "RunConfig",
            "TrainConfig",
        )
    },
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module 'captioner' has no attribute {name!r}")
    module, attribute = _PLACES[name].split(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, whether they are imported yet or not."""
    return sorted({*globals(), *__all__})
