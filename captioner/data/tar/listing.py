"""Lists the images in tar files, with the kept columns."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa

from captioner import storage
from captioner.data.columns import Keep, with_kept
from captioner.data.tar.columns import TEXTS, columns_of_tar, join_columns, parse_text
from captioner.data.tar.members import Damage, Member, open_tar, read_members
from captioner.data.tar.names import key_of, member_uri, rest_uri
from captioner.errors import CaptionerError, InputError, first_of, one_line
from captioner.runtime.prefetch import Mapper, map_in_threads
from captioner.runtime.progress import progress_bar
from captioner.schema import LISTING

__all__ = ["list_tars"]

_SHOWN = 5  # names in a message

_logger = logging.getLogger(__name__)

#: Returns the pattern that excludes a member's name, or None.
_Exclude = Callable[[str], str | None]


@dataclass
class _Contents:
    """What a tar file holds.

    Attributes:
        images: the members to caption, each with what is wrong with it, or None.
        texts: the columns of each key, from members that are text or JSON.
        bad_texts: names of such members that are not valid JSON or too long.
        others: the number of other members, by extension.
        damage: why the rest cannot be listed.
    """

    images: list[tuple[Member, str | None]] = field(default_factory=list)
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    bad_texts: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    damage: Damage | None = None


@dataclass
class _Listed:
    """The listing of a tar file, small enough to keep that of each until all are done."""

    images: pa.Table
    columns: pa.Table | None
    others: Counter[str]
    repeated: int
    bad_texts: list[str]
    damage: Damage | None


def list_tars(
    tars: Sequence[str],
    endings: tuple[str, ...],
    keep: Keep,
    exclude: _Exclude = lambda path: None,
    mapper: Mapper = map_in_threads,
) -> pa.Table:
    """The images in tar files, in their order: :data:`captioner.schema.LISTING`.

    Members that share a key, the path up to the first dot of the file's name, belong together. The
    fields of ``.json`` and the text of ``.txt`` come along if ``keep`` names them; so do, instead,
    the columns of a Parquet file beside the tar file with the same name, as img2dataset writes it.

    Args:
        tars: the URIs of the tar files.
        endings: of images, in lower case, with the dot.
        keep: the columns to keep.
        exclude: returns the pattern that excludes a member's name, or None.
        mapper: lists several tar files at a time; what it calls can be pickled.

    Raises:
        InputError: a tar file cannot be read, none holds an image, or the columns cannot be kept.
    """
    list_one = partial(_list_tar, endings=endings, keep=keep, exclude=exclude)
    listed: list[_Listed] = []
    with progress_bar(len(tars), unit="tar", description="listing") as progress:
        for tar, each in zip(tars, mapper(list_one, tars), strict=True):
            listed.append(each)
            if each.damage is not None:
                _logger.warning("%s: %s", tar, each.damage.problem)
            progress.update()
    _report(tars, listed)
    images = pa.concat_tables([each.images for each in listed]).combine_chunks()
    columns = [each.columns for each in listed if each.columns is not None]
    if not columns:
        return images
    return with_kept(images, join_columns(columns, keep, _called(tars)))


def _called(tars: Sequence[str]) -> str:
    others = len(tars) - 1
    return f"{tars[0]} and {others} other{'s' * (others > 1)}" if others else tars[0]


def _report(tars: Sequence[str], listed: Sequence[_Listed]) -> None:
    """Logs what was not listed and what is unusual.

    Raises:
        InputError: there is no image.
    """
    others: Counter[str] = sum((each.others for each in listed), Counter())
    counts = [f"{count} {name or 'without one'}" for name, count in others.most_common()]
    if not sum(each.images["size"].null_count < len(each.images) for each in listed):
        raise InputError(f"no images in {first_of(tars, _SHOWN)}{_instead(tars, listed, counts)}")
    if counts:
        _logger.info("members of other extensions passed over: %s", first_of(counts, _SHOWN))
    if repeated := sum(each.repeated for each in listed):
        _logger.warning("repeated names in a tar file, whose URIs get an offset: %d", repeated)
    if bad := [name for each in listed for name in each.bad_texts]:
        _logger.warning(
            "members that are not valid JSON or too long, whose columns stay empty: %d: %s",
            len(bad),
            first_of(bad, _SHOWN),
        )


def _instead(tars: Sequence[str], listed: Sequence[_Listed], counts: Sequence[str]) -> str:
    """What is in tar files that have no images, to follow their names."""
    if counts:
        return f", only other files: {first_of(counts, _SHOWN)}"
    for tar, each in zip(tars, listed, strict=True):
        if each.damage is not None:
            return f"{f'; {tar}' if len(tars) > 1 else ''}: {each.damage.problem}"
    return ", nor any other file"


def _list_tar(tar: str, endings: tuple[str, ...], keep: Keep, exclude: _Exclude) -> _Listed:
    try:
        size, version = storage.identify(tar)
        if size is None:
            raise OSError("its size is unknown")
        with open_tar(tar, size) as file:
            contents = _read(file, size, endings, exclude, texts=bool(keep))
    except CaptionerError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"cannot list {tar}: it does not exist") from error
    except OSError as error:
        raise InputError(f"cannot list {tar}: {one_line(error)}") from error
    images, repeated = _as_listing(tar, version, contents)
    columns = None
    if keep:
        keys = [key_of(member.name)[0] for member, _ in contents.images]
        keys += [""] * (len(images) - len(keys))  # the rest that cannot be listed
        columns = columns_of_tar(tar, keys, contents.texts, keep)
    return _Listed(images, columns, contents.others, repeated, contents.bad_texts, contents.damage)


def _read(
    file: BinaryIO,
    size: int,
    endings: tuple[str, ...],
    exclude: _Exclude,
    *,
    texts: bool,
) -> _Contents:
    contents = _Contents()
    for member in read_members(file, size):
        if isinstance(member, Damage):
            contents.damage = member
            continue
        key, extension = key_of(member.name)
        if member.kind == "other" or _is_excluded(member.name, exclude):
            continue
        if member.name.lower().endswith(endings):
            contents.images.append((member, _PROBLEMS.get(member.kind)))
        elif texts and member.kind == "file" and extension.lower() in TEXTS:
            columns = parse_text(file, member, extension.lower())
            if columns is None:
                contents.bad_texts.append(member.name)
            contents.texts.setdefault(key, {}).update(columns or {})
        else:
            contents.others[f".{extension}" if extension else ""] += 1
    return contents


_PROBLEMS = {
    "link": "a link in a tar file, which has no data of its own",
    "sparse": "a sparse file in a tar file, which cannot be read in place",
}


def _is_excluded(name: str, exclude: _Exclude) -> bool:
    parts = name.strip("/").split("/")
    return any(exclude("/".join(parts[:count])) for count in range(1, len(parts) + 1))


def _as_listing(tar: str, version: str, contents: _Contents) -> tuple[pa.Table, int]:
    """The listing of a tar file, and the number of names in it that come again."""
    members = [member for member, _ in contents.images]
    uris = [member_uri(member.name, tar) for member in members]
    counts = Counter(uris)  # not of the names: /a.jpg and a.jpg are one URI
    uris = [
        uri if counts[uri] == 1 else member_uri(member.name, tar, position=member.position)
        for uri, member in zip(uris, members, strict=True)
    ]
    sizes: list[int | None] = [member.size for member in members]
    positions = [member.position for member in members]
    problems = [problem for _, problem in contents.images]
    if (damage := contents.damage) is not None and damage.is_certain:
        uris.append(rest_uri(tar, damage.position))
        sizes.append(None)
        positions.append(damage.position)
        problems.append(f"the rest of the tar file cannot be listed: {damage.problem}")
    columns = {
        "uri": uris,
        "size": sizes,
        "container": [tar] * len(uris),
        "version": [version] * len(uris),
        "position": positions,
        "problem": problems,
    }
    arrays = [
        pa.array(columns[each.name], each.type)
        if each.name in columns
        else pa.nulls(len(uris), each.type)
        for each in LISTING
    ]
    return pa.table(arrays, schema=LISTING), sum(counts.values()) - len(counts)
