"""The shape that a model wants its images in."""

import math
from dataclasses import dataclass
from typing import Literal

from captioner.config import ModelConfig

__all__ = ["Preparation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """What a decode worker makes of an image: a square, or a rectangle that keeps the aspect.

    Give ``size``, or at least one of ``max_side`` and ``max_pixels``. With both of these, both
    hold. Decode workers unpickle a preparation without torch.

    Attributes:
        size: height and width of a square, in pixels; the aspect changes.
        max_side: the longest side of the result with its aspect kept, in pixels.
        max_pixels: height times width of the result with its aspect kept.
        enlarge: scale a smaller image up to ``max_side``; else it keeps its size.
        interpolation: how pixels are resized.

    Raises:
        ValueError: the fields contradict each other, or are not positive.
    """

    size: int | None = None
    max_side: int | None = None
    max_pixels: int | None = None
    enlarge: bool = False
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @classmethod
    def of(cls, config: ModelConfig) -> "Preparation":
        """The square that a model with these settings takes."""
        return cls(size=config.image_size, interpolation=config.interpolation)

    def __post_init__(self) -> None:
        """Checks the fields."""
        limits = [limit for limit in (self.max_side, self.max_pixels) if limit is not None]
        if (self.size is None) == (not limits):
            raise ValueError("give size for a square, or max_side or max_pixels to keep the aspect")
        if min(self.size or 1, *limits, 1) < 1 or self.size == 0:
            raise ValueError("size, max_side and max_pixels must be at least 1")
        if self.enlarge and (self.max_side is None or self.max_pixels is not None):
            raise ValueError("enlarge needs max_side alone")

    @property
    def most_bytes(self) -> int:
        """Bytes of the largest result, in RGB."""
        sides = [side for side in (self.size, self.max_side) if side is not None]
        areas = [side * side for side in sides]
        return 3 * min([*areas, *([] if self.max_pixels is None else [self.max_pixels])])

    def target(self, width: int, height: int) -> tuple[int, int]:
        """The result's width and height for an image of this width and height, in pixels."""
        if self.size is not None:
            return self.size, self.size
        scale = math.inf if self.enlarge else 1.0
        if self.max_side is not None:
            scale = min(scale, self.max_side / max(width, height))
        if self.max_pixels is not None:
            scale = min(scale, math.sqrt(self.max_pixels / (width * height)))
        if scale == 1:
            return width, height
        sides = max(1, round(width * scale)), max(1, round(height * scale))
        if self.max_pixels is None or sides[0] * sides[1] <= self.max_pixels:
            return sides
        # Rounding up may pass the limit, and so may a side that is at least 1 pixel.
        down = min(max(1, int(height * scale)), self.max_pixels)
        return min(max(1, int(width * scale)), self.max_pixels // down), down
