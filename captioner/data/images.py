"""Bytes that claim to be an image → RGB pixels in the shape that a model takes, or a reason.

Decoding raises nothing for what a file holds, and prints nothing: the outcome is data. The size of
an image, and the memory and work that it asks for, are checked before its pixels are decoded; only
the first frame of an animation is decoded; and a process decodes one large image at a time. How
each format is read stands in :mod:`captioner.data.formats`.
"""

import contextlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from captioner.data.formats.limits import OverLimitError, admit
from captioner.data.formats.opening import UnknownFormatError, open_picture
from captioner.data.formats.pictures import Picture
from captioner.data.preparation import Preparation
from captioner.errors import InputError
from captioner.schema import Status

__all__ = ["PREPROCESSING_VERSION", "DecodedImage", "decode", "prepare_image"]

#: Counts up when the same bytes would give other pixels: part of a job's fingerprint.
PREPROCESSING_VERSION = 3

# A JPEG is decoded at a half, a quarter or an eighth where that leaves at least this many times
# the pixels needed along each side: the resize that follows then hides the difference. With
# less, more captions differ (benchmarks/photo_decoding.py).
_REDUCING_GAP = 3.0
# Whole pixels are averaged before that resize only where this many are left: to average also blurs,
# and rounds up.
_AVERAGING_GAP = 6.0
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_LOSSLESS_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # that PNG has
_STRIP = 1 << 20  # pixels that are converted at a time


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """The outcome for one file.

    ``pixels_HW3`` is uint8 ``(height, width, 3)`` as the preparation says, or None with ``status``
    and ``error`` saying why. ``width`` and ``height`` are the file's own, before its orientation is
    applied.
    """

    pixels_HW3: np.ndarray | None
    width: int | None = None
    height: int | None = None
    status: Status = "ok"
    error: str | None = None


def decode(
    data: bytes,
    preparation: Preparation | int,
    *,
    max_pixels: int = 256_000_000,
    max_bytes: int = 256_000_000,
) -> DecodedImage:
    """Decodes an image file, turns it upright and resizes it.

    Args:
        data: the file's bytes.
        preparation: the shape of the result; a number is a square of so many pixels a side.
        max_pixels: an image with more is rejected before its pixels are decoded.
        max_bytes: a longer file is rejected before it is parsed.
    """
    if not data:
        return DecodedImage(None, status="undecodable", error="the file is empty")
    if len(data) > max_bytes:
        return DecodedImage(None, status="rejected", error=f"more than {max_bytes} bytes")
    if isinstance(preparation, int):
        preparation = Preparation(size=preparation)
    with contextlib.ExitStack() as alone:
        return _decoded(data, preparation, max_pixels, alone)


def prepare_image(image: Image.Image | np.ndarray, preparation: Preparation) -> np.ndarray:
    """Prepares an image in memory for a model, as a caption job prepares an image file.

    Args:
        image: a Pillow image, which is turned upright; or uint8 pixels ``(height, width, 3)``.
        preparation: the ``preparation`` of the model that :func:`captioner.load_model` finds.

    Returns:
        uint8 RGB pixels ``(height, width, 3)`` in the model's size.

    Raises:
        InputError: the pixels have another type or shape, or the image cannot be decoded.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(
                f"an array of {image.dtype} {image.shape} is not an image: use uint8 "
                "(height, width, 3)"
            )
        image = Image.fromarray(image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode not in _LOSSLESS_MODES:
        upright = upright.convert("RGB")
    file = io.BytesIO()
    upright.save(file, "PNG", compress_level=1)
    decoded = decode(file.getvalue(), preparation)
    if decoded.pixels_HW3 is None:
        raise InputError(f"the image cannot be prepared: {decoded.error}")
    return decoded.pixels_HW3


def _decoded(
    data: bytes, preparation: Preparation, max_pixels: int, alone: contextlib.ExitStack
) -> DecodedImage:
    """The outcome for a file that is not too long; a large image enters ``alone``.

    The image and its decoder are local here: they are freed before ``alone`` is left. Closing the
    image keeps the decoder.
    """
    width = height = None
    try:
        with contextlib.closing(open_picture(data)) as picture:
            _check_sides(picture)
            width, height = picture.width, picture.height
            target = preparation.target(*picture.size)
            picture.draft((int(target[0] * _REDUCING_GAP), int(target[1] * _REDUCING_GAP)))
            admit(width, height, picture.memory(max_pixels), max_pixels, alone)
            pixels_HW3 = _pixels(picture, target, _RESAMPLING[preparation.interpolation])
            return DecodedImage(pixels_HW3, width, height)
    except OverLimitError as over:
        return DecodedImage(None, width, height, "rejected", str(over))
    except UnknownFormatError as unknown:
        return DecodedImage(None, unknown.width, unknown.height, "undecodable", str(unknown))
    except Exception as error:  # Pillow's parsers raise nearly anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        # Pillow names the file object, whose address would differ from run to run.
        if isinstance(error, UnidentifiedImageError):
            reason = "its header is broken"
        return DecodedImage(None, width, height, "undecodable", reason[:300])


def _check_sides(picture: Picture) -> None:
    """Raises where a file claims a size that no image has; a row holds 32 bits."""
    if not (0 < picture.width < 1 << 31 and 0 < picture.height < 1 << 31):
        raise ValueError("its width or height is not possible")


def _pixels(picture: Picture, target: tuple[int, int], resampling: Image.Resampling) -> np.ndarray:
    """Decodes a picture, resizes it to ``target`` and turns it upright."""
    picture.load()
    left, top, right, bottom = picture.box or (0, 0, *picture.size)
    across = int((right - left) / target[0] / _AVERAGING_GAP) or 1
    down = int((bottom - top) / target[1] / _AVERAGING_GAP) or 1
    small = picture.plain if across == down == 1 else None
    if small is None:
        small = _reduced_rgb(picture, across, down)
    box = left / across, top / down, right / across, bottom / down
    resized = small.resize(target, resampling, box)
    transpose = picture.transpose
    return np.array(resized if transpose is None else resized.transpose(transpose))


def _reduced_rgb(picture: Picture, across: int, down: int) -> Image.Image:
    """RGB, each ``across×down`` pixels averaged; in strips, to save a large image's copies."""
    width, height = picture.size
    rows = max(1, _STRIP // (width * down)) * down
    small = Image.new("RGB", (-(-width // across), -(-height // down)))
    for top, strip in picture.strips(rows):
        small.paste(strip.reduce((across, down)), (0, top // down))
    return small
