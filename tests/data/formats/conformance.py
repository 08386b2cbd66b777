"""Files of every format, depth and transparency, made from a known picture by the specifications.

``python tests/data/formats/conformance.py`` writes docs/reference/formats.md from them.
"""

import functools
import io
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from captioner.data import images
from captioner.data.preparation import Preparation

WIDTH, HEIGHT = 64, 16
PAGE = Path(__file__).parents[3] / "docs" / "reference" / "formats.md"

_x, _y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
GREY = (np.round(_x / (WIDTH - 1) * 255)).astype(np.int64)
RGB = np.stack([GREY, 255 - _y * 17, (GREY + _y * 17) % 256], -1)
ALPHA = np.where(_y < 5, 0, np.where(_y < 10, 128, 255))


@dataclass(frozen=True)
class Case:
    """A file and what it shows.

    ``samples`` is what a TIFF or PNG holds, for a second decoder; ``slack`` how far a pixel may be
    off, where a compression loses something.
    """

    kind: str
    content: str
    make: Callable[[], bytes]
    expected: np.ndarray
    samples: np.ndarray | None = None
    slack: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", self.content.replace(" 1 bits", " 1 bit"))

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.content}"

    def worst(self) -> int:
        """How far the pixel that is worst off is from the picture.

        Raises:
            AssertionError: the file is not decoded.
        """
        decoded = images.decode(self.make(), Preparation(max_side=WIDTH))
        assert decoded.pixels_HW3 is not None, decoded.error
        expected = self.expected
        if expected.ndim == 2:
            expected = np.repeat(expected[..., None], 3, -1)
        assert decoded.pixels_HW3.shape == expected.shape
        return int(np.abs(decoded.pixels_HW3.astype(int) - np.rint(expected)).max())


def quantized(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples of so many bits, and the 8-bit values that they mean."""
    peak = (1 << bits) - 1
    samples = np.array([round(int(value) * peak / 255) for value in values.ravel()], object)
    meant = np.array([sample * 255 / peak for sample in samples], float)
    return samples.astype(np.uint64).reshape(values.shape), meant.reshape(values.shape)


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours and alpha of 0 to 255, laid over white."""
    alpha = alpha / 255
    if colours.ndim == 3:
        alpha = alpha[..., None]
    return colours * alpha + 255 * (1 - alpha)


def packed(rows: np.ndarray, bits: int, order: str = ">") -> bytes:
    """Rows of samples ``(h, n)``, each row beginning on a byte, the highest bit first."""
    if bits in (8, 16, 32, 64):
        return rows.astype(f"{order}u{bits // 8}").tobytes()
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint64)
    ones = (rows[..., None].astype(np.uint64) >> shifts & np.uint64(1)).astype(np.uint8)
    return np.packbits(ones.reshape(len(rows), -1), axis=1).tobytes()


# TIFF 6.0.

_TYPES = {"H": 3, "I": 4}


def tiff(
    samples: np.ndarray,
    bits: int,
    photometric: int,
    *,
    order: str = "<",
    sample_format: int = 1,
    planar: bool = False,
    compression: int = 1,
    predictor: int = 1,
    tile: tuple[int, int] | None = None,
    rows_per_strip: int = 5,
    extra: tuple[int, ...] = (),
    colour_map: np.ndarray | None = None,
    big: bool = False,
    reversed_bits: bool = False,
) -> bytes:
    """A TIFF of samples ``(H, W)`` or ``(H, W, C)``: unsigned patterns of so many bits."""
    samples = samples.reshape(HEIGHT, WIDTH, -1)
    channels = samples.shape[-1]
    planes = [samples[..., each : each + 1] for each in range(channels)] if planar else [samples]
    blocks = []
    for plane in planes:
        for block in _blocks(plane, tile, rows_per_strip):
            flat = _predicted(block, bits, order, predictor)
            data = flat if isinstance(flat, bytes) else packed(flat, bits, order)
            if reversed_bits:
                data = bytes(int(f"{each:08b}"[::-1], 2) for each in data)
            blocks.append({1: bytes, 8: zlib.compress, 32773: _packbits}[compression](data))
    tags: dict[int, tuple[str, tuple[int, ...]]] = {
        256: ("I", (WIDTH,)),
        257: ("I", (HEIGHT,)),
        258: ("H", (bits,) * channels),
        259: ("H", (compression,)),
        262: ("H", (photometric,)),
        266: ("H", (2 if reversed_bits else 1,)),
        277: ("H", (channels,)),
        284: ("H", (2 if planar else 1,)),
        317: ("H", (predictor,)),
        339: ("H", (sample_format,) * channels),
    }
    if extra:
        tags[338] = "H", extra
    if colour_map is not None:
        tags[320] = "H", tuple(int(value) for value in colour_map.T.ravel())
    if tile:
        tags |= {322: ("I", (tile[0],)), 323: ("I", (tile[1],))}
    else:
        tags[278] = "I", (rows_per_strip,)
    return _tiff_file(tags, blocks, (324, 325) if tile else (273, 279), order, big)


def _blocks(
    plane: np.ndarray, tile: tuple[int, int] | None, rows_per_strip: int
) -> Iterator[np.ndarray]:
    if tile is None:
        for top in range(0, HEIGHT, rows_per_strip):
            yield plane[top : top + rows_per_strip]
        return
    across, down = tile
    right, below = -WIDTH % across, -HEIGHT % down
    padded = np.pad(plane, ((0, below), (0, right), (0, 0)), mode="edge")
    for top in range(0, HEIGHT, down):
        for left in range(0, WIDTH, across):
            yield padded[top : top + down, left : left + across]


def _predicted(block: np.ndarray, bits: int, order: str, predictor: int) -> np.ndarray | bytes:
    """The block's rows ``(h, n)`` as they are, as differences, or as bytes of floats."""
    rows = block.reshape(len(block), -1)
    if predictor == 2:
        kind = np.dtype(f"u{bits // 8}")
        before = np.pad(block[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return (block.astype(kind) - before.astype(kind)).reshape(len(block), -1)
    if predictor == 3:
        size, channels = bits // 8, block.shape[-1]
        apart = np.ascontiguousarray(rows.astype(f">u{size}")).view(np.uint8)
        apart = apart.reshape(len(rows), -1, size).transpose(0, 2, 1).reshape(len(rows), -1)
        before = np.pad(apart, ((0, 0), (channels, 0)))[:, : apart.shape[1]]
        return (apart - before).tobytes()
    return rows


def _packbits(data: bytes) -> bytes:
    """PackBits without runs: what is copied, up to 128 bytes at a time."""
    parts = [data[at : at + 128] for at in range(0, len(data), 128)]
    return b"".join(bytes([len(part) - 1]) + part for part in parts)


def _tiff_file(
    tags: dict[int, tuple[str, tuple[int, ...]]],
    blocks: list[bytes],
    names: tuple[int, int],
    order: str,
    big: bool,
) -> bytes:
    head = 16 if big else 8
    starts = [head + sum(len(block) for block in blocks[:each]) for each in range(len(blocks))]
    tags[names[0]] = "I", tuple(starts)
    tags[names[1]] = "I", tuple(len(block) for block in blocks)
    begin = head + sum(map(len, blocks))
    blocks.append(bytes(begin % 2))
    begin += begin % 2
    count, offset, inline = ("Q", "Q", 8) if big else ("H", "I", 4)
    size = struct.calcsize(f"={count}") + len(tags) * (20 if big else 12) + inline
    table, beside = struct.pack(order + count, len(tags)), b""
    for tag, (kind, values) in sorted(tags.items()):
        content = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(content) <= inline:
            field = content.ljust(inline, b"\0")
        else:
            field = struct.pack(order + offset, begin + size + len(beside))
            beside += content + bytes(len(content) % 2)
        table += struct.pack(f"{order}HH{offset}", tag, _TYPES[kind], len(values)) + field
    signature = (b"II" if order == "<" else b"MM") + (
        struct.pack(f"{order}HHHQ", 43, 8, 0, begin)
        if big
        else struct.pack(f"{order}HI", 42, begin)
    )
    return signature + b"".join(blocks) + table + bytes(inline) + beside


def _tiff_case(
    content: str, samples: np.ndarray, expected: np.ndarray, bits: int, *arguments, **options
) -> Case:
    slack = options.pop("slack", 1)
    make = functools.partial(tiff, samples, bits, *arguments, **options)
    return Case("TIFF", content, make, expected, samples, slack)


def tiff_cases() -> Iterator[Case]:
    """Grey, RGB, palettes and other colours, of every depth, in every arrangement."""
    names = {"<": "little-endian", ">": "big-endian"}
    for bits in (1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32):
        for order in "<>":
            if bits == 24 and order == "<":
                continue  # readers do not agree on its order
            samples, meant = quantized(GREY, bits)
            name = f"grey, {bits} bits, {names[order]}"
            yield _tiff_case(name, samples, meant, bits, 1, order=order)
            inverted = np.uint64((1 << bits) - 1) - samples
            yield _tiff_case(f"{name}, WhiteIsZero", inverted, meant, bits, 0, order=order)
    for bits in (1, 2, 4, 8, 12, 16):
        samples, meant = quantized(GREY, bits)
        yield _tiff_case(
            f"grey, {bits} bits, bits reversed", samples, meant, bits, 1, reversed_bits=True
        )
    for bits in (16, 32, 64):
        for order in "<>":
            for peak in (1.0, 255.0, 65535.0):
                if bits == 16 and peak == 65535:
                    continue  # half floats end before it
                floats = (GREY / 255 * peak).astype(f"f{bits // 8}")
                patterns = floats.view(f"u{bits // 8}")
                name = f"grey, {bits}-bit float to {peak:g}, {names[order]}"
                yield _tiff_case(name, patterns, GREY, bits, 1, order=order, sample_format=3)
        floats = (1 - GREY / 255).astype(f"f{bits // 8}")
        patterns = floats.view(f"u{bits // 8}")
        name = f"grey, {bits}-bit float, WhiteIsZero"
        yield _tiff_case(name, patterns, GREY, bits, 0, sample_format=3)
    for bits, peak in ((8, 127), (16, 32767), (16, 255), (32, 65535), (32, 2**31 - 1)):
        for order in "<>":
            values = np.array([round(int(each) * peak / 255) for each in GREY.ravel()])
            name = f"grey, signed {bits} bits to {peak}, {names[order]}"
            meant = (values * 255 / peak).reshape(GREY.shape)
            samples = values.reshape(GREY.shape).astype(np.uint64)
            yield _tiff_case(name, samples, meant, bits, 1, order=order, sample_format=2)
    for bits in (4, 8, 10, 12, 16, 32):
        for planar in (False, True):
            for order in "<>":
                samples, meant = quantized(RGB, bits)
                name = f"RGB, {bits} bits, {names[order]}" + ", planes" * planar
                yield _tiff_case(name, samples, meant, bits, 2, order=order, planar=planar)
    for planar in (False, True):
        patterns = (RGB / 255).astype("f4").view("u4")
        name = "RGB, 32-bit float" + ", planes" * planar
        yield _tiff_case(name, patterns, RGB, 32, 2, sample_format=3, planar=planar)
    yield from _tiff_alpha()
    yield from _tiff_colours()
    yield from _tiff_packings()


def _tiff_alpha() -> Iterator[Case]:
    kinds = {0: "extra sample", 1: "associated alpha", 2: "unassociated alpha"}
    for bits in (8, 16):
        for photometric, colours, colour_name in ((1, GREY, "grey"), (2, RGB, "RGB")):
            for kind, kind_name in kinds.items():
                for planar in (False, True):
                    alpha = ALPHA if colours.ndim == 2 else ALPHA[..., None]
                    stored = np.rint(colours * alpha / 255) if kind == 1 else colours
                    both = np.concatenate([stored.reshape(*GREY.shape, -1), ALPHA[..., None]], -1)
                    samples, _ = quantized(both, bits)
                    meant = colours if kind == 0 else over_white(colours, ALPHA)
                    name = f"{colour_name}, {bits} bits, {kind_name}" + ", planes" * planar
                    yield _tiff_case(
                        name, samples, meant, bits, photometric, extra=(kind,), planar=planar
                    )


def _tiff_colours() -> Iterator[Case]:
    for bits in (1, 2, 4, 8, 16):
        count = 1 << bits
        table = np.random.default_rng(bits).integers(0, 256, (count, 3))
        indices = (_x * 7 + _y * 13) % count
        for scale, name in ((257, ""), (1, ", map of 8 bits")):
            yield _tiff_case(
                f"palette, {bits} bits{name}",
                indices.astype(np.uint64),
                table[indices],
                bits,
                3,
                colour_map=table * scale,
            )
    ink = np.concatenate([255 - RGB, _y[..., None] * 5], -1)
    shown = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    for bits in (8, 16):
        for planar in (False, True):
            samples, _ = quantized(ink, bits)
            name = f"CMYK, {bits} bits" + ", planes" * planar
            yield _tiff_case(name, samples, shown, bits, 5, planar=planar)
    soft = np.asarray(Image.fromarray(RGB.astype(np.uint8)).convert("YCbCr"))
    shown = np.asarray(Image.fromarray(soft, "YCbCr").convert("RGB")).astype(int)
    make = functools.partial(_ycbcr_tiff, soft, 1, 1)
    yield Case("TIFF", "YCbCr, 8 bits, 1×1", make, shown, slack=2)
    for across, down in ((2, 1), (2, 2), (4, 2)):
        flat = np.repeat(np.repeat(soft[::down, ::across], down, 0), across, 1)
        flat[..., 0] = soft[..., 0]
        shown = np.asarray(Image.fromarray(flat, "YCbCr").convert("RGB")).astype(int)
        make = functools.partial(_ycbcr_tiff, flat, across, down)
        yield Case("TIFF", f"YCbCr, 8 bits, {across}×{down}", make, shown, slack=3)
    # Grey L*a*b* is the same with any white point.
    lightness = np.stack([GREY, GREY * 0, GREY * 0], -1)
    y = np.where(GREY / 2.55 > 8, ((GREY / 2.55 + 16) / 116) ** 3, GREY / 2.55 / 903.3)
    shown = np.where(y <= 0.0031308, 12.92 * y, 1.055 * np.power(y, 1 / 2.4) - 0.055) * 255
    yield _tiff_case("CIE L*a*b*, 8 bits", lightness, shown, 8, 8, slack=3)
    yield _tiff_case("CIE L*a*b*, 16 bits", lightness * 257, shown, 16, 8, slack=3)
    middle = np.stack([GREY, GREY * 0 + 128, GREY * 0 + 128], -1)
    yield _tiff_case("ICC L*a*b*, 8 bits", middle, shown, 8, 9, slack=3)


def _ycbcr_tiff(pixels: np.ndarray, across: int, down: int) -> bytes:
    """Uncompressed YCbCr: blocks of brightnesses, then two colours for each."""
    data = b""
    for top in range(0, HEIGHT, down):
        for left in range(0, WIDTH, across):
            block = pixels[top : top + down, left : left + across]
            data += block[..., 0].tobytes() + block[0, 0, 1:].tobytes()
    tags: dict[int, tuple[str, tuple[int, ...]]] = {
        256: ("I", (WIDTH,)),
        257: ("I", (HEIGHT,)),
        258: ("H", (8, 8, 8)),
        259: ("H", (1,)),
        262: ("H", (6,)),
        277: ("H", (3,)),
        278: ("I", (HEIGHT,)),
        530: ("H", (across, down)),
    }
    return _tiff_file(tags, [data], (273, 279), "<", False)


def _tiff_packings() -> Iterator[Case]:
    for compression, name in ((8, "deflate"), (32773, "PackBits")):
        for tile in (None, (48, 16)):
            place = f"{name}, tiles" if tile else name
            for bits in (8, 12, 16, 32):
                samples, meant = quantized(RGB, bits)
                options = {"compression": compression, "tile": tile}
                yield _tiff_case(f"RGB, {bits} bits, {place}", samples, meant, bits, 2, **options)
                inverted = np.uint64((1 << bits) - 1) - quantized(GREY, bits)[0]
                meant = quantized(GREY, bits)[1]
                grey = f"grey, {bits} bits, WhiteIsZero, {place}"
                yield _tiff_case(grey, inverted, meant, bits, 0, **options)
    for order in "<>":
        for tile in (None, (48, 16)):
            place = ("little" if order == "<" else "big") + "-endian" + (", tiles" if tile else "")
            options = {"order": order, "tile": tile, "compression": 8}
            for bits in (8, 16, 32):
                samples, meant = quantized(RGB, bits)
                name = f"RGB, {bits} bits, differences, {place}"
                yield _tiff_case(name, samples, meant, bits, 2, predictor=2, **options)
            for bits in (16, 32, 64):
                patterns = (RGB / 255).astype(f"f{bits // 8}").view(f"u{bits // 8}")
                name = f"RGB, {bits}-bit float, differences, {place}"
                yield _tiff_case(
                    name, patterns, RGB, bits, 2, predictor=3, sample_format=3, **options
                )
    for bits in (8, 12, 16):
        samples, meant = quantized(GREY, bits)
        for order in "<>":
            name = f"grey, {bits} bits, BigTIFF, {'little' if order == '<' else 'big'}-endian"
            yield _tiff_case(name, samples, meant, bits, 1, big=True, order=order)


# PNG.


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    samples: np.ndarray, bits: int, colour_type: int, *chunks: bytes, interlaced: bool = False
) -> bytes:
    """A PNG of samples ``(H, W)`` or ``(H, W, C)``."""
    samples = samples.reshape(HEIGHT, WIDTH, -1)
    passes = [samples]
    if interlaced:
        adam7 = (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)
        passes = [samples[y::down, x::across] for x, y, across, down in (*adam7, (0, 1, 1, 2))]
    data = b"".join(
        b"\0" + packed(row.reshape(1, -1), bits) for each in passes for row in each if row.size
    )
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colour_type, 0, 0, interlaced)
    head = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + b"".join(chunks)
    return head + _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b"")


def _png_case(
    content: str, samples: np.ndarray, expected: np.ndarray, bits: int, colour_type: int, *chunks
) -> Iterator[Case]:
    for interlaced in (False, True):
        make = functools.partial(png, samples, bits, colour_type, *chunks, interlaced=interlaced)
        yield Case("PNG", content + ", interlaced" * interlaced, make, expected, samples)


def png_cases() -> Iterator[Case]:
    """Every colour type and depth, with and without transparency."""
    for bits in (1, 2, 4, 8, 16):
        samples, meant = quantized(GREY, bits)
        yield from _png_case(f"grey, {bits} bits", samples, meant, bits, 0)
        key = samples[0, 20]
        clear = np.where(samples == key, 255, meant)
        chunk = _chunk(b"tRNS", struct.pack(">H", int(key)))
        yield from _png_case(f"grey, {bits} bits, a grey clear", samples, clear, bits, 0, chunk)
    for bits in (8, 16):
        samples, meant = quantized(RGB, bits)
        yield from _png_case(f"RGB, {bits} bits", samples, meant, bits, 2)
        key = samples[3, 20]
        if bits == 16:  # its neighbour differs in a low byte alone, and is not clear
            samples[3, 21] = key ^ np.uint64(1)
            meant[3, 21] = meant[3, 20]
        clear = np.where((samples == key).all(-1, keepdims=True), 255, meant)
        chunk = _chunk(b"tRNS", struct.pack(">3H", *(int(each) for each in key)))
        yield from _png_case(f"RGB, {bits} bits, a colour clear", samples, clear, bits, 2, chunk)
        for colour_type, colours, name in ((4, GREY, "grey"), (6, RGB, "RGB")):
            both = np.concatenate([colours.reshape(*GREY.shape, -1), ALPHA[..., None]], -1)
            samples, _ = quantized(both, bits)
            meant = over_white(colours, ALPHA)
            yield from _png_case(f"{name}, {bits} bits, alpha", samples, meant, bits, colour_type)
    for bits in (1, 2, 4, 8):
        count = 1 << bits
        table = np.random.default_rng(bits).integers(0, 256, (count, 3))
        alpha = np.linspace(0, 255, count).astype(int)[: max(1, count - 1)]
        indices = (_x * 7 + _y * 13) % count
        palette = _chunk(b"PLTE", table.astype(np.uint8).tobytes())
        clear = _chunk(b"tRNS", alpha.astype(np.uint8).tobytes())
        yield from _png_case(f"palette, {bits} bits", indices, table[indices], bits, 3, palette)
        opacity = np.append(alpha, [255] * (count - len(alpha)))
        meant = over_white(table[indices], opacity[indices])
        name = f"palette, {bits} bits, alpha"
        yield from _png_case(name, indices, meant, bits, 3, palette, clear)


# BMP.


def bmp(
    rows: list[bytes],
    bits: int,
    *,
    table: np.ndarray | None = None,
    masks: tuple[int, ...] = (),
    header: int = 40,
    upside_down: bool = True,
) -> bytes:
    """A BMP of packed rows, from the top."""
    padded = [row + bytes(-len(row) % 4) for row in rows]
    data = b"".join(padded[::-1] if upside_down else padded)
    colours = b""
    if table is not None:
        colours = b"".join(
            bytes(int(each) for each in colour[::-1]) + bytes(header != 12) for colour in table
        )
    if header == 12:
        head = struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, bits)
    else:
        height = HEIGHT if upside_down else -HEIGHT
        compression = 3 if masks else 0
        count = 0 if table is None else len(table)
        head = struct.pack("<IiiHH", header, WIDTH, height, 1, bits)
        head += struct.pack("<IIiiII", compression, len(data), 0, 0, count, 0)
        head += b"".join(struct.pack("<I", mask) for mask in masks)
        head += bytes(max(0, header - len(head)))
    begin = 14 + len(head) + len(colours)
    return b"BM" + struct.pack("<IHHI", begin + len(data), 0, 0, begin) + head + colours + data


def bmp_cases() -> Iterator[Case]:
    """Palettes, masks and alpha."""
    for bits in (1, 4, 8):
        count = 1 << bits
        indices = (_x * 7 + _y * 13) % count
        rows = [packed(row[None], bits) for row in indices]
        colours = np.random.default_rng(bits).integers(0, 256, (count, 3))
        greys = np.repeat(np.arange(count)[:, None], 3, 1)
        stretched = np.rint(greys * 255 / (count - 1)).astype(int)
        tables = {"palette": colours, "dark greys": greys, "greys": stretched}
        for name, table in tables.items():
            make = functools.partial(bmp, rows, bits, table=table)
            yield Case("BMP", f"{name}, {bits} bits", make, table[indices])
        make = functools.partial(bmp, rows, bits, table=colours, header=12)
        yield Case("BMP", f"palette, {bits} bits, OS/2", make, colours[indices])
    two = np.array([[0, 0, 0], [255, 255, 255]])
    indices = (_x * 7 + _y * 13) % 2
    rows = [packed(row[None], 8) for row in indices]
    make = functools.partial(bmp, rows, 8, table=two)
    yield Case("BMP", "palette of black and white, 8 bits", make, two[indices])
    reversed_rows = [row[:, ::-1].astype(np.uint8).tobytes() for row in RGB]
    yield Case("BMP", "RGB, 24 bits", functools.partial(bmp, reversed_rows, 24), RGB)
    make = functools.partial(bmp, reversed_rows, 24, upside_down=False)
    yield Case("BMP", "RGB, 24 bits, top first", make, RGB)
    layouts = {
        (16, "RGB, 555"): (),
        (16, "RGB, 555, masks"): (0x7C00, 0x3E0, 0x1F),
        (16, "RGB, 565"): (0xF800, 0x7E0, 0x1F),
        (16, "RGB, 444"): (0xF00, 0xF0, 0xF),
        (16, "ARGB, 4444"): (0xF00, 0xF0, 0xF, 0xF000),
        (16, "ARGB, 1555"): (0x7C00, 0x3E0, 0x1F, 0x8000),
        (32, "RGB, 888"): (),
        (32, "RGB, 888, masks"): (0xFF0000, 0xFF00, 0xFF),
        (32, "RGB, 888, other masks"): (0xFF, 0xFF00, 0xFF0000),
        (32, "ARGB, 8888"): (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
        (32, "RGBA, 8888"): (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
        (32, "RGB, 10 bits"): (0x3FF00000, 0xFFC00, 0x3FF),
        (32, "ARGB, 2 and 10 bits"): (0x3FF00000, 0xFFC00, 0x3FF, 0xC0000000),
    }
    for (bits, name), masks in layouts.items():
        used = masks or ((0x7C00, 0x3E0, 0x1F) if bits == 16 else (0xFF0000, 0xFF00, 0xFF))
        words, meant = np.zeros(GREY.shape, np.uint64), []
        for mask, values in zip(used, (*np.moveaxis(RGB, -1, 0), ALPHA), strict=False):
            shift = (mask & -mask).bit_length() - 1
            samples, each = quantized(values, (mask >> shift).bit_length())
            words |= samples << np.uint64(shift)
            meant.append(each)
        expected = np.stack(meant[:3], -1)
        if len(meant) == 4:
            expected = over_white(expected, meant[3])
        rows = [row.astype(f"<u{bits // 8}").tobytes() for row in words]
        header = 108 if len(used) == 4 else 40
        make = functools.partial(bmp, rows, bits, masks=masks, header=header)
        yield Case("BMP", f"{name} ({bits} bits)", make, expected)


# Formats that a library writes.


def _encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, file_format, **options)
    return sink.getvalue()


def library_cases() -> Iterator[Case]:
    """GIF, WebP, JPEG, AVIF and JPEG 2000."""
    colour = Image.fromarray(RGB.astype(np.uint8))
    grey = Image.fromarray(GREY.astype(np.uint8))
    clear = colour.copy()
    clear.putalpha(Image.fromarray(ALPHA.astype(np.uint8)))
    shown = over_white(RGB, ALPHA)
    table = np.random.default_rng(0).integers(0, 256, (256, 3))
    indices = (_x * 7 + _y * 13) % 256
    palette = Image.fromarray(indices.astype(np.uint8), "L")
    palette.putpalette(table.astype(np.uint8).tobytes())
    make = functools.partial(_encoded, palette, "GIF")
    yield Case("GIF", "palette", make, table[indices])
    make = functools.partial(_encoded, palette, "GIF", transparency=7)
    hidden = np.where((indices == 7)[..., None], 255, table[indices])
    yield Case("GIF", "palette, a colour clear", make, hidden)
    make = functools.partial(_encoded, palette, "GIF", interlace=False)
    yield Case("GIF", "palette, not interlaced", make, table[indices])
    make = functools.partial(_encoded, grey, "GIF")
    yield Case("GIF", "grey", make, GREY)
    for image, name, expected in ((colour, "RGB", RGB), (clear, "alpha", shown)):
        make = functools.partial(_encoded, image, "WEBP", lossless=True)
        yield Case("WebP", f"{name}, lossless", make, expected)
    flat, smooth = RGB.copy(), GREY
    flat[..., :] = (200, 120, 60)
    plain = Image.fromarray(flat.astype(np.uint8))
    yield Case("WebP", "RGB", functools.partial(_encoded, plain, "WEBP"), flat, slack=6)
    yield from _jpeg_cases(plain, flat, grey, smooth)
    make = functools.partial(_encoded, plain, "AVIF", quality=100, subsampling="4:4:4")
    yield Case("AVIF", "RGB, 8 bits", make, flat, slack=4)
    clear_plain = plain.copy()
    clear_plain.putalpha(Image.fromarray(ALPHA.astype(np.uint8)))
    make = functools.partial(_encoded, clear_plain, "AVIF", quality=100, subsampling="4:4:4")
    yield Case("AVIF", "RGB, 8 bits, alpha", make, over_white(flat, ALPHA), slack=4)
    for bits in (10, 12):
        samples, meant = quantized(GREY, bits)
        make = functools.partial(_avif, samples.astype(np.uint16), bits)
        yield Case("AVIF", f"grey, {bits} bits", make, meant, slack=4)
        samples, meant = quantized(flat, bits)
        make = functools.partial(_avif, samples.astype(np.uint16), bits)
        yield Case("AVIF", f"RGB, {bits} bits", make, meant, slack=4)
    for codec, name in (("j2k", "codestream"), ("jp2", "boxes")):
        for bits in (2, 4, 8, 10, 12, 16):
            for values, colours in ((GREY, "grey"), (RGB, "RGB")):
                if bits > 8 and colours == "RGB":
                    continue  # named as not read
                samples, meant = quantized(values, bits)
                kind = np.uint8 if bits <= 8 else np.uint16
                make = functools.partial(_jpeg2000, samples.astype(kind), bits, codec)
                yield Case("JPEG 2000", f"{colours}, {bits} bits, {name}", make, meant)
    make = functools.partial(_encoded, clear, "JPEG2000")
    yield Case("JPEG 2000", "RGB, 8 bits, alpha", make, shown)


def _jpeg_cases(
    plain: Image.Image, flat: np.ndarray, grey: Image.Image, smooth: np.ndarray
) -> Iterator[Case]:
    options = {"quality": 100}
    make = functools.partial(_encoded, grey, "JPEG", **options)
    yield Case("JPEG", "grey", make, smooth, slack=3)
    for progressive in (False, True):
        for sampling in ("4:4:4", "4:2:0"):
            settings = options | {"progressive": progressive, "subsampling": sampling}
            make = functools.partial(_encoded, plain, "JPEG", **settings)
            name = f"YCbCr {sampling}" + ", progressive" * progressive
            yield Case("JPEG", name, make, flat, slack=3)
    make = functools.partial(_encoded, plain, "JPEG", keep_rgb=True, **options)
    yield Case("JPEG", "RGB", make, flat, slack=3)
    ink = np.concatenate([255 - flat, _y[..., None] * 0 + 40], -1).astype(np.uint8)
    inks = Image.frombytes("CMYK", (WIDTH, HEIGHT), ink.tobytes())
    shown = flat * (255 - 40) / 255
    make = functools.partial(_encoded, inks, "JPEG", **options)
    yield Case("JPEG", "CMYK, inverted as Adobe does", make, shown, slack=4)
    yield Case(
        "JPEG", "YCCK, inverted as Adobe does", functools.partial(_ycck, ink), shown, slack=4
    )


def _ycck(ink: np.ndarray) -> bytes:
    """Inks whose first three are stored as YCbCr, which the Adobe segment's last byte says."""
    colours = Image.fromarray(np.ascontiguousarray(ink[..., :3])).convert("YCbCr")
    # Pillow writes what is given to it inverted; it is to write these brightnesses as they are.
    stored = 255 - np.concatenate([np.asarray(colours), 255 - ink[..., 3:]], -1)
    image = Image.frombytes("CMYK", (WIDTH, HEIGHT), stored.astype(np.uint8).tobytes())
    data = _encoded(image, "JPEG", quality=100)
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    return data[:at] + b"\2" + data[at + 1 :]


def _avif(samples: np.ndarray, bits: int) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.avif_encode(samples, level=100, bitspersample=bits))


def _jpeg2000(samples: np.ndarray, bits: int, codec: str) -> bytes:
    import imagecodecs

    return bytes(
        imagecodecs.jpeg2k_encode(
            samples, level=0, codecformat=codec, bitspersample=bits, reversible=True
        )
    )


@functools.cache
def cases() -> tuple[Case, ...]:
    """All of them."""
    return (*tiff_cases(), *png_cases(), *bmp_cases(), *library_cases())


# The page.

_INTRODUCTION = """# Image formats

captioner decides what a file is by its first bytes, not by its name. It reads JPEG, PNG, WebP,
AVIF, JPEG 2000, BMP, GIF and TIFF, and with `pip install 'captioner[formats]'` HEIC and JPEG XL.
A folder's listing takes the extensions that `--ext` names: add `heic,heif,jxl` there once the
packages are installed.

- Only the first frame of an animation, or the first page of a TIFF, is captioned.
- Images are turned upright as their Exif or XMP says.
- What is transparent is laid over white.
- Integers of up to 16 bits are as bright as their range says. TIFFs of longer integers, of
  floating-point numbers, and of signed numbers are scaled by the smallest of 1, 255, 65535 that
  holds the largest of an image; where none does, by that largest. Negative numbers are black.
- Metadata (text, profiles, Exif, thumbnails) may be broken or huge: it is passed over.
- Colour profiles are not applied.
- JPEG 2000 in colour is read up to 8 bits a sample, grey up to 16.
- A file in another format has the status `undecodable`, and its error names the format: "Photoshop
  (PSD), which captioner does not read".

An image that takes much memory is decoded alone in its process; one that takes more than
1.5 bytes for each pixel of `--max-pixels` is `rejected`. Decoding takes about 4 bytes a pixel, a
JPEG much less (it is decoded at a fraction of its size), WebP and AVIF 16, HEIC 7, JPEG XL 16, and
JPEG 2000 22.

## What is tested

Each row is a file of 64×16 pixels that is made by its format's specification and compared pixel by
pixel with the picture it was made from. The last column is how far the worst pixel may be off, of
255: 1 is rounding; more is where a compression loses something.

| Format | Content | Off by at most |
|---|---|---|
"""


def page() -> str:
    """The page of the documentation."""
    rows = [f"| {each.kind} | {each.content} | {each.slack} |\n" for each in cases()]
    return _INTRODUCTION + "".join(rows) + f"\n{len(rows)} files.\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE}\n")
