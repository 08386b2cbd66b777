"""Bytes that claim to be an image → RGB pixels at the model's size, or a reason why not.

Nothing here raises for what a file holds, nor prints: the outcome is data. Files are parsed by an
allow-list of Pillow's formats (it can also run Ghostscript); their size, and the memory and work
that they ask for, are checked before their pixels are decoded; only the first frame of an animation
is; and a process decodes one large image at a time.
"""

import contextlib
import ctypes
import functools
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import (
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    _imaging,
)

from captioner.data.preparation import Preparation
from captioner.runtime.memory import release_freed_memory
from captioner.schema import Status

__all__ = ["PREPROCESSING_VERSION", "DecodedImage", "decode"]

#: Counts up when the same bytes would give other pixels: part of a job's fingerprint.
PREPROCESSING_VERSION = 2

_FORMATS = ("JPEG", "FIRST PNG", "WEBP", "BMP", "DIB", "FIRST GIF", "TIFF OF FEW STRIPS", "AVIF")
_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A JPEG is decoded at a half, a quarter or an eighth where that leaves at least this many times
# the pixels needed along each side: the resize that follows then hides the difference. With
# less, more captions differ (benchmarks/photo_decoding.py).
_REDUCING_GAP = 3.0
# Whole pixels are averaged before that resize only where this many are left: to average also blurs,
# and rounds up.
_AVERAGING_GAP = 6.0
_BYTES_A_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # in Pillow; else 4
_COPIES = {"WEBP": 4, "AVIF": 4}  # of the pixels: the decoder's and Pillow's; else 1
_MEMORY_A_PIXEL = 1.5  # bytes that decoding may take for each pixel that is allowed
_STRIP = 1 << 20  # pixels that are converted at a time
_LARGE = 1 << 27  # bytes
_one_large_image = threading.Lock()
# Encoders write about ten scans; each costs a pass over the image, and may be a few bytes long.
_MOST_SCANS = 100
# Of a TIFF, strips or tiles. Opening makes an object of each, and the file may tell where they are
# by a byte each: 4 MB of them took 1 GB and a minute.
_MOST_STRIPS = 100_000
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # neither a stuffed byte nor a restart
_SCAN, _END = b"\xda", b"\xd9"


class _OverLimitError(Exception):
    """An image is not worth its memory or time; the message is the reason."""


class _FirstFrame:
    """An animation that stays at its first frame: nothing takes that one's place.

    Pillow fills a canvas for that in opening, before the size of the image can be looked at.
    """

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, 0 if name in ("disposal_method", "dispose_op") else value)


class _Png(_FirstFrame, PngImagePlugin.PngImageFile):
    pass


class _Gif(_FirstFrame, GifImagePlugin.GifImageFile):
    pass


class _Tiff(TiffImagePlugin.TiffImageFile):
    """A TIFF that is over the limit, and raises so, where it has too many strips or tiles."""

    def _setup(self) -> None:
        for tag in (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS):
            if len(self.tag_v2.get(tag, ())) > _MOST_STRIPS:
                raise _OverLimitError(f"it has more than {_MOST_STRIPS} strips or tiles")
        super()._setup()


# Not by Image.register_open: who opens images without naming formats is to get Pillow's own.
Image.OPEN["FIRST PNG"] = _Png, Image.OPEN["PNG"][1]
Image.OPEN["FIRST GIF"] = _Gif, Image.OPEN["GIF"][1]
Image.OPEN["TIFF OF FEW STRIPS"] = _Tiff, Image.OPEN["TIFF"][1]


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """The outcome for one file.

    ``pixels_HW3`` is uint8 ``(height, width, 3)`` as the preparation says, or None with ``status``
    and ``error`` saying why.
    ``width`` and ``height`` are the file's own, before its orientation is applied.
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
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns at first; ours is checked below
    _silence()
    if isinstance(preparation, int):
        preparation = Preparation(size=preparation)
    with contextlib.ExitStack() as alone:
        return _decoded(data, preparation, max_pixels, alone)


def _decoded(
    data: bytes, preparation: Preparation, max_pixels: int, alone: contextlib.ExitStack
) -> DecodedImage:
    """The outcome for a file that is not too long; a large image enters ``alone``.

    The image and its decoder are local here, so that they go before ``alone`` is left: closing the
    image keeps the decoder.
    """
    width = height = None
    try:
        canvas = _webp_canvas(data)
        if canvas is not None:  # opening a WebP allocates it, twice
            width, height = canvas
            _admit(width, height, width * height * 4 * _COPIES["WEBP"], max_pixels, alone)
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = _own_size(image)
            target = preparation.target(*image.size)
            least = int(target[0] * _REDUCING_GAP), int(target[1] * _REDUCING_GAP)
            drafted = image.draft(None, least)  # a JPEG is as large as it is decoded from here on
            if canvas is None:
                scans = _scans(data) if isinstance(image, JpegImagePlugin.JpegImageFile) else []
                if _tile_pixels(image) > max_pixels:
                    raise _OverLimitError(f"its tiles have more than {max_pixels} pixels")
                if len(scans) > _MOST_SCANS:
                    raise _OverLimitError(f"it has more than {_MOST_SCANS} scans")
                _admit(width, height, _memory(image, width, height, scans), max_pixels, alone)
            box = drafted[1] if drafted else None  # in a fraction, the last pixel may be a part
            return DecodedImage(_pixels(image, target, box), width, height)
    except _OverLimitError as over:
        return DecodedImage(None, width, height, "rejected", str(over))
    except Exception as error:  # Pillow's parsers raise nearly anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        # Pillow names the BytesIO object, whose address would differ from run to run.
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image in a known format"
        return DecodedImage(None, width, height, "undecodable", reason[:300])


def _silence() -> None:
    """Keeps Pillow and libtiff from telling stderr what is wrong with a file: its row does."""
    _silence_once()
    quiet = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if quiet not in warnings.filters:  # they may have been reset since
        warnings.filterwarnings("ignore", module=r"PIL\.")


@functools.cache
def _silence_once() -> None:
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    libraries = ctypes.CDLL(_imaging.__file__)  # with those that it is linked to
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        with contextlib.suppress(AttributeError):  # a Pillow without libtiff
            getattr(libraries, name)(None)


def _admit(
    width: int, height: int, memory: int, max_pixels: int, alone: contextlib.ExitStack
) -> None:
    """Lets an image that takes so many bytes in, alone if they are many.

    Raises:
        _OverLimitError: it is over a limit.
    """
    if width * height > max_pixels:
        raise _OverLimitError(f"{width}×{height} is more than {max_pixels} pixels")
    most = max(_LARGE, int(_MEMORY_A_PIXEL * max_pixels))
    if memory > most:
        raise _OverLimitError(f"decoding takes {memory} bytes of memory, more than {most}")
    if memory > _LARGE:
        alone.enter_context(_large_image())


@contextlib.contextmanager
def _large_image() -> Iterator[None]:
    """One at a time, and in memory that the process had freed but kept; leaves none of its own."""
    with _one_large_image:
        release_freed_memory()
        try:
            yield
        finally:
            release_freed_memory()


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height of the canvas that decoding a WebP takes; None for what is none."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind, count = data[12:16], len(data)
    if kind == b"VP8X" and count >= 30:  # of a still image or an animation, of any parts
        sides = int.from_bytes(data[24:30], "little")
        return (sides & 0xFFFFFF) + 1, (sides >> 24) + 1
    if kind == b"VP8L" and count >= 25 and data[20] == 0x2F:  # lossless
        sides = int.from_bytes(data[21:25], "little")
        return (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and count >= 30 and data[23:26] == b"\x9d\x01\x2a":  # lossy
        sides = int.from_bytes(data[26:30], "little")
        return sides & 0x3FFF, sides >> 16 & 0x3FFF
    return None


def _memory(image: ImageFile.ImageFile, width: int, height: int, scans: list[int]) -> int:
    """Bytes that decoding takes at its peak, about.

    Args:
        image: not loaded yet; a JPEG at the fraction of its size that it is decoded at.
        width: the file's own, in pixels.
        height: the file's own, in pixels.
        scans: what :func:`_scans` says of a JPEG.
    """
    pixels = image.width * image.height * _BYTES_A_PIXEL.get(image.mode, 4)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        if scans == [len(image.layer)] and "progressive" not in image.info:
            return pixels  # decoded a few rows at a time
        # Scans that bring a part of each block, be it only one: all coefficients are kept.
        samples = [across * down for _, across, down, _ in image.layer]
        return pixels + 2 * width * height * sum(samples) // max(samples)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tile[0][0] == "libtiff":
        tags = image.tag_v2
        rows = min(tags.get(TiffImagePlugin.ROWSPERSTRIP, height), height)
        bits = sum(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
        at_once = max(_tile_pixels(image), width * rows)  # a tile may be larger
        return int(pixels + at_once * bits // 8)
    if image.tile and image.tile[0][0] == "bmp_rle":  # decoded in Python, to an array of its own
        return pixels * 3
    return pixels * _COPIES.get(image.format or "", 1)


def _scans(data: bytes) -> list[int]:
    """How many of a JPEG's colour components each of its scans has; one scan more than allowed."""
    scans: list[int] = []
    position = 0
    while (marker := _MARKER.search(data, position)) and marker[1] != _END:
        position = marker.end()
        if marker[1] == _SCAN:
            scans += data[position + 2 : position + 3]
            if len(scans) > _MOST_SCANS:
                break
        if marker[1] != b"\xd8":  # the start has no length
            position += int.from_bytes(data[position : position + 2], "big")
        # Most have one scan, nearly all of the file: it is not gone through if no other may follow.
        if marker[1] == _SCAN and data.find(b"\xff" + _SCAN, position) < 0:
            break
    return scans


def _pixels(
    image: Image.Image,
    target: tuple[int, int],
    box: tuple[float, float, float, float] | None,
) -> np.ndarray:
    """Decodes, resizes to ``target`` what is in ``box``, or all, and turns upright."""
    image.load()
    left, top, right, bottom = box or (0, 0, *image.size)
    orientation = _orientation(image)  # after loading, which turns a TIFF upright itself
    across = int((right - left) / target[0] / _AVERAGING_GAP) or 1
    down = int((bottom - top) / target[1] / _AVERAGING_GAP) or 1
    plain = across == down == 1 and image.mode == "RGB" and not image.has_transparency_data
    small = image if plain else _reduced_rgb(image, across, down)
    box = left / across, top / down, right / across, bottom / down
    resized = small.resize(target, Image.Resampling.BILINEAR, box)
    return np.array(resized if orientation is None else resized.transpose(orientation))


def _reduced_rgb(image: Image.Image, across: int, down: int) -> Image.Image:
    """RGB, each ``across×down`` pixels averaged; in strips, to save a large image's copies."""
    width, height = image.size
    rows = max(1, _STRIP // (width * down)) * down
    peak = max(_peak(strip) for _, strip in _strips(image, rows)) if _is_deep(image) else None
    small = Image.new("RGB", (-(-width // across), -(-height // down)))
    for top, strip in _strips(image, rows):
        converted = _to_rgb(strip) if peak is None else _grey_to_rgb(strip, peak)
        small.paste(converted.reduce((across, down)), (0, top // down))
    return small


def _strips(image: Image.Image, rows: int) -> Iterator[tuple[int, Image.Image]]:
    """The image from its top in pieces of so many rows, each with where it begins."""
    width, height = image.size
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _own_size(image: Image.Image) -> tuple[int, int]:
    """Width and height before the orientation is applied; Pillow tells a TIFF's after it."""
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        width, height = tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]
    for side in (width, height):  # a file may claim anything; the row holds 32 bits
        if not isinstance(side, int) or not 0 < side < 1 << 31:
            raise ValueError("its width or height is not possible")
    return width, height


def _tile_pixels(image: Image.Image) -> int:
    """Pixels of a TIFF's tiles: one is decoded in full, and may be larger than its image."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    tags = image.tag_v2
    return int(tags.get(TiffImagePlugin.TILEWIDTH, 0) * tags.get(TiffImagePlugin.TILELENGTH, 0))


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TRANSPOSE.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken EXIF in a sound image: the pixels count
        return None


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes of bytes to RGB; what is transparent is laid over white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _numbers(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)


def _peak(image: Image.Image) -> float:
    return 65535.0 if image.mode.startswith("I;16") else float(_numbers(image).max(initial=0))


def _grey_to_rgb(image: Image.Image, largest: float) -> Image.Image:
    """16-bit, 32-bit and floating-point grey, scaled by the smallest usual range that holds it."""
    peak = next((p for p in (1.0, 255.0, 65535.0) if largest <= p), largest)
    scaled_hw = np.clip(np.rint(_numbers(image) * (255 / peak)), 0, 255).astype(np.uint8)
    return Image.fromarray(scaled_hw).convert("RGB")
