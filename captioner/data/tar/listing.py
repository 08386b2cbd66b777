"""Lists the images in tar files, with the columns that come along."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.data.columns import Keep, infer_column, with_kept
from captioner.data.tar.members import Damage, Member, open_tar, read_members
from captioner.data.tar.names import key_of, member_uri, rest_uri
from captioner.errors import CaptionerError, InputError, first_of, one_line
from captioner.runtime.progress import progress_bar
from captioner.schema import LISTING

__all__ = ["list_tars"]

_THREADS = 16  # tar files that are listed at a time: mostly waiting, for a bucket
_SHOWN = 5  # names in a message
_LARGEST_TEXT = 1 << 20  # bytes of a member that has an image's columns
_TEXTS = ("json", "txt", "caption", "cls")  # extensions of such members

_logger = logging.getLogger(__name__)


@dataclass
class _Contents:
    """What a tar file holds.

    Attributes:
        images: the members to caption, each with what is wrong with it, or None.
        texts: the columns of each key, from members that are text or JSON.
        others: the number of other members, by extension.
        damage: why the rest cannot be listed.
    """

    images: list[tuple[Member, str | None]] = field(default_factory=list)
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    damage: Damage | None = None


def list_tars(
    tars: Sequence[str],
    endings: tuple[str, ...],
    keep: Keep,
    exclude: Callable[[str], str | None] = lambda path: None,
) -> pa.Table:
    """The images in tar files, in their order: :data:`captioner.schema.LISTING`.

    Members that share a key, the path up to the first dot of the file's name, belong together. The
    fields of ``.json`` and the text of ``.txt`` come along if ``keep`` names them; so do, instead,
    the columns of a Parquet file beside the tar file with the same name, as img2dataset writes it.

    Args:
        tars: the URIs of the tar files.
        endings: of images, in lower case, with the dot.
        keep: the columns that come along.
        exclude: says of a member's name which pattern excludes it, or None.

    Raises:
        InputError: a tar file cannot be read, none holds an image, or the columns cannot be kept.
    """

    def list_one(tar: str) -> tuple[pa.Table, _Contents]:
        return _list_tar(tar, endings, keep, exclude)

    tables: list[pa.Table] = []
    others: Counter[str] = Counter()
    repeated = 0
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        progress_bar(len(tars), unit="tar", description="listing") as progress,
    ):
        for tar, (table, contents) in zip(tars, pool.map(list_one, tars), strict=True):
            tables.append(table)
            others += contents.others
            names = Counter(member.name for member, _ in contents.images)
            repeated += sum(count - 1 for count in names.values())
            if contents.damage is not None:
                _logger.warning("%s: %s", tar, contents.damage.problem)
            progress.update()
    images = _joined(tables)
    if not len(images):
        found = first_of([f"{count} {name}" for name, count in others.most_common()], _SHOWN)
        raise InputError(f"{first_of(tars, _SHOWN)}: no images, but {found or 'nothing'}")
    if others:
        counts = [f"{count} {name or 'without one'}" for name, count in others.most_common()]
        _logger.info("members of other extensions passed over: %s", first_of(counts, _SHOWN))
    if repeated:
        _logger.warning("names that their tar file has already, told apart by offset: %d", repeated)
    return images


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    except pa.ArrowException as error:
        raise InputError(f"the columns of the tar files differ: {one_line(error)}") from error


def _list_tar(
    tar: str,
    endings: tuple[str, ...],
    keep: Keep,
    exclude: Callable[[str], str | None],
) -> tuple[pa.Table, _Contents]:
    try:
        size, version = storage.size(tar), storage.version(tar)
        if size is None:
            raise FileNotFoundError("it does not exist, or its size is unknown")
        with open_tar(tar, size) as file:
            contents = _read(file, size, endings, exclude, texts=bool(keep))
    except CaptionerError:
        raise
    except OSError as error:
        raise InputError(f"cannot list {tar}: {one_line(error)}") from error
    listing = _as_listing(tar, version, contents)
    if not keep or not len(listing):
        return listing, contents
    keys = [key_of(member.name)[0] for member, _ in contents.images]
    keys += [""] * (len(listing) - len(keys))  # the rest that cannot be listed
    return with_kept(listing, _columns(tar, keys, contents, keep)), contents


def _read(
    file: BinaryIO,
    size: int,
    endings: tuple[str, ...],
    exclude: Callable[[str], str | None],
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
        elif texts and member.kind == "file" and extension.lower() in _TEXTS:
            contents.texts.setdefault(key, {}).update(_parse(file, member, extension.lower()))
        else:
            contents.others[f".{extension}" if extension else ""] += 1
    return contents


_PROBLEMS = {
    "link": "a link in a tar file, which has no data of its own",
    "sparse": "a sparse file in a tar file, which cannot be read in place",
}


def _is_excluded(name: str, exclude: Callable[[str], str | None]) -> bool:
    parts = name.strip("/").split("/")
    return any(exclude("/".join(parts[:count])) for count in range(1, len(parts) + 1))


def _parse(file: BinaryIO, member: Member, extension: str) -> dict[str, Any]:
    """The columns that a member of text has: the fields of an object, or one of its own."""
    if member.size > _LARGEST_TEXT:
        return {}
    file.seek(member.position)
    text = file.read(member.size).decode("utf-8", "replace").lstrip("\ufeff")
    if extension != "json":
        return {extension: text.strip()}
    try:
        parsed = json.loads(text)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {"json": parsed}


def _as_listing(tar: str, version: str, contents: _Contents) -> pa.Table:
    counts = Counter(member.name for member, _ in contents.images)
    rows: list[dict[str, Any]] = [
        {
            "uri": member_uri(
                member.name, tar, position=member.position if counts[member.name] > 1 else None
            ),
            "size": member.size,
            "position": member.position,
            "problem": problem,
        }
        for member, problem in contents.images
    ]
    if (damage := contents.damage) is not None and damage.is_certain:
        rows.append(
            {
                "uri": rest_uri(tar, damage.position),
                "position": damage.position,
                "problem": f"the rest of the tar file cannot be listed: {damage.problem}",
            }
        )
    place = {"container": tar, "version": version}
    return pa.Table.from_pylist([row | place for row in rows], schema=LISTING)


def _columns(tar: str, keys: Sequence[str], contents: _Contents, keep: Keep) -> pa.Table:
    """The columns that come along: of the Parquet file beside the tar file, or of its members."""
    beside = tar[: -len(".tar")] + ".parquet"
    if (table := _read_beside(beside)) is not None:
        chosen = keep.choose(table.column_names, beside, "")
        rows = {key: number for number, key in enumerate(map(str, table["key"].to_pylist()))}
        places = pa.array([rows.get(key) for key in keys], pa.int64())
        return table.select([*chosen]).take(places).rename_columns([*chosen.values()])
    texts = [{"key": key, **contents.texts.get(key, {})} if key else {} for key in keys]
    names = list(dict.fromkeys(name for row in texts for name in row))
    return pa.table(
        {
            new: infer_column(
                [row.get(old) for row in texts],
                lambda place: f"the member {keys[place]}",
                f"{tar}, {old}",
            )
            for old, new in keep.choose(names, tar, "").items()
        }
    )


def _read_beside(uri: str) -> pa.Table | None:
    """The table that img2dataset writes beside a tar file; None if there is none."""
    if not storage.version(uri):
        return None
    try:
        with storage.open_binary(uri) as file:
            table = pq.ParquetFile(file, pre_buffer=False).read(use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {uri}: {one_line(error)}") from error
    return table if "key" in table.column_names else None
