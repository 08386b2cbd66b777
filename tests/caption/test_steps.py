"""The steps of a caption job: transient errors are retried; rows never end in the wrong part."""

import subprocess
import sys
from dataclasses import replace
from typing import BinaryIO

import pyarrow as pa
import pytest

from captioner import storage
from captioner.caption.steps import CaptionJob, finish_shard, load_images, write_part
from captioner.caption.timing import Timing
from captioner.config import DecodeConfig, RunConfig
from captioner.data.preparation import Preparation
from captioner.data.source import list_files
from captioner.errors import OutputError
from captioner.output.manifest import Shard
from captioner.output.parts import Part, read_part
from captioner.schema import CaptionRow
from captioner.storage import Listed
from conftest import write_photos

JOB = CaptionJob(
    output="",
    preparation=Preparation(size=8),
    decode=DecodeConfig(attention="none"),
    run=RunConfig(),
)


def _listing(*paths: object) -> pa.Table:
    return list_files(Listed(str(path), None) for path in paths)


class _Flaky:
    """Fails a number of times, then reads."""

    def __init__(self, failures: int, problem: Exception):
        self.left, self.problem, self.tries = failures, problem, 0

    def __call__(self, path: str) -> BinaryIO:
        self.tries += 1
        if self.left:
            self.left -= 1
            raise self.problem
        return open(path, "rb")


@pytest.mark.parametrize(
    ("problem", "tries"),
    [
        (OSError(5, "Input/output error"), 4),
        (TimeoutError("the bucket does not answer"), 4),
        (FileNotFoundError(2, "No such file"), 1),
        (PermissionError(13, "Permission denied"), 1),
        (IsADirectoryError(21, "Is a directory"), 1),
        (OSError(36, "File name too long"), 1),
    ],
)
def test_transient_errors_are_retried_after_growing_waits(problem, tries, tmp_path, monkeypatch):
    [path] = write_photos(tmp_path, 1)
    waits: list[float] = []
    monkeypatch.setattr(storage.retries.time, "sleep", waits.append)
    flaky = _Flaky(10, problem)
    monkeypatch.setattr(storage.reading, "_open_local", flaky)
    [image] = load_images(JOB, _listing(path))
    assert (image.row.status, flaky.tries) == ("unreadable", tries)
    assert len(waits) == tries - 1
    for number, wait in enumerate(waits):
        assert 0.1 * 2**number <= wait <= 0.2 * 2**number
    flaky = _Flaky(tries - 1, problem)
    monkeypatch.setattr(storage.reading, "_open_local", flaky)
    [image] = load_images(JOB, _listing(path))
    assert image.row.status == "ok"


# Writing.


def _rows(*uris: str) -> list[CaptionRow]:
    return [CaptionRow(uri=uri, status="ok", caption=uri) for uri in uris]


def test_rows_of_other_images_are_not_written(tmp_path):
    job, shard = replace(JOB, output=str(tmp_path)), Shard(0, _listing("a", "b"))
    for uris in (["a"], ["b", "a"], ["a", "b", "b"], []):
        with pytest.raises(RuntimeError, match="the rows of shard 0 are not those of its images"):
            finish_shard(job, shard, _rows(*uris), Timing())
    assert not list(tmp_path.iterdir())
    assert finish_shard(job, shard, _rows("a", "b"), Timing()).rows["ok"] == 2
    assert read_part(job.output, Part(0, 0))["uri"].to_pylist() == ["a", "b"]


def test_redone_rows_are_not_put_into_a_part_of_other_images(tmp_path):
    job = replace(JOB, output=str(tmp_path))
    write_part(job, Shard(0, _listing("a", "b")), _rows("a", "b"))
    with pytest.raises(OutputError, match="holds other images than its shard"):
        write_part(job, Shard(0, _listing("c"), redone=[1]), _rows("c"))
    assert read_part(job.output, Part(0, 0))["uri"].to_pylist() == ["a", "b"]


def test_the_guards_hold_without_assertions():
    """``python -O`` removes assert statements."""
    code = (
        "from captioner.caption.steps import CaptionJob, write_part\n"
        "from captioner.data.source import list_files\n"
        "from captioner.output.manifest import Shard\n"
        "from captioner.storage import Listed\n"
        "assert False, 'assertions are on'\n"
        "try: write_part(None, Shard(0, list_files([Listed('a', None)])), [])\n"
        "except RuntimeError as error: print(error)"
    )
    ran = subprocess.run(
        [sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "the rows of shard 0 are not those of its images\n"
