"""How a file is read, decided by its first bytes."""

import io

from PIL import UnidentifiedImageError

from captioner.data.formats import extra_pictures, known, pillow_guards
from captioner.data.formats.bmp import MaskedBmp, has_masks
from captioner.data.formats.jpeg2000 import JPEG2000_SIGNATURES
from captioner.data.formats.pictures import Jpeg2000Picture, KeyedPng, Picture, WebpPicture
from captioner.data.formats.png import PNG_SIGNATURE, essential_png
from captioner.data.formats.stripped import strip_avif, strip_gif, strip_jpeg, strip_webp
from captioner.data.formats.tiff_directory import TIFF_SIGNATURES
from captioner.data.formats.tiff_pictures import open_tiff

__all__ = ["UnknownFormatError", "open_picture"]


class UnknownFormatError(Exception):
    """A file is not in a supported format; the message names the format."""

    def __init__(self, known_as: known.Known | None) -> None:
        super().__init__(known_as.reason if known_as else "not an image in a known format")
        self.width = known_as.width if known_as else None
        self.height = known_as.height if known_as else None


def open_picture(data: bytes) -> Picture:
    """Opens a file by its first bytes, without decoding its pixels.

    Raises:
        OverLimitError: opening it would take too much memory or time.
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
            return KeyedPng(png.file, data, png.orientation or 1, png.transparent)
        return Picture(png.file, data, png.orientation or 1)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return Picture(strip_gif(data).file, data, 1)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _open_webp(data)
    if data[:4] in TIFF_SIGNATURES and data[8:10] != b"CR":
        return open_tiff(data)
    if data.startswith(JPEG2000_SIGNATURES):
        return Jpeg2000Picture(data)
    if has_masks(data):
        return MaskedBmp(data)
    if known.is_heif(data) and extra_pictures.can_read_heif():
        return extra_pictures.HeifPicture(data)
    if known.is_jxl(data) and extra_pictures.can_read_jxl():
        return extra_pictures.JxlPicture(data)
    is_avif = data[4:8] == b"ftyp" and not known.is_heif(data)
    try:
        return Picture(strip_avif(data).file if is_avif else io.BytesIO(data), data)
    except UnidentifiedImageError:
        raise UnknownFormatError(known.identify(data)) from None


def _open_webp(data: bytes) -> Picture:
    stripped = strip_webp(data)
    canvas = _webp_canvas(data)
    if canvas is None:
        return Picture(stripped.file, data, stripped.orientation or 1)
    return WebpPicture(stripped.file, canvas, stripped.orientation or 1)


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
