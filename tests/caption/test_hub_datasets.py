"""Whole jobs over a dataset of the Hugging Face hub, by its name, against a server like the hub."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from captioner.cli import main
from conftest import write_photos
from hub_server import MAIN, V1, Hub, Repository, serving

pytest.importorskip("huggingface_hub")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PHOTOS = "hf://datasets/owner/photos"
SETTINGS = ["--engine", "local", "--device", "cpu", "--shard-size", "2", "--batch-size", "2"]


def _parquet(photos: list[Path], first: int) -> bytes:
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in photos]
    numbers = [*range(first, first + len(photos))]
    table = pa.table({"image": pa.array(cells, IMAGE), "label": numbers})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=2)
    return sink.getvalue()


def _list(numbers: list[int]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"label": numbers}), sink)
    return sink.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Two Parquet files of a dataset, with three photos each."""
    photos = write_photos(tmp_path_factory.mktemp("photos"), 6)
    return {
        "README.md": b"# Photos",
        "data/test-00000-of-00001.parquet": _parquet(photos[3:], 3),
        "data/train-00000-of-00001.parquet": _parquet(photos[:3], 0),
    }


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    train = {name: data for name, data in files.items() if "test" not in name}
    repositories = {
        "datasets/owner/photos": Repository({MAIN: files, V1: train}),
        "datasets/owner/gated": Repository({MAIN: files}, gated=True),
        "datasets/owner/labels": Repository({MAIN: {"data/train.parquet": _list([1, 2])}}),
        "datasets/owner/texts": Repository({MAIN: {"README.md": b"", "data/train.csv": b"a"}}),
    }
    with serving(repositories) as server:
        # The client reads HF_ENDPOINT once in a process.
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.address})
        yield server


def _caption(source: str, output: Path, model: Path, *more: str) -> Result:
    arguments = ["caption", source, str(output), "--model", str(model), *SETTINGS, *more]
    return CliRunner().invoke(main, arguments)


def _rows(output: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pyarrow.dataset.dataset(output).to_table().to_pylist()
    return rows


def _places(name: str, rows: range, revision: str = "") -> list[str]:
    file = f"{PHOTOS}{revision}/data/{name}-00000-of-00001.parquet"
    return [f"{file}#image={row}" for row in rows]


def test_each_image_has_one_row_with_its_columns(
    hub: Hub, files: dict[str, bytes], model_directory: Path, tmp_path: Path
) -> None:
    done = _caption(PHOTOS, tmp_path / "out", model_directory, "--keep", "label=number")
    assert done.exit_code == 0, done.output
    rows = _rows(tmp_path / "out")
    assert [row["uri"] for row in rows] == _places("test", range(3)) + _places("train", range(3))
    assert [row["number"] for row in rows] == [3, 4, 5, 0, 1, 2]
    for name, data in files.items():
        (tmp_path / "same" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "same" / name).write_bytes(data)
    done = _caption(str(tmp_path / "same"), tmp_path / "local", model_directory)
    assert done.exit_code == 0, done.output
    for row, same in zip(rows, _rows(tmp_path / "local"), strict=True):
        assert row["status"] == "ok"
        assert (row["caption"], row["attention"]) == (same["caption"], same["attention"])


def test_a_revision_in_the_address_is_read(hub: Hub, model_directory: Path, tmp_path: Path) -> None:
    done = _caption(f"{PHOTOS}@v1", tmp_path / "out", model_directory)
    assert done.exit_code == 0, done.output
    assert [row["uri"] for row in _rows(tmp_path / "out")] == _places("train", range(3), "@v1")
    assert [row["status"] for row in _rows(tmp_path / "out")] == ["ok"] * 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("owner/none", r"^captioner: cannot use .*/none: .*\(repository not found\)"),
        (
            "owner/gated",
            r"^captioner: cannot read .*test.*\.parquet: it is gated: accept its terms",
        ),
        ("owner/labels", r"train\.parquet: the column label holds int64, neither images nor the U"),
        ("owner/texts", r"^captioner: .*owner/texts holds no images \(jpg,"),
        ("owner/photos@v9", r"^captioner: cannot list .*@v9: .*\(revision not found\)$"),
        ("owner/photos/nothing", r"^captioner: .*owner/photos/nothing does not exist$"),
        ("owner/photos/data/no.parquet", r"^captioner: .*photos/data/no\.parquet does not exist$"),
        ("photos", r"^captioner: cannot list .*Repository id must be 'namespace/name'"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_one_line_and_writes_nothing(
    source: str, message: str, hub: Hub, model_directory: Path, tmp_path: Path
) -> None:
    done = _caption(f"hf://datasets/{source}", tmp_path / "out", model_directory)
    assert done.exit_code == 2
    *others, line = done.output.splitlines()
    assert re.search(message, line), line
    assert all("passed over" in other for other in others), done.output
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_busy_for_a_while_is_asked_again(
    hub: Hub, model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    hub.refusals = {
        "datasets/owner/photos": [503],
        "tree/main": [429],
        "test-00000-of-00001.parquet": [503, 429],
    }
    done = _caption(PHOTOS, tmp_path / "out", model_directory)
    assert done.exit_code == 0, done.output
    assert [row["status"] for row in _rows(tmp_path / "out")] == ["ok"] * 6
    assert not any(hub.refusals.values())


# Runs a command, and kills the process when it is about to rename its third part.
KILLED = """
import os, signal, sys
renamed = []
def audit(event, arguments):
    if event == "os.rename" and "/part-" in str(arguments[1]):
        renamed.append(arguments[1])
        if len(renamed) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(audit)
from captioner.cli import main
main(sys.argv[1:])
"""


def test_a_job_that_was_killed_resumes(
    hub: Hub, files: dict[str, bytes], model_directory: Path, tmp_path: Path
) -> None:
    output, environment = tmp_path / "out", {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    options = ["--model", str(model_directory), *SETTINGS, "--keep", "label"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "caption", PHOTOS, str(output), *options],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    first = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert len(first) == 2
    done = _caption(PHOTOS, output, model_directory, "--keep", "label")
    assert done.exit_code == 0, done.output
    rows = _rows(output)
    assert [row["label"] for row in rows] == [3, 4, 5, 0, 1, 2]
    assert [row["status"] for row in rows] == ["ok"] * 6
    assert len([*output.glob("part-*")]) == 4
    assert {name: (output / name).stat().st_mtime_ns for name in first} == first
