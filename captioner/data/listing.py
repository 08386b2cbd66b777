"""Which images a source holds: a folder, or a list of URIs."""

import logging
from collections import Counter

from captioner import storage
from captioner.config import ListingConfig
from captioner.data.lists import is_list, read_list
from captioner.errors import InputError, first_of, one_line
from captioner.storage import Listed

__all__ = ["list_source"]

_logger = logging.getLogger(__name__)

_SHOWN = 5  # names in a message


def list_source(source: str, listing: ListingConfig) -> list[Listed]:
    """The images of a source, each once.

    Args:
        source: a folder, listed recursively and sorted; or a list, whose order is kept: see
            :func:`captioner.data.lists.read_list`.
        listing: which files of a folder are images, which column of a list, and how many images to
            take at most.

    Raises:
        InputError: there is no such source, it holds no image, a folder in it cannot be listed, or
            it is a list that cannot be used.
    """
    source = storage.as_path(source)
    try:
        is_table = is_list(source) and not storage.is_directory(source)
    except OSError as error:
        raise InputError(f"cannot read {source}: {one_line(error)}") from error
    if listing.column is not None and not is_table:
        raise InputError(f"--column is for a list, and {source} is not one by its ending")
    images = read_list(source, listing.column) if is_table else _list_folder(source, listing)
    return images[: listing.limit]


def _list_folder(source: str, listing: ListingConfig) -> list[Listed]:
    others: Counter[str] = Counter()
    images = storage.find(source, listing.endings, others)
    if not images:
        raise InputError(f"{source} holds no images ({listing.extensions})")
    if others:
        known = [f"{count} {ending or 'without one'}" for ending, count in others.most_common()]
        _logger.info("files of other endings passed over: %s", first_of(known, _SHOWN))
    return images
