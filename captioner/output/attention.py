"""Attention maps ↔ bytes (codec version 1), and maps over images.

A caption has ``T`` maps of ``H×W`` values; ``peak`` is a map's largest value. The codec stores each
value as one byte, ``round(value / peak · levels)``, row-major, map after map, and reads it back as
``byte · peak / levels``. The error is at most ``peak / (2 · levels)``, plus float32 rounding.
Parquet's zstd compresses the bytes; fewer levels compress better.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from captioner.runtime.plotting import prepare_matplotlib

__all__ = ["colour", "decode", "encode", "heatmap", "overlay"]


def encode(maps_THW: np.ndarray, levels: int = 127) -> tuple[bytes, list[float]]:
    """Encodes attention maps as bytes.

    Args:
        maps_THW: non-negative floats ``(T, H, W)``.
        levels: steps between 0 and a map's largest value, at most 255.

    Returns:
        ``T·H·W`` bytes, and the largest value of each map.

    Raises:
        ValueError: a value is negative or not finite, or a byte cannot hold so many levels.
    """
    if not 1 <= levels <= 255:
        raise ValueError(f"levels must be from 1 to 255, not {levels}")
    maps_THW = np.asarray(maps_THW, dtype=np.float32)
    if not (np.isfinite(maps_THW).all() and (maps_THW >= 0).all()):
        raise ValueError("attention maps must be finite and not negative")
    peaks_T = maps_THW.max(axis=(1, 2), initial=0)
    scale_T = levels / np.where(peaks_T > 0, peaks_T, np.inf).astype(np.float64)
    quantised = np.rint(maps_THW * scale_T[:, None, None]).astype(np.uint8)
    return quantised.tobytes(), peaks_T.tolist()


def decode(
    data: bytes,
    peaks: Sequence[float],
    *,
    grid: tuple[int, int] | int | None = None,
    levels: int = 127,
) -> np.ndarray:
    """Decodes the maps of a row's column ``attention``, as float32 ``(T, H, W)``.

    Args:
        data: the row's ``attention``, ``T·H·W`` bytes.
        peaks: the row's ``attention_peak``: the largest value of each of the ``T`` maps.
        grid: height and width of a map, or one number for a square. Maps are square by default.
        levels: ``captioner.attention.levels`` of the file's schema metadata.

    Raises:
        ValueError: ``data`` does not have ``T·H·W`` bytes.
    """
    count = len(peaks)
    if grid is None:
        grid = round((len(data) / count) ** 0.5) if count else 0
    height, width = (grid, grid) if isinstance(grid, int) else grid
    if len(data) != count * height * width:
        raise ValueError(f"{len(data)} bytes are not {count} maps of {height}×{width}")
    quantised = np.frombuffer(data, np.uint8).reshape(count, height, width)
    return quantised * (np.asarray(peaks, np.float32) / np.float32(levels))[:, None, None]


def heatmap(map_GG: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map enlarged bilinearly to ``size`` (width, height) and stretched to 0 … 1."""
    enlarged = Image.fromarray(np.asarray(map_GG, np.float32)).resize(
        size, Image.Resampling.BILINEAR
    )
    values = np.asarray(enlarged)
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def colour(map_GG: np.ndarray, size: tuple[int, int] | None = None) -> Image.Image:
    """A map in matplotlib's ``viridis``, enlarged to ``size`` (width, height) if one is given."""
    prepare_matplotlib()
    import matplotlib

    values = heatmap(map_GG, size or (map_GG.shape[1], map_GG.shape[0]))
    return Image.fromarray(matplotlib.colormaps["viridis"](values, bytes=True)[..., :3])


def overlay(image: Image.Image, map_GG: np.ndarray, alpha: float = 0.5) -> Image.Image:
    """Blends a map, with weight ``alpha``, over its image, as the notebook does."""
    return Image.blend(image.convert("RGB"), colour(map_GG, image.size), alpha)
