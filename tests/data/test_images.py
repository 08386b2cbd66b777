import functools
import io
import pickle
import resource
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from captioner.data import images
from captioner.data.formats import jpeg, limits, pictures
from captioner.data.images import DecodedImage
from captioner.data.preparation import Preparation
from captioner.errors import InputError

SIZE = 16
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
NOT_AN_IMAGE = "not an image in a known format"


def _encoded(image: Image.Image, file_format: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, file_format, **options)
    return sink.getvalue()


def _picture(width: int = 64, height: int = 48) -> Image.Image:
    """Four quadrants of different colours, each brighter to the right: no symmetry."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (160, 20, 20)
    pixels[: height // 2, width // 2 :] = (20, 160, 20)
    pixels[height // 2 :, : width // 2] = (20, 20, 160)
    pixels[height // 2 :, width // 2 :] = (120, 120, 20)
    pixels += np.linspace(0, 90, width).astype(np.uint8)[None, :, None]
    return Image.fromarray(pixels)


def _photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft blobs: what a photo is like at the scale of a thumbnail."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _halves(mode: str, left, right) -> Image.Image:
    image = Image.new(mode, (SIZE, SIZE), left)
    image.paste(right, (SIZE // 2, 0, SIZE, SIZE))
    return image


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int, colour: int, row: bytes, *extra: bytes) -> bytes:
    """A PNG of equal rows, of the bit depths and colour types that Pillow does not write."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = _chunk(b"IDAT", zlib.compress((b"\0" + row) * height))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data + _chunk(b"IEND", b"")


def _tiff(
    width: int, height: int, *extra: tuple[int, int, int, int], compression: int = 1
) -> bytes:
    """The head of a grey TIFF; what should be its pixels is a few zeros."""
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, 1, 100),
        *extra,
    ]
    tags = list({tag[0]: tag for tag in tags}.values())
    packed = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + packed + bytes(200)


def _prepared(size: int, keep_aspect: bool) -> Preparation:
    return Preparation(max_side=size, enlarge=True) if keep_aspect else Preparation(size=size)


def _decoded(data: bytes, size: int = SIZE, *, keep_aspect: bool = False, **options) -> np.ndarray:
    """The pixels of a sound file as a square, or with the aspect kept."""
    decoded = images.decode(data, _prepared(size, keep_aspect), **options)
    assert (decoded.status, decoded.error) == ("ok", None)
    assert decoded.pixels_HW3 is not None
    return decoded.pixels_HW3


def _assert_explained(decoded: DecodedImage) -> None:
    """Undecodable, with a reason that is one line and says nothing of this process."""
    assert decoded.pixels_HW3 is None
    assert decoded.status == "undecodable"
    assert decoded.error
    assert decoded.error.isprintable()
    assert " object at 0x" not in decoded.error


# What every decoded image is like.


def test_the_pixels_are_square_bytes_of_their_own():
    pixels = _decoded(_encoded(_picture(), "PNG"), 32)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous


def test_the_size_is_that_of_the_file():
    decoded = images.decode(_encoded(_picture(70, 40), "JPEG"), SIZE)
    assert (decoded.width, decoded.height) == (70, 40)


def test_an_image_is_resized_bilinearly():
    image = _photo(50, 30)
    expected = image.resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(_decoded(_encoded(image, "PNG"), 32), np.asarray(expected))


@pytest.mark.parametrize(
    ("width", "height", "shape"),
    [
        (200, 100, (25, 50, 3)),
        (100, 200, (50, 25, 3)),
        (10, 5, (25, 50, 3)),
        (1000, 1, (1, 50, 3)),
        (1, 1000, (50, 1, 3)),
        (50, 50, (50, 50, 3)),
    ],
)
def test_keep_aspect_makes_the_longer_side_the_size(width, height, shape):
    data = _encoded(_photo(width, height), "PNG")
    assert _decoded(data, 50, keep_aspect=True).shape == shape


# Orientation.

UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}
ORIENTED = {
    "jpeg": ("JPEG", {"quality": 95}),
    "mpo": ("MPO", {"save_all": True, "append_images": [Image.new("RGB", (64, 48))]}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}),
    "tiff-lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "avif": ("AVIF", {"quality": 90}),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ORIENTED)
def test_the_orientation_is_applied(kind, orientation):
    file_format, options = ORIENTED[kind]
    stored = _decoded(_encoded(_picture(), file_format, **options), 64, keep_aspect=True)
    assert np.abs(stored.astype(int) - np.asarray(_picture())).mean() < 4
    data = _encoded(_picture(), file_format, exif=_exif(orientation), **options)
    decoded = images.decode(data, _prepared(64, True))
    np.testing.assert_array_equal(decoded.pixels_HW3, UPRIGHT[orientation](stored))
    assert (decoded.width, decoded.height) == (64, 48)
    assert _decoded(data, 32).shape == (32, 32, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF"])
def test_an_orientation_that_does_not_exist_is_ignored(file_format, orientation):
    plain = _encoded(_picture(), file_format)
    odd = _encoded(_picture(), file_format, exif=_exif(orientation))
    np.testing.assert_array_equal(_decoded(odd), _decoded(plain))


def test_an_orientation_after_the_pixels_of_a_png_is_applied():
    plain = _encoded(_picture(), "PNG")
    exif = _chunk(b"eXIf", _exif(6).tobytes().removeprefix(b"Exif\0\0"))
    end = _chunk(b"IEND", b"")
    stored = _decoded(plain, 64, keep_aspect=True)
    turned = _decoded(plain.removesuffix(end) + exif + end, 64, keep_aspect=True)
    np.testing.assert_array_equal(turned, np.rot90(stored, -1))


BROKEN_EXIF = {
    "garbage": b"Exif\0\0" + b"\xff" * 40,
    "no header": b"Exif\0\0II",
    "directory outside": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "directory cut short": b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01",
    "value outside": b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x010E, 2, 99, 2**31),
    "orientation is text": b"Exif\0\0II*\0\x08\0\0\0\x01\0"
    + struct.pack("<HHI4s", 274, 2, 2, b"6"),
    "rational by zero": b"Exif\0\0II*\0\x08\0\0\0\x01\0"
    + struct.pack("<HHII", 0x011A, 5, 1, 26)
    + struct.pack("<IIII", 0, 0, 0, 0),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", BROKEN_EXIF)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_in_a_sound_image_does_not_matter(file_format, name):
    plain = _encoded(_picture(), file_format)
    broken = _encoded(_picture(), file_format, exif=BROKEN_EXIF[name])
    assert broken != plain
    np.testing.assert_array_equal(_decoded(broken), _decoded(plain))


# Modes.


def _lab(colour: tuple[int, int, int]) -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(
        Image.new("RGB", (SIZE, SIZE), colour), *profiles, outputMode="LAB"
    )
    assert image is not None
    return image


def _array(left: float, right: float, dtype: str) -> Image.Image:
    pixels = np.full((SIZE, SIZE), left, dtype)
    pixels[:, SIZE // 2 :] = right
    return Image.fromarray(pixels)


def _palette(mode: str, alpha: int = 255) -> Image.Image:
    """Red and blue; in mode PA, the blue half has this alpha."""
    image = _halves("P", 0, 1)
    image.putpalette([*RED, *BLUE])
    if mode == "PA":
        image = image.convert("PA")
        image.putalpha(_halves("L", 255, alpha))
    return image


def _mode_files() -> dict[str, tuple[str, bytes, tuple, tuple]]:
    """By name: the mode that Pillow opens it in, the file, and its left and its right colour."""
    half = SIZE // 2
    key = _chunk(b"tRNS", struct.pack(">H", 200))
    big_endian = Image.frombytes(
        "I;16B",
        (SIZE, SIZE),
        np.tile([0] * half + [128 * 257] * half, SIZE).astype(">u2").tobytes(),
    )
    reddish, bluish = (200, 80, 60), (80, 90, 180)  # 8-bit LAB is coarse where sRGB ends
    lab = _lab(reddish)
    lab.paste(_lab(bluish), (half, 0))
    black, grey, mid = (0, 0, 0), (40, 40, 40), (128, 128, 128)
    return {
        "1 png": ("1", _encoded(_halves("1", 0, 1), "PNG"), black, WHITE),
        "1 tiff": ("1", _encoded(_halves("1", 0, 1), "TIFF", compression="group4"), black, WHITE),
        "L png": ("L", _encoded(_halves("L", 40, 128), "PNG"), grey, mid),
        "L jpeg": ("L", _encoded(_halves("L", 40, 128), "JPEG"), grey, mid),
        "L bmp": ("L", _encoded(_halves("L", 40, 128), "BMP"), grey, mid),
        "L png, 200 transparent": (
            "L",
            _png(SIZE, SIZE, 8, 0, b"\x28" * half + b"\xc8" * half, key),
            grey,
            WHITE,
        ),
        "L png of 2 bits": ("L", _png(SIZE, SIZE, 2, 0, b"\0\0\xaa\xaa"), black, (170,) * 3),
        "LA png": ("LA", _encoded(_halves("LA", (40, 255), (40, 0)), "PNG"), grey, WHITE),
        "LA png, half": (
            "LA",
            _encoded(_halves("LA", (0, 128), (0, 255)), "PNG"),
            (127,) * 3,
            black,
        ),
        "LA png of 16 bits": (
            "RGBA",
            _png(SIZE, SIZE, 16, 4, b"\x28\x28\xff\xff" * half + bytes(4) * half),
            grey,
            WHITE,
        ),
        "LA tiff": ("LA", _encoded(_halves("LA", (40, 255), (40, 0)), "TIFF"), grey, WHITE),
        "P png": ("P", _encoded(_palette("P"), "PNG"), RED, BLUE),
        "P gif": ("P", _encoded(_palette("P"), "GIF"), RED, BLUE),
        "P bmp": ("P", _encoded(_palette("P"), "BMP"), RED, BLUE),
        "P tiff": ("P", _encoded(_palette("P"), "TIFF"), RED, BLUE),
        "P png, blue transparent": (
            "P",
            _encoded(_palette("P"), "PNG", transparency=1),
            RED,
            WHITE,
        ),
        "P png, half and half": (
            "P",
            _encoded(_palette("P"), "PNG", transparency=b"\xff\x80"),
            RED,
            (127, 127, 255),
        ),
        "P gif, blue transparent": (
            "P",
            _encoded(_palette("P"), "GIF", transparency=1),
            RED,
            WHITE,
        ),
        "PA tiff": ("PA", _encoded(_palette("PA", 0), "TIFF"), RED, WHITE),
        "RGB png": ("RGB", _encoded(_halves("RGB", RED, BLUE), "PNG"), RED, BLUE),
        "RGB webp": ("RGB", _encoded(_halves("RGB", RED, BLUE), "WEBP", lossless=True), RED, BLUE),
        "RGB avif": ("RGB", _encoded(_halves("RGB", RED, BLUE), "AVIF", quality=100), RED, BLUE),
        "RGB png of 16 bits": (
            "RGB",
            _png(SIZE, SIZE, 16, 2, b"\xff\xff\0\0\0\0" * half + b"\0\0\0\0\xff\xff" * half),
            RED,
            BLUE,
        ),
        "RGB png, blue transparent": (
            "RGB",
            _encoded(_halves("RGB", RED, BLUE), "PNG", transparency=BLUE),
            RED,
            WHITE,
        ),
        "RGBA png": ("RGBA", _encoded(_halves("RGBA", (*RED, 255), (*BLUE, 0)), "PNG"), RED, WHITE),
        "RGBA tiff": (
            "RGBA",
            _encoded(_halves("RGBA", (*RED, 128), (*BLUE, 0)), "TIFF"),
            (255, 127, 127),
            WHITE,
        ),
        "RGBA webp": (
            "RGBA",
            _encoded(_halves("RGBA", (*RED, 255), (*BLUE, 0)), "WEBP", lossless=True),
            RED,
            WHITE,
        ),
        "RGBA png of 16 bits": (
            "RGBA",
            _png(SIZE, SIZE, 16, 6, b"\xff\xff\0\0\0\0\xff\xff" * half + bytes(8) * half),
            RED,
            WHITE,
        ),
        "CMYK jpeg": (
            "CMYK",
            _encoded(_halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "JPEG", quality=100),
            RED,
            BLUE,
        ),
        "CMYK tiff": (
            "CMYK",
            _encoded(_halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "TIFF"),
            RED,
            BLUE,
        ),
        "YCbCr jpeg": (
            "RGB",
            _encoded(_halves("RGB", RED, BLUE), "JPEG", quality=100, subsampling=0),
            RED,
            BLUE,
        ),
        "YCbCr tiff of JPEG": (
            "RGB",
            _encoded(_halves("RGB", RED, BLUE), "TIFF", compression="jpeg", quality=100),
            RED,
            BLUE,
        ),
        "YCbCr tiff": (
            "YCbCr",
            _encoded(_halves("YCbCr", (76, 85, 255), (29, 255, 107)), "TIFF"),
            RED,
            BLUE,
        ),
        "LAB tiff": ("LAB", _encoded(lab, "TIFF"), reddish, bluish),
        "I;16 png": ("I;16", _encoded(_array(0, 128 * 257, "uint16"), "PNG"), black, mid),
        "I;16 png, dark": ("I;16", _encoded(_array(0, 255, "uint16"), "PNG"), black, (1, 1, 1)),
        "I;16 tiff": ("I;16", _encoded(_array(0, 128 * 257, "uint16"), "TIFF"), black, mid),
        "I;16B tiff": ("I;16B", _encoded(big_endian, "TIFF"), black, mid),
        "I tiff, to 255": ("I", _encoded(_array(40, 255, "int32"), "TIFF"), grey, WHITE),
        "I tiff, to 65535": ("I", _encoded(_array(-9, 65535, "int32"), "TIFF"), black, WHITE),
        "I tiff, to a million": (
            "I",
            _encoded(_array(502_000, 10**6, "int32"), "TIFF"),
            mid,
            WHITE,
        ),
        "F tiff, to 1": ("F", _encoded(_array(0.501, 1, "float32"), "TIFF"), mid, WHITE),
        "F tiff, to 255": ("F", _encoded(_array(40, 128, "float32"), "TIFF"), grey, mid),
        "F tiff, not a number": (
            "F",
            _encoded(_array(np.nan, 0.501, "float32"), "TIFF"),
            black,
            mid,
        ),
        "F tiff, infinite": ("F", _encoded(_array(np.inf, 0.501, "float32"), "TIFF"), black, mid),
        "F tiff, all zero": ("F", _encoded(_array(0, 0, "float32"), "TIFF"), black, black),
    }


MODE_FILES = _mode_files()


@pytest.mark.parametrize("name", MODE_FILES)
def test_every_mode_becomes_rgb_over_white(name):
    mode, data, left, right = MODE_FILES[name]
    with Image.open(io.BytesIO(data)) as image:
        if (mode, image.mode) == ("YCbCr", "RGB"):
            pytest.skip("this Pillow takes uncompressed YCbCr for RGB")
        assert image.mode == mode
    pixels = _decoded(data).astype(int)
    assert np.abs(pixels[:, : SIZE // 2 - 1] - left).max() <= 3
    assert np.abs(pixels[:, SIZE // 2 + 1 :] - right).max() <= 3


def test_all_colours_of_lab_are_the_same_in_every_thread():
    data = MODE_FILES["LAB tiff"][1]
    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(_decoded, [data] * 64))
    for pixels in decoded:
        np.testing.assert_array_equal(pixels, decoded[0])


# Animations.


def _animation(file_format: str, **options) -> bytes:
    first, *others = (Image.new("RGB", (SIZE, SIZE), colour) for colour in (RED, BLUE, WHITE))
    return _encoded(first, file_format, save_all=True, append_images=others, **options)


ANIMATIONS = {
    "GIF": _animation("GIF", duration=50),
    "WEBP": _animation("WEBP", duration=50, lossless=True),
    "PNG": _animation("PNG", duration=50),
    "AVIF": _animation("AVIF", quality=95),
    "MPO": _animation("MPO", quality=95),
    "TIFF": _animation("TIFF"),
}


@pytest.mark.parametrize("file_format", ANIMATIONS)
def test_the_first_frame_of_an_animation_counts(file_format):
    with Image.open(io.BytesIO(ANIMATIONS[file_format])) as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
    assert np.abs(_decoded(ANIMATIONS[file_format]).astype(int) - RED).max() <= 6


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("file_format", ["GIF", "PNG"])
def test_frames_after_the_first_are_not_decoded(file_format):
    data = ANIMATIONS[file_format]
    np.testing.assert_array_equal(_decoded(data[: len(data) * 6 // 10]), _decoded(data))


# Large JPEGs are decoded at a fraction of their size.


@pytest.mark.parametrize(
    ("width", "height", "fraction"),
    [
        (900, 768, 8),
        (1001, 799, 8),
        (767, 767, 4),
        (384, 384, 4),
        (192, 450, 2),
        (191, 900, 1),
        (900, 150, 1),
    ],
)
def test_a_large_jpeg_is_decoded_at_a_fraction(width, height, fraction):
    data = _encoded(_photo(width, height), "JPEG", quality=90)
    pixels = _decoded(data, 32)
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (width // fraction, height // fraction))
        assert image.size == (-(-width // fraction), -(-height // fraction))
        box = (0, 0, width / fraction, height / fraction)
        np.testing.assert_array_equal(pixels, _resized(image, 32, box))
    with Image.open(io.BytesIO(data)) as image:
        if fraction > 1:
            assert (pixels != _resized(image, 32)).any(), "in full, it looks otherwise"
        exact = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    difference = np.abs(pixels.astype(int) - exact)
    assert difference.mean() < 1
    assert difference.max() < 8


def _resized(image: Image.Image, size: int, box=None) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=6.0))


def test_a_photo_is_gone_through_once(monkeypatch: pytest.MonkeyPatch):
    """Its scans are counted once, and its pixels decoded once."""
    counted, loaded = [], []
    count, load = jpeg.scan_components, ImageFile.ImageFile.load

    def record(image: ImageFile.ImageFile):
        loaded.extend(image.tile)  # nothing where the pixels are there
        return load(image)

    monkeypatch.setattr(pictures, "scan_components", lambda data: counted.append(1) or count(data))
    monkeypatch.setattr(ImageFile.ImageFile, "load", record)
    _decoded(_encoded(_photo(1600, 1200), "JPEG", quality=90), 100)
    assert (len(counted), len(loaded)) == (1, 1)


def test_the_scans_of_a_jpeg_are_counted():
    one = _encoded(_photo(160, 120), "JPEG")
    assert jpeg.scan_components(one) == [3]
    assert jpeg.scan_components(_encoded(_photo(160, 120).convert("L"), "JPEG")) == [1]
    assert jpeg.scan_components(one + one) == [3], "what follows the end does not count"
    assert len(jpeg.scan_components(_encoded(_photo(160, 120), "JPEG", progressive=True))) > 5
    header, body = one[:2], one[2:]
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(one)) + one
    assert jpeg.scan_components(header + thumbnail + body) == [3]


def test_a_fraction_keeps_the_aspect_too():
    data = _encoded(_photo(1600, 800), "JPEG", quality=90)
    pixels = _decoded(data, 100, keep_aspect=True)
    with Image.open(io.BytesIO(data)) as image:
        full = np.asarray(image.resize((100, 50), Image.Resampling.BILINEAR))
    assert pixels.shape == full.shape
    assert np.abs(pixels.astype(int) - full).mean() < 1.5
    assert images.decode(data, _prepared(100, True)).width == 1600


# Limits.


def test_a_file_over_the_byte_limit_is_rejected_unparsed():
    data = _encoded(_picture(), "PNG")
    assert images.decode(data, SIZE, max_bytes=len(data)).status == "ok"
    expected = DecodedImage(None, None, None, "rejected", f"more than {len(data) - 1} bytes")
    assert images.decode(data, SIZE, max_bytes=len(data) - 1) == expected


def test_an_image_over_the_pixel_limit_is_rejected():
    data = _encoded(_picture(64, 48), "PNG")
    assert images.decode(data, SIZE, max_pixels=64 * 48).status == "ok"
    error = "64×48 is more than 3071 pixels"
    assert images.decode(data, SIZE, max_pixels=64 * 48 - 1) == DecodedImage(
        None, 64, 48, "rejected", error
    )


def _patched(image: Image.Image, file_format: str, marker: bytes, offset: int, new: bytes) -> bytes:
    data = bytearray(_encoded(image, file_format))
    at = data.index(marker) + offset
    data[at : at + len(new)] = new
    return bytes(data)


def test_the_pixel_limit_is_ours_alone(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # twice that is an error to Pillow
    assert _decoded(_encoded(_photo(200, 200), "PNG")).shape == (SIZE, SIZE, 3)


def _bombs() -> dict[str, tuple[int, bytes]]:
    """Small files that say they are huge, and their width."""
    n, small = 60_000, Image.new("RGB", (16, 16))
    gif_colours = b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    gif_frame = b"," + struct.pack("<HHHHB", 0, 0, n, n, 0) + b"\x02\x02\x4c\x01\0;"
    gif_clearing = b"!\xf9\x04\x08\0\0\0\0"  # to the background, after the frame
    frames = _chunk(b"acTL", struct.pack(">II", 2, 0))
    frames += _chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, n, n, 0, 0, 1, 1, 1, 0))
    cleared = _png(n, 1, 8, 2, b"", frames)
    lossless = _encoded(small, "WEBP", lossless=True)
    at = lossless.index(b"VP8L") + 9
    webp = lossless[:at] + struct.pack("<I", 16_382 << 14 | 16_382) + lossless[at + 4 :]
    return {
        "png": (n, _png(n, 1, 8, 2, b"").replace(_chunk_head(n, 1), _chunk_head(n, n))),
        "png, cleared": (n, cleared.replace(_chunk_head(n, 1), _chunk_head(n, n))),
        "gif": (n, b"GIF89a" + struct.pack("<HH", n, n) + gif_colours + gif_frame),
        "gif, cleared": (n, b"GIF89a" + bytes(4) + gif_colours + gif_clearing + gif_frame),
        "gif, frame": (n, b"GIF89a" + struct.pack("<HH", 9, 9) + gif_colours + gif_frame),
        "tiff": (n, _tiff(n, n)),
        "tiff-lzw": (n, _tiff(n, n, compression=5)),
        "bmp": (n, _patched(small, "BMP", b"BM", 18, struct.pack("<ii", n, n))),
        "jpeg": (n, _patched(small, "JPEG", b"\xff\xc0", 5, struct.pack(">HH", n, n))),
        "webp": (16_383, webp),
    }


def _chunk_head(width: int, height: int) -> bytes:
    return _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


BOMBS = _bombs()


def _decoded_cheaply(data: bytes) -> DecodedImage:
    assert len(data) < 1000
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    decoded = images.decode(data, SIZE)
    assert time.process_time() - begin < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000, "kilobytes"
    return decoded


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_claims_too_many_pixels_is_rejected_at_once(name):
    side, data = BOMBS[name]
    error = f"{side}×{side} is more than 256000000 pixels"
    assert _decoded_cheaply(data) == DecodedImage(None, side, side, "rejected", error)


def test_tiles_of_too_many_pixels_are_rejected_at_once():
    side = 30_000
    tiles = [(322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 8), (325, 4, 1, 100)]
    error = "its tiles have more than 256000000 pixels"
    assert _decoded_cheaply(_tiff(100, 100, *tiles, compression=5)) == DecodedImage(
        None, 100, 100, "rejected", error
    )


@pytest.mark.parametrize(("tag", "kind"), [(273, 1), (324, 3)])
def test_a_tiff_of_too_many_strips_or_tiles_is_rejected(tag, kind):
    """Each is a pixel, at 8 or at 0: the offsets are bytes, or of 16 bits."""
    for count, problem in [(100_000, None), (100_001, "it has more than 100000 strips or tiles")]:
        data = _tiff(1, count, (278, 4, 1, 1), (322, 4, 1, 1), (323, 4, 1, 1))
        offsets = struct.pack("<HHII", tag, kind, count, len(data))
        data = data.replace(struct.pack("<HHII", 273, 4, 1, 8), offsets) + b"\x08\0" * count
        decoded = images.decode(data, SIZE)
        assert (decoded.status, decoded.error) == ("rejected" if problem else "ok", problem)


def _riff(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def _webp_canvas(width: int, height: int, frame: bytes | None = None) -> bytes:
    """An animated WebP whose one frame, of a pixel, stands on a canvas of that size."""
    frame = frame or _encoded(Image.new("RGB", (1, 1), RED), "WEBP", lossless=True)[12:]
    sides = b"".join(struct.pack("<I", side - 1)[:3] for side in (width, height))
    body = b"WEBP" + _riff(b"VP8X", b"\x02\0\0\0" + sides) + _riff(b"ANIM", bytes(6))
    body += _riff(b"ANMF", bytes(12) + b"\x64\0\0\0" + frame)
    return _riff(b"RIFF", body)


def _decoded_in_a_process(*files: bytes) -> list[tuple[DecodedImage, int, int]]:
    """Outcomes in a process that keeps freed memory, as jobs do; the MiB each took, and left."""
    code = """
import pickle, sys
from captioner.data import images
from captioner.runtime import memory

def mebibytes(name):
    [line] = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) // 1024

memory.keep_freed_memory()
files, measured = pickle.load(sys.stdin.buffer), []
images.decode(files[0], 8, max_pixels=1)
for data in files:
    memory.release_freed_memory()
    open("/proc/self/clear_refs", "w").write("5")
    before = mebibytes("VmRSS")
    decoded = images.decode(data, 16)
    measured.append((decoded, mebibytes("VmHWM") - before, mebibytes("VmRSS") - before))
pickle.dump(measured, sys.stdout.buffer)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(files), capture_output=True, check=False
    )
    assert ran.returncode == 0, ran.stderr.decode()
    return pickle.loads(ran.stdout)


def test_what_opening_would_allocate_is_checked_before():
    bombs = [_webp_canvas(15_900, 15_900)] * 2  # at first the memory is zero without being touched
    for decoded, most, _ in _decoded_in_a_process(*bombs):
        error = "decoding takes 4044960000 bytes of memory, more than 384000000"
        assert decoded == DecodedImage(None, 15_900, 15_900, "rejected", error)
        assert most < 100


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
def test_the_size_of_a_webp_is_read_from_its_head(monkeypatch, lossless, alpha):
    image = Image.new("RGBA", (301, 202), (*RED, 90)) if alpha else Image.new("RGB", (301, 202))
    data = _encoded(image, "WEBP", lossless=lossless)
    assert images.decode(data, SIZE, max_pixels=301 * 202).status == "ok"
    monkeypatch.setattr(Image, "open", None)
    error = "301×202 is more than 60801 pixels"
    assert images.decode(data, SIZE, max_pixels=301 * 202 - 1) == DecodedImage(
        None, 301, 202, "rejected", error
    )


def test_a_large_image_leaves_no_memory_behind():
    side = 2900
    png = _png(5900, 5900, 8, 2, bytes(3 * 5900))
    files = {
        "webp": _encoded(_photo(side, side), "WEBP", method=0),
        "webp, canvas": _webp_canvas(side, side),
        "webp, broken frame": _webp_canvas(side, side, _riff(b"VP8L", b"\x2f" + bytes(4))),
        "png": png,
        "png, broken": png[: len(png) // 2],
    }
    for name, measured in zip(files, _decoded_in_a_process(*files.values()), strict=True):
        decoded, most, left = measured
        assert decoded.status == ("undecodable" if "broken" in name else "ok"), name
        assert most > 60, name
        assert left < 20, name


def _memory(data: bytes, size: int, monkeypatch, *, keep_aspect: bool = False) -> int:
    """Bytes that an image is reckoned to take."""
    reckoned = []
    admit = limits.admit

    def record(width: int, height: int, memory: int, *arguments):
        reckoned.append(memory)
        admit(width, height, memory, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(images, "admit", record)
        images.decode(data, _prepared(size, keep_aspect))
    [memory] = reckoned
    return memory


@pytest.mark.parametrize(
    ("width", "height", "keep_aspect", "fraction"),
    [
        (768, 768, False, 8),
        (4000, 768, False, 8),
        (4000, 767, False, 4),
        (4000, 383, False, 2),
        (4000, 191, False, 1),
        (191, 4000, False, 1),
        (4000, 127, True, 8),
        (127, 127, True, 1),
    ],
)
def test_a_jpeg_is_reckoned_at_the_fraction_that_it_is_decoded_at(
    monkeypatch, width, height, keep_aspect, fraction
):
    """Its pixels are 4 bytes in Pillow, and 1 byte where they are grey."""
    pixels = -(-width // fraction) * -(-height // fraction)
    options = {"keep_aspect": keep_aspect}
    for mode, count in (("RGB", 4), ("CMYK", 4), ("L", 1)):
        data = _encoded(Image.new(mode, (width, height)), "JPEG")
        assert _memory(data, 32, monkeypatch, **options) == pixels * count
    # With all its coefficients of 2 bytes: the two of colour are a quarter as many, or as many.
    for sampling, coefficients in (("4:2:0", 1.5), ("4:4:4", 3)):
        data = _encoded(_photo(width, height), "JPEG", progressive=True, subsampling=sampling)
        expected = pixels * 4 + int(width * height * 2 * coefficients)
        assert _memory(data, 32, monkeypatch, **options) == expected


def _first_scan(data: bytes) -> bytes:
    """A JPEG that has no more."""
    scan = data.index(b"\xff\xda")
    scan += 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    return data[: data.index(b"\xff", scan)] + b"\xff\xd9"


def test_a_jpeg_of_one_scan_may_keep_all_its_coefficients(monkeypatch):
    """One whose scan has not all components, or not all of a block."""
    side = 768
    data = _encoded(Image.new("RGB", (side, side)), "JPEG", subsampling=0, progressive=True)
    coarse = _first_scan(data)
    assert jpeg.scan_components(coarse) == [3]
    assert _memory(coarse, 32, monkeypatch) == (side // 8) ** 2 * 4 + side**2 * 6
    plain = _encoded(Image.new("RGB", (side, side)), "JPEG", subsampling=0)
    one_of_three = plain.replace(b"\xff\xda\0\x0c\x03", b"\xff\xda\0\x08\x01")
    assert jpeg.scan_components(one_of_three) == [1]
    assert _memory(one_of_three, 32, monkeypatch) == (side // 8) ** 2 * 4 + side**2 * 6


def test_a_tile_is_reckoned_though_it_is_larger_than_its_image(monkeypatch):
    tiles = [(322, 4, 1, 5000), (323, 4, 1, 4000), (324, 4, 1, 8), (325, 4, 1, 100)]
    expected = 100 * 100 + 5000 * 4000
    assert _memory(_tiff(100, 100, *tiles, compression=5), 32, monkeypatch) == expected


def test_a_compressed_bitmap_is_rejected_where_its_copies_are_too_many():
    """Each of its runs is 255 rows that are left out."""
    side, rows = 15_300, b"\0\2\0\xff" * 60 + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 0, 0, 2, 0)
    start = 14 + len(header) + 8
    data = b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + bytes(8) + rows
    error = f"decoding takes {3 * side**2} bytes of memory, more than 384000000"
    assert _decoded_cheaply(data) == DecodedImage(None, side, side, "rejected", error)


def test_a_wide_jpeg_is_decoded_alone(monkeypatch):
    alone = []
    load = ImageFile.ImageFile.load

    def record(image: ImageFile.ImageFile):
        if image.tile:
            alone.append(limits.one_large_image.locked())
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", record)
    data = _encoded(Image.new("RGB", (65_500, 540)), "JPEG")
    for size in (91, 90):  # 4 bytes of each pixel are 141 MB; at a half they are 35
        assert images.decode(data, size).status == "ok"
    assert alone == [True, False]


def test_a_large_webp_is_opened_alone(monkeypatch):
    alone = []
    open_image = Image.open

    def record(*arguments, **options):
        alone.append(limits.one_large_image.locked())
        return open_image(*arguments, **options)

    monkeypatch.setattr(Image, "open", record)
    for side in (100, 2900):
        assert images.decode(_webp_canvas(side, side), SIZE).status == "ok"
    assert alone == [False, True]
    assert not limits.one_large_image.locked()


# What is no image, or is one no more.


def test_an_empty_file_is_undecodable():
    expected = DecodedImage(None, None, None, "undecodable", "the file is empty")
    assert images.decode(b"", SIZE) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"a line of text\n",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"%PDF-1.7\n",
        b"\0",
        bytes(4096),
        bytes(range(256)) * 16,
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\x04\0\0\0WEBP",
        b"BM",
        b"GIF89a",
        b"II*\0",
    ],
)
def test_what_is_no_image_is_undecodable(data):
    decoded = images.decode(data, SIZE)
    _assert_explained(decoded)
    assert (decoded.width, decoded.height) == (None, None)


def test_text_is_not_an_image_in_a_known_format():
    assert images.decode(b"a line of text\n", SIZE).error == NOT_AN_IMAGE


@functools.cache
def _sound_files() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    options = {"exif": _exif(6)}
    animated = {"save_all": True, "append_images": [image.rotate(180)]}
    return {
        "jpeg": _encoded(image, "JPEG", **options),
        "jpeg-progressive": _encoded(image, "JPEG", progressive=True),
        "jpeg-cmyk": _encoded(image.convert("CMYK"), "JPEG"),
        "mpo": _encoded(image, "MPO", **animated),
        "png": _encoded(image, "PNG", **options),
        "png-palette": _encoded(image.convert("P"), "PNG", transparency=3),
        "png-animated": _encoded(image, "PNG", **animated),
        "png-16": _encoded(_array(0, 40_000, "uint16"), "PNG"),
        "webp": _encoded(image, "WEBP", **options),
        "webp-lossless": _encoded(image.convert("RGBA"), "WEBP", lossless=True),
        "webp-animated": _encoded(image, "WEBP", **animated),
        "bmp": _encoded(image, "BMP"),
        "gif": _encoded(image, "GIF"),
        "gif-animated": _encoded(image, "GIF", **animated),
        "tiff": _encoded(image, "TIFF", **options),
        "tiff-lzw": _encoded(image, "TIFF", compression="tiff_lzw"),
        "tiff-jpeg": _encoded(image, "TIFF", compression="jpeg"),
        "tiff-lab": MODE_FILES["LAB tiff"][1],
        "tiff-float": MODE_FILES["F tiff, to 1"][1],
        "avif": _encoded(image, "AVIF"),
    }


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", _sound_files())
def test_a_truncated_file_is_decoded_or_explained(name):
    data = _sound_files()[name]
    assert images.decode(data, SIZE).status == "ok"
    lengths = {*range(1, 64), *(len(data) * step // 100 for step in range(1, 100))}
    outcomes = []
    for length in sorted(lengths):
        decoded = images.decode(data[:length], SIZE)
        if decoded.status != "ok":
            _assert_explained(decoded)
        assert images.decode(data[:length], SIZE).error == decoded.error, "the same on every run"
        outcomes.append(decoded.status)
    assert set(outcomes[:8]) == {"undecodable"}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "name", ["jpeg", "jpeg-progressive", "png", "webp", "bmp", "gif", "tiff", "tiff-lzw", "avif"]
)
def test_half_a_file_is_undecodable(name):
    data = _sound_files()[name]
    _assert_explained(images.decode(data[: len(data) // 2], SIZE))


def test_the_size_is_told_where_only_the_pixels_are_broken():
    data = _sound_files()["png"]
    decoded = images.decode(data[: len(data) // 2], SIZE)
    assert (decoded.width, decoded.height) == (40, 30)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(_sound_files())),
    in_head=st.booleans(),
    flips=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=6
    ),
)
def test_flipped_bits_are_decoded_or_explained(name, in_head, flips):
    data = bytearray(_sound_files()[name])
    reach = min(len(data), 400) if in_head else len(data)
    for place, bit in flips:
        data[int(place * reach)] ^= 1 << bit
    decoded = images.decode(bytes(data), SIZE, max_pixels=10**6)
    if decoded.status == "ok":
        assert decoded.pixels_HW3 is not None
        assert decoded.pixels_HW3.shape == (SIZE, SIZE, 3)
        assert decoded.error is None
    elif decoded.status == "rejected":
        assert decoded.error is not None
        assert decoded.error.endswith("more than 1000000 pixels")
    else:
        _assert_explained(decoded)


def test_decoding_in_threads_works_from_the_first_image_on():
    code = """
import io, sys
from concurrent.futures import ThreadPoolExecutor
from captioner.data import images
files = [bytes.fromhex(line) for line in sys.stdin]
with ThreadPoolExecutor(8) as pool:
    print(*pool.map(lambda data: images.decode(data, 8).error, files * 4))
"""
    files = [data for data in _sound_files().values() if len(data) < 20_000]
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        input="\n".join(data.hex() for data in files),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.split() == ["None"] * 4 * len(files), ran.stderr


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_an_image_in_memory_is_prepared_as_its_file_is(mode: str):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG")
    expected = images.decode(file.getvalue(), 16).pixels_HW3
    np.testing.assert_array_equal(images.prepare_image(image, Preparation(size=16)), expected)


def test_an_image_in_memory_is_turned_upright():
    image = Image.new("RGB", (40, 20))
    image.getexif()[0x0112] = 6
    prepared = images.prepare_image(image, Preparation(max_side=20, enlarge=False))
    assert prepared.shape == (20, 10, 3)


def test_a_cmyk_image_and_an_array_are_prepared():
    red = np.full((4, 6, 3), (255, 0, 0), np.uint8)
    for image in (red, Image.fromarray(red).convert("CMYK")):
        prepared = images.prepare_image(image, Preparation(size=2))
        assert prepared.dtype == np.uint8
        assert prepared.tolist() == [[[255, 0, 0]] * 2] * 2


@pytest.mark.parametrize("pixels", [np.zeros((4, 6, 3)), np.zeros((4, 6), np.uint8)])
def test_an_array_that_is_no_image_is_refused(pixels: np.ndarray):
    with pytest.raises(InputError, match=r"use uint8 \(height, width, 3\)"):
        images.prepare_image(pixels, Preparation(size=2))
