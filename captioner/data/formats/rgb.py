"""Samples of any kind to RGB of 8 bits; what is transparent is laid over white."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

__all__ = ["is_deep", "largest", "over_white", "scaled", "to_rgb", "usual_peak"]

_USUAL_PEAKS = (1.0, 255.0, 65535.0)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of 8-bit samples, in any of Pillow's modes, as RGB."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether an image has samples of more than 8 bits, or floating-point samples."""
    return image.mode.startswith(("I", "F"))


def largest(strips: Iterable[np.ndarray]) -> float:
    """The largest finite sample of all strips, at least 0."""
    return max((float(_finite(strip).max(initial=0)) for strip in strips), default=0.0)


def usual_peak(value: float, peaks: Iterable[float] = _USUAL_PEAKS) -> float:
    """The smallest usual range that holds a largest sample; the sample itself where none does."""
    return next((peak for peak in peaks if value <= peak), value)


def scaled(samples: np.ndarray, peak: float, *, inverted: bool = False) -> np.ndarray:
    """Samples as floats from 0 to 255; ``inverted`` where 0 is white."""
    values = np.clip(_finite(samples) * (255 / peak), 0, 255)
    return 255 - values if inverted else values


def over_white(
    colours_HWC: np.ndarray,
    alpha_HW: np.ndarray | None,
    *,
    is_associated: bool,
) -> Image.Image:
    """Grey or RGB from 0 to 255, with alpha from 0 to 1, as an RGB image.

    Args:
        colours_HWC: ``(H, W, 1)`` or ``(H, W, 3)``.
        alpha_HW: None for an opaque image.
        is_associated: the colours are multiplied by alpha already.
    """
    if alpha_HW is not None:
        alpha_HW1 = alpha_HW[..., None]
        weighted = colours_HWC if is_associated else colours_HWC * alpha_HW1
        colours_HWC = weighted + 255 * (1 - alpha_HW1)
    bytes_HWC = np.clip(np.rint(colours_HWC), 0, 255).astype(np.uint8)
    height, width, _ = bytes_HWC.shape
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(bytes_HWC, (height, width, 3))))


def _finite(samples: np.ndarray) -> np.ndarray:
    return np.nan_to_num(samples.astype(np.float32), posinf=0, neginf=0)
