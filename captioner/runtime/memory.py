"""What a process on a CPU keeps beside its tensors: freed blocks and compiled kernels."""

import ctypes
import functools
import os

__all__ = ["keep_few_kernels", "keep_freed_memory", "release_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # no shared library of that kind on this system
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def keep_few_kernels() -> None:
    """Lets oneDNN keep 128 compiled kernels instead of 1024; each batch size needs its own.

    Call it before the first kernel is compiled: oneDNN reads the setting once. Does nothing where
    the environment sets a number.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def keep_freed_memory() -> None:
    """Keeps freed blocks for this process's next allocations. Does nothing without glibc.

    By default glibc returns every large block to the kernel, and each tensor of a forward pass is
    paged in again. On a CPU that can take more than half of the time.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(_TOP_PAD, 64 * 2**20)


def release_freed_memory() -> None:
    """Returns freed blocks of all sizes to the kernel. Does nothing without glibc."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)
