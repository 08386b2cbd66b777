"""Formats that are not read, by name: what a file is, if it is not an image that can be decoded."""

import re
import struct
from dataclasses import dataclass

__all__ = ["Known", "identify", "is_heif", "is_jxl", "jxl_size"]

_NEEDS_EXTRA = "{}, which needs captioner[formats]"
_NOT_READ = "{}, which captioner does not read"
_NO_IMAGE = "{}, not an image"


@dataclass(frozen=True, slots=True)
class Known:
    """What a file is, as a reason, and its size where the header has it, in pixels."""

    reason: str
    width: int | None = None
    height: int | None = None


_IMAGES = (
    (b"8BPS", "Photoshop (PSD)"),
    (b"\xc5\xd0\xd3\xc6", "PostScript (EPS)"),
    (b"%!", "PostScript (EPS)"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"\0\0\2\0", "a cursor (CUR)"),
    (b"icns", "an icon (ICNS)"),
    (b"FUJIFILMCCD-RAW", "camera raw (RAF)"),
    (b"IIRO", "camera raw (ORF)"),
    (b"IIRS", "camera raw (ORF)"),
    (b"MMOR", "camera raw (ORF)"),
    (b"IIU\0", "camera raw (RW2)"),
    (b"FOVb", "camera raw (X3F)"),
    (b"\0MRM", "camera raw (MRW)"),
    (b"II\xbc", "JPEG XR"),
    (b"DDS ", "DirectDraw Surface (DDS)"),
    (b"qoif", "QOI"),
    (b"v/1\1", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"gimp xcf", "GIMP (XCF)"),
    (b"AT&TFORM", "DjVu"),
    (b"SIMPLE  =", "FITS"),
    (b"\xd7\xcd\xc6\x9a", "Windows metafile (WMF)"),
    (b"\1\xda", "SGI"),
    (b"DanM", "Microsoft Paint (MSP)"),
    (b"LinS", "Microsoft Paint (MSP)"),
    (b"BPG\xfb", "BPG"),
    (b"farbfeld", "farbfeld"),
    (b"FLIF", "FLIF"),
    (b"\x8aMNG", "MNG"),
    (b"\x8bJNG", "JNG"),
    (b"/* XPM", "XPM"),
    (b"\xabKTX", "a texture (KTX)"),
)
_OTHERS = (
    (b"%PDF", "a PDF document"),
    (b"\x1aE\xdf\xa3", "WebM or Matroska video"),
    (b"FLV\1", "Flash video"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "Windows Media video"),
    (b"\0\0\1\xba", "MPEG video"),
    (b"\0\0\1\xb3", "MPEG video"),
    (b"OggS", "Ogg media"),
    (b"ID3", "MP3 audio"),
    (b"fLaC", "FLAC audio"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data"),
    (b"\xfd7zXZ", "xz data"),
    (b"BZh", "bzip2 data"),
    (b"PAR1", "a Parquet file"),
    (b"SQLite format", "an SQLite database"),
    (b"\x7fELF", "a program"),
    (b"\0\5\x16\7", "an AppleDouble file (macOS metadata)"),
    (b"\0\5\x16\0", "an AppleSingle file (macOS metadata)"),
    (b"version https://git-lfs", "a Git LFS pointer (run git lfs pull)"),
)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"mif2"}
_BRANDS = {
    b"crx ": _NOT_READ.format("camera raw (CR3)"),
    b"avci": _NOT_READ.format("HEIF of AVC"),
    b"jpeg": _NOT_READ.format("HEIF of JPEG"),
    b"qt  ": _NO_IMAGE.format("QuickTime video"),
    b"M4A ": _NO_IMAGE.format("MPEG-4 audio"),
}
_JXL_BOXES = b"\0\0\0\x0cJXL \r\n\x87\n"
_MARKUP = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*\?>\s*|<!--.*?-->\s*)*<(!doctype )?(\w+)", re.I | re.S
)
_NETPBM = re.compile(rb"P[1-7FfX]\s")


def identify(data: bytes) -> Known | None:
    """What a file is that none of the readers takes; None where nobody knows."""
    found = _identify(data)
    if found and not all(
        side is None or 0 < side < 1 << 31 for side in (found.width, found.height)
    ):
        return Known(found.reason)
    return found


def _identify(data: bytes) -> Known | None:
    if is_heif(data):
        return Known(_NEEDS_EXTRA.format("HEIC"), *_heif_size(data))
    if is_jxl(data):
        return Known(_NEEDS_EXTRA.format("JPEG XL"), *jxl_size(data))
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        return Known(_BRANDS.get(brand, _NO_IMAGE.format("MPEG-4 video")))
    if data[:4] == b"RIFF" and data[8:12] in (b"AVI ", b"WAVE"):
        return Known(_NO_IMAGE.format("AVI video" if data[8:12] == b"AVI " else "WAV audio"))
    if data[-18:-2] == b"TRUEVISION-XFILE":
        return Known(_NOT_READ.format("Targa (TGA)"), *struct.unpack("<HH", data[12:16]))
    for signature, name in _IMAGES:
        if data.startswith(signature):
            return Known(_NOT_READ.format(name), *_size(data, name))
    for signature, name in _OTHERS:
        if data.startswith(signature):
            return Known(_NO_IMAGE.format(name))
    return _identify_elsewhere(data)


def _identify_elsewhere(data: bytes) -> Known | None:
    """The format of a file by bytes after its beginning, or by a pattern."""
    if data[8:10] == b"CR" and data[:2] in (b"II", b"MM"):
        return Known(_NOT_READ.format("camera raw (CR2)"))
    if data[128:132] == b"DICM":
        return Known(_NOT_READ.format("DICOM"))
    if data[257:262] == b"ustar":
        return Known(_NO_IMAGE.format("a tar archive"))
    if data[:1] == b"\x47" and data[188:189] == b"\x47" and data[376:377] == b"\x47":
        return Known(_NO_IMAGE.format("MPEG transport-stream video"))
    if data[:1] == b"\1" and data[40:44] == b" EMF":
        return Known(_NOT_READ.format("Windows metafile (EMF)"))
    if _NETPBM.match(data):
        return Known(_NOT_READ.format("Netpbm (PBM, PGM, PPM, PAM or PFM)"))
    if (
        data[:1] == b"\x0a"
        and data[1:2] in (b"\0", b"\2", b"\3", b"\4", b"\5")
        and data[2:3] == b"\1"
    ):
        return Known(_NOT_READ.format("PCX"))
    markup = _MARKUP.match(data, 0, 4096)
    if markup is None:
        return None
    if markup[2].lower() == b"svg":
        return Known(_NOT_READ.format("a drawing (SVG)"))
    if markup[1] or markup[2].lower() in (b"html", b"head", b"body"):
        return Known(_NO_IMAGE.format("an HTML page"))
    return Known(_NO_IMAGE.format("XML"))


def _size(data: bytes, name: str) -> tuple[int, int] | tuple[()]:
    """The width and the height in the header of some formats."""
    if name == "Photoshop (PSD)" and len(data) >= 22:
        height, width = struct.unpack(">II", data[14:22])
        return width, height
    if name == "QOI" and len(data) >= 12:
        width, height = struct.unpack(">II", data[4:12])
        return width, height
    if name == "DirectDraw Surface (DDS)" and len(data) >= 20:
        height, width = struct.unpack("<II", data[12:20])
        return width, height
    return ()


def is_jxl(data: bytes) -> bool:
    """Whether a file is JPEG XL, bare or in boxes."""
    return data[:2] == b"\xff\x0a" or data[:12] == _JXL_BOXES


def is_heif(data: bytes) -> bool:
    """Whether a file is HEIF and not AVIF."""
    if data[4:8] != b"ftyp":
        return False
    brands = {data[8:12]}
    if data[8:12] in (b"mif1", b"msf1", b"mif2"):
        end = min(int.from_bytes(data[:4], "big"), 512)
        brands |= {data[at : at + 4] for at in range(16, end, 4)}
        if brands & {b"avif", b"avis"}:
            return False
    return bool(brands & _HEIF_BRANDS)


def _heif_size(data: bytes) -> tuple[int, int] | tuple[()]:
    """The size of a HEIF file's image: the largest, since tiles have sizes too.

    Codecs pad an image to whole blocks; where it is cropped to its own size, that counts.
    """
    cropped = [
        (values[0] // max(values[1], 1), values[2] // max(values[3], 1))
        for values in _properties(data, b"clap", 4)
    ]
    sizes = cropped or [(values[1], values[2]) for values in _properties(data, b"ispe", 3)]
    return max(sizes, key=lambda size: size[0] * size[1], default=())


def _properties(data: bytes, kind: bytes, count: int) -> list[tuple[int, ...]]:
    """The first 32-bit numbers of each property of this kind in a HEIF file."""
    head = data[: 1 << 20]
    begins = [found.end() for found in re.finditer(kind, head)]
    return [
        struct.unpack_from(f">{count}I", head, at) for at in begins if at + 4 * count <= len(head)
    ]


_JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def jxl_size(data: bytes) -> tuple[int, int] | tuple[()]:
    """Width and height in the header of a JPEG XL file (ISO/IEC 18181-1, SizeHeader)."""
    begin = 0
    if data[:12] == _JXL_BOXES:
        begin = next(
            (
                data.find(box, 0, 1 << 20) + skip
                for box, skip in ((b"jxlc", 4), (b"jxlp", 8))
                if box in data[: 1 << 20]
            ),
            -1,
        )
    if begin < 0 or data[begin : begin + 2] != b"\xff\x0a":
        return ()
    bits, position = int.from_bytes(data[begin + 2 : begin + 16], "little"), 0

    def take(count: int) -> int:
        nonlocal position
        position += count
        return bits >> position - count & (1 << count) - 1

    def side(small: bool) -> int:
        if small:
            return (take(5) + 1) * 8
        return take((9, 13, 18, 30)[take(2)]) + 1

    small = bool(take(1))
    height = side(small)
    ratio = take(3)
    width = (
        side(small)
        if ratio == 0
        else height * _JXL_RATIOS[ratio - 1][0] // _JXL_RATIOS[ratio - 1][1]
    )
    return width, height
