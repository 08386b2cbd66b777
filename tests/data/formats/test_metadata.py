"""Metadata never costs an image, in any format, and costs no memory."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from captioner.data import images

SIDE = 24
PIXELS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
WORKFLOW = zlib.compress(b'{"node": 1}' * 200_000)  # of 2 MB


def _encoded(file_format: str, **options: object) -> bytes:
    sink = io.BytesIO()
    PICTURE.save(sink, file_format, **options)
    return sink.getvalue()


def _same(data: bytes, plain: bytes) -> None:
    """The file is decoded, to the pixels of the plain one."""
    expected, decoded = images.decode(plain, SIDE), images.decode(data, SIDE)
    assert (expected.status, decoded.status, decoded.error) == ("ok", "ok", None)
    assert (decoded.width, decoded.height) == (SIDE, SIDE)
    np.testing.assert_array_equal(decoded.pixels_HW3, expected.pixels_HW3)


# PNG.


def _chunk(kind: bytes, data: bytes, wrong: int = 0) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data) ^ wrong)
    return struct.pack(">I", len(data)) + kind + data + check


HEAD = _chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
ROWS = zlib.compress(b"".join(b"\0" + row.tobytes() for row in PIXELS))
IDAT, IEND = _chunk(b"IDAT", ROWS), _chunk(b"IEND", b"")


def _png(before: bytes = b"", after: bytes = b"", pixels: bytes = IDAT, end: bytes = IEND) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + HEAD + before + pixels + after + end


BOMB = zlib.compress(bytes(1 << 26))
PNG_CHUNKS = {
    "zTXt of 2 MB": _chunk(b"zTXt", b"workflow\0\0" + WORKFLOW),
    "iTXt of 2 MB": _chunk(b"iTXt", b"workflow\0\1\0\0\0" + WORKFLOW),
    "tEXt of 3 MB": _chunk(b"tEXt", b"prompt\0" + b"a word " * 430_000),
    "many texts": _chunk(b"tEXt", b"a\0" + bytes(60_000)) * 100,
    "iCCP of 2 MB": _chunk(b"iCCP", b"scanner\0\0" + zlib.compress(bytes(2_000_000))),
    "iCCP, broken": _chunk(b"iCCP", b"scanner\0\0garbage"),
    "iCCP, unknown compression": _chunk(b"iCCP", b"scanner\0\7garbage"),
    "iCCP, empty": _chunk(b"iCCP", b""),
    "zTXt bomb": _chunk(b"zTXt", b"a\0\0" + BOMB),
    "XMP bomb": _chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
    "Exif bomb": _chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB),
    "Exif as text, broken": _chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nno digits"),
    "zTXt, unknown compression": _chunk(b"zTXt", b"a\0\5x"),
    "tEXt, wrong sum": _chunk(b"tEXt", b"Comment\0x", wrong=1),
    "tRNS, wrong sum": _chunk(b"tRNS", PIXELS[0, 0].astype(">u2").tobytes(), wrong=1),
    "tRNS, too short": _chunk(b"tRNS", b"\0"),
    "pHYs, too short": _chunk(b"pHYs", b"\0"),
    "gAMA, too short": _chunk(b"gAMA", b""),
    "cHRM, too short": _chunk(b"cHRM", b"\0\0"),
    "sRGB, empty": _chunk(b"sRGB", b""),
    "eXIf, garbage": _chunk(b"eXIf", b"\xff" * 60),
    "acTL, too short": _chunk(b"acTL", b"\0"),
    "fcTL, out of order": _chunk(b"acTL", struct.pack(">II", 2, 0)) + _chunk(b"fcTL", bytes(26)),
    "suggested palette, odd": _chunk(b"PLTE", b"\0\1\2\3"),
    "private": _chunk(b"caBX", bytes(1000)),
}


@pytest.mark.parametrize("name", PNG_CHUNKS)
def test_a_png_with_this_chunk_is_decoded(name):
    _same(_png(PNG_CHUNKS[name]), _png())
    _same(_png(after=PNG_CHUNKS[name]), _png())


def test_chunks_between_the_pixels_of_a_png_do_not_matter():
    halves = _chunk(b"IDAT", ROWS[:100]), _chunk(b"IDAT", ROWS[100:])
    _same(_png(pixels=_chunk(b"tEXt", b"a\0b").join(halves)), _png())


def test_a_png_that_ends_in_cut_metadata_is_decoded():
    _same(_png(after=_chunk(b"tEXt", bytes(900))[:300], end=b""), _png())


def test_a_png_that_ends_in_cut_pixels_is_not():
    assert images.decode(_png(end=b"")[:-300], SIDE).status == "undecodable"


@pytest.mark.parametrize("kind", ["eXIf", "zTXt", "iTXt", "packed iTXt"])
def test_the_orientation_in_any_chunk_of_a_png_counts(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    packed = exif.tobytes()
    text = f"\nexif\n{len(packed):8}\n{packed.hex()}\n".encode()
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    chunk = {
        "eXIf": _chunk(b"eXIf", packed.removeprefix(b"Exif\0\0")),
        "zTXt": _chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
        "iTXt": _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        "packed iTXt": _chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
    }[kind]
    decoded = images.decode(_png(chunk), SIDE)
    np.testing.assert_array_equal(decoded.pixels_HW3, np.rot90(PIXELS, -1))


# JPEG.


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


JPEG_SEGMENTS = {
    "Exif, garbage": _segment(0xE1, b"Exif\0\0" + b"\xff" * 60),
    "Exif of 10 MB": _segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 160,
    "profile, a part": _segment(0xE2, b"ICC_PROFILE\0\2\5garbage"),
    "profile, cut": _segment(0xE2, b"ICC_PROFILE\0"),
    "several pictures, garbage": _segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
    "Photoshop, garbage": _segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff\xff\xff"),
    "JFIF, cut": _segment(0xE0, b"JFIF\0\1"),
    "Adobe, cut": _segment(0xEE, b"Adobe\0"),
    "XMP, garbage": _segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<"),
    "comment": _segment(0xFE, bytes(60_000)),
    "every segment": b"".join(_segment(0xE0 + each, b"\xff" * 7) for each in range(16)),
}


@pytest.mark.parametrize("name", JPEG_SEGMENTS)
def test_a_jpeg_with_this_segment_is_decoded(name):
    plain = _encoded("JPEG")
    _same(plain[:2] + JPEG_SEGMENTS[name] + plain[2:], plain)


def test_the_orientation_in_the_xmp_of_a_jpeg_counts():
    xmp = _segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<a tiff:Orientation="3"/>')
    plain = _encoded("JPEG")
    upright = images.decode(plain, SIDE).pixels_HW3
    assert upright is not None
    turned = images.decode(plain[:2] + xmp + plain[2:], SIDE).pixels_HW3
    np.testing.assert_array_equal(turned, upright[::-1, ::-1])


# GIF and WebP.

GIF_EXTENSIONS = {
    "comments of 8 MB": b"!\xfe" + (b"\xff" + bytes(255)) * 32_000 + b"\0",
    "graphic control, cut": b"!\xf9\x01\0\0",
    "application, garbage": b"!\xff\x03abc\x05abcde\0",
    "XMP": b"!\xff\x0bXMP DataXMP\x04<x/>\0",
    "unknown": b"!\x77\x02ab\0",
}


@pytest.mark.parametrize("name", GIF_EXTENSIONS)
def test_a_gif_with_this_extension_is_decoded(name):
    plain = _encoded("GIF")
    begin = 13 + (3 << (plain[10] & 7) + 1)
    _same(plain[:begin] + GIF_EXTENSIONS[name] + plain[begin:], plain)


WEBP_CHUNKS = {
    "Exif, garbage": (0x08, b"EXIF" + struct.pack("<I", 60) + b"\xff" * 60),
    "Exif of 5 MB": (0x08, b"EXIF" + struct.pack("<I", 5_000_000) + bytes(5_000_000)),
    "Exif, cut": (0x08, b"EXIF" + struct.pack("<I", 60) + b"\xff" * 20),
    "XMP, garbage": (0x04, b"XMP " + struct.pack("<I", 4) + b"\xff" * 4),
    "profile, said and not there": (0x20, b""),
    "unknown": (0, b"abcd" + struct.pack("<I", 6) + bytes(6)),
}


@pytest.mark.parametrize("name", WEBP_CHUNKS)
def test_a_webp_with_this_chunk_is_decoded(name):
    flags, chunk = WEBP_CHUNKS[name]
    plain = _encoded("WEBP", lossless=True)
    sides = struct.pack("<I", SIDE - 1)[:3] * 2
    head = b"VP8X" + struct.pack("<I", 10) + bytes([flags, 0, 0, 0]) + sides
    body = b"WEBP" + head + plain[12:] + chunk
    _same(b"RIFF" + struct.pack("<I", len(body)) + body, plain)


# TIFF.

TIFF_TAGS = {
    "text outside the file": (270, 2, 99, 2**31),
    "text of no length": (270, 2, 0, 0),
    "resolution by nothing": (282, 5, 1, 0),
    "unknown type": (305, 99, 7, 0),
    "Exif outside the file": (34665, 4, 1, 2**30),
    "Exif that is the directory itself": (34665, 4, 1, 8),
    "GPS, garbage": (34853, 4, 1, 3),
    "profile outside the file": (34675, 7, 2**30, 8),
    "XMP outside the file": (700, 7, 2**30, 8),
    "private": (65000, 7, 60, 8),
}


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("name", TIFF_TAGS)
def test_a_tiff_with_this_tag_is_decoded(name, compression):
    plain = _encoded("TIFF", compression=compression)
    begin = int.from_bytes(plain[4:8], "little")
    count = int.from_bytes(plain[begin : begin + 2], "little")
    entries = [plain[at : at + 12] for at in range(begin + 2, begin + 2 + 12 * count, 12)]
    entries.append(struct.pack("<HHII", *TIFF_TAGS[name]))
    entries = sorted(
        {entry[:2]: entry for entry in entries}.values(),
        key=lambda entry: int.from_bytes(entry[:2], "little"),
    )
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    padded = plain + bytes(len(plain) % 2)
    data = padded[:4] + struct.pack("<I", len(padded)) + padded[8:] + directory
    _same(data, plain)


# AVIF.


@pytest.mark.parametrize("broken", [b"\xff" * 12, b"II\0\0", b"II*\0\xff\xff\xff\x7f", b"MM"])
def test_an_avif_with_broken_exif_is_decoded(broken):
    exif = Image.Exif()
    exif[0x010E] = "a description"
    data = _encoded("AVIF", quality=90, exif=exif)
    begin = data.index(exif.tobytes().removeprefix(b"Exif\0\0"))
    data = data[:begin] + broken + data[begin + len(broken) :]
    _same(data, _encoded("AVIF", quality=90))


def test_metadata_takes_no_memory():
    """Bombs of 64 MB a chunk, twenty times; measured in a process of its own."""
    code = """
import resource, sys
from captioner.data import images
plain, *files = [bytes.fromhex(line) for line in sys.stdin]
images.decode(plain, 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(*[images.decode(data, 24).status for data in files])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    bombs = [_png(PNG_CHUNKS[name] * 20) for name in ("zTXt bomb", "XMP bomb", "Exif bomb")]
    ran = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(data.hex() for data in [_png(), *bombs]),
        capture_output=True,
        text=True,
        check=False,
    )
    statuses, mebibytes = ran.stdout.splitlines()
    assert statuses.split() == ["ok"] * 3
    assert int(mebibytes) < 20
