"""BMPs whose samples are given by masks: Pillow reads a few masks, and ignores alpha in 16 bits."""

import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

from captioner.data.formats import rgb
from captioner.data.formats.pictures import Picture

__all__ = ["MaskedBmp", "has_masks"]

_COMPRESSIONS = (3, 6)  # by masks, without and with alpha


def has_masks(data: bytes) -> bool:
    """Whether a file is a BMP whose 16 or 32 bits a pixel are divided by masks."""
    if data[:2] != b"BM" or len(data) < 70 or int.from_bytes(data[14:18], "little") < 40:
        return False
    bits, compression = struct.unpack_from("<HI", data, 28)
    return bits in (16, 32) and compression in _COMPRESSIONS


class MaskedBmp(Picture):
    """A BMP of 16 or 32 bits a pixel, and masks that say which bits are a colour's or alpha's.

    Where alpha is 0 in the whole image it is opaque: some programs name the mask and leave it so.
    """

    def __init__(self, data: bytes) -> None:
        start, header, width, height = struct.unpack_from("<I", data, 10) + struct.unpack_from(
            "<Iii", data, 14
        )
        bits, compression = struct.unpack_from("<HI", data, 28)
        self.width, self.height = self.size = width, abs(height)
        self.box = None
        self._orientation = 1
        masks = struct.unpack_from("<4I", data, 54)
        has_alpha = header >= 56 or (header == 40 and compression == 6)
        self._masks = masks if has_alpha and masks[3] else masks[:3]
        if not all(masks[:3]):
            raise ValueError("its masks are empty")
        self._is_upside_down = height > 0
        self._kind = np.dtype(f"<u{bits // 8}")
        self._stride = (width * bits // 8 + 3) & ~3
        self._data, self._start = data, start

    def close(self) -> None:
        """Nothing is open."""

    def draft(self, least: tuple[int, int]) -> None:
        """A BMP is read at its own size."""

    def memory(self, max_pixels: int) -> int:
        """Nothing beside the file."""
        return 0

    def load(self) -> None:
        """Checks that the file contains all rows.

        Raises:
            ValueError: the file is cut short.
        """
        if self._start + self._stride * self.height > len(self._data):
            raise ValueError("image file is truncated")

    @property
    def plain(self) -> Image.Image | None:
        """None: the samples have to be read."""
        return None

    def strips(self, rows: int) -> Iterator[tuple[int, Image.Image]]:
        """RGB pixels from the top in pieces of so many rows, each with where it begins."""
        has_alpha = len(self._masks) == 4 and any(
            (words & self._masks[3]).any() for _, words in self._words(rows)
        )
        for top, words_hW in self._words(rows):
            colours_hW3 = np.stack([_sample(words_hW, mask) for mask in self._masks[:3]], -1)
            alpha_hW = _sample(words_hW, self._masks[3]) / 255 if has_alpha else None
            yield top, rgb.over_white(colours_hW3, alpha_hW, is_associated=False)

    def _words(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Each strip's pixels as they are ``(h, W)``, from the top."""
        for top in range(0, self.height, rows):
            count = min(rows, self.height - top)
            first = self.height - top - count if self._is_upside_down else top
            part = np.frombuffer(
                self._data, np.uint8, count * self._stride, self._start + first * self._stride
            ).reshape(count, self._stride)
            used = part[:, : self.width * self._kind.itemsize]
            words_hW = np.ascontiguousarray(used).view(self._kind)
            yield top, words_hW[::-1] if self._is_upside_down else words_hW


def _sample(words: np.ndarray, mask: int) -> np.ndarray:
    """What a mask selects, from 0 to 255."""
    values: np.ndarray = (words & mask).astype(np.float32) * (255 / mask)
    return values
