"""Limits on what an image may take to decode: pixels, memory, passes over it."""

import contextlib
import threading
from collections.abc import Iterator

from captioner.runtime.memory import release_freed_memory

__all__ = ["OverLimitError", "admit", "one_large_image"]

_MEMORY_PER_PIXEL = 1.5  # bytes that decoding may take for each pixel that is allowed
_LARGE = 1 << 27  # bytes: images that take more are decoded one at a time

#: Held while a process decodes an image that takes much memory.
one_large_image = threading.Lock()


class OverLimitError(Exception):
    """An image asks for more memory or time than is allowed; the message is the reason."""


def admit(
    width: int, height: int, memory: int, max_pixels: int, alone: contextlib.ExitStack
) -> None:
    """Checks an image's size and memory before its pixels are decoded.

    Args:
        width: in pixels.
        height: in pixels.
        memory: bytes that decoding takes at its peak.
        max_pixels: how many an image may have.
        alone: keeps other large images out until it is left, where this one is large.

    Raises:
        OverLimitError: the image is over a limit.
    """
    if width * height > max_pixels:
        raise OverLimitError(f"{width}×{height} is more than {max_pixels} pixels")
    most = max(_LARGE, int(_MEMORY_PER_PIXEL * max_pixels))
    if memory > most:
        raise OverLimitError(f"decoding takes {memory} bytes of memory, more than {most}")
    if memory > _LARGE:
        alone.enter_context(_large_image())


@contextlib.contextmanager
def _large_image() -> Iterator[None]:
    """Decodes one large image at a time, in memory that is given back to the system after it."""
    with one_large_image:
        release_freed_memory()
        try:
            yield
        finally:
            release_freed_memory()
