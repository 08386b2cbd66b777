"""What a process on a CPU keeps in memory beside its tensors: freed blocks, compiled kernels."""

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
    """Bounds what oneDNN keeps: by default 1024 kernels, compiled for each new size of a batch.

    To be called before the first of them, whoever's it is: oneDNN looks once. Does nothing where
    the user has set a number.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def keep_freed_memory() -> None:
    """Keeps what this process frees for its next allocation. Does nothing without glibc.

    By default glibc gives every large block back to the kernel, and each tensor of a forward pass
    is then paged in anew: on a CPU that can cost more than half of the time.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(_TOP_PAD, 64 * 2**20)


def release_freed_memory() -> None:
    """Gives back to the system what is free, blocks of all sizes. Does nothing without glibc."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)
