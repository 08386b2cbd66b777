"""A file that is not read is named; only what nobody knows is not an image in a known format."""

import io
import struct

import pytest
from PIL import Image

from captioner.data import images
from captioner.data.formats import known

PILLOW_WRITES = {
    "EPS": "PostScript (EPS)",
    "PPM": "Netpbm (PBM, PGM, PPM, PAM or PFM)",
    "ICO": "an icon (ICO)",
    "TGA": "Targa (TGA)",
    "SGI": "SGI",
    "PCX": "PCX",
    "DDS": "DirectDraw Surface (DDS)",
    "MSP": "Microsoft Paint (MSP)",
    "QOI": "QOI",
}


@pytest.mark.parametrize("file_format", PILLOW_WRITES)
def test_a_format_that_only_pillow_reads_is_named(file_format):
    sink = io.BytesIO()
    Image.new("1" if file_format == "MSP" else "RGB", (32, 24)).save(sink, file_format)
    with Image.open(io.BytesIO(sink.getvalue())) as image:
        assert image.format == file_format, "Pillow would read it"
    decoded = images.decode(sink.getvalue(), 16)
    assert decoded.status == "undecodable"
    assert decoded.error == f"{PILLOW_WRITES[file_format]}, which captioner does not read"
    if file_format in ("TGA", "DDS", "QOI"):
        assert (decoded.width, decoded.height) == (32, 24)


def _boxes(brand: bytes, *compatible: bytes) -> bytes:
    brands = brand + bytes(4) + b"".join(compatible)
    return struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands


NAMED = {
    b"8BPS" + b"\0\1" + bytes(6) + b"\0\3" + struct.pack(">II", 30, 40): (
        "Photoshop (PSD), which captioner does not read",
        (40, 30),
    ),
    b"8BPS" + b"\0\1" + bytes(6) + b"\0\3" + b"\xff" * 8: (
        "Photoshop (PSD), which captioner does not read",
        (None, None),
    ),
    b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>": (
        "a drawing (SVG), which captioner does not read",
        (None, None),
    ),
    b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- made by hand -->\n<svg/>": (
        "a drawing (SVG), which captioner does not read",
        (None, None),
    ),
    b"%PDF-1.7\n": ("a PDF document, not an image", (None, None)),
    b"\n<!DOCTYPE html>\n<html>": ("an HTML page, not an image", (None, None)),
    b"<rss/>": ("XML, not an image", (None, None)),
    b"version https://git-lfs.github.com/spec/v1\n": (
        "a Git LFS pointer (run git lfs pull), not an image",
        (None, None),
    ),
    b"\0\5\x16\7\0\2\0\0Mac OS X": (
        "an AppleDouble file (macOS metadata), not an image",
        (None, None),
    ),
    b"II*\0\x10\0\0\0CR\2\0" + bytes(20): (
        "camera raw (CR2), which captioner does not read",
        (None, None),
    ),
    b"FUJIFILMCCD-RAW 0201": ("camera raw (RAF), which captioner does not read", (None, None)),
    _boxes(b"crx "): ("camera raw (CR3), which captioner does not read", (None, None)),
    _boxes(b"isom", b"mp41"): ("MPEG-4 video, not an image", (None, None)),
    _boxes(b"qt  "): ("QuickTime video, not an image", (None, None)),
    b"\x1aE\xdf\xa3" + bytes(20): ("WebM or Matroska video, not an image", (None, None)),
    b"RIFF\0\0\0\0AVI LIST": ("AVI video, not an image", (None, None)),
    b"PK\3\4" + bytes(20): ("a ZIP archive, not an image", (None, None)),
    b"a line of text\n": ("not an image in a known format", (None, None)),
    bytes(4096): ("not an image in a known format", (None, None)),
}


@pytest.mark.parametrize("data", NAMED, ids=lambda data: data[:24].hex())
def test_a_file_that_is_not_read_is_named(data):
    decoded = images.decode(data, 16)
    assert decoded.status == "undecodable"
    assert (decoded.error, (decoded.width, decoded.height)) == NAMED[data]


@pytest.mark.parametrize(
    ("brands", "is_heif"),
    [
        ((b"heic", b"mif1"), True),
        ((b"mif1", b"heic"), True),
        ((b"msf1", b"hevc"), True),
        ((b"mif1", b"avif"), False),
        ((b"avif", b"mif1"), False),
        ((b"isom", b"heic"), False),
    ],
)
def test_heif_is_told_from_avif_and_video(brands, is_heif):
    assert known.is_heif(_boxes(*brands)) == is_heif
