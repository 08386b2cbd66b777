"""``--config``, which reads options from a TOML file, and ``--print-config``, which writes one."""

import json
import tomllib
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

import click
from click.core import ParameterSource

from captioner.config.settings import Settings
from captioner.errors import InputError, one_line
from captioner.options import group_options, option

__all__ = ["config_options", "format_config"]

_GROUP = "Config file"


def config_options(command: Any) -> Any:
    """A decorator that adds ``--config`` and ``--print-config``."""
    command = option(
        "--print-config",
        is_flag=True,
        group=_GROUP,
        help="Print the options as a TOML file for --config, and do nothing else.  [default: off]",
    )(command)
    return option(
        "--config",
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        group=_GROUP,
        help="TOML file with values of the options, such as epochs = 20; options on the command "
        "line win over it.  [default: none]",
    )(command)


def _read_config(context: click.Context, _: click.Parameter, uri: str | None) -> None:
    """Makes the values in a file the defaults of a command's options.

    Raises:
        InputError: the file cannot be read, or has an option that the command does not have, or a
            value of the wrong kind.
    """
    if uri is None:
        return
    from captioner import storage

    try:
        values = tomllib.loads(storage.read(storage.absolute(uri)).decode())
    except OSError as error:
        raise InputError(f"--config {uri}: {error.strerror or one_line(error)}") from error
    except ValueError as error:
        raise InputError(f"--config {uri} is not a TOML file: {one_line(error)}") from error
    options = {_key(each): each for each in _options(context)}
    defaults = {}
    for key, value in values.items():
        if key not in options:
            close = get_close_matches(key, options, n=1)
            hint = f"use {close[0]}" if close else f"see captioner {context.info_name} --help"
            raise InputError(f"--config {uri}: unknown option {key!r}; {hint}")
        defaults[str(options[key].name)] = _as_default(
            f"--config {uri}: {key}", options[key], value
        )
    context.default_map = defaults


def _as_default(place: str, parameter: click.Option, value: Any) -> Any:
    """A value as click takes it from the command line, where numbers are text.

    Raises:
        InputError: the value is not of the option's kind.
    """
    if parameter.multiple:
        if not isinstance(value, list) or not all(_is_scalar(each) for each in value):
            raise InputError(f"{place} must be a list, such as [{_toml('a')}, {_toml('b')}]")
        return [str(each) for each in value]
    if parameter.is_flag:
        if not isinstance(value, bool):
            raise InputError(f"{place} must be true or false, not {value!r}")
        return value
    if not _is_scalar(value):
        raise InputError(f"{place} must be text or a number, not {_toml_name(value)}")
    return str(value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _toml_name(value: Any) -> str:
    return {bool: "true or false", list: "a list", dict: "a table"}.get(type(value), "a date")


def format_config(
    context: click.Context, settings: Sequence[Settings], *, replaced: Collection[str] = ()
) -> str:
    """The options of the command that runs, as a file for ``--config``.

    Args:
        context: the command's.
        settings: what the command made of its options: their values are written whether given or
            not. Of the other options those that have a value are written.
        replaced: names of options that the settings hold the outcome of, and that are left out.
    """
    lines: list[str] = []
    own = _options(context)
    for group, options in group_options(context.command, context).items():
        entries = [
            f"{_key(each)} = {_toml(value)}"
            for each in options
            if each in own
            and each.name not in replaced
            and (value := _value(context, each, settings)) is not None
        ]
        if entries:
            lines += [*([""] if lines else []), f"# {group}", *entries]
    return "\n".join(lines)


def _value(context: click.Context, parameter: click.Option, settings: Sequence[Settings]) -> Any:
    """The value to write; None leaves the option out."""
    name = str(parameter.name)
    given = context.params.get(name)
    is_given = context.get_parameter_source(name) is not ParameterSource.DEFAULT
    for each in settings:
        if hasattr(each, name):
            value = getattr(each, name)
            if value is None:
                return "none" if is_given else None
            if value == ():
                return None
            return value
    return given if is_given or given else None


def _options(context: click.Context) -> list[click.Option]:
    return [
        each
        for each in context.command.get_params(context)
        # Without --help and --config, which have no value, and the option that writes the file.
        if isinstance(each, click.Option) and each.expose_value and each.name != "print_config"
    ]


def _key(parameter: click.Option) -> str:
    """The name of an option in a file: as typed, without the leading dashes."""
    return parameter.opts[0].removeprefix("--")


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
