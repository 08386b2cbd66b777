"""The captions to score: generated in this process, or read from a caption job's output."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner import storage
from captioner.config import TEXT_SETTINGS, DecodeConfig, RunConfig
from captioner.data import images as decoding
from captioner.data.dataset import CaptionedImage
from captioner.data.preparation import Preparation
from captioner.data.prompts import check_columns
from captioner.errors import InputError, first_of
from captioner.model.base import Caption
from captioner.model.loading import load_model
from captioner.output.directory import OutputDirectory
from captioner.output.rows import read_rows
from captioner.runtime import prefetch
from captioner.runtime.progress import progress_bar
from captioner.schema import COLUMNS

__all__ = ["Captioned", "caption_dataset", "join_output"]

_ROW = ["uri", "caption", "score", "tokens", "token_logprobs"]  # of an output
_SHOWN = 10  # URIs that a line names
_ALWAYS_STATED = TEXT_SETTINGS[:4]  # the others where they are not the default


@dataclass(frozen=True)
class Captioned:
    """Images with references and a caption for each.

    Attributes:
        images: the images.
        captions: a caption for each image.
        scores: the model's own score of each caption, its mean log-probability.
        tokens: the words of each caption.
        token_logprobs: the natural log-probability of each word.
        settings: how the captions were made.
        left_out: the URIs of images and captions that are not scored, by reason.
    """

    images: list[CaptionedImage]
    captions: list[str]
    scores: list[float]
    tokens: list[list[str]]
    token_logprobs: list[list[float]]
    settings: dict[str, Any]
    left_out: dict[str, list[str]]

    def describe_left_out(self) -> list[str]:
        """A line for each reason, with the first URIs."""
        lines = []
        for reason, uris in self.left_out.items():
            lines.append(f"left out: {len(uris)} {reason}: {first_of(uris, _SHOWN)}")
        return lines


def caption_dataset(
    images: Sequence[CaptionedImage], model: str, *, decode: DecodeConfig, run: RunConfig
) -> Captioned:
    """Captions images in this process.

    Args:
        images: the images.
        model: a model's directory, or its name on a model hub.
        decode: what decides the captions.
        run: only its device, precision, batch size and decoders are used.

    Raises:
        BundleError: the model cannot be loaded.
        InputError: the device does not exist, or ``run.batch_size`` is ``auto``.
    """
    if run.batch_size == "auto":
        raise InputError("--batch-size auto is only for caption jobs; give a number")
    found = load_model(model)
    decode = found.resolve(decode)
    check_columns(decode.prompt, [])
    captioner = found.load(decode, device=run.device, precision=run.precision)
    kept: list[CaptionedImage] = []
    captions: list[Caption] = []
    undecodable: list[str] = []
    with progress_bar(len(images), unit="image", description="captions") as progress:
        for batch in _decoded_batches(images, found.preparation, run):
            decoded = [(image, pixels) for image, pixels in batch if pixels is not None]
            undecodable += [image.uri for image, pixels in batch if pixels is None]
            if decoded:
                kept += [image for image, _ in decoded]
                captions += captioner.caption([pixels for _, pixels in decoded])
            progress.update(len(batch))
    settings = {"model": model, "precision": str(captioner.dtype).removeprefix("torch.")}
    chosen = asdict(decode)
    changed = (name for name in TEXT_SETTINGS if chosen[name] != getattr(DecodeConfig(), name))
    settings |= {name: chosen[name] for name in dict.fromkeys((*_ALWAYS_STATED, *changed))}
    reasons = {"images that cannot be read or decoded": undecodable}
    return Captioned(
        images=kept,
        captions=[caption.text for caption in captions],
        scores=[caption.score for caption in captions],
        tokens=[caption.tokens for caption in captions],
        token_logprobs=[caption.token_logprobs for caption in captions],
        settings=settings,
        left_out=_without_empty(reasons),
    )


def _decoded_batches(
    images: Sequence[CaptionedImage], preparation: Preparation, run: RunConfig
) -> Iterator[list[tuple[CaptionedImage, np.ndarray | None]]]:
    """Batches of images with their pixels, or None for images that cannot be decoded."""
    assert isinstance(run.batch_size, int)
    load = partial(_load_pixels, preparation=preparation)
    threads = run.decoders or os.cpu_count() or 1
    pixels = prefetch.map_ahead(load, [image.uri for image in images], threads)
    for begin in range(0, len(images), run.batch_size):
        yield [(image, next(pixels)) for image in images[begin : begin + run.batch_size]]


def _load_pixels(uri: str, preparation: Preparation) -> np.ndarray | None:
    """Reads and decodes an image; None if that fails."""
    try:
        data = storage.read(uri)
    except OSError:
        return None
    return decoding.decode(data, preparation).pixels_HW3


def join_output(output: str, images: Sequence[CaptionedImage]) -> Captioned:
    """Reads the captions that a caption job wrote for images.

    Images and captions are joined by URI, or else by a file name that is unique in both sets.

    Raises:
        OutputError: ``output`` is not a caption job's output, or a part cannot be read.
    """
    directory = OutputDirectory(output)
    job = directory.read_json("run.json").get("settings", {})
    directory.finish_compaction()
    tables = [
        rows.filter(pc.equal(rows["status"], "ok")).select(_ROW)
        for rows in read_rows(directory, [*_ROW, "status"])
    ]
    rows = pa.concat_tables(tables or [COLUMNS.empty_table().select(_ROW)])
    captions = {uri: place for place, uri in enumerate(rows["uri"].to_pylist())}
    found = {image.uri: image.uri for image in images if image.uri in captions}
    by_name = _by_name(uri for uri in captions if uri not in found)
    wanted = _by_name(image.uri for image in images if image.uri not in found)
    found |= {uri: by_name[name] for name, uri in wanted.items() if name in by_name}
    kept = [image for image in images if image.uri in found]
    used = set(found.values())
    reasons = {
        "images without a caption": [image.uri for image in images if image.uri not in found],
        "captions without references": [uri for uri in captions if uri not in used],
    }
    places = [captions[found[image.uri]] for image in kept]
    joined = rows.take(pa.array(places, pa.int64()))
    return Captioned(
        images=kept,
        captions=joined["caption"].to_pylist(),
        scores=joined["score"].to_pylist(),
        tokens=joined["tokens"].to_pylist(),
        token_logprobs=joined["token_logprobs"].to_pylist(),
        settings={"output": output} | {name: job[name] for name in TEXT_SETTINGS if name in job},
        left_out=_without_empty(reasons),
    )


def _by_name(uris: Iterable[str]) -> dict[str, str]:
    """URIs by file name; URIs that share a name are left out."""
    named = [(uri.rsplit("/", 1)[-1], uri) for uri in uris]
    count = Counter(name for name, _ in named)
    return {name: uri for name, uri in named if count[name] == 1}


def _without_empty(reasons: dict[str, list[str]]) -> dict[str, list[str]]:
    return {reason: uris for reason, uris in reasons.items() if uris}
