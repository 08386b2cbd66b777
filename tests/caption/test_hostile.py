"""Files and names that are meant to do harm, one by one and a thousand at once."""

import io
import itertools
import json
import os
import random
import socket
import struct
import subprocess
import sys
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from captioner.caption.job import caption_images
from captioner.cli import main
from captioner.config import RunConfig
from captioner.data import images
from captioner.model import bundle
from conftest import write_photos

MODES = (
    *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB"),
    *("HSV", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"),
)
FORMATS = {
    "jpg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "bmp": "BMP",
    "gif": "GIF",
    "tif": "TIFF",
    "avif": "AVIF",
    "jp2": "JPEG2000",
}
RUN = RunConfig(
    max_error_rate=1.0, engine="local", shard_size=64, batch_size=16, precision="fp32", device="cpu"
)


def _encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, file_format, **options)
    return sink.getvalue()


def _noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _in_mode(mode: str) -> Image.Image:
    if mode in ("PA", "La", "RGBa"):
        return _noise().convert({"PA": "P", "La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    if mode == "LAB" or mode.startswith("I;16"):
        return Image.frombytes(
            mode, (40, 30), random.Random(0).randbytes(2400 + 1200 * (mode == "LAB"))
        )
    return _noise().convert(mode)


@cache
def mode_files() -> dict[str, bytes]:
    """Each of Pillow's modes in each format that holds it, by file name."""
    pairs = itertools.product(MODES, FORMATS.items())
    return {
        f"{mode.replace(';', '-')}.{ending}": data
        for mode, (ending, file_format) in pairs
        if (data := _encoded_if_possible(_in_mode(mode), file_format))
    }


def _encoded_if_possible(image: Image.Image, file_format: str) -> bytes | None:
    try:
        return _encoded(image, file_format)
    except (OSError, ValueError, KeyError):  # the format has no such mode
        return None


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, data: bytes, *extra: bytes, colour: int = 2) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    parts = (b"\x89PNG\r\n\x1a\n", head, *extra, _chunk(b"IDAT", data), _chunk(b"IEND", b""))
    return b"".join(parts)


def _zeros(count: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(count >> 20)) + packer.flush()


def _with_size(image: bytes, marker: bytes, offset: int, size: bytes) -> bytes:
    at = image.index(marker) + offset
    return image[:at] + size + image[at + len(size) :]


def _tiff(kind: int, width: int, count: int = 1) -> bytes:
    """A grey TIFF of 16×16 whose width is of any type."""
    values = [(256, kind, count, width), (257, 3, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1)]
    values += [(262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 16), (279, 4, 1, 256)]
    tags = b"".join(struct.pack("<HHII", *value) for value in values)
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + tags + bytes(400)


def _scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = _encoded(Image.new("L", (4000, 4000)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


@cache
def bombs() -> dict[str, tuple[str, bytes]]:
    """Small files that ask for much memory or time, and the statuses that they may end with."""
    side, white = 16_000, Image.new("RGB", (16, 16), "white")
    jpeg, bmp, gif = (_encoded(white, each) for each in ("JPEG", "BMP", "GIF"))
    webp = _encoded(white, "WEBP", lossless=True)
    huge_webp = _encoded(Image.new("RGBA", (side, side)), "WEBP", lossless=True, method=0)
    grey = Image.new("L", (side, side))
    strip = {"compression": "tiff_lzw", "strip_size": side * side}
    row = zlib.compress(b"\0" + bytes(3))
    bomb = b"icc\0\0" + _zeros(1 << 28)
    return {
        "pixels.png": ("ok", _png(side, side, _zeros(side * side + side + (1 << 20)), colour=0)),
        "palette.png": ("ok", _encoded(grey.convert("P"), "PNG", transparency=0)),
        "alpha.png": ("rejected", _encoded(Image.new("LA", (side, side)), "PNG", compress_level=1)),
        "pixels.gif": ("ok", _encoded(grey, "GIF")),
        "pixels.tif": ("ok rejected", _encoded(grey, "TIFF", **strip)),
        "pixels.webp": ("rejected", huge_webp),
        "pixels.jpg": ("rejected ok", _encoded(grey, "JPEG", progressive=True)),
        "more.png": ("rejected", _png(60_000, 60_000, _zeros(1 << 24))),
        "scans.jpg": ("rejected", _scans(20_000)),
        "text.png": (
            "ok",
            _png(1, 1, row, _chunk(b"zTXt", b"a\0\0" + _zeros(1 << 28))),
        ),
        "texts.png": (
            "ok",
            _png(1, 1, row, *[_chunk(b"zTXt", b"a\0\0" + _zeros(1 << 20))] * 200),
        ),
        "profile.png": ("ok", _png(1, 1, row, _chunk(b"iCCP", bomb))),
        "trailing.png": ("ok", _png(1, 1, row + _zeros(1 << 28))),
        "wide.png": ("ok", _encoded(Image.new("RGB", (65_535, 1)), "PNG")),
        "tall.png": ("ok", _encoded(Image.new("RGB", (1, 65_535)), "PNG")),
        "wide.jpg": ("ok", _encoded(Image.new("RGB", (65_500, 1)), "JPEG")),
        "tall.jpg": ("ok", _encoded(Image.new("RGB", (1, 65_500)), "JPEG")),
        "wide.bmp": ("ok", _encoded(Image.new("RGB", (65_535, 1)), "BMP")),
        "tall.gif": ("ok", _encoded(Image.new("L", (1, 65_535)), "GIF")),
        "wide.tif": ("ok", _encoded(Image.new("RGB", (65_535, 1)), "TIFF")),
        "tall.webp": ("ok", _encoded(Image.new("RGB", (1, 16_383)), "WEBP")),
        "wider.png": ("undecodable rejected", _png(2**31 - 1, 1, row)),
        "nothing.png": ("undecodable", _png(0, 0, zlib.compress(b""))),
        "nothing.jpg": ("undecodable", _with_size(jpeg, b"\xff\xc0", 5, bytes(4))),
        "nothing.bmp": ("undecodable", _with_size(bmp, b"BM", 18, bytes(8))),
        "nothing.gif": ("undecodable ok", _with_size(gif, b"GIF8", 6, bytes(4))),
        "negative.bmp": ("undecodable rejected", _with_size(bmp, b"BM", 18, b"\xff" * 8)),
        "wide-tag.tif": ("undecodable rejected", _tiff(4, 2**32 - 1)),
        "text-tag.tif": ("undecodable", _tiff(2, 16)),
        "two-tag.tif": ("undecodable ok", _tiff(3, 16, count=2)),
        "signed-tag.tif": ("undecodable", _tiff(9, 2**32 - 1)),
        "rational-tag.tif": ("undecodable", _tiff(5, 8)),
        "frames.gif": (
            "ok",
            _encoded(white, "GIF", save_all=True, append_images=[_noise(16, 16)] * 2000),
        ),
        "canvas.webp": (
            "undecodable rejected",
            _with_size(webp, b"VP8L", 9, struct.pack("<I", 16_382 << 14 | 16_382)),
        ),
    }


@cache
def sound_files() -> dict[str, bytes]:
    """One file of each kind, to be damaged."""
    frames = {"save_all": True, "append_images": [_noise(seed=1), _noise(seed=2)]}
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        f"plain.{ending}": _encoded(_noise(), file_format)
        for ending, file_format in FORMATS.items()
    }
    for ending in ("gif", "webp", "png", "tif"):
        files[f"animated.{ending}"] = _encoded(_noise(), FORMATS[ending], **frames)
    for ending in ("jpg", "png", "webp", "tif"):
        files[f"turned.{ending}"] = _encoded(_noise(), FORMATS[ending], exif=exif)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"):
        image = _noise().convert("1") if compression == "group4" else _noise()
        files[f"{compression}.tif"] = _encoded(image, "TIFF", compression=compression)
    files["progressive.jpg"] = _encoded(_noise(), "JPEG", progressive=True)
    return files


def damaged_files(count: int, seed: int) -> dict[str, bytes]:
    """Files with flipped bits, cut short, with bytes put in, or with another's end."""
    draw = random.Random(seed)
    sound = sorted(sound_files().items())
    files = {}
    for number in range(count):
        name, data = draw.choice(sound)
        broken = bytearray(data)
        kind = draw.choice(["flipped", "truncated", "inserted", "spliced"])
        at = draw.randrange(len(broken) if draw.random() < 0.5 else min(400, len(broken)))
        if kind == "flipped":
            for _ in range(draw.randint(1, 8)):
                reach = min(len(broken), draw.choice([100, 400, len(broken)]))
                broken[draw.randrange(reach)] ^= 1 << draw.randrange(8)
        elif kind == "truncated":
            del broken[at:]
        elif kind == "inserted":
            broken[at:at] = draw.randbytes(draw.randint(1, 40))
        else:
            other = draw.choice(sound)[1]
            broken[at:] = other[draw.randrange(len(other)) :]
        files[f"{kind}-{number:04d}-{name}"] = bytes(broken)
    return files


def odd_files() -> dict[str, bytes]:
    """Broken profiles, wrong endings, and what is no image."""
    files = {"empty.jpg": b"", "text.png": b"this is no image", "zeros.gif": bytes(4096)}
    profiles = {"empty": b"", "short": b"\0\0\0\x04", "noise": bytes(range(256)) * 40}
    for name, profile in profiles.items():
        for ending in ("jpg", "png", "webp", "tif"):
            data = _encoded(_noise(), FORMATS[ending], icc_profile=profile)
            files[f"profile-{name}.{ending}"] = data
    sound = sound_files()
    for ours, theirs in (("jpg", "png"), ("png", "webp"), ("gif", "tif"), ("bmp", "jpg")):
        files[f"wrong-ending-{theirs}.{ours}"] = sound[f"plain.{theirs}"]
    return files | {
        "script.jpg": b"#!/bin/sh\nrm -rf /\n",
        "page.png": b"<html><script>alert(1)</script></html>",
        "drawing.gif": b"<svg xmlns='http://www.w3.org/2000/svg' onload='x()'/>",
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
        "pickle.png": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "archive.jpg": b"PK\x05\x06" + bytes(18),
    }


def _outcome(data: bytes) -> images.DecodedImage:
    return images.decode(data, 16, max_pixels=10**6)


def _print(capsys: pytest.CaptureFixture[str], counts: dict[str, object]) -> None:
    with capsys.disabled():
        print("\n" + json.dumps(counts))


def test_every_mode_in_every_format_is_decoded(capsys):
    statuses = Counter(_outcome(data).status for data in mode_files().values())
    _print(capsys, {"modes in formats": len(mode_files()), "statuses": statuses})
    assert statuses == {"ok": len(mode_files())}
    assert {name.split(".")[1] for name in mode_files()} == set(FORMATS)
    assert {name.split(".")[0] for name in mode_files()} >= {"LA", "PA", "CMYK", "LAB", "I-16", "F"}


def test_damaged_and_odd_files_are_decoded_or_explained_without_a_word(capfd):
    files = damaged_files(2000, seed=1) | odd_files()
    statuses: Counter[str] = Counter()
    for name, data in files.items():
        decoded = _outcome(data)
        assert (decoded.pixels_HW3 is None) == (decoded.error is not None), name
        statuses[decoded.status] += 1
    assert capfd.readouterr().err == "", "neither Pillow nor libtiff says anything"
    kinds = Counter(name.split("-")[0] for name in damaged_files(2000, seed=1))
    _print(capfd, {"damaged": kinds, "odd": len(odd_files()), "statuses": statuses})
    assert statuses["ok"] > 100
    assert statuses["undecodable"] > 100


def test_damaged_files_are_the_same_with_warnings_as_errors_and_without():
    code = """
import sys; sys.path.insert(0, ".."); import test_hostile
for name, data in test_hostile.damaged_files(150, seed=2).items():
    decoded = test_hostile._outcome(data)
    print(name, decoded.status, decoded.error)
"""
    outputs = []
    for option in ("error", "always"):
        ran = subprocess.run(
            [sys.executable, "-W", option, "-W", "ignore::DeprecationWarning", "-c", code],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stderr == ""
        outputs.append(ran.stdout)
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_bombs_cost_little_memory_and_time(tmp_path, capsys):
    for name, (_, data) in bombs().items():
        (tmp_path / name).write_bytes(data)
    # Its own process, whose largest memory can be reset before each file.
    code = """
import gc, json, pathlib, resource, sys, time
from captioner.data import images

def memory(name):
    [line] = [x for x in open("/proc/self/status") if x.startswith(name)]
    return int(line.split()[1]) / 1024

images.decode(b"warm up", 8)
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    data = path.read_bytes()
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, begin = memory("VmRSS"), time.perf_counter()
    decoded = images.decode(data, 260)
    seconds = time.perf_counter() - begin
    print(json.dumps([path.name, decoded.status, decoded.error, memory("VmHWM") - before, seconds]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    measured = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(measured) == len(bombs())
    largest, slowest = max(each[3] for each in measured), max(each[4] for each in measured)
    counts = Counter(each[1] for each in measured)
    counted = {"bombs": len(measured), "statuses": counts}
    _print(capsys, counted | {"largest MiB": round(largest), "slowest s": round(slowest, 1)})
    for name, status, error, mebibytes, seconds in measured:
        assert status in bombs()[name][0].split(), (name, status, error)
        assert (error is None) == (status == "ok"), name
        assert mebibytes < 1100, name
        assert seconds < 30, name


# Names, and what is no file.

NAMES = (
    *(" ", "two  words", " leading", "trailing ", "line\nbreak", "return\rhere", "tab\there"),
    *("'quoted'", '"quoted"', "`true`", "$(true)", "%41", "100%", "%s%n", "emoji 🐶", "#1", "a?b"),
    *(
        "*",
        "[",
        "[a-z]",
        "{a,b}",
        ";ls",
        "a|b",
        "a&b",
        "a\\b",
        "_private",
        ".hidden",
        "-rf",
        "--help",
    ),
    *(
        "..",
        "...",
        "~",
        "~root",
        "a::b",
        "s3:",
        "e\u0301",
        "\u00e9",
        "\u202etxt",
        "\u2066a",
        "\u2028",
    ),
    *(
        "\x1b[31mred",
        "\x1b]0;title\x07",
        "\x7f",
        "\x01",
        "\ufeffbom",
        "\u200b",
        "NUL",
        "CON",
        "=1+1",
    ),
    "n" * 251,
)
NOT_UTF8 = (b"\xff\xfe.jpg", b"caf\xe9.jpg", b"\xed\xa0\x80.jpg", b"\xff" * 251 + b".jpg")


def _rows(output: Path) -> list[dict]:
    parts = sorted(output.glob("part-*"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def test_files_of_any_name_are_captioned_once_and_shown_safely(tmp_path, model_directory, capsys):
    photos, output = tmp_path / "photos", tmp_path / "out"
    data = write_photos(tmp_path / "one", 1)[0].read_bytes()
    photos.mkdir()
    for name in NAMES:
        (photos / f"{name}.jpg").write_bytes(data)
    for raw in NOT_UTF8:
        with open(os.path.join(os.fsencode(photos), raw), "wb") as file:
            file.write(data)
    folder = photos / "sub\n\x1b[2J?folder"
    folder.mkdir()
    (folder / "inside.jpg").write_bytes(data)
    os.symlink("nowhere", os.path.join(os.fsencode(photos), b"lost\xff.jpg"))
    count = len(NAMES) + len(NOT_UTF8) + 2
    summary = caption_images(str(photos), str(output), str(model_directory), run=RUN)
    assert summary.rows == {"ok": count - 1, "unreadable": 1}
    rows = _rows(output)
    uris = {row["uri"] for row in rows}
    assert len(uris) == len(rows) == count
    assert {str(photos / f"{name}.jpg") for name in NAMES} < uris
    assert sum(uri.startswith("file://") and "%FF" in uri for uri in uris) == 3
    for arguments in (
        ["report", str(output)],
        ["show", str(output), "\x1b[31mred.jpg", "-o", str(tmp_path / "a.png")],
        ["show", str(output), "\x1b[31m nowhere.jpg", "-o", str(tmp_path / "b.png")],
        ["caption", str(photos / "\x1b[31m nowhere"), str(output), "--model", str(model_directory)],
    ):
        shown = CliRunner().invoke(main, arguments).output
        assert all(line.isprintable() for line in shown.split("\n")), arguments
    (output / "part-000000.parquet").unlink()
    shown = CliRunner().invoke(main, ["report", str(output), "--missing"]).output
    assert len(shown.splitlines()) == len(rows[:64])
    assert all(line.isprintable() for line in shown.split("\n"))
    _print(capsys, {"names": count})


def _unreadable_things(photos: Path, data: bytes) -> dict[str, str]:
    """Things called like images; by name, the status that a list of them ends with."""
    (photos / "folder.jpg").mkdir()
    (photos / "loop.jpg").symlink_to(photos / "loop.jpg")
    (photos / "there.jpg").symlink_to(photos / "back.jpg")
    (photos / "back.jpg").symlink_to(photos / "there.jpg")
    (photos / "dangling.jpg").symlink_to("nowhere")
    (photos / "up").symlink_to("..")
    (photos / "endless.jpg").symlink_to("/dev/zero")
    (photos / "terminal.jpg").symlink_to("/dev/tty")
    (photos / "memory.jpg").symlink_to("/proc/self/mem")
    (photos / "linked.jpg").symlink_to("real.jpg")
    (photos / "real.jpg").write_bytes(data)
    os.mkfifo(photos / "pipe.jpg")
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(photos)  # the path of a socket may have 107 bytes
        server.bind("socket.jpg")
        os.chdir(here)
    statuses = {path.name: "unreadable" for path in photos.iterdir() if path.name != "up"}
    return statuses | {"linked.jpg": "ok", "real.jpg": "ok", "gone.jpg": "unreadable"}


@pytest.mark.parametrize("as_list", [False, True])
def test_what_is_no_file_never_blocks_a_job(as_list, tmp_path, model_directory):
    photos = tmp_path / "photos"
    photos.mkdir()
    data = write_photos(tmp_path / "one", 1)[0].read_bytes()
    expected = _unreadable_things(photos, data)
    source = photos
    if as_list:
        source = tmp_path / "list.txt"
        source.write_text("\n".join(f"photos/{name}" for name in expected))
    else:  # pipes, sockets, devices and folders are not listed
        listed = {"loop.jpg", "there.jpg", "back.jpg", "dangling.jpg", "linked.jpg", "real.jpg"}
        # A file of the process's own has a regular file's mode.
        listed.add("memory.jpg")
        expected = {name: status for name, status in expected.items() if name in listed}
    caption_images(str(source), str(tmp_path / "out"), str(model_directory), run=RUN)
    rows = _rows(tmp_path / "out")
    assert {Path(row["uri"]).name: row["status"] for row in rows} == expected
    assert len(rows) == len(expected)
    assert all(row["error"].isprintable() for row in rows if row["error"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_unreadable(tmp_path, model_directory):
    [photo] = write_photos(tmp_path / "photos", 1)
    photo.chmod(0)
    caption_images(str(photo.parent), str(tmp_path / "out"), str(model_directory), run=RUN)
    assert [row["status"] for row in _rows(tmp_path / "out")] == ["unreadable"]


def test_files_that_change_after_they_were_listed_have_the_row_of_what_was_read(
    tmp_path, model_directory
):
    photos, output = write_photos(tmp_path / "photos", 8), tmp_path / "out"
    run = RunConfig(**{**vars(RUN), "shard_size": 8})
    caption_images(str(photos[0].parent), str(output), str(model_directory), run=run)
    (output / "part-000000.parquet").unlink()  # the manifest knows all of them
    photos[0].unlink()
    photos[1].write_bytes(b"")
    photos[2].write_bytes(photos[3].read_bytes()[:-300])
    for path in photos[4:7]:
        path.unlink()
    photos[4].mkdir()
    os.mkfifo(photos[5])
    photos[6].symlink_to(photos[3])
    summary = caption_images(str(photos[0].parent), str(output), str(model_directory), run=run)
    rows = _rows(output)
    assert [row["uri"] for row in rows] == [str(path) for path in photos]
    assert [row["status"] for row in rows] == [
        *("unreadable", "undecodable", "undecodable", "ok", "unreadable", "unreadable", "ok", "ok")
    ]
    assert summary.rows == {"ok": 3, "undecodable": 2, "unreadable": 3}
    assert rows[6]["caption"] == rows[3]["caption"]
    assert rows[6]["bytes"] == photos[3].stat().st_size


def test_a_name_never_becomes_a_path_that_is_written(tmp_path, model_directory):
    inside = tmp_path / "deep" / "inside"
    photo = write_photos(inside / "photos", 1)[0]
    names = [
        *(
            "../../x.jpg",
            "../../../../../../etc/x.jpg",
            "photos/../../../y.jpg",
            "/x.jpg",
            "//x.jpg",
        ),
        *("file:///x.jpg", "file:///%2e%2e/x.jpg", "part-000000.parquet", "__captioner/run.json"),
        *("../out/part-000000.parquet", "~/x.jpg", "memory://../x.jpg", "con:x.jpg"),
        str(photo),
    ]
    (inside / "list.txt").write_text("\n".join(names))
    output = inside / "out"

    def standing() -> set[Path]:
        return {path for path in tmp_path.rglob("*") if output not in (path, *path.parents)}

    before = standing()
    run = RunConfig(**{**vars(RUN), "shard_size": 4})
    summary = caption_images(str(inside / "list.txt"), str(output), str(model_directory), run=run)
    assert summary.images == len(_rows(output))
    assert summary.rows["ok"] == 1
    assert standing() == before
    written = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    parts = {f"part-{number:06d}.parquet" for number in range(-(-summary.images // 4))}
    private = {
        f"__captioner/{name}"
        for name in ("run.json", "manifest-0000.parquet", "summary.json", "lock")
    }
    assert written == parts | private


# A thousand at once.


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Path:
    """A folder of 1,000 images: sound, damaged, odd, bombs, of odd names."""
    folder = tmp_path_factory.mktemp("thousand")
    files = mode_files() | odd_files() | {name: data for name, (_, data) in bombs().items()}
    sound = write_photos(tmp_path_factory.mktemp("sound"), 400)
    files |= {
        f"{draw}-{NAMES[draw % len(NAMES)][:200]}.jpg": path.read_bytes()
        for draw, path in enumerate(sound)
    }
    (folder / "dangling.jpg").symlink_to("nowhere")
    files |= damaged_files(999 - len(files), seed=3)
    for name, data in files.items():
        (folder / name.replace(".avif", ".avif.jpg")).write_bytes(data)
    return folder


def _caption_in_a_process(photos, output, model, **settings) -> tuple[list[dict], float]:
    """The rows of the job in a process of its own, and that process's largest memory in MiB."""
    code = f"""
import sys
from captioner.config import RunConfig
from captioner.caption.job import caption_images
run = RunConfig(max_error_rate=1.0, engine="local", device="cpu", **{settings!r})
caption_images(*sys.argv[1:], run=run)
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024)
"""
    command = [sys.executable, "-c", code, photos, output, model]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    others = [line for line in ran.stderr.splitlines() if " of 1000 images, " not in line]
    assert others == [], "beside the progress, not a word of Pillow's or libtiff's"
    return _rows(output), float(ran.stdout)


@pytest.mark.slow
def test_a_thousand_files_each_have_their_row(thousand, tmp_path, capsys):
    """With the settings and the model that a user has who gives none."""
    rows, mebibytes = _caption_in_a_process(thousand, tmp_path, bundle.DEFAULT)
    assert [row["uri"] for row in rows] == sorted(str(path) for path in thousand.iterdir())
    assert len(rows) == 1000
    statuses = Counter(row["status"] for row in rows)
    _print(capsys, {"files": len(rows), "statuses": statuses, "largest MiB": round(mebibytes)})
    assert statuses.keys() == {"ok", "unreadable", "undecodable", "rejected"}
    for row in rows:
        assert (row["caption"] is None) == (row["status"] != "ok")
        assert (row["error"] is None) == (row["status"] == "ok")
        assert row["error"] is None or row["error"].isprintable(), row
    assert mebibytes < 1536


@pytest.mark.slow
@pytest.mark.thorough
def test_ray_writes_the_same_rows_of_a_thousand_files(
    thousand, model_directory, tmp_path, local_ray
):
    settings = {"shard_size": 64, "batch_size": 16, "precision": "fp32"}
    here, there = tmp_path / "local", tmp_path / "ray"
    expected, _ = _caption_in_a_process(thousand, here, model_directory, **settings)
    run = RunConfig(**{**vars(RUN), "engine": "ray"})
    caption_images(str(thousand), str(there), str(model_directory), run=run)
    same = ("uri", "status", "error", "caption", "width", "height", "bytes")
    local, ray = (
        [[row[name] for name in same] for row in rows] for rows in (expected, _rows(there))
    )
    assert local == ray
