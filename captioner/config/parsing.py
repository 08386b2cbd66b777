"""Parsing of JSON."""

import json
from typing import Any

from captioner.errors import InputError

__all__ = ["parse_json"]


def parse_json(text: str | bytes) -> Any:
    """Parses JSON in which no object has a name twice.

    Raises:
        InputError: the text is not JSON, is nested too deep, or gives a name twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_named_once)
    except RecursionError as error:
        raise InputError("it is nested too deep") from error
    except ValueError as error:
        if "integer string conversion" in str(error):  # Python's limit, and its advice to programs
            raise InputError("a number has more than 4300 digits") from error
        raise InputError(str(error)) from error


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise InputError(f"{name[:100]!r} occurs twice")
        values[name] = value
    return values
