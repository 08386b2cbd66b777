"""Bytes that claim to be an image → RGB pixels at the model's size, or a reason why not.

Nothing here raises for what a file holds: the outcome is data. Files are parsed by an allow-list of
Pillow's formats (it can also run Ghostscript), their size is checked before their pixels are
decoded, and only the first frame of an animation is.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from captioner.schema import Status

__all__ = ["PREPROCESSING_VERSION", "DecodedImage", "decode"]

#: Counts up when the same bytes would give other pixels: part of a job's fingerprint.
PREPROCESSING_VERSION = 1

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF")
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
# the pixels needed along each side: the resize that follows then hides the difference.
_REDUCING_GAP = 2.0


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """The outcome for one file.

    ``pixels_HW3`` is uint8 ``(size, size, 3)``, or None with ``status`` and ``error`` saying why.
    ``width`` and ``height`` are the file's own, before its orientation is applied.
    """

    pixels_HW3: np.ndarray | None
    width: int | None = None
    height: int | None = None
    status: Status = "ok"
    error: str | None = None


def decode(
    data: bytes,
    size: int,
    *,
    keep_aspect: bool = False,
    max_pixels: int = 256_000_000,
    max_bytes: int = 256_000_000,
) -> DecodedImage:
    """Decodes an image file, turns it upright and resizes it to ``size×size`` (the aspect changes).

    Args:
        data: the file's bytes.
        size: height and width of the result, in pixels.
        keep_aspect: make the longer side ``size`` and keep the aspect, to show it to a person.
        max_pixels: an image with more is rejected before its pixels are decoded.
        max_bytes: a longer file is rejected before it is parsed.
    """
    if not data:
        return DecodedImage(None, status="undecodable", error="the file is empty")
    if len(data) > max_bytes:
        return DecodedImage(None, status="rejected", error=f"more than {max_bytes} bytes")
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns at first; ours is checked below
    width = height = None
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = _own_size(image)
            if width * height > max_pixels:
                error = f"{width}×{height} is more than {max_pixels} pixels"
                return DecodedImage(None, width, height, "rejected", error)
            if _tile_pixels(image) > max_pixels:
                error = f"its tiles have more than {max_pixels} pixels"
                return DecodedImage(None, width, height, "rejected", error)
            target = _fit(*image.size, size) if keep_aspect else (size, size)
            least = int(target[0] * _REDUCING_GAP), int(target[1] * _REDUCING_GAP)
            drafted = image.draft(None, least)
            box = drafted[1] if drafted else None  # in a fraction, the last pixel may be a part
            image.load()
            orientation = _orientation(image)  # after loading, which turns a TIFF upright itself
            small = _to_rgb(image).resize(
                target, Image.Resampling.BILINEAR, box, reducing_gap=_REDUCING_GAP
            )
            upright = small.transpose(orientation) if orientation is not None else small
            return DecodedImage(np.array(upright), width, height)
    except Exception as error:  # Pillow's parsers raise nearly anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        # Pillow names the BytesIO object, whose address would differ from run to run.
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image in a known format"
        return DecodedImage(None, width, height, "undecodable", reason)


def _own_size(image: Image.Image) -> tuple[int, int]:
    """Width and height before the orientation is applied; Pillow tells a TIFF's after it."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        return tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]
    return image.size


def _tile_pixels(image: Image.Image) -> int:
    """Pixels of a TIFF's tiles: one is decoded in full, and may be larger than its image."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    tags = image.tag_v2
    return int(tags.get(TiffImagePlugin.TILEWIDTH, 0) * tags.get(TiffImagePlugin.TILELENGTH, 0))


def _fit(width: int, height: int, longest: int) -> tuple[int, int]:
    scale = longest / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TRANSPOSE.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken EXIF in a sound image: the pixels count
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes to RGB; what is transparent is laid over white."""
    if image.mode.startswith(("I", "F")):
        return _grey_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and floating-point grey, scaled by the smallest usual range that holds it."""
    grey_hw = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    if image.mode.startswith("I;16"):
        peak = 65535.0
    else:
        largest = float(grey_hw.max(initial=0))
        peak = next((p for p in (1.0, 255.0, 65535.0) if largest <= p), largest)
    scaled_hw = np.clip(np.rint(grey_hw * (255 / peak)), 0, 255).astype(np.uint8)
    return Image.fromarray(scaled_hw).convert("RGB")
