"""PNG: the chunks that decide the pixels, and colours that are transparent.

Pillow gives up where an ancillary chunk is broken, or holds more than a megabyte of text. libpng
and browsers skip such chunks; so does this.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np

from captioner.data.formats.limits import OverLimitError
from captioner.data.formats.orientation import exif_orientation, xmp_orientation
from captioner.data.formats.spliced import SplicedFile

__all__ = ["PNG_SIGNATURE", "EssentialPng", "TransparentColour", "essential_png"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"\0\0\0\0IEND\xaeB`\x82"
_MOST_CHUNKS = 1_000_000
_LONGEST_METADATA = 1 << 20  # bytes of Exif, text or XMP that are looked at, unpacked
_NOTED = (b"tRNS", b"eXIf", b"iTXt", b"zTXt", b"tEXt")
_GREY, _RGB, _PALETTE = 0, 2, 3  # colour types


@dataclass(frozen=True, slots=True)
class TransparentColour:
    """The colour whose pixels are transparent, in samples of ``depth`` bits."""

    samples: tuple[int, ...]
    depth: int

    def mask(self, samples_HWC: np.ndarray) -> np.ndarray:
        """Which pixels ``(H, W)`` have the colour.

        Args:
            samples_HWC: the samples; those of fewer than 8 bits scaled to 0..255.
        """
        scale = 255 // ((1 << self.depth) - 1) if self.depth < 8 else 1
        same_HW: np.ndarray = (samples_HWC == np.array(self.samples) * scale).all(-1)
        return same_HW


@dataclass(frozen=True, slots=True)
class EssentialPng:
    """A PNG of its critical chunks and the transparency of its palette."""

    file: BinaryIO
    orientation: int | None
    transparent: TransparentColour | None


class _Chunks:
    """What a walk over the chunks has found."""

    def __init__(self, data: bytes) -> None:
        self.view = memoryview(data)
        self.pieces: list[memoryview] = [self.view[:8]]
        self.depth = self.colour_type = self.palette = 0
        self.transparent: TransparentColour | None = None
        self.exif = self.xmp = b""

    def take(self, kind: bytes, chunk: memoryview) -> None:
        """Keeps a chunk or its content; skips a broken chunk that is not critical."""
        content = chunk[8:-4]
        if kind == b"IHDR" and len(content) >= 10:
            self.depth, self.colour_type = content[8], content[9]
        if kind == b"PLTE":
            self.palette = len(content) // 3
            if self.colour_type != _PALETTE:  # a suggestion
                return
        if kind[:1].isupper():
            self.pieces.append(chunk)
        elif kind in _NOTED and len(content) <= _LONGEST_METADATA and _sum_is_right(chunk):
            self._note(kind, chunk, bytes(content))

    def _note(self, kind: bytes, chunk: memoryview, content: bytes) -> None:
        if kind == b"eXIf":
            self.exif = self.exif or content
        elif kind == b"iTXt" and content.startswith(b"XML:com.adobe.xmp\0"):
            self.xmp = self.xmp or _international_text(content)
        elif kind in (b"zTXt", b"tEXt") and content.startswith(b"Raw profile type exif\0"):
            self.exif = self.exif or _raw_profile(kind, content)
        elif kind == b"tRNS" and self.colour_type == _PALETTE:
            if 1 <= len(content) <= self.palette:
                self.pieces.append(chunk)
        elif kind == b"tRNS" and len(content) == {_GREY: 2, _RGB: 6}.get(self.colour_type):
            most = (1 << self.depth) - 1
            samples = struct.unpack(f">{len(content) // 2}H", content)
            self.transparent = TransparentColour(tuple(each & most for each in samples), self.depth)


def essential_png(data: bytes) -> EssentialPng:
    """A PNG without the chunks that do not decide its pixels.

    Raises:
        OverLimitError: it has more than a million chunks.
    """
    chunks, position = _Chunks(data), 8
    seen_pixels = False
    for _ in range(_MOST_CHUNKS):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        end = position + 12 + length
        if kind == b"IEND" or (end > len(data) and seen_pixels and kind != b"IDAT"):
            break
        if end > len(data):  # cut short, which Pillow reports
            chunks.pieces.append(chunks.view[position:])
            return EssentialPng(cast(BinaryIO, SplicedFile(chunks.pieces)), None, None)
        seen_pixels = seen_pixels or kind == b"IDAT"
        chunks.take(kind, chunks.view[position:end])
        position = end
    else:
        raise OverLimitError(f"it has more than {_MOST_CHUNKS} chunks")
    orientation = exif_orientation(chunks.exif) if chunks.exif else None
    if orientation is None and chunks.xmp:
        orientation = xmp_orientation(chunks.xmp)
    file = cast(BinaryIO, SplicedFile([*chunks.pieces, _END]))
    return EssentialPng(file, orientation, chunks.transparent)


def _sum_is_right(chunk: memoryview) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _unpacked(packed: bytes) -> bytes:
    """What zlib data holds, up to a limit; empty where it is broken."""
    try:
        return zlib.decompressobj().decompress(packed, _LONGEST_METADATA)
    except zlib.error:
        return b""


def _international_text(content: bytes) -> bytes:
    """The text of an iTXt chunk."""
    flags, *texts = (
        content.partition(b"\0")[2][:2],
        *content.partition(b"\0")[2][2:].split(b"\0", 2),
    )
    if len(texts) < 3:
        return b""
    return _unpacked(texts[2]) if flags[:1] == b"\1" else texts[2]


def _raw_profile(kind: bytes, content: bytes) -> bytes:
    """Exif that ImageMagick has written as text: a line's name, a length, hexadecimal digits."""
    text = content.partition(b"\0")[2]
    if kind == b"zTXt":
        text = _unpacked(text[1:])
    try:
        return bytes.fromhex("".join(text.decode("ascii").split("\n")[3:]))
    except ValueError:
        return b""
