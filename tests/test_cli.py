import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from captioner.cli import main
from captioner.output.decisions import Journal
from conftest import write_photos


def _run(*arguments: object):
    return CliRunner().invoke(main, [str(each) for each in arguments], prog_name="captioner")


COMMANDS = sorted(main.commands)
OPTIONS = [
    (command, option)
    for command in COMMANDS
    for option in main.commands[command].params
    if option.param_type_name == "option"
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_in_sentences(command):
    result = _run(command, "--help")
    assert result.exit_code == 0, result.output
    assert main.commands[command].help.split("\n")[0].endswith((".", ":"))


def test_the_list_of_commands_has_a_whole_summary_of_each():
    text = CliRunner().invoke(main, ["--help"], terminal_width=80).output
    listed = [line.split()[0] for line in text[text.index("Commands:") :].splitlines()[1:]]
    assert listed[0] == "caption"
    assert sorted(listed) == COMMANDS
    assert "..." not in text[text.index("Commands:") :]


@pytest.mark.parametrize(
    ("command", "option"), OPTIONS, ids=[f"{name} --{option.name}" for name, option in OPTIONS]
)
def test_every_option_says_what_it_does_and_its_default(command, option):
    sentence = option.help.split("  [")[0]
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    assert option.required or option.show_default or "  [" in option.help
    assert "preset's" not in option.help
    assert option.group != "Other", "choose the heading that --help lists the option under"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_group_of_options_fits_one_screen(command):
    text = CliRunner().invoke(main, [command, "--help"], terminal_width=100).output
    groups = text.split("\n\n")
    assert max(len(group.splitlines()) for group in groups) <= 30


def test_the_training_options_name_each_presets_value():
    text = " ".join(_run("train", "--help").output.split())
    for values in (
        "[default: small: 14, notebook: 4]",
        "[default: small: none, notebook: 2]",
        "[default: small: 0.0005, notebook: 0.0001]",
        "[default: small: matrices, notebook: all]",
        "[default: small: 1, notebook: none]",
    ):
        assert values in text


def test_a_wrong_value_names_the_option_as_it_is_typed(tmp_path: Path):
    cases = {
        "--learning-rate must be at least 0, not -1.0": ("--learning-rate=-1",),
        "--ext must be words separated by commas, not 'jpg,'; use for example jpg,png": (
            "--ext=jpg,",
        ),
        "--actors must be N or MIN:MAX, not '3:1'": ("--actors=3:1",),
        "--drop-path needs a trained encoder; add --fine-tune-from": ("--drop-path=0.1",),
    }
    for message, options in cases.items():
        command = "train" if options[0][2:4] in ("le", "dr") else "caption"
        result = _run(command, tmp_path / "no", tmp_path / "out", *options)
        assert result.exit_code == 2, result.output
        assert result.output == f"captioner: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "empty"),
    [
        (["caption", "", "out"], "SOURCE"),
        (["caption", "photos", ""], "OUTPUT"),
        (["caption", "photos", "out", "--model", ""], "--model"),
        (["caption", "photos", "out", "--keep="], "--keep"),
        (["export", "out", "", "--format", "csv"], "DESTINATION"),
        (["train", "data", "model", "--images", ""], "--images"),
        (["review", "out", "--token", ""], "--token"),
    ],
)
def test_an_empty_value_is_refused(arguments: list[str], empty: str):
    result = _run(*arguments)
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert result.output.startswith(f"captioner: {empty} is empty: give a value")


def test_a_message_has_no_signature_of_a_web_address():
    uri = "https://host/x/?X-Amz-Signature=SECRET&id=7"
    result = _run("caption", uri, "out")
    assert (result.exit_code, "SECRET" in result.output) == (2, False)
    assert "X-Amz-Signature=…&id=7" in result.output
    result = _run("caption", uri.replace("//", "//me:SECRET@"), "out")
    assert (result.exit_code, "SECRET" in result.output) == (2, False)


@pytest.mark.parametrize("size", ["256MBB", "MB", "-1", "1.5.2GB", "ten"])
def test_what_is_not_a_size_is_refused_with_an_example(tmp_path: Path, size: str):
    result = _run("compact", tmp_path, f"--size={size}")
    assert result.exit_code == 2
    assert f"'{size}' is not a size; use for example 256MB." in result.output


def test_help_imports_neither_torch_nor_ray():
    code = (
        "import sys; from captioner.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray', 'pyarrow', 'pandas', 'wandb', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_python_m_captioner_is_the_command():
    command = [sys.executable, "-m", "captioner", "report", "nowhere"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("captioner: ")


def test_warnings_of_libraries_stay_off_the_terminal():
    code = (
        "import logging; from captioner.cli import main\n"
        "try: main(['report', 'nowhere'])\n"
        "except SystemExit: logging.getLogger('gcsfs').warning('no credentials')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(ran.stderr.splitlines()) == 1, ran.stderr


def test_after_its_imports_a_command_collects_garbage(tmp_path: Path, model_directory: Path):
    assert _run("caption", tmp_path / "no", tmp_path / "o", "--model", model_directory).exit_code
    assert gc.isenabled()


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
    assert "\nlast run: 3 images in " in result.output
    result = _run("caption", photos[0].parent, output, "--model", model_directory, "--engine=local")
    assert result.exit_code == 0, result.output
    assert "\nlast run: no image captioned, ended " in _run("report", output).output
    summary = output / "__captioner" / "summary.json"
    for broken in ("", '{"captioned": 3}', '{"captioned": "<b>", "seconds": 1}', "[]"):
        summary.write_text(broken)
        result = _run("report", output)
        assert result.exit_code == 2
        [line] = result.output.splitlines()
        assert "summary.json" in line
    summary.unlink()
    part = pq.read_table(output / "part-000000.parquet")
    pq.write_table(part.replace_schema_metadata(), output / "part-000000.parquet")
    result = _run("show", output, photos[1].name, "-o", tmp_path / "overlay.png")
    assert result.exit_code == 2
    assert result.output.endswith(" are damaged\n")
    (output / "part-000000.parquet").unlink()
    result = _run("report", output, "--missing")
    assert result.exit_code == 1
    assert result.output.splitlines() == [str(path) for path in photos]


def test_report_names_an_image_of_each_status(tmp_path: Path, model_directory: Path):
    write_photos(tmp_path / "photos", 2)
    (tmp_path / "photos" / "text.jpg").write_text("no image")
    (tmp_path / "photos" / "void.jpg").touch()
    result = _run("caption", tmp_path / "photos", tmp_path / "out", "--model", model_directory)
    assert result.exit_code == 3
    assert result.output.endswith("; captioner report shows why\n")
    lines = _run("report", tmp_path / "out").output.splitlines()
    assert lines[:2] == ["4 images listed", "  2 ok"]
    assert lines[2].startswith(f"  2 undecodable, for example {tmp_path}/photos/text.jpg: ")
    assert len(lines[2]) > len(f"  2 undecodable, for example {tmp_path}/photos/text.jpg: ")


def test_report_counts_the_reviewers_decisions(tmp_path: Path, model_directory: Path):
    photos = [str(path) for path in write_photos(tmp_path / "photos", 4)]
    _run("caption", tmp_path / "photos", tmp_path / "out", "--model", model_directory)
    assert "reviewed" not in _run("report", tmp_path / "out").output
    journal = Journal(str(tmp_path / "out"))
    for uri, kind in zip(photos, ("accepted", "accepted", "edited", "rejected"), strict=True):
        made = journal.decide(uri, kind, "a cat" if kind == "edited" else None, seen=0)
    journal.decide("/no/row/of/this/output.jpg", "accepted", None, seen=0)

    lines = _run("report", tmp_path / "out").output.splitlines()
    assert "4 captions reviewed: 2 accepted, 1 edited, 1 rejected" in lines

    journal.decide(photos[3], None, None, seen=made.revision)
    lines = _run("report", tmp_path / "out").output.splitlines()
    assert "3 captions reviewed: 2 accepted, 1 edited, 0 rejected" in lines


def test_show_of_a_folder_that_is_no_output_says_so(tmp_path: Path):
    result = _run("show", tmp_path, "a.jpg", "-o", tmp_path / "overlay.png")
    assert result.exit_code == 2
    assert result.output.splitlines() == _run("report", tmp_path).output.splitlines()


def test_show_takes_a_path_from_the_working_directory(
    tmp_path: Path, model_directory: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    [photo] = write_photos(tmp_path / "photos", 1)
    assert _run("caption", "photos", "out", "--model", model_directory).exit_code == 0
    for name in (f"./photos/{photo.name}", f"photos/../photos/{photo.name}"):
        result = _run("show", "out", name, "-o", "overlay.png")
        assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory, model_directory: Path) -> Path:
    """Captions of an image in Japanese, and of two whose names are no text."""
    directory = tmp_path_factory.mktemp("named")
    photos = write_photos(directory / "photos" / "a b", 3)
    for path, name in zip(photos, ("犬🐕.jpg".encode(), b"caf\xe9.jpg", b"\xff.jpg"), strict=True):
        path.rename(path.parent / os.fsdecode(name))
    arguments = (directory / "photos", directory / "out", "--model", model_directory)
    result = _run("caption", *arguments, "--engine=local")
    assert result.exit_code == 0, result.output
    return directory


def test_show_writes_no_png_under_another_name(named: Path):
    uri = os.fsdecode(b"caf\xe9.jpg")
    for name in ("overlay.jpg", "overlay"):
        result = _run("show", named / "out", uri, "-o", named / name)
        assert result.exit_code == 2
        assert result.output.endswith(f"/{name}: not a PNG file; use a name that ends with .png\n")
        assert not (named / name).exists()


def test_show_finds_a_name_that_is_no_text(named: Path):
    name = os.fsdecode(b"caf\xe9.jpg")
    for uri in (name, f"a b/{name}", named / "photos" / "a b" / name, "a%20b/caf%E9.jpg"):
        result = _run("show", named / "out", uri, "-o", named / "overlay.png")
        assert result.exit_code == 0, result.output
    result = _run("show", named / "out", f"b/{name}", "-o", named / "overlay.png")
    assert result.exit_code == 2
    assert result.output == f"captioner: no images of {named}/out match b/caf\\udce9.jpg\n"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "犬🐕"), ("latin-1", r"\u72ac\U0001f415")]
)
def test_what_the_terminal_cannot_show_is_spelled(named: Path, encoding: str, shown: str):
    command = [sys.executable, "-m", "captioner.cli", "report", named / "out"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    ran = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert f"/{shown}.jpg\n" in ran.stdout.decode(encoding)
    assert ran.stderr == b""


def test_a_working_directory_that_is_deleted_is_one_line(tmp_path: Path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = _run("report", "out")
    assert result.exit_code == 2
    assert result.output == ("captioner: out starts from the working directory, which is deleted\n")


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


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--no-such"], "See captioner --help."),
        (["capt\nion"], r"No such command 'capt\nion'."),
        (["caption"], "Missing argument 'SOURCE'. See captioner caption --help."),
        (["caption", "a", "b", "c"], "extra argument (c). See captioner caption --help."),
        (["caption", "a", "b", "--batch-size", "1e9"], "'1e9' is not a valid integer. See"),
    ],
)
def test_unusable_arguments_get_one_line_that_names_the_help(arguments: list[str], line: str):
    result = _run(*arguments)
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert result.output.startswith("captioner: ")
    assert line in result.output


def test_train_reads_what_its_options_say(tmp_path: Path):
    """As far as the encoder's weights, which are not there."""
    photos = write_photos(tmp_path / "coco" / "photos", 5)
    tables = tmp_path / "annotations"
    tables.mkdir()
    for name, begin, end in (("train", 0, 3), ("val", 3, 5), ("leak", 0, 1)):
        images = [{"id": i, "file_name": photos[i].name} for i in range(begin, end)]
        annotations = [{"image_id": i, "caption": f"Photo {i} ."} for i in range(begin, end)]
        content = {"images": images, "annotations": [*annotations, {"image_id": 9, "caption": "x"}]}
        (tables / f"{name}.json").write_text(json.dumps(content))
    (tables / "hostile.json").write_text("[" * 100_000)
    (tmp_path / "train.txt").write_text(f"{photos[0].name}\n{photos[1].name}\n")
    (tmp_path / "val.txt").write_text(f"photos/{photos[2].name}\n")
    images = ("--images", tmp_path / "coco")
    lists = ("--train-list", tmp_path / "train.txt", "--val-list", tmp_path / "val.txt")
    left_out = "; left out: {} captioned images that are not there"
    counts = {
        "3 images to train on, 2 to validate on" + left_out.format(2): (
            *images,
            "--val-data",
            tables / "val.json",
        ),
        "2 images to train on, 1 to validate on" + left_out.format(1): (*images, *lists),
    }
    for line, options in counts.items():
        weights = (
            "--encoder-weights",
            tmp_path / "none.pth",
            "--warmup-steps",
            0,
            "--minimum-count",
            1,
        )
        result = _run("train", tables / "train.json", tmp_path / "model", *options, *weights)
        assert result.exit_code == 2, result.output
        *_, first, second = result.output.splitlines()
        assert first == line
        assert "none.pth does not exist" in second
    several = [*images, *counts["3 images to train on, 2 to validate on" + left_out.format(2)][2:]]
    more = ["--data", f"{tables / 'val.json'}:2", "--images", tmp_path / "coco"]
    more += ["--val-data", tables / "train.json"]
    result = _run("train", tables / "train.json", tmp_path / "model", *several, *more, *weights)
    assert result.exit_code == 2, result.output
    assert "5 images are in both train and validation" in result.output
    (tmp_path / "val.txt").write_text(f"{photos[2].name}\ngone.jpg\n")
    result = _run("train", tables / "train.json", tmp_path / "val.txt", *images, *lists)
    assert result.exit_code == 2, result.output
    _, first, _, second, warning, third = result.output.splitlines()
    assert warning.endswith("use a lower --warmup-steps")
    assert first == (
        f"left out: 1 of the 2 names in {lists[3]} are of no captioned image: gone.jpg"
    )
    assert second.startswith("2 images to train on, 1 to validate on")
    assert third == f"captioner: cannot use {lists[3]} for output: Not a directory"
    mistakes = {
        "are in both train and validation": (*images, "--val-data", tables / "leak.json"),
        "not both": (*images, *lists, "--val-data", tables / "val.json"),
        "too few to hold out": images,
        "(--images says where the images are)": (),
        "is not valid JSON": (*images, "--val-data", tables / "hostile.json"),
        "nowhere does not exist": ("--images", tmp_path / "nowhere"),
    }
    for message, options in mistakes.items():
        result = _run("train", tables / "train.json", tmp_path / "model", *options)
        assert result.exit_code == 2, result.output
        *before, last = result.output.splitlines()
        assert message in last
        assert all(line.startswith("left out: 1 of the ") for line in before), result.output
    assert not (tmp_path / "model").exists()


def test_debug_shows_where_an_error_comes_from(tmp_path: Path, model_directory: Path):
    result = _run("--debug", "caption", tmp_path / "no", tmp_path / "o", "--model", model_directory)
    assert result.exit_code == 1
    assert result.exception is not None


def test_ctrl_c_while_packages_are_imported_ends_the_command_at_once():
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have ignored it
        "class Interrupts:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'pyarrow':\n"
        "            try: os.kill(os.getpid(), signal.SIGINT)\n"
        "            except KeyboardInterrupt: print('swallowed')\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from captioner.cli import main\n"
        "main(['report', 'nowhere'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (130, "")
    assert ran.stderr == "captioner: stopped by SIGINT\n"


def test_the_cache_is_shown_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("features/a", "features/b", "models/one/weights"):
        path = tmp_path / "captioner" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1_500_000))
    folder = tmp_path / "captioner"
    expected = [
        f"{folder}/features: files 2, 3.0 MB",
        f"{folder}/compiled: files 0, 0.0 MB",
        f"{folder}/models: files 1, 1.5 MB",
    ]
    for arguments in (["cache"], ["cache", "show"]):
        result = _run(*arguments)
        assert (result.exit_code, result.output.splitlines()) == (0, expected), result.output
    result = _run("cache", "clear", "--kind", "features")
    assert (result.exit_code, result.output) == (0, f"deleted {expected[0]}\n")
    assert [path.name for path in folder.iterdir()] == ["models"]
    result = _run("cache", "clear")
    assert result.exit_code == 0
    assert list(folder.iterdir()) == []


def test_a_cache_that_cannot_be_cleared_is_one_line(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "captioner").mkdir()
    (tmp_path / "captioner" / "features").write_bytes(b"a file")
    result = _run("cache", "clear")
    assert result.exit_code == 2
    assert (
        result.output
        == f"captioner: cannot delete {tmp_path}/captioner/features: Not a directory\n"
    )
