"""TIFF: the layout of a file's samples, and whether Pillow reads them correctly.

Pillow knows a TIFF by a table of layouts, and takes some of them for others: 12 bits for 16, black
for white, unsigned for signed. What is not in :func:`_pillow_reads` is read by
:class:`captioner.data.formats.tiff_samples.SampledTiff`.
"""

from dataclasses import dataclass

from PIL import TiffImagePlugin

from captioner.data.formats.tiff_directory import Directory, Tag

__all__ = ["Layout", "check_is_read", "layout"]

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, MASK, CMYK, YCBCR, CIELAB, ICCLAB = *range(7), 8, 9
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3, 9: 3}  # samples by photometric interpretation
UNSIGNED, SIGNED, FLOAT, _UNDEFINED = 1, 2, 3, 4  # sample formats
_PHOTOMETRIC_NAMES = {4: "a mask", 10: "ITU Lab", 32803: "camera raw", 32844: "LogL"}
_PHOTOMETRIC_NAMES |= {32845: "LogLuv", 34892: "camera raw", 51177: "a depth map"}
_FAX, _JPEG = (2, 3, 4), (6, 7)
_UNPACKED = (1, 5, 8, 32773, 32946, 34925, 50000)  # compressions of bytes, whatever they mean
HORIZONTAL, FLOATING_POINT = 2, 3  # predictors
ASSOCIATED, _UNASSOCIATED = 1, 2  # alpha


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of the samples of a TIFF, and what they mean."""

    width: int
    height: int
    photometric: int
    bits: int
    sample_format: int
    samples: int
    extra: tuple[int, ...]
    compression: int
    predictor: int
    is_planar: bool
    order: str
    tile_width: int

    @property
    def colours(self) -> int:
        """Samples a pixel that are colours; the others are extra."""
        return _COLOURS.get(self.photometric, self.samples)

    @property
    def alpha(self) -> int | None:
        """Whether the first extra sample is alpha, and of which kind."""
        kind = next(iter(self.extra), None)
        return kind if kind in (ASSOCIATED, _UNASSOCIATED) else None

    @property
    def row_samples(self) -> int:
        """Samples in a row of the file: of all channels, or of one where they are apart."""
        return self.width * (1 if self.is_planar else self.samples)

    @property
    def description(self) -> str:
        """The layout in words, for a reason."""
        kind = {SIGNED: "signed", FLOAT: "floating-point"}.get(self.sample_format, "unsigned")
        return f"{self.samples} {kind} samples of {self.bits} bits a pixel"


def layout(directory: Directory) -> Layout:
    """The layout of a TIFF.

    Raises:
        ValueError: its size or samples are missing or contradict each other.
    """
    width, height = (directory.integers(tag) for tag in (Tag.WIDTH, Tag.LENGTH))
    for side in (width, height):
        if len(side) != 1 or not 0 < side[0] < 1 << 31:
            raise ValueError("its width or height is not possible")
    compression = directory.integer(Tag.COMPRESSION, 1)
    photometric = directory.integer(Tag.PHOTOMETRIC, YCBCR if compression == 6 else 0)
    bits = directory.integers(Tag.BITS) or (1,)
    samples = directory.integer(
        Tag.SAMPLES, 3 if compression in _JPEG and photometric in (2, 6) else len(bits)
    )
    formats = directory.integers(Tag.SAMPLE_FORMAT)[:samples] or (UNSIGNED,)
    if not 0 < samples <= 1000 or len(set(bits[:samples])) > 1 or len(set(formats)) > 1:
        raise ValueError("its samples have different types, which captioner does not read")
    extra = directory.integers(Tag.EXTRA_SAMPLES)
    missing = samples - _COLOURS.get(photometric, samples) - len(extra)
    if missing < 0:
        extra = extra[: missing or None] if len(extra) + missing >= 0 else ()
    return Layout(
        width=width[0],
        height=height[0],
        photometric=photometric,
        bits=bits[0],
        sample_format=UNSIGNED if formats[0] == _UNDEFINED else formats[0],
        samples=samples,
        # Without the tag, a fourth sample of RGB is alpha to all readers.
        extra=extra or ((_UNASSOCIATED,) if missing == 1 and photometric != CMYK else ()),
        compression=compression,
        predictor=directory.integer(Tag.PREDICTOR, 1),
        is_planar=directory.integer(Tag.PLANAR, 1) == 2 and samples > 1,
        order=directory.order,
        tile_width=directory.integer(Tag.TILE_WIDTH, 0),
    )


def check_is_read(directory: Directory, form: Layout) -> bool:
    """Whether Pillow reads the layout rightly; else this package reads its samples.

    Raises:
        ValueError: neither does; the message says what the file is.
    """
    is_preview = directory.integer(Tag.NEW_SUBFILE_TYPE, 0) & 1
    if Tag.DNG_VERSION in directory.numbers or (
        is_preview and Tag.SUB_DIRECTORIES in directory.numbers
    ):
        raise ValueError("camera raw (such as DNG, NEF, ARW), which captioner does not read")
    if Tag.WINDOWS_MEDIA_PHOTO in directory.numbers:
        raise ValueError("JPEG XR, which captioner does not read")
    if form.photometric not in _COLOURS:
        name = _PHOTOMETRIC_NAMES.get(form.photometric, f"photometric {form.photometric}")
        raise ValueError(f"a TIFF of {name}, which captioner does not read")
    if form.photometric == CMYK and directory.integer(Tag.INK_SET, 1) != 1:
        raise ValueError("a TIFF of inks other than CMYK, which captioner does not read")
    if form.compression not in TiffImagePlugin.COMPRESSION_INFO:
        raise ValueError(f"a TIFF of compression {form.compression}, which captioner does not read")
    if _pillow_reads(directory, form):
        return True
    if form.compression not in _UNPACKED or form.samples < form.colours or not _is_sampled(form):
        raise ValueError(
            f"a TIFF of {form.description} (photometric {form.photometric}, "
            f"compression {form.compression}), which captioner does not read"
        )
    return False


def _pillow_reads(directory: Directory, form: Layout) -> bool:
    if form.compression in _FAX:
        return form.bits == 1
    if form.compression not in _UNPACKED:
        return form.bits == 8
    if form.is_planar or form.sample_format != UNSIGNED:
        return False
    if form.photometric == YCBCR:
        return form.bits == 8
    if form.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO):
        deep = form.bits == 16 and form.photometric == BLACK_IS_ZERO
        plain = directory.integer(Tag.FILL_ORDER, 1) == 1
        return form.samples == 1 and (form.bits in (1, 2, 4, 8) or (deep and plain))
    return form.photometric == RGB and form.bits in (8, 16) and form.samples == 3


def _is_sampled(form: Layout) -> bool:
    if form.sample_format == FLOAT:
        return form.bits in (16, 32, 64) and form.photometric in (0, 1, 2)
    if form.predictor == HORIZONTAL and form.bits not in (8, 16, 32, 64):
        return False
    if form.tile_width * form.row_samples // form.width * form.bits % 8:
        return False
    if form.photometric in (CIELAB, ICCLAB):
        return form.bits in (8, 16)
    if form.photometric == PALETTE:
        return form.bits <= 16 and form.sample_format == UNSIGNED
    if form.photometric in (CMYK, YCBCR):
        return form.bits in (8, 16) and form.sample_format == UNSIGNED
    return 0 < form.bits <= 32 or form.bits == 64
