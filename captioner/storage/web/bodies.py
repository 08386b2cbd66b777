"""Reads bodies of responses: only the bytes that are asked for, and all of them or an error."""

import zlib
from typing import Protocol

__all__ = ["Body", "read_body"]

_PIECE = 1 << 16  # bytes
_SLACK = 1 << 20  # bytes that a compressed body may be longer than its content

_GZIP = {"gzip", "x-gzip", "deflate"}


class Body(Protocol):
    """A response's body, as it comes; an error where the connection ends before it does."""

    def read1(self, amt: int, decode_content: bool) -> bytes:
        """The next bytes, at most ``amt``; empty at the end."""


def read_body(body: Body, coding: str, end: int | None) -> bytes:
    """The first ``end`` bytes of a body, or all; reads no further.

    Args:
        body: the body.
        coding: the header ``Content-Encoding``.
        end: the number of bytes.

    Raises:
        OSError: the body is damaged, ends early, or has an encoding that nobody asked for.
    """
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return _plain(body, end)
    if coding in _GZIP:
        return _inflated(body, end)
    raise OSError(f"the body is encoded as {coding[:40]!r}, which was not asked for")


def _plain(body: Body, end: int | None) -> bytes:
    pieces, size = [], 0
    while end is None or size < end:
        piece = body.read1(_PIECE if end is None else min(_PIECE, end - size), False)
        if not piece:
            break
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def _inflated(body: Body, end: int | None) -> bytes:
    """Decompresses; a small body may stand for gigabytes, so no more than ``end`` bytes of it."""
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by the header
    pieces, size, received = [], 0, 0
    while not inflater.eof and (end is None or size < end):
        data = body.read1(_PIECE, False)
        received += len(data)
        if not data:
            raise ConnectionError("the compressed body is cut off")
        if end is not None and received > end + _SLACK:
            raise OSError("the compressed body is longer than its content")
        try:
            piece = inflater.decompress(data, 0 if end is None else end - size)
        except zlib.error as error:
            raise OSError("the compressed body is damaged") from error
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)
