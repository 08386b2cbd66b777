"""Pillow's readers, held to what is safe with files from anywhere: installed by a call.

Only the formats of :data:`FORMATS` are read (Pillow can also run Ghostscript), only the first frame
of an animation is, and nothing is printed about a broken file.
"""

import contextlib
import ctypes
import functools
import logging
import re
import warnings

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImagePalette,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    _imaging,
)

from captioner.data.formats.limits import OverLimitError
from captioner.data.formats.tiff_directory import MOST_STRIPS

__all__ = ["FORMATS", "install"]

#: What :func:`PIL.Image.open` is to be given as formats.
FORMATS = (
    *("PLAIN JPEG", "FIRST PNG", "WEBP", "WHOLE BMP", "DIB", "FIRST GIF"),
    *("TIFF OF FEW STRIPS", "AVIF", "JPEG2000"),
)


class _FirstFrame:
    """An animation that stays at its first frame, which nothing replaces.

    Pillow fills a canvas for a replacement while it opens the file, before its size can be checked.
    """

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, 0 if name in ("disposal_method", "dispose_op") else value)


class _Png(_FirstFrame, PngImagePlugin.PngImageFile):
    pass


class _Gif(_FirstFrame, GifImagePlugin.GifImageFile):
    pass


class _Bmp(BmpImagePlugin.BmpImageFile):
    """A BMP whose grey palette does not change how many bits its pixels are taken to have."""

    def _bitmap(self, header: int = 0, offset: int = 0) -> None:
        super()._bitmap(header, offset)
        assert self.fp is not None
        self.fp.seek(28 if int.from_bytes(self._head(14, 4), "little") > 12 else 24)
        bits = int.from_bytes(self.fp.read(2), "little")
        if self.mode not in ("1", "L") or bits == {"1": 1, "L": 8}[self.mode]:
            return
        levels = (0, 255) if self.mode == "1" else range(1 << bits)
        self._mode = "P"
        self.palette = ImagePalette.raw("RGB", bytes(level for level in levels for _ in range(3)))
        [tile] = self.tile
        rawmode = {1: "P;1", 4: "P;4", 8: "P"}[bits] if tile[0] == "raw" else "P"
        assert isinstance(tile[3], tuple)
        self.tile = [ImageFile._Tile(tile[0], tile[1], tile[2], (rawmode, *tile[3][1:]))]

    def _head(self, begin: int, size: int) -> bytes:
        assert self.fp is not None
        self.fp.seek(begin)
        return self.fp.read(size)


class _Tiff(TiffImagePlugin.TiffImageFile):
    """A TIFF of a bounded number of strips, whose YCbCr pixels may share their colours."""

    def _setup(self) -> None:
        for tag in (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS):
            if len(self.tag_v2.get(tag, ())) > MOST_STRIPS:
                raise OverLimitError(f"it has more than {MOST_STRIPS} strips or tiles")
        super()._setup()
        sampling = self.tag_v2.get(TiffImagePlugin.YCBCRSUBSAMPLING, (2, 2))
        if self.mode == "YCbCr" and sampling != (1, 1):
            # Pillow reads these pixels as if each had its own colours; libtiff knows better.
            self._mode, self.use_load_libtiff = "RGB", True
            arguments = ("RGBX", False, self.tag_v2.offset)
            size = self.tag_v2[TiffImagePlugin.IMAGEWIDTH], self.tag_v2[TiffImagePlugin.IMAGELENGTH]
            self.tile = [ImageFile._Tile("libtiff", (0, 0, *size), 0, arguments)]


def install() -> None:
    """Makes :data:`FORMATS` known to Pillow, lifts its own limit on pixels, and silences it."""
    _install_once()
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns at first; ours is checked instead
    quiet = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if quiet not in warnings.filters:  # they may have been reset since
        warnings.filterwarnings("ignore", module=r"PIL\.")


@functools.cache
def _install_once() -> None:
    Image.preinit()
    Image.init()
    # Not by Image.register_open: who opens images without naming formats is to get Pillow's own.
    Image.OPEN["PLAIN JPEG"] = JpegImagePlugin.JpegImageFile, Image.OPEN["JPEG"][1]
    Image.OPEN["FIRST PNG"] = _Png, Image.OPEN["PNG"][1]
    Image.OPEN["FIRST GIF"] = _Gif, Image.OPEN["GIF"][1]
    Image.OPEN["WHOLE BMP"] = _Bmp, Image.OPEN["BMP"][1]
    Image.OPEN["TIFF OF FEW STRIPS"] = _Tiff, Image.OPEN["TIFF"][1]
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    libraries = ctypes.CDLL(_imaging.__file__)  # with those that it is linked to
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        with contextlib.suppress(AttributeError):  # a Pillow without libtiff
            getattr(libraries, name)(None)
