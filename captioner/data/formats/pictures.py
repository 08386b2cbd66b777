"""A file opened but not decoded: its size, the memory that it takes, and then its pixels as RGB."""

import io
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin

from captioner.data.formats import pillow_guards, rgb
from captioner.data.formats.jpeg import MOST_SCANS, scan_components
from captioner.data.formats.jpeg2000 import read_codestream
from captioner.data.formats.limits import OverLimitError
from captioner.data.formats.orientation import TRANSPOSE
from captioner.data.formats.png import TransparentColour, essential_png

__all__ = ["Jpeg2000Picture", "KeyedPng", "Picture", "WebpPicture"]

_BYTES_PER_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # in Pillow; else 4
_COPIES = {"AVIF": 4}  # of the pixels: the decoder's and Pillow's; else 1
_WEBP_COPIES = 4
_ORIENTATION = 0x0112


class Picture:
    """A file that Pillow reads.

    Args:
        file: its bytes.
        orientation: from the metadata; None if Pillow finds it after decoding.
        data: the whole file, to count a JPEG's scans in.

    Attributes:
        width: the file's own, before its orientation is applied, in pixels.
        height: the file's own.
        size: width and height of what is decoded.
        box: the part of what is decoded that is the image.
    """

    def __init__(self, file: BinaryIO, data: bytes, orientation: int | None = None) -> None:
        self.image: Image.Image = Image.open(file, formats=pillow_guards.FORMATS)
        self.width, self.height = self.size = self.image.size
        self.box: tuple[float, float, float, float] | None = None
        self._orientation = orientation
        self._data = data

    def close(self) -> None:
        """Gives the decoder back."""
        self.image.close()

    def draft(self, least: tuple[int, int]) -> None:
        """Chooses the smallest size that a JPEG can be decoded at, not below ``least``."""
        drafted = self.image.draft(None, least)  # None for other formats
        self.size = self.image.size
        self.box = drafted[1] if drafted else None  # in a fraction, the last pixel may be a part

    def memory(self, max_pixels: int) -> int:
        """Bytes that decoding takes at its peak, about.

        Raises:
            OverLimitError: decoding would take too many passes, or has tiles of too many pixels.
        """
        image = self.image
        pixels = image.width * image.height * _BYTES_PER_PIXEL.get(image.mode, 4)
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            return pixels + _coefficients(image, self._data, self.width * self.height)
        tile = getattr(image, "tile", None)
        if tile and tile[0][0] == "bmp_rle":  # decoded in Python, to its own array
            return pixels * 3
        return pixels * _COPIES.get(image.format or "", 1)

    def load(self) -> None:
        """Decodes the pixels."""
        self.image.load()

    @property
    def transpose(self) -> Image.Transpose | None:
        """What turns the decoded pixels upright."""
        if self._orientation is not None:
            return TRANSPOSE.get(self._orientation)
        try:
            return TRANSPOSE.get(self.image.getexif().get(_ORIENTATION, 1))
        except Exception:  # broken metadata in a sound image: the pixels count
            return None

    @property
    def plain(self) -> Image.Image | None:
        """The pixels, where they need no conversion."""
        if self.image.mode == "RGB" and not self.image.has_transparency_data:
            return self.image
        return None

    def strips(self, rows: int) -> Iterator[tuple[int, Image.Image]]:
        """RGB pixels from the top in pieces of so many rows, each with where it begins."""
        peak = None
        if rgb.is_deep(self.image):
            is_16_bit = self.image.mode.startswith("I;16")
            numbers = (np.asarray(strip) for _, strip in self._crops(self.image, rows))
            peak = 65535.0 if is_16_bit else rgb.usual_peak(rgb.largest(numbers))
        for top, strip in self._crops(self.image, rows):
            if peak is None:
                yield top, rgb.to_rgb(strip)
            else:
                grey_HW1 = rgb.scaled(np.asarray(strip), peak)[..., None]
                yield top, rgb.over_white(grey_HW1, None, is_associated=False)

    @staticmethod
    def to_rgb(image: Image.Image) -> Image.Image:
        """A strip of 8-bit samples as RGB, over white."""
        return rgb.to_rgb(image)

    @staticmethod
    def _crops(image: Image.Image, rows: int) -> Iterator[tuple[int, Image.Image]]:
        width, height = image.size
        for top in range(0, height, rows):
            yield top, image.crop((0, top, width, min(top + rows, height)))


def _coefficients(image: JpegImagePlugin.JpegImageFile, data: bytes, pixels: int) -> int:
    """Bytes of the coefficients that a JPEG keeps: none where it is decoded a few rows at a time.

    Raises:
        OverLimitError: it has too many scans.
    """
    scans = scan_components(data)
    if len(scans) > MOST_SCANS:
        raise OverLimitError(f"it has more than {MOST_SCANS} scans")
    if scans == [len(image.layer)] and "progressive" not in image.info:
        return 0
    # Scans that bring a part of each block, be it only one: all coefficients are kept.
    samples = [across * down for _, across, down, _ in image.layer]
    return 2 * pixels * sum(samples) // max(samples)


class WebpPicture(Picture):
    """A WebP, which is opened when it is decoded: opening allocates its canvas twice."""

    def __init__(self, file: BinaryIO, canvas: tuple[int, int], orientation: int | None) -> None:
        self._file, self._orientation = file, orientation
        self.width, self.height = self.size = canvas
        self.box = None
        self._opened: ImageFile.ImageFile | None = None

    @property
    def image(self) -> Image.Image:  # type: ignore[override]
        """The image, decoded."""
        assert self._opened is not None
        return self._opened

    def close(self) -> None:
        """Gives the decoder back."""
        if self._opened is not None:
            self._opened.close()

    def draft(self, least: tuple[int, int]) -> None:
        """A WebP is decoded at its own size."""

    def memory(self, max_pixels: int) -> int:
        """Bytes of the canvases that are allocated."""
        return self.width * self.height * 4 * _WEBP_COPIES

    def load(self) -> None:
        """Opens and decodes the file."""
        self._opened = Image.open(self._file, formats=pillow_guards.FORMATS)
        self.image.load()
        if self.image.size != self.size:
            raise ValueError("its size contradicts its header")


class KeyedPng(Picture):
    """A grey or RGB PNG in which one colour is transparent."""

    def __init__(
        self, file: BinaryIO, data: bytes, orientation: int, transparent: TransparentColour
    ) -> None:
        super().__init__(file, data, orientation)
        self._transparent = transparent
        self._low: Image.Image | None = None
        if transparent.depth == 16 and self.image.mode == "RGB":
            # Pillow keeps the high bytes of the samples; this is the other half.
            self._low = Image.open(essential_png(data).file, formats=pillow_guards.FORMATS)
            [tile] = self._low.tile
            self._low.tile = [ImageFile._Tile(*tile[:3], "RGB;16L")]

    def memory(self, max_pixels: int) -> int:
        """Bytes of the pixels, twice where they are decoded in halves."""
        return super().memory(max_pixels) * (2 if self._low else 1)

    def load(self) -> None:
        """Decodes the pixels, and their other half."""
        super().load()
        if self._low:
            self._low.load()

    @property
    def plain(self) -> Image.Image | None:
        """None: pixels are transparent."""
        return None

    def strips(self, rows: int) -> Iterator[tuple[int, Image.Image]]:
        """RGB pixels, with white in the place of the transparent colour."""
        for (top, strip), (_, image) in zip(
            super().strips(rows), self._crops(self.image, rows), strict=True
        ):
            is_bits = image.mode == "1"
            samples = np.asarray(image.convert("L") if is_bits else image).astype(np.int32)
            if self._low:
                part = self._low.crop((0, top, image.width, top + image.height))
                samples = samples << 8 | np.asarray(part)
            if samples.ndim == 2:
                samples = samples[..., None]
            pixels_HW3 = np.array(strip)
            pixels_HW3[self._transparent.mask(samples)] = 255
            yield top, Image.fromarray(pixels_HW3)


class Jpeg2000Picture(Picture):
    """A JPEG 2000 image, whose header says how deep its samples are."""

    def __init__(self, data: bytes) -> None:
        self._codestream = read_codestream(data)
        bits = self._codestream.bits
        if len(bits) > 1 and max(bits) > 8:
            # Pillow rounds white up to 256, which a byte holds as 0: it becomes black.
            kind = f"{len(bits)} components of {max(bits)} bits"
            raise ValueError(f"JPEG 2000 of {kind}, which captioner does not read")
        super().__init__(io.BytesIO(data), data)
        if self.size != (self._codestream.width, self._codestream.height):
            raise ValueError("its size contradicts its header")

    def memory(self, max_pixels: int) -> int:
        """Bytes of the pixels, and of the tile that is decoded."""
        return super().memory(max_pixels) + self._codestream.memory

    @property
    def plain(self) -> Image.Image | None:
        """The pixels, where they need no conversion."""
        return None if self._is_shallow else super().plain

    @property
    def _is_shallow(self) -> bool:
        """Whether samples of fewer than 8 bits were moved up, without reaching 255."""
        return self.image.mode in ("L", "RGB") and max(self._codestream.bits) < 8

    def strips(self, rows: int) -> Iterator[tuple[int, Image.Image]]:
        """RGB pixels; samples of fewer than 8 bits are stretched to 255."""
        bits = max(self._codestream.bits)
        white = 256 - (1 << 8 - bits) if self._is_shallow else 255
        table = [min(255, round(value * 255 / white)) for value in range(256)] * 3
        for top, strip in super().strips(rows):
            yield top, strip.point(table) if self._is_shallow else strip
