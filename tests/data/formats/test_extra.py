"""HEIC and JPEG XL by the extra ``formats``, and JPEG 2000."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from captioner.data import images
from captioner.data.formats import extra_pictures, known

COARSE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
PICTURE = Image.fromarray(COARSE).resize((64, 48), Image.Resampling.BICUBIC)
EXPECTED = np.asarray(PICTURE.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)


def _heic(image: Image.Image = PICTURE, **options: object) -> bytes:
    heif = pytest.importorskip("pillow_heif")
    pytest.importorskip("pi_heif")
    sink = io.BytesIO()
    heif.from_pillow(image).save(sink, format="HEIF", quality=95, **options)
    return sink.getvalue()


def _jxl(image: Image.Image = PICTURE, **options: object) -> bytes:
    pytest.importorskip("pillow_jxl")
    sink = io.BytesIO()
    image.save(sink, "JXL", lossless=True, **options)
    return sink.getvalue()


def _jp2(image: Image.Image = PICTURE, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG2000", **options)
    return sink.getvalue()


WRITERS = {"HEIC": _heic, "JPEG XL": _jxl, "JPEG 2000": _jp2}


@pytest.mark.parametrize("name", WRITERS)
def test_a_picture_is_decoded(name):
    decoded = images.decode(WRITERS[name](), 32)
    assert (decoded.status, decoded.error, decoded.width, decoded.height) == ("ok", None, 64, 48)
    assert np.abs(decoded.pixels_HW3 - EXPECTED).mean() < 4


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_grey_and_transparent_pictures_are_decoded(name, mode):
    image = PICTURE.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.new("L", image.size, 128))
    decoded = images.decode(WRITERS[name](image), 32)
    over_white = EXPECTED * 128 / 255 + 255 * 127 / 255
    grey = np.asarray(PICTURE.convert("L").convert("RGB").resize((32, 32))).astype(int)
    assert np.abs(decoded.pixels_HW3 - (over_white if mode == "RGBA" else grey)).mean() < 5


@pytest.mark.parametrize("name", WRITERS)
def test_a_picture_over_the_limits_is_rejected_with_its_size(name):
    image = PICTURE.resize((640, 480))
    decoded = images.decode(WRITERS[name](image), 32, max_pixels=640 * 480 - 1)
    assert (decoded.status, decoded.width, decoded.height) == ("rejected", 640, 480)
    assert decoded.error == f"640×480 is more than {640 * 480 - 1} pixels"


@pytest.mark.parametrize("name", WRITERS)
def test_a_picture_that_takes_much_memory_is_rejected(name, monkeypatch):
    from captioner.data.formats import limits

    monkeypatch.setattr(limits, "_LARGE", 1000)
    decoded = images.decode(WRITERS[name](), 32, max_pixels=64 * 48)
    assert decoded.status == "rejected"
    assert decoded.error.startswith("decoding takes")


LARGE = {
    "HEIC": lambda image: _heic(image),
    "JPEG XL, lossless": lambda image: _jxl(image, effort=1),
    "JPEG XL, alpha": lambda image: _jxl(image.convert("RGBA"), effort=1),
    "JPEG 2000": lambda image: _jp2(image),
    "JPEG 2000, alpha": lambda image: _jp2(image.convert("RGBA")),
    "JPEG 2000, grey": lambda image: _jp2(image.convert("L")),
}


@pytest.mark.parametrize("name", LARGE)
def test_decoding_takes_no_more_memory_than_it_is_reckoned_to(name):
    """Measured in a process of its own, beside the strip of a megapixel that is converted."""
    data = LARGE[name](PICTURE.resize((1600, 1600)))
    code = """
import sys
from captioner.data import images
from captioner.data.formats import limits
from captioner.data.formats.opening import open_picture

def mebibytes(name):
    [line] = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) / 1024

small, data = (bytes.fromhex(line) for line in sys.stdin)
images.decode(small, 32)
reckoned = open_picture(data).memory(10**9) / 2**20
open("/proc/self/clear_refs", "w").write("5")
before = mebibytes("VmRSS")
print(images.decode(data, 32).status, mebibytes("VmHWM") - before, reckoned)
"""
    small = LARGE[name](PICTURE)
    ran = subprocess.run(
        [sys.executable, "-c", code],
        input=f"{small.hex()}\n{data.hex()}".encode(),
        capture_output=True,
    )
    status, taken, reckoned = ran.stdout.split()
    assert status == b"ok", ran.stderr.decode()
    assert float(taken) < float(reckoned) + 14


@pytest.mark.parametrize("name", WRITERS)
def test_a_damaged_file_is_decoded_or_explained(name):
    data = WRITERS[name]()
    generator = np.random.default_rng(0)
    for length in generator.integers(1, len(data), 60).tolist():
        assert images.decode(data[:length], 32).status in ("ok", "undecodable")
    for place, bit in zip(generator.integers(0, len(data), 200), range(200), strict=True):
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit % 8
        decoded = images.decode(bytes(damaged), 32, max_pixels=10**6)
        assert (decoded.pixels_HW3 is None) == (decoded.status != "ok")
        assert decoded.error is None or decoded.error.isprintable()


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (2, np.fliplr),
        (3, lambda pixels: np.rot90(pixels, 2)),
        (4, np.flipud),
        (5, lambda pixels: pixels.swapaxes(0, 1)),
        (6, lambda pixels: np.rot90(pixels, -1)),
        (7, lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1)),
        (8, np.rot90),
    ],
)
def test_heic_is_turned_once(orientation, turn):
    """Its container turns it; an orientation in its Exif data must not turn it again."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = images.decode(_heic(), 64).pixels_HW3.astype(int)
    turned = images.decode(_heic(exif=exif.tobytes()), 64).pixels_HW3
    assert np.abs(turned - turn(upright)).mean() < 1
    assert np.abs(turned - upright).mean() > 50


@pytest.mark.parametrize("depth", [10, 12])
def test_heic_of_more_than_8_bits_is_decoded(depth):
    heif = pytest.importorskip("pillow_heif")
    pytest.importorskip("pi_heif")
    pixels = np.asarray(PICTURE).astype(np.uint16) * 257
    heif.options.SAVE_HDR_TO_12_BIT = depth == 12
    sink = io.BytesIO()
    heif.encode("RGB;16", PICTURE.size, pixels.tobytes(), sink, quality=95)
    heif.options.SAVE_HDR_TO_12_BIT = False
    decoded = images.decode(sink.getvalue(), 32)
    assert np.abs(decoded.pixels_HW3 - EXPECTED).mean() < 4


@pytest.mark.parametrize(("name", "package"), [("HEIC", "pi_heif"), ("JPEG XL", "pillow_jxl")])
def test_without_the_extra_the_file_is_named_with_its_size(name, package, monkeypatch):
    data = WRITERS[name]()
    find = extra_pictures.find_spec
    monkeypatch.setattr(
        extra_pictures, "find_spec", lambda each: None if each == package else find(each)
    )
    decoded = images.decode(data, 32)
    assert decoded.status == "undecodable"
    assert decoded.error == f"{name}, which needs captioner[formats]"
    assert (decoded.width, decoded.height) == (64, 48)


@pytest.mark.parametrize(
    "size", [(1, 1), (8, 8), (256, 256), (257, 9), (640, 480), (1000, 3), (800, 400), (3, 9000)]
)
@pytest.mark.parametrize("boxes", [False, True])
def test_the_header_of_a_jpeg_xl_has_its_size(size, boxes):
    assert known.jxl_size(_jxl(Image.new("RGB", size), use_container=boxes)) == size


def test_a_jpeg_inside_a_jpeg_xl_is_decoded(tmp_path):
    pytest.importorskip("pillow_jxl")
    path = tmp_path / "photo.jpg"
    PICTURE.save(path, quality=95)
    sink = io.BytesIO()
    with Image.open(path) as image:
        image.save(sink, "JXL", lossless_jpeg=True)
    expected = images.decode(path.read_bytes(), 32)
    decoded = images.decode(sink.getvalue(), 32)
    np.testing.assert_array_equal(decoded.pixels_HW3, expected.pixels_HW3)


def test_deep_colours_in_jpeg_2000_are_named_and_not_shown_wrongly():
    imagecodecs = pytest.importorskip("imagecodecs")
    deep = np.full((16, 16, 3), 1023, np.uint16)
    decoded = images.decode(bytes(imagecodecs.jpeg2k_encode(deep, bitspersample=10)), 16)
    assert decoded.status == "undecodable"
    assert decoded.error == "JPEG 2000 of 3 components of 10 bits, which captioner does not read"


def test_reading_other_formats_imports_no_package_of_the_extra():
    code = """
import sys
from captioner.data import images
assert images.decode(sys.stdin.buffer.read(), 32).status == "ok"
print([name for name in ("pi_heif", "pillow_jxl", "torch") if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], input=_jp2(), capture_output=True)
    assert ran.stdout.decode() == "[]\n", ran.stderr.decode()
