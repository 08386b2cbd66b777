import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from captioner.cli import main
from conftest import write_photos


def _run(*arguments: object):
    return CliRunner().invoke(main, [str(each) for each in arguments])


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_has_help_for_every_option(command):
    result = _run(command, "--help")
    assert result.exit_code == 0, result.output
    assert main.commands[command].help
    for parameter in main.commands[command].params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name


def test_help_imports_neither_torch_nor_ray():
    code = (
        "import sys; from captioner.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray', 'pyarrow', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_caption_show_and_report(tmp_path: Path, model_directory: Path):
    photos = write_photos(tmp_path / "photos", 3)
    output = tmp_path / "out"
    result = _run("caption", photos[0].parent, output, "--model", model_directory, "--engine=local")
    assert result.exit_code == 0, result.output
    assert "3 images (3 ok)" in result.output
    result = _run("show", output, photos[1].name, "-o", tmp_path / "overlay.png")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "overlay.png") as image:
        assert image.width > 300
    result = _run("report", output)
    assert result.exit_code == 0, result.output
    assert "3 ok" in result.output
    assert "0 images have no row" in result.output
    (output / "part-000000.parquet").unlink()
    result = _run("report", output, "--missing")
    assert result.exit_code == 1
    assert result.output.splitlines() == [str(path) for path in photos]


def _model_without_weights(tmp_path: Path, model_directory: Path) -> Path:
    path = tmp_path / "weightless"
    path.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (path / name).write_bytes((model_directory / name).read_bytes())
    return path


def test_mistakes_get_one_line_and_exit_code_2(tmp_path: Path, model_directory: Path):
    photos = write_photos(tmp_path / "photos", 2)[0].parent
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty").mkdir()
    weightless = _model_without_weights(tmp_path, model_directory)
    cases = {
        "does not exist": (tmp_path / "nowhere", tmp_path / "o1", "--model", model_directory),
        "holds no images": (tmp_path / "empty", tmp_path / "o2", "--model", model_directory),
        "has no model.safetensors": (photos, tmp_path / "o3", "--model", weightless),
        "has no config.json": (photos, tmp_path / "o4", "--model", tmp_path / "empty"),
        "Not a directory": (photos, tmp_path / "file", "--model", model_directory),
        "no device 'gpu'": (photos, tmp_path / "o5", "--model", model_directory, "--device=gpu"),
    }
    for message, arguments in cases.items():
        result = _run("caption", *arguments, "--engine", "local")
        assert result.exit_code == 2, (message, result.output)
        assert message in result.output
        assert len(result.output.splitlines()) == 1, result.output


def test_debug_shows_where_an_error_comes_from(tmp_path: Path, model_directory: Path):
    result = _run("--debug", "caption", tmp_path / "no", tmp_path / "o", "--model", model_directory)
    assert result.exit_code == 1
    assert result.exception is not None
