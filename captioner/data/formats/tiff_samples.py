"""TIFF: the samples of the layouts that Pillow does not read rightly.

libtiff only unpacks the strips or tiles, as grey bytes, and the samples are read from these here:
TIFF 6.0, and Adobe's technical note 3 for floating point.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from PIL import TiffImagePlugin

from captioner.data.formats.tiff_directory import Directory, Tag, rewritten
from captioner.data.formats.tiff_layout import FLOAT, FLOATING_POINT, HORIZONTAL, SIGNED, Layout

__all__ = ["SampledTiff"]


class SampledTiff:
    """The samples of a TIFF, read in strips of rows.

    Args:
        data: the file.
        directory: its first directory.
        form: the layout of its samples.
    """

    def __init__(self, data: bytes, directory: Directory, form: Layout) -> None:
        self._form = form
        self._images = [
            TiffImagePlugin.TiffImageFile(rewritten(data, directory, values))
            for values in self._as_bytes(directory)
        ]

    @property
    def memory(self) -> int:
        """Bytes of the samples, unpacked."""
        return sum(image.width * image.height for image in self._images)

    def _as_bytes(self, directory: Directory) -> Iterator[dict[int, tuple[int, ...]]]:
        """The tags that make grey bytes of the samples: of all, or of each plane."""
        form = self._form
        samples = 1 if form.is_planar else form.samples
        tile_width = form.tile_width * samples * form.bits // 8
        width = math.ceil(form.row_samples * form.bits / 8)
        if tile_width:  # whole tiles: a predictor may spread a pixel over all of one
            width = math.ceil(form.width / form.tile_width) * tile_width
        values: dict[int, tuple[int, ...]] = {
            Tag.WIDTH: (width,),
            Tag.BITS: (8,),
            Tag.PHOTOMETRIC: (1,),
            Tag.SAMPLES: (1,),
            Tag.PLANAR: (),
            Tag.PREDICTOR: (),
            Tag.EXTRA_SAMPLES: (),
            Tag.SAMPLE_FORMAT: (),
            Tag.COLOUR_MAP: (),
            Tag.ORIENTATION: (),
            **dict.fromkeys(range(529, 533), ()),
        }
        if tile_width:
            values[Tag.TILE_WIDTH] = (tile_width,)
        if not form.is_planar:
            yield values
            return
        for plane in range(form.colours + (form.alpha is not None)):
            parts = {}
            for tag in (Tag.STRIP_OFFSETS, Tag.STRIP_COUNTS, Tag.TILE_OFFSETS, Tag.TILE_COUNTS):
                places = directory.integers(tag)
                count = len(places) // form.samples
                parts[tag] = places[plane * count : (plane + 1) * count]
            yield values | parts

    def load(self) -> None:
        """Unpacks the file.

        Raises:
            OSError: it is broken.
        """
        for image in self._images:
            image.load()

    def samples_hWC(self, top: int, bottom: int) -> np.ndarray:  # noqa: N802
        """The samples of some rows ``(h, W, channels)``, as unsigned, signed or float numbers."""
        form = self._form
        planes = []
        for image in self._images:
            strip = image.crop((0, top, image.width, bottom))
            rows_hB = np.frombuffer(strip.tobytes(), np.uint8).reshape(bottom - top, image.width)
            planes.append(self._numbers(rows_hB)[:, : form.row_samples])
        if form.is_planar:
            return np.stack(planes, -1)
        return planes[0].reshape(bottom - top, form.width, form.samples)

    def _numbers(self, rows_hB: np.ndarray) -> np.ndarray:
        """The samples ``(h, n)`` in rows of bytes ``(h, B)``, those that fill the last tile too."""
        form = self._form
        if form.predictor == FLOATING_POINT and form.sample_format == FLOAT:
            return self._by_tile(rows_hB, self._unpredicted_floats)
        if form.bits in (8, 16, 32, 64):
            kind = {SIGNED: "i", FLOAT: "f"}.get(form.sample_format, "u")
            numbers_hn = rows_hB.view(f"{form.order}{kind}{form.bits // 8}")
            if form.predictor == HORIZONTAL and kind != "f":
                return self._by_tile(numbers_hn, self._unpredicted)
            return numbers_hn
        return self._of_odd_bits(rows_hB)

    def _of_odd_bits(self, rows_hB: np.ndarray) -> np.ndarray:
        """Samples that do not fill whole bytes, the highest bit first."""
        form = self._form
        count = rows_hB.shape[1] * 8 // form.bits
        bits_hnb = np.unpackbits(rows_hB, axis=1, count=count * form.bits)
        bits_hnb = bits_hnb.reshape(len(rows_hB), count, form.bits)
        numbers_hn = np.zeros((len(rows_hB), count), np.int64)
        for bit in range(form.bits):
            numbers_hn = numbers_hn << 1 | bits_hnb[..., bit]
        if form.sample_format == SIGNED:
            numbers_hn -= (numbers_hn >> form.bits - 1) << form.bits
        return numbers_hn

    def _by_tile(
        self, rows_hn: np.ndarray, undo: Callable[[np.ndarray, int], np.ndarray]
    ) -> np.ndarray:
        """Undoes a predictor in each tile's part of the rows, or in whole rows."""
        form = self._form
        channels = 1 if form.is_planar else form.samples
        tiles = math.ceil(form.width / form.tile_width) if form.tile_width else 1
        return np.concatenate([undo(part, channels) for part in np.split(rows_hn, tiles, 1)], 1)

    def _unpredicted(self, differences_hn: np.ndarray, channels: int) -> np.ndarray:
        native_hn = differences_hn.astype(differences_hn.dtype.newbyteorder("="))
        by_channel = native_hn.reshape(len(native_hn), -1, channels)
        sums: np.ndarray = by_channel.cumsum(1, dtype=native_hn.dtype).reshape(native_hn.shape)
        return sums

    def _unpredicted_floats(self, rows_hB: np.ndarray, channels: int) -> np.ndarray:
        """Floats whose bytes are apart, the highest first, as differences."""
        size = self._form.bits // 8
        by_channel = rows_hB.reshape(len(rows_hB), -1, channels)
        bytes_hsn = by_channel.cumsum(1, dtype=np.uint8).reshape(len(rows_hB), size, -1)
        return np.ascontiguousarray(bytes_hsn.transpose(0, 2, 1)).view(f">f{size}")[..., 0]
