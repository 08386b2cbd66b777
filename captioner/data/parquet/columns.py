"""Which column of a Parquet file holds images."""

import json
from collections.abc import Sequence

import pyarrow as pa

from captioner.errors import InputError, first_of

__all__ = ["image_column", "image_columns"]

_SHOWN = 20  # names of columns in a message

#: Names, in lower case, of columns that hold the bytes of images in published tables.
_IMAGE_NAMES = frozenset(
    """
    image images img jpg jpeg png webp picture photo image_bytes img_bytes image_data bytes
    content data
    """.split()  # noqa: SIM905
)
#: Names of binary columns that hold text: some writers do not mark text as such.
_TEXT_NAMES = frozenset(
    """
    uri url image_uri image_url image_path img_url img_path file file_name filename file_path
    filepath path
    """.split()  # noqa: SIM905
)


def image_column(schema: pa.Schema, source: str, column: str | None = None) -> str | None:
    """The column of a Parquet file that holds images; None if the file is a list of URIs.

    Args:
        schema: the file's.
        source: what the file is called, for messages.
        column: the column that ``--column`` names, if it does.

    Raises:
        InputError: several columns may hold images, or ``column`` holds neither images nor text.
    """
    if column is not None:
        return _named(schema, source, column)
    candidates = image_columns(schema)
    if len(candidates) > 1:
        raise InputError(
            f"{source}: each of the columns {' and '.join(candidates)} may be the column of "
            "images; choose one with --column"
        )
    return candidates[0] if candidates else None


def image_columns(schema: pa.Schema) -> list[str]:
    """The columns that may hold images.

    Those that Hugging Face's features call images; else those whose type is its
    ``struct<bytes, path>``; else binary columns with a usual name; else binary columns, unless one
    of text has a usual name for URIs.
    """
    declared = _declared_images(schema)
    for fields in (
        [field for field in schema if field.name in declared and _holds_bytes(field.type)],
        [field for field in schema if _is_struct(field.type)],
        [field for field in schema if _is_binary(field.type) and _named_as(field, _IMAGE_NAMES)],
    ):
        if fields:
            return [field.name for field in fields]
    if any(_named_as(field, _TEXT_NAMES) for field in schema):
        return []
    return [field.name for field in schema if _is_binary(field.type)]


def _named(schema: pa.Schema, source: str, column: str) -> str | None:
    if schema.names.count(column) != 1:
        how_often = "no column" if column not in schema.names else "several columns called"
        shown = first_of(schema.names, _SHOWN)
        raise InputError(
            f"--column {column}: {source} has {how_often} {column}; its columns are {shown}"
        )
    kind = schema.field(column).type
    if _is_struct(kind) or (_is_binary(kind) and column.lower() not in _TEXT_NAMES):
        return column
    if pa.types.is_list(kind) and _holds_bytes(kind.value_type):
        raise InputError(
            f"--column {column}: {source} has lists of images in {column}, which are not "
            "supported: write a row for each image"
        )
    return None


def _declared_images(schema: pa.Schema) -> Sequence[str]:
    """The columns that Hugging Face's features, in the schema's metadata, call images."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [
            name
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "Image"
        ]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return []


def _named_as(field: pa.Field, names: frozenset[str]) -> bool:
    return field.name.lower() in names


def _holds_bytes(kind: pa.DataType) -> bool:
    return _is_struct(kind) or _is_binary(kind)


def _is_struct(kind: pa.DataType) -> bool:
    """Whether a type is Hugging Face's of an image: ``struct<bytes, path>``."""
    if not pa.types.is_struct(kind):
        return False
    return any(field.name == "bytes" and _is_binary(field.type) for field in kind)


def _is_binary(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    )
