"""A file opened but not decoded: its size, the memory that it takes, and then its pixels as RGB.

:func:`open_picture` decides by the first bytes how a file is read.
"""

import io
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from captioner.data.formats import known, pillow_guards, rgb, tiff
from captioner.data.formats.jpeg import MOST_SCANS, scan_components
from captioner.data.formats.jpeg2000 import JPEG2000_SIGNATURES, read_codestream
from captioner.data.formats.limits import OverLimitError
from captioner.data.formats.orientation import TRANSPOSE, xmp_orientation
from captioner.data.formats.png import PNG_SIGNATURE, TransparentColour, essential_png
from captioner.data.formats.stripped import strip_avif, strip_gif, strip_jpeg, strip_webp
from captioner.data.formats.tiff_directory import (
    TIFF_SIGNATURES,
    Directory,
    Tag,
    read_directory,
    rewritten,
)

__all__ = ["Picture", "open_picture"]

_BYTES_PER_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # in Pillow; else 4
_COPIES = {"AVIF": 4}  # of the pixels: the decoder's and Pillow's; else 1
_WEBP_COPIES = 4
_ORIENTATION = 0x0112


class Picture:
    """A file that Pillow reads.

    Args:
        file: its bytes.
        orientation: what its metadata says; None to ask Pillow after decoding.
        data: the whole file, to count a JPEG's scans in.

    Attributes:
        width: the file's own, before its orientation is applied, in pixels.
        height: the file's own.
        size: width and height of what is decoded.
        box: the part of what is decoded that is the image.
    """

    def __init__(self, file: BinaryIO, data: bytes, orientation: int | None = None) -> None:
        self.image: ImageFile.ImageFile = Image.open(file, formats=pillow_guards.FORMATS)
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
        if image.tile and image.tile[0][0] == "bmp_rle":  # decoded in Python, to its own array
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


class _WebpPicture(Picture):
    """A WebP, which is opened when it is decoded: opening allocates its canvas twice."""

    def __init__(self, file: BinaryIO, canvas: tuple[int, int], orientation: int | None) -> None:
        self._file, self._orientation = file, orientation
        self.width, self.height = self.size = canvas
        self.box = None
        self._opened: ImageFile.ImageFile | None = None

    @property
    def image(self) -> ImageFile.ImageFile:  # type: ignore[override]
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


class _KeyedPng(Picture):
    """A grey or RGB PNG in which one colour is transparent."""

    def __init__(self, data: bytes, file: BinaryIO, transparent: TransparentColour) -> None:
        super().__init__(file, data)
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


class _TiffPicture(Picture):
    """A TIFF whose layout Pillow reads rightly."""

    def __init__(self, data: bytes, directory: Directory, form: tiff.Layout) -> None:
        # Where other tags are broken or huge, Pillow sees the essential tags alone.
        file = io.BytesIO(data) if directory.is_plain else rewritten(data, directory, {})
        super().__init__(file, data)
        self._copied = 0 if directory.is_plain else len(data)
        self._form, self._directory = form, directory
        self.width, self.height = form.width, form.height
        if Tag.ORIENTATION not in directory.entries and directory.xmp:
            self._orientation = xmp_orientation(directory.xmp)

    def memory(self, max_pixels: int) -> int:
        """Bytes of the pixels, and of a strip or tile that libtiff unpacks."""
        _check_tiles(self._directory, max_pixels)
        pixels = super().memory(max_pixels)
        assert isinstance(self.image, TiffImagePlugin.TiffImageFile)
        if not self.image.use_load_libtiff:
            return pixels
        bits = self._form.bits * self._form.samples
        return pixels + _unpacked_at_once(self._directory, self._form, bits) + self._copied


class _SampledTiffPicture(Picture):
    """A TIFF whose samples are read here, since Pillow does not know them or mistakes them."""

    def __init__(self, data: bytes, directory: Directory, form: tiff.Layout) -> None:
        self.width, self.height = self.size = form.width, form.height
        self.box = None
        self._form, self._directory, self._bytes = form, directory, len(data)
        self._orientation = directory.integer(Tag.ORIENTATION, 0) or xmp_orientation(directory.xmp)
        if self._orientation is None:
            self._orientation = 1
        self._file = tiff.SampledTiff(data, directory, form)
        self._pixels = tiff.Colours(self._file, directory, form)

    def close(self) -> None:
        """Nothing is open."""

    def draft(self, least: tuple[int, int]) -> None:
        """A TIFF is decoded at its own size."""

    def memory(self, max_pixels: int) -> int:
        """Bytes of the samples, and of what unpacking them takes."""
        _check_tiles(self._directory, max_pixels)
        bits = self._form.bits * self._form.samples
        at_once = 0
        if self._form.compression != 1:
            at_once = self._bytes + _unpacked_at_once(self._directory, self._form, bits)
        return self._file.memory + at_once

    def load(self) -> None:
        """Unpacks the samples."""
        self._file.load()

    @property
    def plain(self) -> Image.Image | None:
        """None: the samples have to be read."""
        return None

    def strips(self, rows: int) -> Iterator[tuple[int, Image.Image]]:
        """RGB pixels from the top in pieces of so many rows, each with where it begins."""
        return self._pixels.strips(rows)


def _check_tiles(directory: Directory, max_pixels: int) -> None:
    """Refuses tiles that are too large: one is decoded in full, even beyond its image."""
    tile = directory.integer(Tag.TILE_WIDTH, 0) * directory.integer(Tag.TILE_LENGTH, 0)
    if tile > max_pixels:
        raise OverLimitError(f"its tiles have more than {max_pixels} pixels")


def _unpacked_at_once(directory: Directory, form: tiff.Layout, bits: int) -> int:
    """Bytes of the strip or tile that libtiff unpacks at once; a tile may be the larger."""
    rows = min(directory.integer(Tag.ROWS_PER_STRIP, form.height), form.height)
    tile = directory.integer(Tag.TILE_WIDTH, 0) * directory.integer(Tag.TILE_LENGTH, 0)
    return max(tile, form.width * rows) * bits // 8


class _Jpeg2000Picture(Picture):
    """A JPEG 2000 image, whose header says how deep its samples are."""

    def __init__(self, data: bytes) -> None:
        self._codestream = read_codestream(data)
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


def open_picture(data: bytes) -> Picture:
    """Opens a file by its first bytes, without decoding its pixels.

    Raises:
        UnknownFormatError: it is not in a format that is read; the message names it.
        Exception: nearly any, where the file is broken.
    """
    pillow_guards.install()
    if data[:3] == b"\xff\xd8\xff":
        stripped = strip_jpeg(data)
        return Picture(stripped.file, data, stripped.orientation or 1)
    if data[:8] == PNG_SIGNATURE:
        png = essential_png(data)
        if png.transparent:
            picture: Picture = _KeyedPng(data, png.file, png.transparent)
            picture._orientation = png.orientation or 1
            return picture
        return Picture(png.file, data, png.orientation or 1)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return Picture(strip_gif(data).file, data, 1)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _open_webp(data)
    if data[:4] in TIFF_SIGNATURES and data[8:10] != b"CR":
        directory = read_directory(data)
        form = tiff.layout(directory)
        is_read = tiff.check_is_read(directory, form)
        return (_TiffPicture if is_read else _SampledTiffPicture)(data, directory, form)
    if data.startswith(JPEG2000_SIGNATURES):
        return _Jpeg2000Picture(data)
    is_avif = data[4:8] == b"ftyp" and not known.is_heif(data)
    try:
        return Picture(strip_avif(data).file if is_avif else io.BytesIO(data), data)
    except UnidentifiedImageError:
        raise UnknownFormatError(known.identify(data)) from None


class UnknownFormatError(Exception):
    """A file is not in a format that is read; the message says what it is."""

    def __init__(self, known_as: known.Known | None) -> None:
        super().__init__(known_as.reason if known_as else "not an image in a known format")
        self.width = known_as.width if known_as else None
        self.height = known_as.height if known_as else None


def _open_webp(data: bytes) -> Picture:
    stripped = strip_webp(data)
    canvas = _webp_canvas(data)
    if canvas is None:
        return Picture(stripped.file, data, stripped.orientation or 1)
    return _WebpPicture(stripped.file, canvas, stripped.orientation or 1)


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height of the canvas that decoding a WebP takes; None where it has none."""
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
