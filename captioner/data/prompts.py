"""Templates of prompts: text with names of the source's columns in braces."""

import string
from collections.abc import Mapping, Sequence
from typing import Any

from captioner.errors import InputError, first_of

__all__ = ["check_columns", "columns_of", "fill"]

_SHOWN = 20  # names of columns in a message


def columns_of(template: str) -> list[str]:
    """The columns that a prompt names in braces, ``{{`` and ``}}`` standing for braces.

    Raises:
        InputError: the braces do not match, or hold more than a name.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"--prompt {template!r}: {error}; write {{{{ and }}}} for braces"
        ) from error
    names = [(name, style, conversion) for _, name, style, conversion in parts if name is not None]
    for name, style, conversion in names:
        if not name.isidentifier() or style or conversion:
            raise InputError(
                f"--prompt {template!r}: {{{name}}} is not a column's name; "
                "write {{ and }} for braces"
            )
    return list(dict.fromkeys(name for name, _, _ in names))


def fill(template: str, row: Mapping[str, Any]) -> str:
    """A prompt with the values of a source's row; a null, or no value, becomes nothing."""
    values = {name: row.get(name) for name in columns_of(template)}
    texts = {name: "" if value is None else str(value) for name, value in values.items()}
    return template.format_map(texts)


def check_columns(template: str | None, columns: Sequence[str]) -> None:
    """Checks that a source has the columns that a prompt names.

    Raises:
        InputError: it lacks one.
    """
    missing = [name for name in columns_of(template or "") if name not in columns]
    if missing:
        known = f"its columns are {first_of(columns, _SHOWN)}" if columns else "it has no columns"
        raise InputError(
            f"--prompt {template!r}: the source has no column {missing[0]!r}; {known}; write "
            "{{ and }} for braces"
        )
