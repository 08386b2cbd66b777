"""A training run that takes a second: squares of a colour, four steps an epoch."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from captioner.config import LaunchConfig, TrainConfig
from captioner.data.splits import CaptionedImage, Split
from captioner.training import run as training
from captioner.training.journal import Epoch
from conftest import TINY, tiny_model

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def write_split(directory: Path, caption: str = "a {} square .") -> Split:
    """Eight images to train on and four to validate on."""
    directory.mkdir()
    examples = []
    for index in range(12):
        word, colour = list(COLOURS.items())[index % 2]
        path = directory / f"{index:02d}.png"
        Image.new("RGB", (64, 64), colour).save(path)
        examples.append(CaptionedImage(str(path), [caption.format(word)], path.name))
    return Split(examples[:8], examples[8:], [])


class TinyRun:
    """Trains in a directory; its cache and its encoder's weights are beside it."""

    def __init__(self, directory: Path, split: Split | None = None):
        self.directory = directory
        self.split = split or write_split(directory / "data")
        self.weights = str(directory / "encoder.pth")
        torch.save(tiny_model().encoder.backbone.state_dict(), self.weights)

    def train(
        self, output: str = "model", *, log: tuple[Any, ...] = ("tensorboard",), **changes: object
    ) -> list[Epoch]:
        settings = {"batch_size": 2, "minimum_count": 1, "learning_rate": 2e-3, "epochs": 2}
        settings |= {"precision": "fp32", "fine_tune_from": None, **changes}
        return training.train(
            self.split,
            str(self.directory / output),
            model_config=TINY,
            config=TrainConfig(**settings),
            launch=LaunchConfig(log=log),
            encoder_weights=self.weights,
        )
