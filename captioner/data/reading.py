"""Reads the images of a listing: files one by one, neighbours in a container together."""

import re
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from captioner import storage
from captioner.data.parquet.cells import read_cells
from captioner.data.tar.reading import read_images_of_tar
from captioner.errors import CaptionerError

__all__ = ["groups", "is_in_container", "read_images"]

_GROUP_IMAGES, _GROUP_BYTES = 32, 16 << 20  # of a container, read together at most

#: The end of the URI of an image in a Parquet file: ``.parquet#COLUMN=ROW``.
_CELL = re.compile(r"\.parquet#[^/]*=\d+$", re.IGNORECASE)

#: What reads images of one container: as :func:`read_images`.
Reader = Callable[[pa.Table, int, int], Iterator[bytes | Exception]]


def is_in_container(uri: str) -> bool:
    """Whether a URI names an image in a file that holds many, which has a locator in a listing."""
    return uri.startswith("tar://") or _CELL.search(uri) is not None


def groups(images: pa.Table) -> Iterator[range]:
    """The images of a shard that are read together: neighbours in a container; else one by one."""
    containers, sizes = images["container"].to_pylist(), images["size"].to_pylist()
    begin, total = 0, 0
    for index, (container, size) in enumerate(zip(containers, sizes, strict=True)):
        total += size or 0
        count = index - begin
        alone = container is None or container != containers[begin]
        if count and (alone or count >= _GROUP_IMAGES or total > _GROUP_BYTES):
            yield range(begin, index)
            begin, total = index, size or 0
    if len(images):
        yield range(begin, len(images))


def read_images(images: pa.Table, limit: int, retries: int) -> Iterator[bytes | Exception]:
    """Reads a group of images, in order.

    Args:
        images: rows of a listing, all of one container or none; see :func:`groups`.
        limit: at most ``limit + 1`` bytes of an image are read, which shows that it is longer.
        retries: how often a transient error is retried.

    Yields:
        An image's bytes, or why they cannot be read.

    Raises:
        CaptionerError: no image of the job can be read, for example without credentials.
    """
    for container, some in _by_container(images):
        yield from (_read_files if container is None else _reader(container))(some, limit, retries)


def _by_container(images: pa.Table) -> Iterator[tuple[str | None, pa.Table]]:
    containers: Sequence[str | None] = images["container"].to_pylist()
    begin = 0
    for index in range(1, len(containers) + 1):
        if index == len(containers) or containers[index] != containers[begin]:
            yield containers[begin], images.slice(begin, index - begin)
            begin = index


def _read_files(images: pa.Table, limit: int, retries: int) -> Iterator[bytes | Exception]:
    for uri in images["uri"].to_pylist():
        try:
            yield storage.read(uri, limit, retries=retries)
        except CaptionerError:
            raise
        except Exception as problem:  # a bucket's client raises errors of many types
            yield problem


#: What reads a container, by the end of its name.
_READERS: dict[str, Reader] = {"parquet": read_cells, "tar": read_images_of_tar}


def _reader(container: str) -> Reader:
    return _READERS[container.rpartition(".")[2].lower()]
