"""HEIF and JPEG XL, read by the packages of the extra ``formats``."""

import io
from collections.abc import Iterator
from importlib.util import find_spec

from PIL import Image

from captioner.data.formats import known
from captioner.data.formats.pictures import Picture

__all__ = ["HeifPicture", "JxlPicture", "can_read_heif", "can_read_jxl"]

_MEMORY_OF_HEIF = 7  # bytes a pixel, measured: planes of YCbCr, and what becomes of them
_MEMORY_OF_JXL = 16  # bytes a pixel, measured: 6 where it is decoded in groups, more where not


def can_read_heif() -> bool:
    """Whether the package that reads HEIF is installed."""
    return find_spec("pi_heif") is not None


def can_read_jxl() -> bool:
    """Whether the package that reads JPEG XL is installed."""
    return find_spec("pillow_jxl") is not None


class HeifPicture(Picture):
    """The primary image of a HEIF file, which libheif turns upright while it decodes it."""

    def __init__(self, data: bytes) -> None:
        import pi_heif

        file = pi_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)
        self._file = file[file.primary_index]
        self.width, self.height = self.size = self._file.size
        self.box = None
        self._orientation = 1

    def close(self) -> None:
        """Gives the decoder back."""
        del self._file

    def draft(self, least: tuple[int, int]) -> None:
        """A HEIF file is decoded at its own size."""

    def memory(self, max_pixels: int) -> int:
        """Bytes that decoding takes, by measurement."""
        alpha = 2 if self._file.mode == "RGBA" else 0
        return self.width * self.height * (_MEMORY_OF_HEIF + alpha)

    def load(self) -> None:
        """Decodes the pixels, which stay in libheif's memory."""
        assert self._file.data is not None
        if self._file.size != self.size:
            raise ValueError("its size contradicts its header")

    @property
    def plain(self) -> Image.Image | None:
        """None: to save a copy, pixels are read in strips."""
        return None

    def strips(self, rows: int) -> Iterator[tuple[int, Image.Image]]:
        """RGB pixels from the top in pieces of so many rows, each with where it begins."""
        mode, stride = self._file.mode, self._file.stride
        is_premultiplied = bool(self._file.info.get("premultiplied_alpha"))
        mode = "RGBa" if mode == "RGBA" and is_premultiplied else mode
        for top in range(0, self.height, rows):
            size = self.width, min(rows, self.height - top)
            part = self._file.data[top * stride : (top + size[1]) * stride]
            strip = Image.frombytes(mode, size, bytes(part), "raw", mode, stride, 1)
            yield top, self.to_rgb(strip)


class JxlPicture(Picture):
    """A JPEG XL image, which libjxl turns upright while it decodes it."""

    def __init__(self, data: bytes) -> None:
        size = known.jxl_size(data)
        if not size:
            raise ValueError("its header is broken")
        self.width, self.height = self.size = size
        self.box = None
        self._orientation = 1
        self._data = data

    def close(self) -> None:
        """Nothing is open."""

    def draft(self, least: tuple[int, int]) -> None:
        """A JPEG XL image is decoded at its own size."""

    def memory(self, max_pixels: int) -> int:
        """Bytes that decoding takes, by measurement."""
        return self.width * self.height * _MEMORY_OF_JXL

    def load(self) -> None:
        """Decodes the pixels.

        Raises:
            ValueError: the file is broken.
        """
        import pillow_jxl

        try:
            is_jpeg, information, pixels, *_ = pillow_jxl.Decoder(num_threads=0)(self._data)
        except BaseException as error:
            # What panics in Rust is no Exception.
            if isinstance(error, Exception) or type(error).__name__ != "PanicException":
                raise
            raise ValueError(str(error)) from None
        if is_jpeg:
            inner = Image.open(io.BytesIO(pixels), formats=("JPEG",))
            inner.load()
            self._turned_by_its_jpeg(inner)
            return
        mode = "F" if information.mode == "F;16" else information.mode
        size = information.width, information.height
        self._keep(Image.frombytes(mode, size, pixels))

    def _turned_by_its_jpeg(self, inner: Image.Image) -> None:
        """Keeps a JPEG that was stored without loss, whose own metadata names its orientation."""
        orientation = inner.getexif().get(0x0112, 1)
        self._orientation = orientation if isinstance(orientation, int) else 1
        self._keep(inner)

    def _keep(self, image: Image.Image) -> None:
        if set(image.size) != set(self.size):
            raise ValueError("its size contradicts its header")
        self.size = image.size
        self.image = image
