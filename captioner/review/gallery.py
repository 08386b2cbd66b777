"""A page of photos with their captions and the attention map of each word."""

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import jinja2
import numpy as np
import pyarrow as pa

from captioner.errors import InputError, printable
from captioner.output.directory import OutputDirectory
from captioner.output.images import OutputImages
from captioner.output.rows import lowest_ranked_rows
from captioner.review.pictures import map_png, photo_jpeg
from captioner.review.rows import attention_maps
from captioner.runtime.progress import progress_bar

__all__ = ["Order", "make_gallery"]

#: The rows to show: a random sample, the best or worst scores, or the first listed.
Order = Literal["random", "best", "worst", "listed"]

_READERS = 8  # threads that read photos


@dataclass
class _Card:
    """What the page shows of a row; pictures are ``data:`` URIs or None."""

    uri: str
    score: float | None
    is_low: bool = False  # the score is one of captions that are probably wrong
    photo: str | None = None
    ratio: float = 1.0  # the photo's width divided by its height
    words: list[tuple[str, float, str | None]] = field(default_factory=list)  # probability, map
    mean_map: str | None = None
    problem: str = ""


def make_gallery(output: str, *, count: int = 100, order: Order = "random", seed: int = 0) -> str:
    """Makes an HTML page without scripts that needs no other file and no network.

    Args:
        output: a caption job's output directory, local or in a bucket.
        count: the largest number of rows to show.
        order: how to choose the rows, and their order.
        seed: the seed of the random sample.

    Raises:
        InputError: ``count`` is below 1, or ``seed`` below 0.
        OutputError: ``output`` is not a caption job's output, or cannot be read.
    """
    if count < 1:
        raise InputError(f"--images must be at least 1, not {count}")
    if seed < 0:
        raise InputError(f"--seed must be at least 0, not {seed}")
    directory = OutputDirectory(output)
    directory.read_json("run.json")
    directory.finish_compaction()
    generator = np.random.default_rng(seed)
    ranks: dict[Order, Callable[[np.ndarray], np.ndarray]] = {
        "random": lambda scores: generator.random(len(scores)),
        "best": np.negative,
        "worst": np.positive,
        "listed": np.zeros_like,
    }
    photos, low_score = OutputImages(directory), directory.low_score
    rows = lowest_ranked_rows(directory, ranks[order], count)
    with (
        ThreadPoolExecutor(_READERS) as pool,
        progress_bar(len(rows), unit="image", description="gallery") as progress,
    ):
        cards = []
        for card in pool.map(lambda row: _card(photos, row, rows.schema), rows.to_pylist()):
            card.is_low = card.score is not None and card.score < low_score
            cards.append(card)
            progress.update()
    template = (
        resources.files("captioner.review").joinpath("gallery.html").read_text(encoding="utf-8")
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["printable"] = printable
    return environment.from_string(template).render(output=output, order=order, cards=cards)


def _card(photos: OutputImages, row: dict[str, Any], schema: pa.Schema) -> _Card:
    card = _Card(row["uri"], row["score"])
    if row["status"] != "ok":
        card.problem = f"{row['status']}: {row['error']}"
        return card
    try:
        photo, card.ratio = photo_jpeg(photos, row["uri"], "small")
        card.photo = _data_uri(photo, "jpeg")
    except InputError as error:
        card.problem = str(error)
    tokens = row["tokens"]
    maps: list[str | None] = [None] * len(tokens)
    if row["attention"]:
        maps_TGG = attention_maps(row, schema)
        card.mean_map = _data_uri(map_png(maps_TGG.mean(0)), "png")
        if len(maps_TGG) == len(tokens):  # one pixel per value; the page enlarges them
            maps = [_data_uri(map_png(map_GG), "png") for map_GG in maps_TGG]
    probabilities = np.exp(row["token_logprobs"]).tolist()
    card.words = list(zip(tokens, probabilities, maps, strict=True))
    return card


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
