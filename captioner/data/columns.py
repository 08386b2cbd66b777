"""The columns of a source that are kept in the rows: which, under which names and types."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from captioner.data.prompts import check_columns, columns_of
from captioner.errors import InputError, first_of
from captioner.schema import COLUMNS, KEPT

__all__ = ["Keep", "infer_column", "is_unicode", "with_kept", "without_views"]

_SHOWN = 20  # names of columns in a message
_DEEPEST = 40  # lists or objects within each other; Arrow reads 100 levels, two for each list


class Keep:
    """The columns that ``--keep`` names.

    ``all`` is every column but that of the URIs or images; ``old=new`` renames a column. Names are
    separated by commas. The columns that the prompt names, and the one that names the images in
    messages, are kept too; if ``--keep`` renames them, they go by their new names.
    """

    def __init__(self, names: str | None, prompt: str | None = None, id_column: str | None = None):
        self._names = [] if names is None else [name.strip() for name in names.split(",")]
        if not all(self._names):
            raise InputError(f"--keep must be names separated by commas, not {names!r}")
        self._prompt, self._id = prompt, id_column
        self._needed = columns_of(prompt or "")

    def __bool__(self) -> bool:
        """Whether any column is kept."""
        return bool(self._names or self._needed or self._id)

    def may_keep(self, column: str) -> bool:
        """Whether a column of this name may be one to keep; ``choose`` decides."""
        names = {each for name in self._names for each in (name, name.partition("=")[0])}
        return bool({"all", column} & names) or column in (*self._needed, self._id)

    def choose(self, columns: Sequence[str], source: str, images: str) -> dict[str, str]:
        """The columns of a table to keep, each with its new name, in the order of the option.

        Args:
            columns: what the table has.
            source: what it is called, for messages.
            images: its column of URIs or images, which ``all`` leaves out.

        Raises:
            InputError: the table lacks a column or has it twice, or columns would share a name with
                each other or with captioner's own.
        """
        chosen: dict[str, str] = {}
        for name in self._names:
            old, equals, new = (name, "", "") if name in columns else name.partition("=")
            if old == "all" and "all" not in columns:
                chosen = {each: each for each in columns if each != images} | chosen
            elif columns.count(old) != 1:
                how_often = "no column" if old not in columns else "several columns"
                raise InputError(
                    f"--keep {name}: {how_often} {old!r} in {source}; {_shown(columns)}"
                )
            else:
                chosen[old] = new if equals else old
        for name in (*self._needed, *([] if self._id is None else [self._id])):
            if name in columns and name not in chosen.values():
                chosen.setdefault(name, name)
        if self._id is not None and self._id not in chosen.values():
            shown = _shown([*chosen.values()] or columns)
            raise InputError(f"--id {self._id}: no column {self._id!r} in {source}; {shown}")
        check_columns(self._prompt, [*chosen.values()] if chosen else columns)
        self._check(chosen, source)
        return chosen

    def refuse(self, source: str) -> None:
        """Refuses a source that has no columns.

        Raises:
            InputError: ``--keep``, ``--id`` or the prompt names columns.
        """
        check_columns(self._prompt, [])
        if self:
            option = "--keep" if self._names else "--id"
            raise InputError(f"{option}: {source} has no columns; remove {option}")

    def _check(self, chosen: dict[str, str], source: str) -> None:
        names = list(chosen.values())
        for old, new in chosen.items():
            if new in COLUMNS.names:
                raise InputError(
                    f"--keep: the column {old} of {source} would have the name {new}, which a "
                    f"column of the output has; rename it, for example {self._renamed(old)}"
                )
            if not is_unicode(new):
                raise InputError(
                    f"--keep: the name of the column {new!a} of {source} is not valid Unicode; "
                    "leave the column out"
                )
            if not new or names.count(new) > 1:
                problem = "without a name" if not new else f"called {new} twice"
                raise InputError(
                    f"--keep: a column would be {problem}; rename it, for example {old}=NAME"
                )

    def _renamed(self, old: str) -> str:
        others = ",".join(name for name in self._names if name.partition("=")[0] != old)
        return f"--keep {others + ',' if others else ''}{old}=source_{old}"


def _shown(columns: Sequence[str]) -> str:
    if not columns:
        return "there are no columns"
    return f"the columns are {first_of(columns, _SHOWN)}"


def with_kept(listing: pa.Table, kept: pa.Table) -> pa.Table:
    """A listing with the kept columns, row by row; unchanged if there are none.

    Raises:
        InputError: Parquet cannot store a column.
    """
    if not kept.column_names:
        return listing
    columns = [kept[name].combine_chunks() for name in kept.column_names]
    columns = [
        pa.concat_arrays(each.chunks) if isinstance(each, pa.ChunkedArray) else each
        for each in columns
    ]
    for field in kept.schema:
        _refuse_unstorable(field)
    struct = pa.StructArray.from_arrays(columns, fields=list(kept.schema))
    return listing.append_column(KEPT, struct)


def without_views(table: pa.Table) -> pa.Table:
    """A table with strings in place of string views, which Arrow's ``take`` does not support."""
    fields = [each.with_type(_plain(each.type)) for each in table.schema]
    plain = pa.schema(fields, table.schema.metadata)
    return table if plain.equals(table.schema) else table.cast(plain)


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([each.with_type(_plain(each.type)) for each in kind])
    return kind


def _refuse_unstorable(field: pa.Field) -> None:
    """Refuses a column that Parquet cannot store, or can store but not read back."""
    kinds, depth = [field.type], 0
    while kinds and depth <= _DEEPEST:
        if any(pa.types.is_struct(kind) and not kind.num_fields for kind in kinds):
            raise InputError(
                f"--keep: the column {field.name} holds {{}}, an object without names, which "
                "Parquet cannot store: leave the column out"
            )
        kinds = [
            kind.field(place).type
            for kind in kinds
            for place in range(getattr(kind, "num_fields", 0))
        ]
        depth += 1
    if kinds:
        raise InputError(
            f"--keep: the column {field.name} has lists or objects within each other more than "
            f"{_DEEPEST} deep, which Parquet cannot store: leave the column out"
        )


def is_unicode(value: object) -> bool:
    """Whether a value of JSON has no half of a surrogate pair, which JSON can spell."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _place_of_huge(values: Sequence[Any]) -> int | None:
    """The row of the first number that Arrow has no integer for."""
    numbers = ((n, each) for n, each in enumerate(values) if isinstance(each, int))
    return next((n for n, each in numbers if not -(2**63) <= each < 2**63), None)


def infer_column(values: Sequence[Any], place_of: Callable[[int], str], name: str) -> pa.Array:
    """Values of JSON as a column of one type.

    Args:
        values: what the rows have; None where they have nothing.
        place_of: describes a row, for messages.
        name: the source and the column, for messages.

    Raises:
        InputError: the values have no common type.
    """
    try:
        column = pa.array(values)
        return column.cast(pa.string()) if pa.types.is_null(column.type) else column
    except UnicodeEncodeError as error:
        place = next(n for n, each in enumerate(values) if not is_unicode(each))
        raise InputError(
            f"{name}: the text in {place_of(place)} is not valid Unicode (half of a surrogate "
            "pair): leave the column out of --keep, or mend the text"
        ) from error
    except (pa.ArrowException, OverflowError) as error:
        if (huge := _place_of_huge(values)) is not None:
            raise InputError(
                f"{name}: {values[huge]!r:.100} in {place_of(huge)} has more than 64 bits: leave "
                "the column out of --keep, or write the number as text"
            ) from error
        first = next(value for value in values if value is not None)
        alike = (type(first), type(None))
        place = next((n for n, each in enumerate(values) if not isinstance(each, alike)), 0)
        raise InputError(
            f"{name}: {values[place]!r:.100} in {place_of(place)} has another type than "
            f"{first!r:.100}; leave the column out of --keep, or convert its values to one type"
        ) from error
