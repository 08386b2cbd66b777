"""The first directory of a TIFF: the tags that decide its pixels, and a copy with other values.

Pillow reads every tag, and gives up where one is broken that does not matter. The directory here
has the essential tags alone, and a rewritten directory may stand behind the file that it describes.
"""

import struct
from dataclasses import dataclass
from typing import BinaryIO, cast

from captioner.data.formats.limits import OverLimitError
from captioner.data.formats.spliced import SplicedFile

__all__ = ["MOST_STRIPS", "TIFF_SIGNATURES", "Directory", "Tag", "read_directory", "rewritten"]

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")


class Tag:
    """The tags that decide the pixels, by number."""

    NEW_SUBFILE_TYPE = 254
    WIDTH = 256
    LENGTH = 257
    BITS = 258
    COMPRESSION = 259
    PHOTOMETRIC = 262
    FILL_ORDER = 266
    STRIP_OFFSETS = 273
    ORIENTATION = 274
    SAMPLES = 277
    ROWS_PER_STRIP = 278
    STRIP_COUNTS = 279
    PLANAR = 284
    PREDICTOR = 317
    COLOUR_MAP = 320
    TILE_WIDTH = 322
    TILE_LENGTH = 323
    TILE_OFFSETS = 324
    TILE_COUNTS = 325
    SUB_DIRECTORIES = 330
    INK_SET = 332
    EXTRA_SAMPLES = 338
    SAMPLE_FORMAT = 339
    XMP = 700
    WINDOWS_MEDIA_PHOTO = 0xBC01
    DNG_VERSION = 50706


# Fax options, tables of JPEG in both its styles, and YCbCr's coefficients, sampling and range.
_PASSED_ON = (292, 293, 347, *range(512, 522), 529, 530, 531, 532)
_ESSENTIAL = {
    number for name, number in vars(Tag).items() if not name.startswith("_") and number < 700
} | set(_PASSED_ON)


_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_BYTES |= {13: 4, 16: 8, 17: 8, 18: 8}  # a pointer, and what BigTIFF adds
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_LONGEST_XMP = 1 << 20
#: Of strips or tiles. Opening makes an object of each, and the file may tell where they are by a
#: byte each: 4 MB of them took 1 GB and a minute.
MOST_STRIPS = 100_000
_MOST_BYTES_OF_SMALL_TAGS = 1 << 16


@dataclass(frozen=True, slots=True)
class Directory:
    """A TIFF's first directory.

    Attributes:
        order: the byte order, as for :mod:`struct`.
        big: it is a BigTIFF, of 64-bit offsets.
        entries: each essential tag's type, count and bytes.
        xmp: the XMP packet, or empty.
        numbers: the tags that are there, essential or not.
        is_plain: Pillow can read the directory without harm: it is no BigTIFF's, and the tags that
            are not essential are small and inside the file.
    """

    order: str
    big: bool
    entries: dict[int, tuple[int, int, bytes]]
    xmp: bytes
    numbers: frozenset[int]
    is_plain: bool

    def integers(self, tag: int) -> tuple[int, ...]:
        """A tag's values; none where it is absent or holds no integers."""
        kind, count, content = self.entries.get(tag, (0, 0, b""))
        if kind not in _INTEGERS:
            return ()
        return struct.unpack(f"{self.order}{count}{_INTEGERS[kind]}", content)

    def integer(self, tag: int, default: int) -> int:
        """A tag's first value."""
        return next(iter(self.integers(tag)), default)


def read_directory(data: bytes) -> Directory:
    """The first directory of a TIFF.

    Raises:
        OverLimitError: it has too many strips or tiles.
        ValueError: the directory is cut short.
    """
    order, big = "<" if data[:2] == b"II" else ">", 43 in data[2:4]
    first, head, entry = (8, 8, 20) if big else (4, 2, 12)

    def number(begin: int, size: int) -> int:
        if begin + size > len(data):
            raise ValueError("its directory is outside the file")
        return int.from_bytes(data[begin : begin + size], "little" if order == "<" else "big")

    begin = number(first, 8 if big else 4)
    entries, xmp, numbers, is_plain, small = {}, b"", set(), True, 0
    for index in range(min(number(begin, head), 1 << 16)):
        at = begin + head + index * entry
        if at + entry > len(data):
            break
        tag, kind, count = number(at, 2), number(at + 2, 2), number(at + 4, 8 if big else 4)
        numbers.add(tag)
        size = count * _BYTES.get(kind, 0)
        inline, value = (8, at + 12) if big else (4, at + 8)
        place = value if size <= inline else number(value, inline)
        inside = size > 0 and place + size <= len(data)
        if tag in _ESSENTIAL and inside:
            if tag in (Tag.STRIP_OFFSETS, Tag.TILE_OFFSETS) and count > MOST_STRIPS:
                raise OverLimitError(f"it has more than {MOST_STRIPS} strips or tiles")
            entries[tag] = kind, count, data[place : place + size]
        else:
            small += size
            is_plain = is_plain and inside and tag in _HARMLESS
        if tag == Tag.XMP and inside:
            xmp = data[place : place + min(size, _LONGEST_XMP)]
    is_plain = is_plain and small <= _MOST_BYTES_OF_SMALL_TAGS and not big
    return Directory(order, big, entries, xmp, frozenset(numbers), is_plain)


# Texts and numbers that describe, as most writers put them in.
_HARMLESS = {269, 270, 271, 272, 280, 281, 282, 283, 285, 286, 287, 296, 297, 305, 306, 315, 316}


def rewritten(data: bytes, directory: Directory, values: dict[int, tuple[int, ...]]) -> BinaryIO:
    """The file with a directory of the essential tags behind it, some with other values.

    It is a TIFF of 32-bit offsets, though the file may be a BigTIFF: Pillow does not read those of
    the big-endian kind.

    Args:
        data: the file.
        directory: its directory.
        values: for tags, the integers to put in the place of what they have; none removes a tag.

    Raises:
        ValueError: the file is too long for offsets of 32 bits.
    """
    if len(data) >= 1 << 31:
        raise ValueError("a TIFF of 2 GiB or more in this layout, which captioner does not read")
    entries = dict(directory.entries)
    long_ones = {tag: directory.integers(tag) for tag, entry in entries.items() if entry[0] >= 16}
    for tag, integers in (long_ones | values).items():
        entries.pop(tag, None)
        if integers:
            packed = struct.pack(f"{directory.order}{len(integers)}I", *integers)
            entries[tag] = 4, len(integers), packed
    padding = bytes(len(data) % 2)
    header, packed = _packed(directory.order, entries, len(data) + len(padding))
    return cast(BinaryIO, SplicedFile([header, memoryview(data)[len(header) :], padding, packed]))


def _packed(
    order: str, entries: dict[int, tuple[int, int, bytes]], begin: int
) -> tuple[bytes, bytes]:
    """A file's header and its directory, which is at ``begin``."""
    size = 2 + len(entries) * 12 + 4
    table, beside = [struct.pack(order + "H", len(entries))], b""
    for tag, (kind, count, content) in sorted(entries.items()):
        if len(content) <= 4:
            value = content.ljust(4, b"\0")
        else:
            value = struct.pack(order + "I", begin + size + len(beside))
            beside += content + bytes(len(content) % 2)
        table.append(struct.pack(f"{order}HHI", tag, kind, count) + value)
    table.append(bytes(4))
    signature = b"II" if order == "<" else b"MM"
    return signature + struct.pack(order + "HI", 42, begin), b"".join(table) + beside
