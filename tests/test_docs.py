"""The documentation: pages made from the code are current, links lead somewhere, commands parse."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import click
import pytest

from captioner.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for place in ("*.md", "docs/**/*.md", "captioner/**/*.md", "cluster/*.md", "benchmarks/*.md")
    for page in ROOT.glob(place)
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def _make_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_reference", ROOT / "docs" / "make_reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["command-line.md", "python.md"])
def test_the_reference_is_current(name: str):
    reference = _make_reference()
    made = reference.PAGES[reference.REFERENCE / name]()
    written = (reference.REFERENCE / name).read_text()
    assert written == made, "run python docs/make_reference.py"


def test_the_python_reference_refers_only_to_what_it_describes():
    text = (ROOT / "docs" / "reference" / "python.md").read_text()
    described = re.findall(r"^#+ `(\w+)`|^\| `(\w+)` \|", text, re.MULTILINE)
    names = {name for names in described for name in names}
    assert {"Summary", "Plan", "Dataset", "Captioned", "Evaluation", "RunConfig"} <= names
    assert set(re.findall(r"\bsee `(\w+)`", text)) <= names
    returned = set(re.findall(r"^\) -> (?:list\[)?(\w+)", text, re.MULTILINE))
    assert returned - {"ndarray"} <= names


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]
            assert anchor in slugs, target


def _commands(page: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    starts = re.compile(r"^(?:pip install [^&]*&& |ray job submit .*-- )?(captioner .*)$")
    return [found[1] for line in lines if (found := starts.match(line))]


COMMANDS = [
    (name, line) for page, name in zip(PAGES, NAMES, strict=True) for line in _commands(page)
]


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_the_commands_in_the_documentation_parse(name: str, line: str):
    line = re.sub(r'"?\$\(.*\)"?', "value", line).replace("$LISTS", "").replace("$BOTH", "")
    words = shlex.split(re.sub(r" > \S+$", "", line), comments=True)[1:]
    command = main.commands[words[0]]
    if "--help" in words:
        return
    assert isinstance(command.make_context(words[0], words[1:]), click.Context)
