import dataclasses
import itertools
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from captioner.cli import main
from captioner.commands.train import train
from captioner.config import DecodeConfig, ListingConfig, RunConfig, TrainConfig
from captioner.options import configure, option_name


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def _printed(*arguments: object) -> str:
    result = _run(*arguments, "--print-config")
    assert result.exit_code == 0, result.output
    return result.output


TRAIN = ("train", "DATA", "OUT")


@pytest.mark.parametrize(
    "command",
    [
        TRAIN,
        (*TRAIN, "--preset", "notebook"),
        (*TRAIN, "--preset", "small", "--clip-norm", "none", "--fine-tune-from", 2),
        (*TRAIN, "--encoder", "resnet18", "--dropout", 0.5, "--captions", "first"),
        (*TRAIN, "--tokenizer", "bpe", "--vocabulary-size", 500),
        (*TRAIN, "--data", 'a "b"\\:2', "--data", "tab\there", "--images", "none"),
        (*TRAIN, "--extend-vocabulary", "--allow-missing", "--learning-rate", "0.25"),
        ("caption", "SOURCE", "OUT"),
        (
            "caption",
            "SOURCE",
            "OUT",
            "--exclude",
            "*.tmp",
            "--exclude",
            "x",
            "--batch-size",
            "auto",
        ),
        ("caption", "SOURCE", "OUT", "--actors", "1:4", "--wait-for-nodes", "--beam", 2),
    ],
)
def test_the_printed_file_gives_the_same_options(command: tuple[object, ...], tmp_path: Path):
    text = _printed(*command)
    path = tmp_path / "options.toml"
    path.write_text(text)
    assert _printed(*command[:3], "--config", path) == text
    values = tomllib.loads(text)
    if command[0] == "train":
        assert set(values) >= {"preset", "epochs", "learning-rate", "workers"}
    for given, value in itertools.pairwise(command):
        name = str(given).removeprefix("--")
        if str(given).startswith("--") and not str(value).startswith("--"):
            wanted = values[name]
            assert str(value) in wanted if isinstance(wanted, list) else str(wanted) == str(value)


def test_each_setting_is_printed_with_its_value():
    values = tomllib.loads(_printed(*TRAIN, "--preset", "notebook", "--epochs", 7))
    expected = configure(TrainConfig(), {"epochs": 7})
    shown = {
        name.replace("_", "-"): value for name, value in vars(expected).items() if value is not None
    }
    assert {name: values[name] for name in shown} == shown
    values = tomllib.loads(_printed("caption", "SOURCE", "OUT"))
    for settings in (DecodeConfig(), ListingConfig(), RunConfig()):
        for each in dataclasses.fields(settings):
            value = getattr(settings, each.name)
            if value is not None and not isinstance(value, tuple):
                assert values[option_name(each).removeprefix("--")] == value


def test_the_command_line_wins_over_the_file(tmp_path: Path):
    path = tmp_path / "train.toml"
    path.write_text('epochs = 20\nlearning-rate = 0.25\npreset = "notebook"\nclip-norm = "none"\n')
    values = tomllib.loads(_printed(*TRAIN, "--epochs", 3, "--config", path))
    assert values["epochs"] == 3
    assert values["learning-rate"] == 0.25
    assert values["batch-size"] == 64  # the notebook's
    assert values["clip-norm"] == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1.0", "unknown option 'learning_rate'; use learning-rate"),
        ("[train]\nepochs = 1", "unknown option 'train'; use "),
        ("zzzzzz = 1", "unknown option 'zzzzzz'; see captioner train --help"),
        ("help = true", "unknown option 'help'"),
        ("epochs = 2.5", "'2.5' is not a valid integer"),
        ("epochs = true", "epochs must be text or a number, not true or false"),
        ("epochs = [1]", "epochs must be text or a number, not a list"),
        ("epochs = -1", "--epochs must be at least 0"),
        ('data = "a"', 'data must be a list, such as ["a", "b"]'),
        ("overwrite = 1", "overwrite must be true or false, not 1"),
        ('captions = "some"', "'some' is not one of"),
        ("epochs = ", "is not a TOML file"),
    ],
)
def test_what_a_file_has_wrong_is_one_line(text: str, message: str, tmp_path: Path):
    path = tmp_path / "train.toml"
    path.write_text(text)
    result = _run(*TRAIN, "--config", path)
    assert result.exit_code == 2
    assert message in result.output
    if "captioner: " in result.output:
        assert len(result.output.splitlines()) == 1


def test_a_missing_file_is_one_line(tmp_path: Path):
    result = _run(*TRAIN, "--config", tmp_path / "none.toml")
    assert result.exit_code == 2
    assert result.output.startswith(f"captioner: --config {tmp_path / 'none.toml'}: ")
    assert len(result.output.splitlines()) == 1


def test_every_option_has_a_name_in_the_file():
    keys = [each.opts[0] for each in train.params if hasattr(each, "group")]
    assert len(keys) == len(set(keys))
    assert all(key.startswith("--") for key in keys)
