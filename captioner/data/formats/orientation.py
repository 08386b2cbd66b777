"""The orientation that an image's metadata names, read without trusting the metadata."""

import re

from PIL import Image

__all__ = ["TRANSPOSE", "exif_orientation", "xmp_orientation"]

#: What turns an image upright, by the value of its orientation.
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_INTEGERS = {1: 1, 3: 2, 4: 4}  # Exif types that hold an orientation, and their bytes
_XMP = re.compile(rb"tiff:Orientation(?:=\"|>)([0-9])")
_LONGEST_XMP = 1 << 20  # bytes that are searched


def exif_orientation(exif: bytes) -> int | None:
    """The orientation in a block of Exif, with or without its ``Exif`` prefix; None if absent."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "little", b"MM": "big"}.get(exif[:2])
    if order is None:
        return None

    def number(begin: int, size: int) -> int:
        return int.from_bytes(exif[begin : begin + size], "little" if order == "little" else "big")

    begin = number(4, 4)
    for entry in range(begin + 2, begin + 2 + 12 * number(begin, 2), 12):
        if entry + 12 > len(exif):
            return None
        if number(entry, 2) == _ORIENTATION and number(entry + 2, 2) in _INTEGERS:
            return number(entry + 8, _INTEGERS[number(entry + 2, 2)])
    return None


def xmp_orientation(xmp: bytes) -> int | None:
    """The orientation in an XMP packet; None if absent."""
    found = _XMP.search(xmp, 0, _LONGEST_XMP)
    return int(found[1]) if found else None
