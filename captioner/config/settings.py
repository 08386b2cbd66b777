"""What settings are made of: fields with help and limits, validated when they are made."""

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, TypeVar

from captioner.errors import InputError

__all__ = ["SettingError", "Settings", "from_mapping", "setting"]

Config = TypeVar("Config")


def setting(
    default: Any,
    text: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    option: str | None = None,
    group: str | None = None,
    unset: str | None = None,
) -> Any:
    """A dataclass field that can become a command-line option.

    Args:
        default: the field's default.
        text: what the setting does and its unit, in one or two short sentences.
        minimum: the smallest value allowed.
        maximum: the largest value allowed.
        option: the option's name, where it is not ``--field-name``.
        group: the heading that ``--help`` lists the option under, where it is not the class's.
        unset: what happens where the value is None, for ``--help``: "the model's own".
    """
    return field(
        default=default,
        metadata={
            "help": text,
            "minimum": minimum,
            "maximum": maximum,
            "option": option,
            "group": group,
            "unset": unset,
        },
    )


class SettingError(InputError):
    """A setting has a wrong value: ``name`` is the setting, ``problem`` describes the problem."""

    def __init__(self, name: str, problem: str):
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"{self.name} {self.problem}"


class Settings:
    """Checks every field against its annotation and limits when the settings are made.

    ``GROUP`` is the heading that ``--help`` lists the options under.
    """

    GROUP: typing.ClassVar[str] = "Options"

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            minimum, maximum = each.metadata["minimum"], each.metadata["maximum"]
            if not _fits(value, hints[each.name]):
                expected = _describe(hints[each.name])
                raise SettingError(each.name, f"must be {expected}, not {value!r}")
            if not isinstance(value, (int, float)):
                continue
            if minimum is not None and not value >= minimum:
                raise SettingError(each.name, f"must be at least {minimum}, not {value!r}")
            if maximum is not None and not value <= maximum:
                raise SettingError(each.name, f"must be at most {maximum}, not {value!r}")
            if hints[each.name] is float:  # 1 and 1.0 are one setting: their JSON is to be the same
                object.__setattr__(self, each.name, float(value))


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple and arguments[1:] == (...,):
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if origin is tuple:
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(map(_fits, value, arguments))
        )
    if isinstance(value, bool):  # which Python takes for a whole number
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        choices = [str(choice) for choice in typing.get_args(hint)]
        return "one of " + ", ".join(choices) if len(choices) > 1 else choices[0]
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,):
        return f"a tuple, each {_describe(typing.get_args(hint)[0])}"
    if arguments := typing.get_args(hint):
        separator = ", " if typing.get_origin(hint) is tuple else " or "
        return separator.join(_describe(argument) for argument in arguments)
    return {
        int: "a whole number",
        float: "a finite number",
        str: "text",
        bool: "true or false",
    }.get(hint, getattr(hint, "__name__", str(hint)))


def from_mapping(config: type[Config], values: Mapping[str, Any]) -> Config:
    """Makes settings out of parsed JSON.

    Raises:
        InputError: a key is unknown, or a value has the wrong type or is out of range.
    """
    if not isinstance(values, Mapping):
        raise InputError("the settings are not an object")
    known = {each.name for each in dataclasses.fields(config)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise InputError(f"unknown setting {', '.join(unknown)}")
    return config(
        **{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()},
    )
