"""Finds a row of an output and draws its attention maps."""

import io
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from captioner import storage
from captioner.data import images
from captioner.data.preparation import Preparation
from captioner.errors import InputError, OutputError
from captioner.output import attention
from captioner.output.directory import OutputDirectory
from captioner.output.images import OutputImages
from captioner.output.manifest import read_manifest
from captioner.output.rows import read_row
from captioner.runtime.plotting import prepare_matplotlib

__all__ = ["CaptionedRow", "attention_maps", "draw", "find_row", "read_photo", "refuse_listed"]

_LONGEST_SIDE = 480  # pixels, of an image in a drawing
_MAX_BYTES = 256_000_000  # of an image file
_MAX_PANEL_RATIO = 4  # largest ratio of a panel's height to its width


def _spelled(uri: str) -> str:
    """A URI as a listing spells it; the last parts of a path stay relative."""
    if storage.has_scheme(uri):
        return storage.absolute(uri)
    return storage.readable(os.path.normpath(uri))


@dataclass(frozen=True)
class CaptionedRow:
    """The row of a captioned image.

    Attributes:
        uri: the image.
        caption: its caption.
        tokens: the words.
        maps_TGG: a map for each word, or one for the caption.
        is_low: whether the score is one of captions that are probably wrong.
    """

    uri: str
    caption: str
    tokens: list[str]
    maps_TGG: np.ndarray
    is_low: bool


def find_row(output: str, uri: str) -> CaptionedRow:
    """Finds the row of an image.

    Args:
        output: an output directory.
        uri: the URI as listed, or its last parts if only one image ends in them.

    Raises:
        InputError: no image or several images match, or the image has no caption or no maps.
        OutputError: the output cannot be read.
    """
    directory = OutputDirectory(output)
    directory.read_json("run.json")
    manifest = read_manifest(directory)
    listed = _spelled(uri)
    match = pc.equal(manifest["uri"], listed)
    if not pc.any(match).as_py():
        end = listed.removeprefix("file://").lstrip("/")
        match = pc.ends_with(manifest["uri"], f"/{end}")
    found = manifest.filter(match)
    if len(found) != 1:
        advice = "; give more of the URI" if len(found) else ""
        raise InputError(f"{len(found) or 'no'} images of {output} match {uri}{advice}")
    directory.finish_compaction()
    part = read_row(directory, found["shard"][0].as_py(), found["row"][0].as_py())
    if part is None:
        raise InputError(f"{uri} has no row yet; run captioner caption again to resume")
    [values] = part.to_pylist()
    if values["status"] != "ok":
        raise InputError(f"{uri} has no caption: {values['status']}, {values['error']}")
    if values["attention"] is None:
        raise InputError(f"{uri} has no attention maps: the job ran with --attention none")
    maps_TGG = attention_maps(values, part.schema)
    is_low = values["score"] < directory.low_score
    return CaptionedRow(values["uri"], values["caption"], values["tokens"], maps_TGG, is_low)


def refuse_listed(output: str, target: str) -> None:
    """Refuses to write over an image that an output lists, or a file of the output's own.

    Raises:
        InputError: the file is an image of the output.
        OutputError: it is the output's own.
    """
    directory = OutputDirectory(output)
    directory.refuse_own(target)
    if pc.any(pc.equal(read_manifest(directory)["uri"], target)).as_py():
        raise InputError(f"{target} is an image of {output}: write to another file")


def attention_maps(row: dict[str, Any], schema: pa.Schema) -> np.ndarray:
    """Decodes the maps ``(T, H, W)`` of a row of a part with this schema.

    Raises:
        OutputError: the maps are damaged.
    """
    try:
        return attention.decode(
            row["attention"],
            row["attention_peak"],
            grid=(row["attention_height"], row["attention_width"]),
            levels=int(schema.metadata[b"captioner.attention.levels"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        uri = row["uri"]
        raise OutputError(f"the attention maps of {uri} are damaged") from error


def read_photo(photos: OutputImages, uri: str, longest_side: int) -> Image.Image:
    """Reads an image to show it.

    Args:
        photos: the images of the output.
        uri: the image.
        longest_side: the longest side of the result, in pixels.

    Raises:
        InputError: the image cannot be read.
    """
    try:
        data = photos.read(uri, _MAX_BYTES)
        shown = Preparation(max_side=longest_side, enlarge=True)
        decoded = images.decode(data, shown, max_bytes=_MAX_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {uri}: {error}") from error
    if decoded.pixels_HW3 is None:
        raise InputError(f"cannot decode {uri}: {decoded.error}")
    return Image.fromarray(decoded.pixels_HW3)


def _panels(row: CaptionedRow, image: Image.Image) -> list[tuple[str, Image.Image]]:
    """Titles and pictures: the image, the mean of the maps over it, each word's map over it."""
    panels = [("", image)]
    if count := len(row.maps_TGG):
        panels.append((f"mean of {count}", attention.overlay(image, row.maps_TGG.mean(0))))
    if count == len(row.tokens):
        words = zip(row.tokens, row.maps_TGG, strict=True)
        panels += [(word, attention.overlay(image, map_GG)) for word, map_GG in words]
    return panels


def draw(output: str, row: CaptionedRow) -> bytes:
    """Draws the image, the mean of its maps and the map of each word, as a PNG.

    Raises:
        InputError: the image cannot be read.
    """
    prepare_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    photos = OutputImages(OutputDirectory(output))
    image = read_photo(photos, row.uri, _LONGEST_SIDE)
    panels = _panels(row, image)
    columns = min(len(panels), 5)
    rows = math.ceil(len(panels) / columns)
    height = 2.4 * min(image.height / image.width, _MAX_PANEL_RATIO) + 0.3
    figure = Figure(figsize=(2.4 * columns, height * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(row.caption, parse_math=False)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, (title, panel) in zip(figure.axes, panels, strict=False):
        axes.imshow(panel)
        axes.set_title(title, parse_math=False)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=100)
    return sink.getvalue()
