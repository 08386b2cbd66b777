"""Writes docs/reference/command-line.md and python.md: ``python docs/make_reference.py``.

The first comes from the click commands, the second from the docstrings of the public names. A test
fails if either is out of date.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import click

import captioner
from captioner.cli import main as cli
from captioner.options import group_options

REFERENCE = ROOT / "docs" / "reference"
#: The types that public functions return, and the types of their attributes.
_RESULTS = (
    "captioner.caption.summary:Summary",
    "captioner.caption.timing:Timing",
    "captioner.caption.plan:Plan",
    "captioner.data.dataset:Dataset",
    "captioner.data.splits:Split",
    "captioner.data.splits:CaptionedImage",
    "captioner.evaluation.captions:Captioned",
    "captioner.evaluation.evaluation:Evaluation",
    "captioner.evaluation.metrics:Scores",
    "captioner.training.journal:Epoch",
    "captioner.model.base:Model",
    "captioner.model.base:LoadedModel",
    "captioner.model.base:Caption",
)
_NOTE = "<!-- Written by docs/make_reference.py; do not edit. -->"


def command_line() -> str:
    """The reference of all commands, as Markdown."""
    lines = [
        _NOTE,
        "",
        "# Command line",
        "",
        "The same text as `captioner COMMAND --help`. `captioner --debug COMMAND …` shows the "
        "traceback of an error; [failures](../explanation/failures.md) explains the exit codes.",
        "",
    ]
    names = cli.list_commands(click.Context(cli))
    lines += [f"- [captioner {name}](#captioner-{name})" for name in names]
    for name in names:
        lines += ["", *_command(name, cli.commands[name])]
    return "\n".join(lines) + "\n"


def _command(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=f"captioner {name}")
    yield f"## captioner {name}"
    yield ""
    yield "```text"
    yield command.get_usage(context).removeprefix("Usage: ")
    yield "```"
    yield ""
    yield _escaped(inspect.cleandoc(command.help or ""))
    for group, options in group_options(command, context).items():
        rows = [record for each in options if (record := each.get_help_record(context))]
        if group == "Other":  # --help itself
            continue
        yield ""
        yield f"**{group}**"
        yield ""
        yield "| option | |"
        yield "|---|---|"
        for option, text in rows:
            yield f"| `{option.replace('|', chr(92) + '|')}` | {_escaped(' '.join(text.split()))} |"


def _escaped(text: str) -> str:
    """Text as Markdown shows it: nothing in angle brackets is HTML, no bar ends a cell."""
    text = text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")
    return re.sub(r"(?<![\w`-])(--[a-z][\w-]*)", r"`\1`", text)


def python() -> str:
    """The reference of the public names, as Markdown."""
    lines = [
        _NOTE,
        "",
        "# Python",
        "",
        *_sections(inspect.getdoc(captioner) or ""),
        "",
        "```python",
        'data = captioner.read_dataset("flickr8k")',
        "model = captioner.BUNDLED_MODEL",
        "captioned = captioner.caption_dataset(",
        "    data.split().test, model, decode=captioner.DecodeConfig(), run=captioner.RunConfig()",
        ")",
        "print(captioner.evaluate(captioned).to_json())",
        "```",
    ]
    functions = [name for name in captioner.__all__ if inspect.isroutine(_value(name))]
    others = [name for name in captioner.__all__ if name not in functions]
    for name in functions:
        value = _value(name)
        signature = _signature(name, value)
        lines += ["", f"## `{name}`", "", "```python", signature, "```", ""]
        lines += _sections(inspect.getdoc(value) or "")
    lines += [
        "",
        "## Results",
        "",
        "The types that the functions return, and the types of their attributes.",
    ]
    for place in _RESULTS:
        lines += ["", *_result(place)]
    lines += ["", "## Settings, errors and constants", "", "| name | |", "|---|---|"]
    for name in others:
        value = _value(name)
        lines.append(f"| `{name}` | {_summary(name, value)} |")
    lines += [
        "",
        "The fields of the settings are the options of the [command line](command-line.md): "
        "`RunConfig(batch_size=32)` is `--batch-size 32`.",
    ]
    return "\n".join(lines) + "\n"


def _result(place: str) -> Iterator[str]:
    """The attributes, properties and methods of a type."""
    module, name = place.split(":")
    kind = getattr(importlib.import_module(module), name)
    yield f"### `{name}`"
    yield ""
    yield from _sections(inspect.getdoc(kind) or "")
    members = {key: member for key, member in vars(kind).items() if not key.startswith("_")}
    properties = {key: each for key, each in members.items() if isinstance(each, property)}
    methods = {key: each for key, each in members.items() if inspect.isfunction(each)}
    if properties and "Attributes:" not in (kind.__doc__ or ""):
        yield ""
        yield "**Attributes**"
        yield ""
    for key, member in properties.items():
        text = _first(member)
        yield f"- `{key}`: {text[:1].lower()}{text[1:]}"
    if methods:
        yield ""
        yield "**Methods**"
        yield ""
    for key, method in methods.items():
        parameters = [each for each in inspect.signature(method).parameters if each != "self"]
        yield f"- `{key}({', '.join(parameters)})`: {_first(method)}"


def _first(member: Any) -> str:
    """The first paragraph of a member's docstring, on one line."""
    first = (inspect.getdoc(member) or "").split("\n\n")[0].replace("\n", " ")
    return _plain(first)


def _value(name: str) -> Any:
    return getattr(captioner, name)


def _summary(name: str, value: Any) -> str:
    if name == "PRESETS":
        return "The presets of `captioner train`: `small` and `notebook`."
    if name == "BUNDLED_MODEL":
        return (
            "The directory of the model that comes with captioner, trained on Flickr8k and "
            "everyday photos."
        )
    return _plain((inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " "))


def _signature(name: str, value: Any) -> str:
    whole = inspect.signature(value)
    parameters = [_short(str(each)) for each in whole.parameters.values()]
    kinds = [each.kind for each in whole.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returned = _short(inspect.formatannotation(whole.return_annotation))
    lines = "".join(f"    {each},\n" for each in parameters)
    return f"captioner.{name}(\n{lines}) -> {returned}"


def _short(annotation: str) -> str:
    """An annotation without the modules of its types."""
    return re.sub(r"\b(?:[a-z_]\w*\.)+([A-Za-z]\w*)", r"\1", annotation)


def _sections(doc: str) -> Iterator[str]:
    """A Google-style docstring as Markdown: its sections become lists."""
    section = ""
    for line in doc.splitlines():
        heading = re.fullmatch(r"(Args|Returns|Raises|Yields|Attributes|Example):", line)
        if heading:
            section = heading[1]
            yield f"**{ {'Args': 'Arguments'}.get(section, section) }**"
            yield ""
            if section == "Example":
                yield "```python"
        elif section == "Example":
            yield re.sub(r"^    (>>> )?", "", line)
        elif section and (entry := re.fullmatch(r"    (\w+): (.*)", line)):
            yield f"- `{entry[1]}`: {_plain(entry[2])}"
        elif section:
            yield _plain(line.strip()) if section == "Returns" else _plain(line[4:].rstrip()[2:])
        else:
            yield _plain(line)
    if section == "Example":
        yield "```"


def _plain(text: str) -> str:
    """Text without the roles that Sphinx knows and Markdown does not."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text).replace("<", "&lt;")


PAGES = {REFERENCE / "command-line.md": command_line, REFERENCE / "python.md": python}


def main() -> None:
    """Writes the pages."""
    for path, make in PAGES.items():
        path.write_text(make())


if __name__ == "__main__":
    main()
