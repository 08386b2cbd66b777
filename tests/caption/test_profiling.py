import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from captioner.caption.job import caption_images
from captioner.cli import main
from captioner.config import RunConfig
from captioner.errors import OutputError
from conftest import write_photos


def _caption(photos: Path, output: Path, model: Path, profile: Path | None, batch_size: int = 4):
    run = RunConfig(
        engine="local",
        batch_size=batch_size,
        shard_size=8,
        profile=None if profile is None else str(profile),
    )
    return caption_images(str(photos), str(output), str(model), run=run)


def _batches(trace: bytes) -> list[str]:
    events = json.loads(trace)["traceEvents"]
    assert any(event["name"].startswith("aten::") for event in events)
    return sorted(event["name"] for event in events if event.get("cat") == "user_annotation")


@pytest.mark.parametrize(
    ("count", "batches"),
    [
        (30, ["batch 2", "batch 3", "batch 4"]),
        (6, ["batch 2"]),
        (3, ["batch 1"]),
    ],
)
def test_a_few_batches_are_traced_and_the_rows_stay_the_same(
    tmp_path: Path, model_directory: Path, count: int, batches: list[str]
):
    photos = write_photos(tmp_path / "photos", count)[0].parent
    trace = tmp_path / "trace.json"
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    _caption(photos, plain, model_directory, None)
    summary = _caption(photos, profiled, model_directory, trace)
    assert summary.rows["ok"] == count
    assert _batches(trace.read_bytes()) == batches
    assert len(trace.read_bytes()) < 50_000_000
    assert pq.read_table(profiled).drop(["attention"]) == pq.read_table(plain).drop(["attention"])
    assert [path.name for path in tmp_path.glob("*trace*")] == ["trace.json"]
    assert _caption(photos, profiled, model_directory, None).captioned == 0, "the same job"


def test_a_trace_is_compressed_if_its_name_ends_in_gz(tmp_path: Path, model_directory: Path):
    photos = write_photos(tmp_path / "photos", 3)[0].parent
    trace = tmp_path / "traces" / "trace.json.gz"
    _caption(photos, tmp_path / "out", model_directory, trace)
    assert _batches(gzip.decompress(trace.read_bytes())) == ["batch 1"]


def test_a_finished_job_has_no_trace_and_says_so(tmp_path: Path, model_directory: Path, caplog):
    photos = write_photos(tmp_path / "photos", 1)[0].parent
    trace = tmp_path / "trace.json"
    for _ in range(2):
        _caption(photos, tmp_path / "out", model_directory, trace if trace.exists() else None)
        trace.touch()
    assert f"--profile: no image is left to caption; {trace} is not written" in caplog.messages
    assert trace.read_bytes() == b""


def test_a_trace_that_cannot_be_written_ends_the_job(tmp_path: Path, model_directory: Path):
    photos = write_photos(tmp_path / "photos", 3)[0].parent
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write .*trace\.json: "):
        _caption(photos, tmp_path / "out", model_directory, tmp_path / "file" / "trace.json")
    assert _caption(photos, tmp_path / "out", model_directory, None).rows["ok"] == 3


def test_on_ray_a_profile_is_refused(tmp_path: Path, model_directory: Path):
    photos = write_photos(tmp_path / "photos", 1)[0].parent
    arguments = [photos, tmp_path / "out", "--model", model_directory, "--engine=ray"]
    for dry_run in ([], ["--dry-run"]):
        command = ["caption", *arguments, "--profile", tmp_path / "trace.json", *dry_run]
        result = CliRunner().invoke(main, [str(each) for each in command])
        assert result.exit_code == 2
        assert result.output == (
            "captioner: --profile needs --engine local: it records one process\n"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_torchs_profiler_says_nothing(tmp_path: Path, model_directory: Path):
    photos = write_photos(tmp_path / "photos", 2)[0].parent
    command = [sys.executable, "-c", "from captioner.cli import main; main()", "caption"]
    command += [str(photos), str(tmp_path / "out"), "--model", str(model_directory)]
    command += ["--engine", "local", "--profile", str(tmp_path / "trace.json")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    [line] = ran.stderr.splitlines()
    assert line.startswith("2 images, all to caption")
