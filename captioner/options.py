"""Command-line options made from the settings, and help that lists them in groups.

click's own formatter prints the help. A formatter with colours, such as rich-click, would add two
dependencies and the time that their import takes to every ``--help``; the groups need thirty lines.
"""

import dataclasses
import re
import typing
from collections.abc import Callable, Container, Mapping
from decimal import Decimal
from functools import partial
from typing import Any, TypeVar

import click

from captioner.config import Preset, SettingError
from captioner.errors import InputError

__all__ = [
    "BUNDLED_DEFAULT",
    "GroupedCommand",
    "GroupedOption",
    "Size",
    "allow_missing_option",
    "configure",
    "group_options",
    "option",
    "options_of",
]

Config = TypeVar("Config")

_LAST_GROUP = "Other"
_MAY_BE_EMPTY = {"prefix", "suffix", "prompt", "system_prompt"}


class GroupedOption(click.Option):
    """An option that ``--help`` lists under the heading ``group``."""

    def __init__(self, *arguments: Any, group: str = _LAST_GROUP, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.group = group


option = partial(click.option, cls=GroupedOption)
allow_missing_option = option(
    "--allow-missing",
    is_flag=True,
    group="Data",
    help="Accept data, or a list of names, with more than half of its images missing.  "
    "[default: off]",
)
BUNDLED_DEFAULT = "  [default: the bundled model]"


class GroupedCommand(click.Command):
    """A command whose ``--help`` lists its options in groups, in the order of the options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuses empty values, which mean that a variable of the shell is not set.

        Raises:
            InputError: an argument, or the value of an option, is empty.
        """
        rest = super().parse_args(ctx, args)
        for each in self.params:
            value = ctx.params.get(each.name or "")
            if each.name not in _MAY_BE_EMPTY and (value == "" or value == ("",)):
                is_option = isinstance(each, click.Option)
                shown = each.opts[0] if is_option else str(each.name).upper()
                remedy = "give a value, or leave it out" if is_option else "give a value"
                raise InputError(f"{shown} is empty: {remedy}")
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes a section for each group; ``--help`` itself comes last."""
        for group, options in group_options(self, ctx).items():
            records = [record for each in options if (record := each.get_help_record(ctx))]
            with formatter.section(group):
                formatter.write_dl(records, col_max=26)


def group_options(command: click.Command, ctx: click.Context) -> dict[str, list[click.Option]]:
    """The options of a command by group, in the order in which the groups first appear."""
    groups: dict[str, list[click.Option]] = {}
    for each in command.get_params(ctx):
        if isinstance(each, click.Option):
            groups.setdefault(getattr(each, "group", _LAST_GROUP), []).append(each)
    if _LAST_GROUP in groups:
        groups[_LAST_GROUP] = groups.pop(_LAST_GROUP)
    return groups


def options_of(
    config: type,
    *,
    presets: Mapping[str, Preset] | None = None,
    only: Container[str] | None = None,
) -> Callable[[Any], Any]:
    """A decorator that adds an option for each field of a settings class: ``--field-name``.

    Args:
        config: the settings class.
        presets: where the defaults of a model, and of training, come from instead of the class;
            the help gives each preset's.
        only: the names of the fields that become options; all of them where this is None.
    """

    def decorate(command: Any) -> Any:
        hints = typing.get_type_hints(config)
        for each in reversed(dataclasses.fields(config)):
            if only is not None and each.name not in only:
                continue
            hint = hints[each.name]
            is_repeatable = typing.get_origin(hint) is tuple
            kind = _type_of(typing.get_args(hint)[0] if is_repeatable else hint)
            name = option_name(each)
            if kind is bool:
                name = f"{name}/--no-{name[2:]}"
            add_option = option(
                name,
                each.name,
                group=each.metadata["group"] or config.GROUP,  # type: ignore[attr-defined]
                type=kind,
                metavar="GLOB" if is_repeatable and kind is str else getattr(kind, "metavar", None),
                multiple=is_repeatable,
                default=None,
                help=f"{each.metadata['help']}  [default: {_default_of(each, presets)}]",
            )
            command = add_option(command)
        return command

    return decorate


def option_name(field: "dataclasses.Field[Any]") -> str:
    """The option of a settings field, as it is typed."""
    return field.metadata["option"] or "--" + field.name.replace("_", "-")


def _type_of(hint: Any) -> Any:
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return click.Choice([str(choice) for choice in choices])
    return _OrWord(*choices) if choices else hint


def _default_of(field: "dataclasses.Field[Any]", presets: Mapping[str, Preset] | None) -> str:
    if presets is None:
        return field.metadata["unset"] if field.default is None else _as_typed(field.default)
    values = {name: _as_typed(preset.value(field.name)) for name, preset in presets.items()}
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{name}: {value}" for name, value in values.items())


def _as_typed(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(map(_as_typed, value))
    return f"{value:g}" if isinstance(value, float) else str(value) or "empty"


class _OrWord(click.ParamType):  # type: ignore[type-arg]
    """A value of the first type, or a word: a literal such as ``auto``, or ``none``."""

    def __init__(self, kind: type, other: Any):
        self.kind = click.types.convert_type(kind)
        self.word: str = next(iter(typing.get_args(other)), "none")
        self.name = f"{self.kind.name}|{self.word}"
        self.metavar = f"{self.kind.name.upper()}|{self.word}"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return value if value == self.word else self.kind.convert(value, param, ctx)


def configure(base: Config, values: Mapping[str, Any]) -> Config:
    """The settings ``base`` with the options that were given; one that was not is None, or ().

    Raises:
        InputError: a value is out of range; the message names the option as it is typed.
    """
    hints = typing.get_type_hints(type(base))
    fields = {each.name: each for each in dataclasses.fields(base)}  # type: ignore[arg-type]
    changed = {}
    for name in fields:
        value = values.get(name)
        if value is None or value == ():
            continue
        if value == "none" and type(None) in typing.get_args(hints[name]):
            value = None
        elif typing.get_origin(hints[name]) is typing.Literal:
            by_name = {str(choice): choice for choice in typing.get_args(hints[name])}
            value = by_name[value]
        changed[name] = value
    try:
        return dataclasses.replace(base, **changed)  # type: ignore[type-var]
    except SettingError as error:
        raise InputError(f"{option_name(fields[error.name])} {error.problem}") from error


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes, with or without KB, MB or GB."""

    name = "size"
    _units: typing.ClassVar = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """The number of bytes that ``value`` stands for."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B|)", str(value).upper())
        if match is None:
            self.fail(f"{value!r} is not a size; use for example 256MB.", param, ctx)
        return int(Decimal(match[1]) * self._units[match[2]])
