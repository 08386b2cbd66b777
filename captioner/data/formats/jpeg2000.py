"""The header of a JPEG 2000 codestream: what it takes to decode it."""

from dataclasses import dataclass

__all__ = ["JPEG2000_SIGNATURES", "Codestream", "read_codestream"]

JPEG2000_SIGNATURES = (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")
_START = b"\xff\x4f\xff\x51"
_FARTHEST = 1 << 20  # bytes before the codestream: profiles, palettes and other boxes


@dataclass(frozen=True, slots=True)
class Codestream:
    """Sizes in pixels, and the bits of each component."""

    width: int
    height: int
    tile_width: int
    tile_height: int
    bits: tuple[int, ...]

    @property
    def memory(self) -> int:
        """Bytes that decoding a tile takes beside the image itself, by measurement."""
        width, height = min(self.width, self.tile_width), min(self.height, self.tile_height)
        return width * height * len(self.bits) * 6


def read_codestream(data: bytes) -> Codestream:
    """The header of the codestream, which may be inside boxes.

    Raises:
        ValueError: there is none, or it is cut short.
    """
    begin = data.find(_START, 0, _FARTHEST)
    if begin < 0 or len(data) < begin + 42:
        raise ValueError("its codestream is missing")
    right, below, left, top, tile_width, tile_height = (
        int.from_bytes(data[at : at + 4], "big") for at in range(begin + 8, begin + 32, 4)
    )
    count = int.from_bytes(data[begin + 40 : begin + 42], "big")
    bits = tuple((each & 127) + 1 for each in data[begin + 42 : begin + 42 + 3 * count : 3])
    if not (right > left and below > top and tile_width and tile_height and bits):
        raise ValueError("its width or height is not possible")
    return Codestream(right - left, below - top, tile_width, tile_height, bits)
