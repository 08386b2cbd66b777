"""TIFF: which files Pillow reads rightly, and the samples of the others.

Pillow knows a TIFF by a table of layouts, and takes some of them for others: 12 bits for 16, black
for white, unsigned for signed. For what is not in :func:`_pillow_reads`, libtiff only unpacks the
strips or tiles, as grey bytes, and the samples are read from these here: TIFF 6.0, and Adobe's
technical note 3 for floating point.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, TiffImagePlugin

from captioner.data.formats import rgb
from captioner.data.formats.tiff_directory import Directory, Tag, rewritten

__all__ = ["Colours", "Layout", "SampledTiff", "check_is_read", "layout"]

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, MASK, CMYK, YCBCR, CIELAB, ICCLAB = *range(7), 8, 9
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3, 9: 3}  # samples by photometric interpretation
_UNSIGNED, _SIGNED, _FLOAT, _UNDEFINED = 1, 2, 3, 4
_PHOTOMETRIC_NAMES = {4: "a mask", 10: "ITU Lab", 32803: "camera raw", 32844: "LogL"}
_PHOTOMETRIC_NAMES |= {32845: "LogLuv", 34892: "camera raw", 51177: "a depth map"}
_FAX, _JPEG = (2, 3, 4), (6, 7)
_UNPACKED = (1, 5, 8, 32773, 32946, 34925, 50000)  # compressions of bytes, whatever they mean
_HORIZONTAL, _FLOATING_POINT = 2, 3  # predictors
_ASSOCIATED, _UNASSOCIATED = 1, 2  # alpha


@dataclass(frozen=True, slots=True)
class Layout:
    """How the samples of a TIFF lie, and what they mean."""

    width: int
    height: int
    photometric: int
    bits: int
    sample_format: int
    samples: int
    extra: tuple[int, ...]
    compression: int
    predictor: int
    is_planar: bool
    order: str
    tile_width: int

    @property
    def colours(self) -> int:
        """Samples a pixel that are colours; the others are extra."""
        return _COLOURS.get(self.photometric, self.samples)

    @property
    def alpha(self) -> int | None:
        """Whether the first extra sample is alpha, and of which kind."""
        kind = next(iter(self.extra), None)
        return kind if kind in (_ASSOCIATED, _UNASSOCIATED) else None

    @property
    def row_samples(self) -> int:
        """Samples in a row of the file: of all channels, or of one where they are apart."""
        return self.width * (1 if self.is_planar else self.samples)

    @property
    def description(self) -> str:
        """The layout in words, for a reason."""
        kind = {_SIGNED: "signed", _FLOAT: "floating-point"}.get(self.sample_format, "unsigned")
        return f"{self.samples} {kind} samples of {self.bits} bits a pixel"


def layout(directory: Directory) -> Layout:
    """The layout of a TIFF.

    Raises:
        ValueError: its size or samples are missing or contradict each other.
    """
    width, height = (directory.integers(tag) for tag in (Tag.WIDTH, Tag.LENGTH))
    for side in (width, height):
        if len(side) != 1 or not 0 < side[0] < 1 << 31:
            raise ValueError("its width or height is not possible")
    compression = directory.integer(Tag.COMPRESSION, 1)
    photometric = directory.integer(Tag.PHOTOMETRIC, YCBCR if compression == 6 else 0)
    bits = directory.integers(Tag.BITS) or (1,)
    samples = directory.integer(
        Tag.SAMPLES, 3 if compression in _JPEG and photometric in (2, 6) else len(bits)
    )
    formats = directory.integers(Tag.SAMPLE_FORMAT)[:samples] or (_UNSIGNED,)
    if not 0 < samples <= 1000 or len(set(bits[:samples])) > 1 or len(set(formats)) > 1:
        raise ValueError("its samples are not of one kind, which is not read")
    extra = directory.integers(Tag.EXTRA_SAMPLES)
    missing = samples - _COLOURS.get(photometric, samples) - len(extra)
    if missing < 0:
        extra = extra[: missing or None] if len(extra) + missing >= 0 else ()
    return Layout(
        width=width[0],
        height=height[0],
        photometric=photometric,
        bits=bits[0],
        sample_format=_UNSIGNED if formats[0] == _UNDEFINED else formats[0],
        samples=samples,
        # Without the tag, a fourth sample of RGB is alpha to all readers.
        extra=extra or ((_UNASSOCIATED,) if missing == 1 and photometric != CMYK else ()),
        compression=compression,
        predictor=directory.integer(Tag.PREDICTOR, 1),
        is_planar=directory.integer(Tag.PLANAR, 1) == 2 and samples > 1,
        order=directory.order,
        tile_width=directory.integer(Tag.TILE_WIDTH, 0),
    )


def check_is_read(directory: Directory, form: Layout) -> bool:
    """Whether Pillow reads the layout rightly; else :class:`SampledTiff` does.

    Raises:
        ValueError: neither does; the message says what the file is.
    """
    is_preview = directory.integer(Tag.NEW_SUBFILE_TYPE, 0) & 1
    if Tag.DNG_VERSION in directory.numbers or (
        is_preview and Tag.SUB_DIRECTORIES in directory.numbers
    ):
        raise ValueError("camera raw (such as DNG, NEF, ARW), which captioner does not read")
    if Tag.WINDOWS_MEDIA_PHOTO in directory.numbers:
        raise ValueError("JPEG XR, which captioner does not read")
    if form.photometric not in _COLOURS:
        name = _PHOTOMETRIC_NAMES.get(form.photometric, f"photometric {form.photometric}")
        raise ValueError(f"a TIFF of {name}, which captioner does not read")
    if form.photometric == CMYK and directory.integer(Tag.INK_SET, 1) != 1:
        raise ValueError("a TIFF of inks other than CMYK, which captioner does not read")
    if form.compression not in TiffImagePlugin.COMPRESSION_INFO:
        raise ValueError(f"a TIFF of compression {form.compression}, which captioner does not read")
    if _pillow_reads(directory, form):
        return True
    if form.compression not in _UNPACKED or form.samples < form.colours or not _is_sampled(form):
        raise ValueError(
            f"a TIFF of {form.description} (photometric {form.photometric}, "
            f"compression {form.compression}), which captioner does not read"
        )
    return False


def _pillow_reads(directory: Directory, form: Layout) -> bool:
    if form.compression in _FAX:
        return form.bits == 1
    if form.compression not in _UNPACKED:
        return form.bits == 8
    if form.is_planar or form.sample_format != _UNSIGNED:
        return False
    if form.photometric == YCBCR:
        return form.bits == 8
    if form.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO):
        deep = form.bits == 16 and form.photometric == BLACK_IS_ZERO
        plain = directory.integer(Tag.FILL_ORDER, 1) == 1
        return form.samples == 1 and (form.bits in (1, 2, 4, 8) or (deep and plain))
    return form.photometric == RGB and form.bits in (8, 16) and form.samples == 3


def _is_sampled(form: Layout) -> bool:
    if form.sample_format == _FLOAT:
        return form.bits in (16, 32, 64) and form.photometric in (0, 1, 2)
    if form.predictor == _HORIZONTAL and form.bits not in (8, 16, 32, 64):
        return False
    if form.tile_width * form.row_samples // form.width * form.bits % 8:
        return False
    if form.photometric in (CIELAB, ICCLAB):
        return form.bits in (8, 16)
    if form.photometric == PALETTE:
        return form.bits <= 16 and form.sample_format == _UNSIGNED
    if form.photometric in (CMYK, YCBCR):
        return form.bits in (8, 16) and form.sample_format == _UNSIGNED
    return 0 < form.bits <= 32 or form.bits == 64


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
        if form.predictor == _FLOATING_POINT and form.sample_format == _FLOAT:
            return self._by_tile(rows_hB, self._unpredicted_floats)
        if form.bits in (8, 16, 32, 64):
            kind = {_SIGNED: "i", _FLOAT: "f"}.get(form.sample_format, "u")
            numbers_hn = rows_hB.view(f"{form.order}{kind}{form.bits // 8}")
            if form.predictor == _HORIZONTAL and kind != "f":
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
        if form.sample_format == _SIGNED:
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


class Colours:
    """The samples of a TIFF as RGB.

    Integers of up to 16 bits are as bright as their range says. Longer ones and floats are scaled
    by the smallest usual range that holds the image's largest: 1, 255, 65535, or the largest.
    """

    def __init__(self, file: SampledTiff, directory: Directory, form: Layout) -> None:
        self._file, self._form = file, form
        self._map = np.array(directory.integers(Tag.COLOUR_MAP)) if form.photometric == 3 else None

    def strips(self, rows: int) -> Iterator[tuple[int, Image.Image]]:
        """RGB pixels from the top in pieces of so many rows, each with where it begins."""
        form = self._form
        peak = self._peak(rows)
        for top in range(0, form.height, rows):
            samples_HWC = self._file.samples_hWC(top, min(top + rows, form.height))
            if form.photometric in (CIELAB, ICCLAB):
                yield top, self._lab(samples_HWC)
                continue
            colours_HWC = self._colours(samples_HWC, peak)
            alpha_HW = None
            if form.alpha is not None:
                alpha_peak = peak if form.photometric != PALETTE else float((1 << form.bits) - 1)
                alpha_HW = rgb.scaled(samples_HWC[..., form.colours], alpha_peak) / 255
            is_associated = form.alpha == _ASSOCIATED
            yield top, rgb.over_white(colours_HWC, alpha_HW, is_associated=is_associated)

    def _peak(self, rows: int) -> float:
        """The sample that is as bright as can be."""
        form = self._form
        if form.sample_format == _UNSIGNED and form.bits <= 16:
            return float((1 << form.bits) - 1)
        strips = (
            self._file.samples_hWC(top, min(top + rows, form.height))[..., : form.colours]
            for top in range(0, form.height, rows)
        )
        largest = rgb.largest(strips)
        if form.sample_format == _SIGNED and form.bits <= 16:
            most = float((1 << form.bits - 1) - 1)
            return rgb.usual_peak(largest, [peak for peak in (1.0, 255.0) if peak < most] + [most])
        return rgb.usual_peak(largest)

    def _colours(self, samples_HWC: np.ndarray, peak: float) -> np.ndarray:
        """Grey or RGB from 0 to 255."""
        form = self._form
        if form.photometric == PALETTE:
            return self._of_palette(samples_HWC[..., 0])
        values_HWC = rgb.scaled(
            samples_HWC[..., : form.colours], peak, inverted=form.photometric == WHITE_IS_ZERO
        )
        if form.photometric == CMYK:
            colours_HW3: np.ndarray = (
                (255 - values_HWC[..., :3]) * (255 - values_HWC[..., 3:4]) / 255
            )
            return colours_HW3
        if form.photometric == YCBCR:
            bytes_HWC = np.rint(values_HWC).astype(np.uint8)
            return np.asarray(Image.fromarray(bytes_HWC, "YCbCr").convert("RGB"), np.float32)
        return values_HWC

    def _of_palette(self, indices_HW: np.ndarray) -> np.ndarray:
        assert self._map is not None
        count = 1 << self._form.bits
        if len(self._map) != 3 * count:
            raise ValueError(f"its palette has {len(self._map)} values, not {3 * count}")
        # Some writers put 8 bits where the specification asks for 16; libtiff allows for it too.
        table_N3 = (self._map if self._map.max() < 256 else self._map / 257).reshape(3, count).T
        colours_HW3: np.ndarray = table_N3[indices_HW].astype(np.float32)
        return colours_HW3

    def _lab(self, samples_HWC: np.ndarray) -> Image.Image:
        """CIE L*a*b*, by the high bytes of its samples."""
        form = self._form
        bytes_HW3 = samples_HWC[..., :3]
        if form.bits == 16:
            bytes_HW3 = bytes_HW3.astype(np.uint16) >> 8
        bytes_HW3 = bytes_HW3.astype(np.uint8)
        if form.photometric == ICCLAB:  # a* and b* begin at -128 there
            bytes_HW3 = bytes_HW3 ^ np.array((0, 128, 128), np.uint8)
        height, width, _ = bytes_HW3.shape
        image = Image.frombytes("LAB", (width, height), bytes_HW3.tobytes(), "raw", "LAB", 0, 1)
        return rgb.to_rgb(image)
