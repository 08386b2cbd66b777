"""JPEG, GIF, WebP and AVIF files without their metadata, which may be broken, huge or both.

Pillow parses metadata while it opens a file, and fails, copies or takes quadratic time where the
metadata is broken or long. The readers here keep what decides the pixels, and note the orientation.
"""

import re
from dataclasses import dataclass
from typing import BinaryIO, cast

from captioner.data.formats.orientation import exif_orientation, xmp_orientation
from captioner.data.formats.spliced import SplicedFile

__all__ = ["Stripped", "strip_avif", "strip_gif", "strip_jpeg", "strip_webp"]

_LONGEST_METADATA = 1 << 20  # bytes of Exif or XMP that are looked at
_XMP_OF_JPEG = b"http://ns.adobe.com/xap/1.0/\0"
_ITEM_INFO = re.compile(rb"infe([\2\3])", re.S)  # and its version
_PIXEL_CHUNKS_OF_WEBP = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_METADATA_FLAGS_OF_WEBP = 0x2C  # profile, Exif, XMP


@dataclass(frozen=True, slots=True)
class Stripped:
    """A file without its metadata, and the orientation that the metadata names."""

    file: BinaryIO
    orientation: int | None = None


def strip_jpeg(data: bytes) -> Stripped:
    """A JPEG without application segments and comments, up to its first scan.

    The JFIF and Adobe segments stay: they decide what colours the components are.
    """
    view, pieces, exif, xmp = memoryview(data), [memoryview(data)[:2]], b"", b""
    position = 2
    while data[position : position + 1] == b"\xff":
        marker = data[position + 1 : position + 2]
        length = 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if not b"\xc0" <= marker <= b"\xfe" or marker == b"\xda" or length < 4:
            break
        content = view[position + 4 : position + length]
        name = bytes(content[:6])
        if marker == b"\xe1" and name == b"Exif\0\0" and len(exif) < _LONGEST_METADATA:
            exif += content[6:]
        elif marker == b"\xe1" and bytes(content[: len(_XMP_OF_JPEG)]) == _XMP_OF_JPEG:
            xmp = xmp or bytes(content[len(_XMP_OF_JPEG) :])
        keeps_colours = (
            (marker == b"\xe0" and name[:5] == b"JFIF\0" and len(content) >= 14)
            or (marker == b"\xee" and name[:5] == b"Adobe" and len(content) >= 12)
            or not (b"\xe0" <= marker <= b"\xef" or marker == b"\xfe")
        )
        if keeps_colours:
            pieces.append(view[position : position + length])
        position += length
    pieces.append(view[position:])
    orientation = exif_orientation(exif) if exif else None
    if orientation is None and xmp:
        orientation = xmp_orientation(xmp)
    return Stripped(cast(BinaryIO, SplicedFile(pieces)), orientation)


def strip_gif(data: bytes) -> Stripped:
    """A GIF whose extensions before the first image are gone, but for the last graphic control."""
    view = memoryview(data)
    flags = data[10] if len(data) > 10 else 0
    begin = position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    control = b""
    while data[position : position + 1] == b"!":
        end = position + 2
        while end < len(data) and data[end]:
            end += 1 + data[end]
        end += 1
        if data[position + 1 : position + 3] == b"\xf9\x04" and end == position + 8:
            control = data[position:end]
        position = end
    return Stripped(cast(BinaryIO, SplicedFile([view[:begin], control, view[position:]])))


def strip_webp(data: bytes) -> Stripped:
    """A WebP of the chunks that hold pixels; the others may be of any size, and cut off."""
    view, pieces, exif, xmp = memoryview(data), list[bytes | memoryview](), b"", b""
    position, is_cut = 12, False
    while position + 8 <= len(data):
        kind = data[position : position + 4]
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        end = position + 8 + length + length % 2
        content = view[position + 8 : position + 8 + length]
        if kind == b"VP8X":
            pieces += [view[position : position + 8], _without_metadata_flags(content)]
        elif kind in _PIXEL_CHUNKS_OF_WEBP:
            pieces.append(view[position:end])
            is_cut = is_cut or position + 8 + length > len(data)
        elif kind == b"EXIF" and length < _LONGEST_METADATA:
            exif = exif or bytes(content)
        elif kind == b"XMP ":
            xmp = xmp or bytes(content[:_LONGEST_METADATA])
        position = end
    orientation = exif_orientation(exif) if exif else None
    if orientation is None and xmp:
        orientation = xmp_orientation(xmp)
    size = 4 + sum(len(piece) for piece in pieces)
    # Where pixels are cut off, the file has to keep saying so.
    claimed = int.from_bytes(data[4:8], "little") if is_cut else size
    head = b"RIFF" + max(size, claimed).to_bytes(4, "little") + b"WEBP"
    return Stripped(cast(BinaryIO, SplicedFile([head, *pieces])), orientation)


def _without_metadata_flags(content: memoryview) -> bytes:
    return bytes(each & ~_METADATA_FLAGS_OF_WEBP for each in content[:1]) + bytes(content[1:])


def strip_avif(data: bytes) -> Stripped:
    """An AVIF whose Exif and XMP have a type that the decoder passes over.

    The orientation of an AVIF is a property of its image; that in its Exif does not count.
    """
    view, pieces, done = memoryview(data), list[memoryview | bytes](), 0
    for entry in _ITEM_INFO.finditer(data, 0, _LONGEST_METADATA):
        begin = entry.start(1) + (8 if entry[1] == b"\2" else 10)
        if data[begin : begin + 4] in (b"Exif", b"mime"):
            pieces += [view[done:begin], b"skip"]
            done = begin + 4
    return Stripped(cast(BinaryIO, SplicedFile([*pieces, view[done:]])))
