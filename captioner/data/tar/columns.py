"""The columns of images in tar files: from members of text beside them, or from a Parquet file."""

import itertools
import json
from collections.abc import Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.data.columns import Keep, infer_column, is_unicode, without_views
from captioner.data.tar.members import Member
from captioner.errors import InputError, one_line

__all__ = ["TEXTS", "columns_of_tar", "join_columns", "parse_text"]

#: Extensions of members that have an image's columns.
TEXTS = ("json", "txt", "caption", "cls")
_LARGEST_TEXT = 1 << 20  # bytes of such a member


def parse_text(file: BinaryIO, member: Member, extension: str) -> dict[str, Any] | None:
    """The columns that a member of text has: the fields of an object, or one of its own.

    None where the member is not valid JSON, or too long to be an image's columns.
    """
    if member.size > _LARGEST_TEXT:
        return None
    file.seek(member.position)
    text = file.read(member.size).decode("utf-8", "replace").lstrip("\ufeff")
    if extension != "json":
        return {extension: text.strip()}
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else {"json": parsed}


def columns_of_tar(
    tar: str, keys: Sequence[str], texts: dict[str, dict[str, Any]], keep: Keep
) -> pa.Table:
    """The columns of a tar file, under their own names, with a row for each key.

    They are those of the Parquet file beside the tar file, if there is one; else those of its
    members. An empty key has none. A column without a value, or that is not to be kept, has the
    type null.

    Raises:
        InputError: the Parquet file cannot be read, or values of one column have no common type.
    """
    of_keys = pa.array([key or None for key in keys], pa.string())
    beside = tar[: -len(".tar")] + ".parquet"
    if (table := _read_beside(beside)) is not None:
        rows = {key: number for number, key in enumerate(map(str, table["key"].to_pylist()))}
        places = pa.array([rows.get(key) for key in keys], pa.int64())
        others = [name for name in table.column_names if name != "key"]
        taken = table.select([*filter(keep.may_keep, others)]).take(places)
        for name in itertools.filterfalse(keep.may_keep, others):
            taken = taken.append_column(name, pa.nulls(len(keys)))
        return taken.append_column("key", of_keys)
    fields = [texts.get(key, {}) for key in keys]
    names = dict.fromkeys(
        name for row in fields for name in row if name != "key" and is_unicode(name)
    )
    columns: dict[str, pa.Array] = {}
    for name in names:
        values = [row.get(name) for row in fields] if keep.may_keep(name) else []
        if any(value is not None for value in values):
            columns[name] = infer_column(
                values, lambda place: f"the member {keys[place]}", f"{tar}, {name}"
            )
        else:
            columns[name] = pa.nulls(len(keys))
    return pa.table(columns | {"key": of_keys})


def _read_beside(uri: str) -> pa.Table | None:
    """The table that img2dataset writes beside a tar file; None if there is none."""
    try:
        storage.identify(uri)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {uri}: {one_line(error)}") from error
    try:
        with storage.open_binary(uri) as file:
            table = without_views(pq.ParquetFile(file, pre_buffer=False).read(use_threads=False))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {uri}: {one_line(error)}") from error
    return table if "key" in table.column_names else None


def join_columns(tables: Sequence[pa.Table], keep: Keep, source: str) -> pa.Table:
    """The columns to keep of all tar files, under their new names.

    A tar file without a column that another has gets nulls.

    Raises:
        InputError: no tar file has a column that is to be kept, or they have it with different
            types.
    """
    try:
        joined = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(
            f"{source}: a column's type differs between tar files: {one_line(error)}; leave it "
            "out of --keep"
        ) from error
    chosen = keep.choose(joined.column_names, source, "")
    joined = joined.select([*chosen]).rename_columns([*chosen.values()])
    for place, field in enumerate(joined.schema):
        if pa.types.is_null(field.type):
            text = pa.nulls(len(joined), pa.string())
            joined = joined.set_column(place, field.name, text)
    return joined
