"""Reads images of a tar file: neighbours in one request."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from captioner import storage
from captioner.errors import CaptionerError

__all__ = ["read_images_of_tar"]

_GAP = 1 << 20  # bytes between images; fewer are read along rather than cost a request


def read_images_of_tar(images: pa.Table, limit: int, retries: int) -> Iterator[bytes | Exception]:
    """As :func:`captioner.data.reading.read_images`, for images of one tar file."""
    rows = images.select(["container", "version", "position", "size"]).to_pylist()
    for span in _spans(rows):
        yield from _read_span(span, retries)


def _spans(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Cuts images into spans that are read at once, each of one version of the tar file."""
    span: list[dict[str, Any]] = []
    for row in rows:
        if span:
            gap = row["position"] - span[-1]["position"] - span[-1]["size"]
            if not 0 <= gap <= _GAP or row["version"] != span[-1]["version"]:
                yield span
                span = []
        span.append(row)
    if span:
        yield span


def _read_span(span: list[dict[str, Any]], retries: int) -> Iterator[bytes | Exception]:
    tar, begin = span[0]["container"], span[0]["position"]
    end = span[-1]["position"] + span[-1]["size"]
    try:
        data = memoryview(_read_version(tar, begin, end, span[0]["version"], retries))
    except CaptionerError:
        raise
    except Exception as problem:  # a bucket's client raises errors of many types
        yield from [problem] * len(span)
        return
    for row in span:
        first = row["position"] - begin
        yield bytes(data[first : first + row["size"]])


def _read_version(tar: str, begin: int, end: int, version: str, retries: int) -> bytes:
    """Reads a range of a version of a tar file.

    Raises:
        OSError: the range cannot be read, or the tar file has another version.
    """
    data, problem = b"", None
    try:
        data = storage.read_range(tar, begin, end, retries=retries)
    except FileNotFoundError:
        raise
    except OSError as error:  # perhaps because the tar file is shorter now
        problem = error
    # Asked after the read: the tar file may be replaced at any moment before.
    if storage.identify(tar, retries=retries)[1] != version:
        raise OSError("the tar file has changed since it was listed")
    if problem is not None:
        raise problem
    return data
