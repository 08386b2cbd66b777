"""TIFF pictures: those that Pillow reads rightly, and those whose samples are read here."""

import io
from collections.abc import Iterator

from PIL import Image, TiffImagePlugin

from captioner.data.formats.limits import OverLimitError
from captioner.data.formats.orientation import xmp_orientation
from captioner.data.formats.pictures import Picture
from captioner.data.formats.tiff_colours import Colours
from captioner.data.formats.tiff_directory import Directory, Tag, read_directory, rewritten
from captioner.data.formats.tiff_layout import Layout, check_is_read, layout
from captioner.data.formats.tiff_samples import SampledTiff

__all__ = ["open_tiff"]


def open_tiff(data: bytes) -> Picture:
    """Opens a TIFF by its first directory.

    Raises:
        OverLimitError: it has too many strips or tiles.
        ValueError: it is broken, or of a kind that is not read.
    """
    directory = read_directory(data)
    form = layout(directory)
    if check_is_read(directory, form):
        return _TiffPicture(data, directory, form)
    return _SampledTiffPicture(data, directory, form)


class _TiffPicture(Picture):
    """A TIFF whose layout Pillow reads rightly."""

    def __init__(self, data: bytes, directory: Directory, form: Layout) -> None:
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

    def __init__(self, data: bytes, directory: Directory, form: Layout) -> None:
        self.width, self.height = self.size = form.width, form.height
        self.box = None
        self._form, self._directory, self._bytes = form, directory, len(data)
        self._orientation = directory.integer(Tag.ORIENTATION, 0) or xmp_orientation(directory.xmp)
        if self._orientation is None:
            self._orientation = 1
        self._file = SampledTiff(data, directory, form)
        self._pixels = Colours(self._file, directory, form)

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


def _unpacked_at_once(directory: Directory, form: Layout, bits: int) -> int:
    """Bytes of the strip or tile that libtiff unpacks at once; a tile may be the larger."""
    rows = min(directory.integer(Tag.ROWS_PER_STRIP, form.height), form.height)
    tile = directory.integer(Tag.TILE_WIDTH, 0) * directory.integer(Tag.TILE_LENGTH, 0)
    return max(tile, form.width * rows) * bits // 8
