"""Jobs with a pretrained model that are killed: its batches are slow, and no row is lost."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest
import test_kills as kills
from PIL import Image

from conftest import write_photos

pytestmark = pytest.mark.slow

OPTIONS = ["--shard-size", "12", "--batch-size", "4", "--device", "cpu", "--max-new-tokens", "4"]


def _command(photos: Path, output: Path, model: Path, engine: str) -> list[str]:
    command = [sys.executable, str(kills.FAULTS), engine, "caption", str(photos), str(output)]
    return [*command, "--model", str(model), *OPTIONS]


def _rows(output: Path) -> list[dict[str, Any]]:
    rows = pyarrow.dataset.dataset(output).to_table(columns=["uri", "caption", "tokens"])
    return sorted(rows.to_pylist(), key=lambda row: row["uri"])


@pytest.mark.thorough
@pytest.mark.parametrize(("engine", "runs"), [("local", 5), ("ray", 1)])
def test_an_image_that_kills_a_pretrained_model_is_set_aside(
    engine: str, runs: int, directory_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """A death in the job, one with the batch, and two with the image alone."""
    photos, output = tmp_path / "photos", tmp_path / "out"
    paths = write_photos(photos, 12)
    Image.new("RGB", (64, 64), (255, 0, 255)).save(paths[6], format="png")
    command = _command(photos, output, directory_of("blip"), engine)
    done = kills._run(command, KILL_MODEL="1", RUNS=str(runs))
    assert done.returncode == 0, done.stderr
    assert kills._check(output, photos) == {"ok": 11, "failed": 1}


def test_a_killed_job_with_a_pretrained_model_resumes_to_the_same_rows(
    directory_of: Callable[[str], Path], tmp_path: Path
) -> None:
    photos, output, whole = tmp_path / "photos", tmp_path / "out", tmp_path / "whole"
    write_photos(photos, 60)
    model = directory_of("blip")
    with kills._started(_command(photos, output, model, "local")) as job:
        kills._wait(job, lambda: kills._parts(output) >= 1)
        os.kill(job.pid, signal.SIGKILL)
    assert kills._parts(output) < 5
    before = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
    for place in (output, whole):
        command = _command(photos, place, model, "local")
        kills._run_here([*command, "--engine", "local"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert kills._check(output, photos) == {"ok": 60}
    assert _rows(output) == _rows(whole)
