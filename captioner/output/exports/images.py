"""The bytes of an exported image."""

import logging
import os

from captioner.errors import InputError
from captioner.output.exports.paths import image_path
from captioner.output.images import OutputImages

__all__ = ["THREADS", "file_extension", "read_image"]

#: How many images are read at once: reading waits for the disk or a bucket.
THREADS = 8
_LARGEST = 1 << 30  # bytes of an image

_logger = logging.getLogger(__name__)


def read_image(images: OutputImages, uri: str) -> bytes | None:
    """An image's bytes; None, with a warning, where it cannot be read or is larger than 1 GiB.

    Raises:
        InputError: the whole store cannot be used.
    """
    try:
        data = images.read(uri, _LARGEST)
    except InputError:
        raise
    except OSError as error:
        _logger.warning("cannot read %s: %s", uri, error)
        return None
    if len(data) > _LARGEST:
        _logger.warning("cannot export %s: it is larger than %d bytes", uri, _LARGEST)
        return None
    return data


def file_extension(uri: str) -> str:
    """The extension of an image's file in lower case, with its dot; ``.jpg`` where it has none."""
    path = image_path(uri)
    if path.startswith(("http://", "https://")):
        path = path.split("?")[0]
    return os.path.splitext(path)[1].lower() or ".jpg"
