"""Encodes what the gallery and the review page show: photos, and attention maps."""

import io

import numpy as np
from PIL import Image

from captioner.output.attention import colour
from captioner.output.images import OutputImages
from captioner.review.rows import read_photo

__all__ = ["SIZES", "map_png", "photo_jpeg"]

#: Pixels of a photo's longest side, by the name of the size.
SIZES = {"small": 320, "large": 1280}
_QUALITY = 85  # of JPEG


def photo_jpeg(photos: OutputImages, uri: str, size: str) -> tuple[bytes, float]:
    """A photo as JPEG in one of the :data:`SIZES`, and its width divided by its height.

    Raises:
        InputError: it cannot be read or decoded.
    """
    photo = read_photo(photos, uri, SIZES[size])
    return _encode(photo, "JPEG", quality=_QUALITY), photo.width / photo.height


def map_png(map_HW: np.ndarray) -> bytes:
    """An attention map as a PNG with one pixel per value; the page enlarges it."""
    return _encode(colour(map_HW), "PNG")


def _encode(image: Image.Image, kind: str, **settings: int) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **settings)
    return sink.getvalue()
