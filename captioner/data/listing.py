"""Which images a source holds: a folder, tar or Parquet files, or a list of URIs."""

import hashlib
import logging
import shlex
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from captioner import storage
from captioner.config import ListingConfig
from captioner.data.columns import Keep
from captioner.data.filters import PROGRAMS_FILES, Exclusion
from captioner.data.lists import is_list, is_parquet, read_list
from captioner.data.parquet.listing import holds_images, list_parquet
from captioner.data.source import list_files
from captioner.data.tar.listing import list_tars
from captioner.data.tar.names import COMPRESSED, expand, is_tar, refuse_compressed
from captioner.errors import InputError, first_of, one_line
from captioner.runtime.prefetch import Mapper, map_in_threads
from captioner.storage import FolderError, Listed, PassedOver

__all__ = ["list_source"]

_logger = logging.getLogger(__name__)

_SHOWN = 5  # names in a message


def list_source(
    source: str,
    listing: ListingConfig,
    *,
    prompt: str | None = None,
    seed: int = 0,
    mapper: Mapper = map_in_threads,
) -> pa.Table:
    """The images of a source, each once: :data:`captioner.schema.LISTING`.

    Args:
        source: a folder, listed recursively and sorted: of images or, without any, of tar files or
            of Parquet files; a tar file, or several by a pattern: see
            :func:`captioner.data.tar.names.expand`; a Parquet file with images; or a list, whose
            order is kept: see :func:`captioner.data.lists.read_list`. A ``.txt`` list may name tar
            files.
        listing: which files of a folder are images, which columns of a table count, and how many
            images to take at most.
        prompt: a prompt, which may name columns: see :mod:`captioner.data.prompts`.
        seed: chooses the sample, if the settings ask for one.
        mapper: reads the headers of several tar files at a time.

    Raises:
        InputError: there is no such source, it holds no image, a folder in it cannot be listed, or
            it is a list that cannot be used.
    """
    source = storage.as_path(source)
    keep = Keep(listing.keep, prompt, listing.id)
    refuse_compressed(source)
    try:
        is_file = (is_list(source) or is_tar(source)) and not storage.is_directory(source)
    except OSError as error:
        raise InputError(f"cannot read {source}: {one_line(error)}") from error
    if not is_file:
        images = _list_folder(source, listing, keep, mapper)
    elif is_tar(source):
        images = _list_tars(expand(source), listing, keep, mapper)
    else:
        images = _list_rows(source, listing, keep, mapper)
    if listing.sample is not None:
        images = _sample(images, listing.sample, seed)
    return images.slice(0, listing.limit)


def _sample(images: pa.Table, count: int, seed: int) -> pa.Table:
    """A random sample, in the order of the listing; it changes little when the source grows."""
    key = seed.to_bytes(8, "big")
    ranks = np.array(
        [
            hashlib.blake2b(uri.encode(), digest_size=8, key=key).digest()
            for uri in images["uri"].to_pylist()
        ],
        "S8",
    )
    return images.take(np.sort(np.argsort(ranks, kind="stable")[:count]))


def _list_rows(source: str, listing: ListingConfig, keep: Keep, mapper: Mapper) -> pa.Table:
    if listing.exclude:
        raise InputError(
            f"--exclude is for a folder, and {source} is a list: remove lines from the list instead"
        )
    if source.lower().endswith(".txt"):
        images = read_list(source, listing.column)
        uris: list[str] = images["uri"].to_pylist()
        for uri in uris:
            refuse_compressed(uri)
        tars = [uri for uri in uris if is_tar(uri)]
        if 0 < len(tars) < len(uris):
            raise InputError(
                f"{source} lists both tar files ({len(tars)}) and other files "
                f"({len(uris) - len(tars)}): make a list of each"
            )
        if tars:
            expanded = (name for pattern in tars for name in expand(pattern))
            return _list_tars([*dict.fromkeys(expanded)], listing, keep, mapper)
        keep.refuse(source)
        return images
    if is_parquet(source) and holds_images(source, listing.column):
        return list_parquet(source, [Listed(source, None)], listing, keep)
    return read_list(source, listing.column, keep)


def _list_folder(source: str, listing: ListingConfig, keep: Keep, mapper: Mapper) -> pa.Table:
    """The images of a folder; those in its tar files, or else in its Parquet files, if none."""
    passed_over = PassedOver()
    images = _find(source, listing.endings, listing.exclude, passed_over)
    if not images and passed_over.endings[".tar"]:
        tars = _find(source, (".tar",), listing.exclude, passed_over)
        _log_passed_over(passed_over, listing.exclude)
        return _list_tars([tar.uri for tar in tars], listing, keep, mapper)
    if not images and passed_over.endings[".parquet"]:
        files = _find(source, (".parquet",), listing.exclude, passed_over)
        if files := _without_private(source, files):
            _log_passed_over(passed_over, listing.exclude)
            return list_parquet(source, files, listing, keep)
    if listing.column is not None:
        raise InputError(f"--column is for a list, and {source} is not one by its ending")
    keep.refuse(source)
    _log_passed_over(passed_over, listing.exclude)
    if not images:
        problem = f"{source} holds no images ({listing.extensions})"
        if tars := _find(source, COMPRESSED, listing.exclude, passed_over):
            problem += f", but compressed tar files, {len(tars)}: decompress them to .tar"
        raise InputError(problem)
    return list_files(images)


def _list_tars(tars: Sequence[str], listing: ListingConfig, keep: Keep, mapper: Mapper) -> pa.Table:
    if listing.column is not None:
        raise InputError("--column is for a list, and tar files have none: leave it out")
    exclusion = Exclusion((*PROGRAMS_FILES, *listing.exclude))
    return list_tars(tars, listing.endings, keep, exclusion.match, mapper)


def _without_private(source: str, files: Sequence[Listed]) -> list[Listed]:
    """Parquet files but those that programs keep for themselves, with ``_`` or ``.`` before."""
    begin = source.rstrip("/") + "/"
    parts = ((file, file.uri.removeprefix(begin).split("/")) for file in files)
    public = [
        file for file, names in parts if not any(name.startswith(("_", ".")) for name in names)
    ]
    if private := len(files) - len(public):
        _logger.info("Parquet files passed over whose path has a name with _ or .: %d", private)
    return public


def _find(
    source: str, endings: tuple[str, ...], exclude: Sequence[str], passed_over: PassedOver
) -> list[Listed]:
    exclusion = Exclusion((*PROGRAMS_FILES, *exclude))
    try:
        return storage.find(source, endings, exclude=exclusion.match, passed_over=passed_over)
    except FolderError as error:
        pattern = shlex.quote(error.pattern)
        raise InputError(f"{error}; leave the folder out with --exclude {pattern}") from error


def _log_passed_over(passed_over: PassedOver, exclude: Sequence[str]) -> None:
    if passed_over.endings:
        counts = passed_over.endings.most_common()
        known = [f"{count} {ending or 'without one'}" for ending, count in counts]
        _logger.info("files of other endings passed over: %s", first_of(known, _SHOWN))
    excluded = passed_over.excluded
    others = [f"{excluded[name]} {name}" for name in PROGRAMS_FILES if excluded[name]]
    if others:
        _logger.info("files of other programs passed over: %s", ", ".join(others))
    for pattern in exclude:
        if excluded[pattern]:
            _logger.info("--exclude %s leaves out %d", shlex.quote(pattern), excluded[pattern])
        else:
            _logger.warning("--exclude %s matches nothing", shlex.quote(pattern))
    if links := passed_over.links:
        _logger.warning(
            "links passed over, to folders that are listed already: %d: %s",
            len(links),
            first_of(links, _SHOWN),
        )
