"""The row that every listed image gets: names, Arrow types, statuses, versions.

A part is a Parquet file with these columns. Its schema metadata says how to read the attention
maps (see :mod:`captioner.output.attention`): ``captioner.schema``, ``captioner.attention`` (which
maps), ``captioner.attention.version`` and ``captioner.attention.levels``. The maps' height and
width are in the row: they may differ from image to image.
"""

import builtins
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import pyarrow as pa

__all__ = [
    "ATTENTION_VERSION",
    "COLUMNS",
    "KEPT",
    "LISTING",
    "MANIFEST",
    "SCHEMA_VERSION",
    "STATUSES",
    "CaptionRow",
    "Status",
    "kept_fields",
    "part_schema",
    "rows_to_table",
]

SCHEMA_VERSION = 2
ATTENTION_VERSION = 1

Status = Literal["ok", "unreadable", "undecodable", "rejected", "failed"]
#: ``unreadable``: I/O. ``undecodable``: not an image. ``rejected``: over a limit. ``failed``: the
#: model, on this image alone.
STATUSES: tuple[Status, ...] = ("ok", "unreadable", "undecodable", "rejected", "failed")

COLUMNS = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("tokens", pa.list_(pa.string())),
        pa.field("token_logprobs", pa.list_(pa.float32())),
        pa.field("score", pa.float32()),
        pa.field("attention", pa.binary()),
        pa.field("attention_peak", pa.list_(pa.float32())),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("bytes", pa.int64()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("attention_height", pa.int32()),
        pa.field("attention_width", pa.int32()),
        pa.field("finish", pa.string()),
        pa.field("captions", pa.list_(pa.string())),
    ]
)

#: The images of a source, each once, in a stable order. Where an image is a file, ``container`` is
#: null, and so are the columns that locate the image in its container. A listing may have one more
#: column, :data:`KEPT`.
LISTING = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64()),  # in bytes; null if the source does not tell it
        pa.field("container", pa.string()),  # the URI of the tar or Parquet file
        pa.field("version", pa.string()),  # of the container when it was listed
        pa.field("column", pa.string()),  # of images, in a Parquet file
        pa.field("row_group", pa.int32()),  # of a Parquet file
        pa.field("position", pa.int64()),  # in a tar: offset in bytes; else row of the row group
        pa.field("problem", pa.string()),  # why the image cannot be read, where that is known
    ]
)

#: The column of a listing and of a manifest that holds the kept columns of the source: a
#: struct, whose fields become columns of the parts.
KEPT = "kept"

#: The images to caption: a listing, where the ``row``-th row of part ``shard`` is the image's.
MANIFEST = pa.schema(
    [
        *LISTING,
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
    ]
)


@dataclass(kw_only=True, slots=True)
class CaptionRow:
    """One image's row; the fields are :data:`COLUMNS`."""

    uri: str
    caption: str | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float] | None = None
    score: float | None = None
    attention: builtins.bytes | None = field(default=None, repr=False)
    attention_peak: list[float] | None = None
    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    status: Status
    error: str | None = None
    attention_height: int | None = None
    attention_width: int | None = None
    finish: str | None = None
    captions: list[str] | None = None


def kept_fields(images: pa.Schema) -> list[pa.Field]:
    """The kept columns of the source, from a listing's or a manifest's schema."""
    return list(images.field(KEPT).type) if KEPT in images.names else []


def part_schema(*, attention: str, levels: int, kept: Sequence[pa.Field] = ()) -> pa.Schema:
    """The schema of a part, with the metadata that a reader of its attention maps needs.

    ``kept`` are the kept columns of the source.
    """
    return pa.schema([*COLUMNS, *kept]).with_metadata(
        {
            "captioner.schema": str(SCHEMA_VERSION),
            "captioner.attention": attention,
            "captioner.attention.version": str(ATTENTION_VERSION),
            "captioner.attention.levels": str(levels),
        }
    )


def rows_to_table(rows: Sequence[CaptionRow], schema: pa.Schema = COLUMNS) -> pa.Table:
    """Converts rows to a table with the schema's types, even if a column is all null."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=schema)
