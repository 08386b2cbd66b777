"""TIFF: samples as RGB."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from captioner.data.formats import rgb
from captioner.data.formats.tiff_directory import Directory, Tag
from captioner.data.formats.tiff_layout import (
    ASSOCIATED,
    CIELAB,
    CMYK,
    ICCLAB,
    PALETTE,
    SIGNED,
    UNSIGNED,
    WHITE_IS_ZERO,
    YCBCR,
    Layout,
)
from captioner.data.formats.tiff_samples import SampledTiff

__all__ = ["Colours"]


class Colours:
    """The samples of a TIFF as RGB.

    Integers of up to 16 bits are as bright as their range says. Longer ones and floats are scaled
    by the smallest usual range that holds the image's largest: 1, 255, 65535, or the largest.
    """

    def __init__(self, file: SampledTiff, directory: Directory, form: Layout) -> None:
        self._file, self._form = file, form
        self._map = (
            np.array(directory.integers(Tag.COLOUR_MAP)) if form.photometric == PALETTE else None
        )

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
            is_associated = form.alpha == ASSOCIATED
            yield top, rgb.over_white(colours_HWC, alpha_HW, is_associated=is_associated)

    def _peak(self, rows: int) -> float:
        """The sample that is as bright as can be."""
        form = self._form
        if form.sample_format == UNSIGNED and form.bits <= 16:
            return float((1 << form.bits) - 1)
        strips = (
            self._file.samples_hWC(top, min(top + rows, form.height))[..., : form.colours]
            for top in range(0, form.height, rows)
        )
        largest = rgb.largest(strips)
        if form.sample_format == SIGNED and form.bits <= 16:
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
