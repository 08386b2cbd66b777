"""Scores captions of a dataset's images, generated in this process or by a caption job."""

import io
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner import __version__, storage
from captioner.config import DecodeConfig, RunConfig
from captioner.data import dataset
from captioner.data import images as decoding
from captioner.data.dataset import CaptionedImage, Dataset
from captioner.data.preparation import Preparation
from captioner.data.prompts import check_columns
from captioner.errors import InputError, first_of
from captioner.evaluation import metrics
from captioner.evaluation.metrics import Scores
from captioner.model import bundle
from captioner.model.loading import load_model
from captioner.output.decisions import read_decisions
from captioner.output.directory import OutputDirectory
from captioner.output.rows import read_rows
from captioner.runtime import prefetch
from captioner.runtime.progress import progress_bar

__all__ = [
    "Captioned",
    "Evaluation",
    "caption_dataset",
    "choose_images",
    "describe_seen",
    "evaluate",
    "join_output",
    "read_references",
]

_SHOWN = 10
_DECODING = (
    "beam",
    "length_penalty",
    "max_words",
    "allow_unknown",
    "prompt",
    "system_prompt",
    "max_new_tokens",
    "temperature",
    "top_p",
    "repetition_penalty",
    "seed",
)  # settings in the table


@dataclass(frozen=True)
class Captioned:
    """Images with references and a caption for each.

    Attributes:
        images: the images.
        captions: a caption for each image.
        settings: how the captions were made.
        left_out: the URIs of images and captions that are not scored, by reason.
    """

    images: list[CaptionedImage]
    captions: list[str]
    settings: dict[str, Any]
    left_out: dict[str, list[str]]

    def describe_left_out(self) -> list[str]:
        """A line for each reason, with the first URIs."""
        lines = []
        for reason, uris in self.left_out.items():
            lines.append(f"left out: {len(uris)} {reason}: {first_of(uris, _SHOWN)}")
        return lines


def choose_images(
    data: Dataset, *, split: str | None, names: str | None, allow_missing: bool = False
) -> list[CaptionedImage]:
    """Chooses the images of a dataset to evaluate on.

    Args:
        data: the dataset.
        split: ``train``, ``val``, ``test`` or ``all``.
        names: a file of image names, one per line, instead of a split. If both are None, all
            images are chosen.
        allow_missing: accept a file if more than half of its names are not in the dataset.

    Raises:
        InputError: no image matches, or the file cannot be read.
    """
    if names is not None:
        images = data.listed(names, allow_missing=allow_missing)
    else:
        images = data.choose(split or "all")
    dataset.warn_if_single(images, "score")
    return images


def read_references(
    source: str,
    images_directory: str | None = None,
    *,
    needed: Collection[str] | None = None,
    allow_missing: bool = False,
) -> Dataset:
    """Reads the captions to score against.

    Args:
        source: a dataset; or a reviewed output, whose accepted and edited captions are the
            references.
        images_directory: as for :func:`captioner.data.dataset.read_dataset`; a dataset's only.
        needed: as there.
        allow_missing: as there.

    Raises:
        InputError: the dataset cannot be read, or no caption of the output is accepted.
        OutputError: the output cannot be read.
    """
    output = OutputDirectory(storage.absolute(source))
    if not output.is_begun():
        return dataset.read_dataset(
            source, images_directory, needed=needed, allow_missing=allow_missing
        )
    for option, given in (("--images", images_directory), ("--split", needed)):
        if given is not None:
            raise InputError(f"{option} goes with a dataset: {source} is a caption job's output")
    accepted = {
        uri: decision.caption
        for uri, decision in read_decisions(output.uri).items()
        if decision.decision in ("accepted", "edited")
    }
    images: list[CaptionedImage] = []
    output.finish_compaction()
    for rows in read_rows(output, ["uri", "caption", "status"]) if accepted else ():
        images += [
            CaptionedImage(row["uri"], [accepted[row["uri"]] or row["caption"]])
            for row in rows.to_pylist()
            if row["status"] == "ok" and row["uri"] in accepted
        ]
    if not images:
        raise InputError(f"{source} has no accepted captions: accept some in captioner review")
    return Dataset(images)


def describe_seen(
    images: Sequence[CaptionedImage], data: Dataset, model: str, *, split: str | None
) -> str | None:
    """Describes, in one line, how many of the images a model has seen in training.

    Args:
        images: the images to evaluate on.
        data: the dataset that contains them.
        model: a bundle's directory.
        split: the split of the images; None if a file named them.

    Returns:
        The line; None if the model has seen no image or has no record.

    Raises:
        InputError: the model was trained on images of the split ``val`` or ``test``.
        BundleError: the model's record of its images is damaged.
    """
    seen = bundle.load_images(model)
    if seen is None:
        return None
    find, uris = dataset.finder(data.images), {image.uri for image in images}
    seen_names = {"trained on": seen.trained, "validated on": seen.validated - seen.trained}
    counts = {
        use: len(uris & {image.uri for name in names for image in find(name)})
        for use, names in seen_names.items()
    }
    if not any(counts.values()):
        return None
    known = " and ".join(f"{use} {count}" for use, count in counts.items() if count)
    text = f"{model} was {known} of these {len(images)} images, by their names"
    if counts["trained on"] and split in ("val", "test"):
        raise InputError(f"{text}: it was trained on another split; name the images with --list")
    return text


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
        raise InputError("--batch-size auto is for caption jobs: give a number to evaluate")
    found = load_model(model)
    decode = found.resolve(decode)
    check_columns(decode.prompt, [])
    captioner = found.load(decode, device=run.device, precision=run.precision)
    kept: list[CaptionedImage] = []
    captions: list[str] = []
    undecodable: list[str] = []
    with progress_bar(len(images), unit="image", description="captions") as progress:
        for batch in _decoded_batches(images, found.preparation, run):
            decoded = [(image, pixels) for image, pixels in batch if pixels is not None]
            undecodable += [image.uri for image, pixels in batch if pixels is None]
            if decoded:
                kept += [image for image, _ in decoded]
                some = captioner.caption([pixels for _, pixels in decoded])
                captions += [caption.text for caption in some]
            progress.update(len(batch))
    settings = {"model": model, "precision": str(captioner.dtype).removeprefix("torch.")}
    chosen = asdict(decode)
    changed = (name for name in _DECODING if chosen[name] != getattr(DecodeConfig(), name))
    settings |= {name: chosen[name] for name in dict.fromkeys((*_DECODING[:4], *changed))}
    reasons = {"images that cannot be read or decoded": undecodable}
    return Captioned(kept, captions, settings, _without_empty(reasons))


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
    captions: dict[str, str] = {}
    directory.finish_compaction()
    for rows in read_rows(directory, ["uri", "caption", "status"]):
        ok = rows.filter(pc.equal(rows["status"], "ok"))
        captions.update(zip(ok["uri"].to_pylist(), ok["caption"].to_pylist(), strict=True))
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
    return Captioned(
        images=kept,
        captions=[captions[found[image.uri]] for image in kept],
        settings={"output": output} | {name: job[name] for name in _DECODING if name in job},
        left_out=_without_empty(reasons),
    )


def _by_name(uris: Iterable[str]) -> dict[str, str]:
    """URIs by file name; URIs that share a name are left out."""
    named = [(uri.rsplit("/", 1)[-1], uri) for uri in uris]
    count = Counter(name for name, _ in named)
    return {name: uri for name, uri in named if count[name] == 1}


def _without_empty(reasons: dict[str, list[str]]) -> dict[str, list[str]]:
    return {reason: uris for reason, uris in reasons.items() if uris}


@dataclass(frozen=True)
class Evaluation:
    """Captions and their scores, as a table, JSON or Parquet."""

    captioned: Captioned
    scores: Scores

    def lines(self) -> list[str]:
        """An aligned table: scores times 100, number of images, decoding settings."""
        rows = [
            (metrics.NAMES[name], f"{100 * value:.1f}")
            for name, value in self.scores.corpus.items()
        ]
        rows += [("images", str(len(self.captioned.images))), ("tokenizer", self.scores.tokenizer)]
        decoding = {name: v for name, v in self.captioned.settings.items() if name in _DECODING}
        rows += [
            (name.replace("_", " "), "none" if value is None else str(value))
            for name, value in decoding.items()
        ]
        name_width, value_width = (max(map(len, column)) for column in zip(*rows, strict=True))
        return [f"{name:<{name_width}}  {value:>{value_width}}" for name, value in rows]

    def to_json(self) -> str:
        """Returns the unscaled scores, and every URI that was left out, as JSON."""
        values = {
            "scores": self.scores.corpus,
            "images": len(self.captioned.images),
            "tokenizer": self.scores.tokenizer,
            "settings": self.captioned.settings,
            "left_out": self.captioned.left_out,
            "metrics_left_out": self.scores.left_out,
            "captioner_version": __version__,
        }
        return json.dumps(values, indent=2)

    def to_parquet(self) -> bytes:
        """A Parquet file with a row per image, the lowest CIDEr first.

        The columns are ``uri``, ``caption``, ``references`` and all scores except BLEU-1 to 3.
        """
        columns = {
            "uri": [image.uri for image in self.captioned.images],
            "caption": self.captioned.captions,
            "references": [image.captions for image in self.captioned.images],
        }
        shown = {
            name: values
            for name, values in self.scores.images.items()
            if name not in ("bleu_1", "bleu_2", "bleu_3")
        }
        order = np.argsort(self.scores.images["cider"], kind="stable")
        sink = io.BytesIO()
        pq.write_table(pa.table(columns | shown).take(order), sink, compression="zstd")
        return sink.getvalue()


def evaluate(captioned: Captioned, *, tokenizer: str = "auto", spice: bool = False) -> Evaluation:
    """Scores captions; see :func:`captioner.evaluation.metrics.score`.

    Raises:
        InputError: there is nothing to score, or as :func:`captioner.evaluation.metrics.score`.
    """
    if not captioned.images:
        raise InputError("no image has both a caption and references")
    references = [image.captions for image in captioned.images]
    scores = metrics.score(captioned.captions, references, tokenizer=tokenizer, spice=spice)
    return Evaluation(captioned, scores)
