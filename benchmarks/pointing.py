"""The pointing game (Zhang et al. 2018): do the words' maps point at what they name?

python benchmarks/pointing.py DATA BOXES

For each word of a generated caption that people named in the photo, the largest value of the word's
map has to fall into one of the thing's boxes, with a tolerance of 15 pixels. The mean map of the
caption's words, the photo's centre and a random cell play the same game. The last line is JSON.

DATA is a dataset as ``captioner train`` takes it. BOXES is a JSON file:
``{image: {"size": [width, height], "nouns": {word: [[x1, y1, x2, y2], …]}}}`` in pixels.
"""

import dataclasses
import itertools
import json
import string
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import click
import numpy as np

from captioner import storage
from captioner.config import DecodeConfig, ModelConfig, parse_json
from captioner.data.dataset import CaptionedImage, read_dataset
from captioner.data.preparation import Preparation
from captioner.data.views import load_view
from captioner.errors import CaptionerError, InputError
from captioner.model import bundle
from captioner.model.native import Caption, Captioner

TOLERANCE = 15  # pixels of the photo
BATCH = 32  # images

Map = Literal["last", "mean"]
Box = Sequence[float]


@dataclasses.dataclass(frozen=True)
class Maps:
    """How maps are made, as the model's settings of these names say; None: as the model does."""

    attention_map: Map | None = None
    attention_norms: bool | None = None
    attention_blur: float | None = None

    def of(self, config: ModelConfig) -> ModelConfig:
        """A model's settings with these maps."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(config, **given)


@dataclasses.dataclass
class Game:
    """Hits of the maps, the captions' mean maps, the centre and a random cell, over some words."""

    words: int = 0
    hits: int = 0
    mean: int = 0
    centre: int = 0
    random: float = 0.0

    def play(
        self, map_HW: np.ndarray, mean_HW: np.ndarray, boxes: Sequence[Box], size: tuple[int, int]
    ) -> None:
        """Adds a word.

        Args:
            map_HW: the word's map.
            mean_HW: the mean map of the caption.
            boxes: the boxes of what the word names.
            size: the photo's width and height.
        """
        height, width = map_HW.shape
        cells = [
            _is_hit(((column + 0.5) / width, (row + 0.5) / height), boxes, size)
            for row in range(height)
            for column in range(width)
        ]
        self.words += 1
        self.hits += cells[int(map_HW.argmax())]
        self.mean += cells[int(mean_HW.argmax())]
        self.centre += _is_hit((0.5, 0.5), boxes, size)
        self.random += sum(cells) / len(cells)

    def shares(self) -> dict[str, float]:
        """The shares of hits."""
        words = max(1, self.words)
        return {
            "maps": self.hits / words,
            "mean map": self.mean / words,
            "centre": self.centre / words,
            "random": self.random / words,
        }


def _is_hit(point: tuple[float, float], boxes: Sequence[Box], size: tuple[int, int]) -> bool:
    """Whether a point, in shares of the photo's size, lies in a box or near it."""
    x, y = point[0] * size[0], point[1] * size[1]
    return any(
        left - TOLERANCE <= x <= right + TOLERANCE and top - TOLERANCE <= y <= bottom + TOLERANCE
        for left, top, right, bottom in boxes
    )


def _captions(
    images: Sequence[CaptionedImage], model: str, maps: Maps
) -> Iterator[tuple[CaptionedImage, Caption]]:
    """Captions images that can be decoded."""
    loaded = bundle.load(model)
    loaded.model.config = loaded.model.decoder.config = maps.of(loaded.config)
    decode = DecodeConfig(attention="tokens").with_model_defaults(loaded.config)
    captioner, preparation = Captioner(loaded, decode), Preparation.of(loaded.config)
    for begin in range(0, len(images), BATCH):
        batch = images[begin : begin + BATCH]
        views = [load_view(image.uri, preparation, 0) for image in batch]
        known = [(i, view) for i, view in zip(batch, views, strict=True) if view is not None]
        if known:
            captions = captioner(np.stack([view for _, view in known]))
            yield from zip([image for image, _ in known], captions, strict=True)


def play(
    images: Sequence[CaptionedImage],
    boxes: dict[str, Any],
    model: str,
    maps: Maps | None = None,
) -> Game:
    """Plays the game on photos, with the model's own maps or with others."""
    game = Game()
    for image, caption in _captions(images, model, maps or Maps()):
        photo = boxes[image.name]
        maps_TGG = caption.attention_THW
        assert maps_TGG is not None
        for word, map_GG in zip(caption.tokens, maps_TGG, strict=True):
            noun = word.strip(string.punctuation)  # which a word of subwords includes
            if noun in photo["nouns"]:
                game.play(map_GG, maps_TGG.mean(0), photo["nouns"][noun], tuple(photo["size"]))
    return game


@click.command()
@click.argument("data")
@click.argument("boxes")
@click.option(
    "--model", default=bundle.DEFAULT, help="Model directory.  [default: captioner's own]"
)
@click.option("--limit", type=int, help="Only the first N photos that have boxes.")
@click.option(
    "--map",
    "kinds",
    multiple=True,
    type=click.Choice(get_args(Map)),
    help="Maps to compare; repeat it for several.  [default: those that the model gives]",
)
@click.option(
    "--norms",
    "norms",
    multiple=True,
    type=click.Choice(["yes", "no"]),
    help="Whether maps are weighted by the values' norms; repeat it to compare.  [default: as the "
    "model says]",
)
@click.option(
    "--blur",
    "blurs",
    multiple=True,
    type=float,
    help="Standard deviations of the maps' blur to compare, in cells; repeat it.  [default: the "
    "model's]",
)
def main(
    data: str,
    boxes: str,
    model: str,
    limit: int | None,
    kinds: tuple[Map, ...],
    norms: tuple[str, ...],
    blurs: tuple[float, ...],
) -> None:
    """Plays the pointing game with a model's captions of the photos that have boxes."""
    try:
        parsed = parse_json(storage.read(storage.absolute(boxes)))
        named = read_dataset(storage.absolute(data)).images
        images = [image for image in named if image.name in parsed][:limit]
        if not images:
            raise InputError(f"{boxes} has boxes of no image in {data}")
        results = {}
        own = bundle.load(storage.absolute(model)).config
        weighted = [each == "yes" for each in norms]
        for settings in itertools.product(kinds or (None,), weighted or (None,), blurs or (None,)):
            maps = Maps(*settings)
            game = play(images, parsed, storage.absolute(model), maps)
            shown = maps.of(own)
            name = f"{shown.attention_map}, blur {shown.attention_blur:g}"
            name += ", norms" if shown.attention_norms else ""
            results[name] = {"words": game.words, **game.shares()}
            shares = ", ".join(f"{what} {100 * s:.1f}%" for what, s in game.shares().items())
            click.echo(f"{name}: {game.words} words: {shares}")
    except CaptionerError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps({"model": model, "images": len(images), "results": results}))


if __name__ == "__main__":
    main()
