"""Reasons that are the job's: it stops before it writes them into a row for each image."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.caption import ray
from captioner.caption.job import caption_images
from captioner.caption.steps import common_failure
from captioner.config import RunConfig
from captioner.data import images
from captioner.errors import CaptionerError, InputError, StoppedError
from captioner.schema import CaptionRow
from conftest import write_photos

RUN = RunConfig(
    engine="local", shard_size=5, batch_size=4, precision="fp32", device="cpu", max_error_rate=1
)


def _list(tmp_path: Path, *names: object) -> str:
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{name}\n" for name in names))
    return str(path)


def _run(engine: str, request: pytest.FixtureRequest, **changes: object) -> RunConfig:
    if engine == "ray":
        request.getfixturevalue("local_ray")
    return RunConfig(**{**vars(RUN), "engine": engine, **changes})


def _rows(output: Path) -> int:
    return sum(pq.read_metadata(part).num_rows for part in output.glob("part-*"))


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.thorough)])
def test_a_job_whose_first_images_all_fail_alike_stops_and_writes_no_row(
    engine, tmp_path, model_directory, request
):
    photos = write_photos(tmp_path / "photos", 2)
    gone = [tmp_path / "disk" / f"{number}.jpg" for number in range(20)]
    source, output = _list(tmp_path, *gone, *photos), tmp_path / "out"
    run = _run(engine, request, stop_after_failures=12)
    with pytest.raises(InputError) as caught:
        caption_images(source, str(output), str(model_directory), run=run)
    message = str(caught.value)
    assert message.startswith("the first 15 images all fail for the same reason: unreadable: ")
    assert f"for example {tmp_path}/disk/" in message
    assert message.endswith("add --stop-after-failures none")
    assert _rows(output) in {"local": [0], "ray": [0, 2]}[engine]  # Ray may be at the sound ones
    # Once the disk is mounted, the same command captions all.
    for path in gone:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(photos[0].read_bytes())
    summary = caption_images(source, str(output), str(model_directory), run=run)
    assert summary.rows == {"ok": 22}


def test_the_rows_are_written_where_the_option_says_so(tmp_path, model_directory):
    source = _list(tmp_path, *(f"{number}.jpg" for number in range(20)))
    run = RunConfig(**{**vars(RUN), "stop_after_failures": None})
    summary = caption_images(source, str(tmp_path / "out"), str(model_directory), run=run)
    assert summary.rows == {"unreadable": 20}


def test_one_image_that_does_not_fail_lets_the_rows_of_the_others_pass(tmp_path, model_directory):
    photos = write_photos(tmp_path / "photos", 1)
    names = [f"{number}.jpg" for number in range(30)]
    source = _list(tmp_path, *names[:11], *photos, *names[11:])
    run = RunConfig(**{**vars(RUN), "stop_after_failures": 12})
    summary = caption_images(source, str(tmp_path / "out"), str(model_directory), run=run)
    assert summary.rows == {"ok": 1, "unreadable": 30}
    assert _rows(tmp_path / "out") == 31


def test_fewer_failures_than_the_limit_become_rows(tmp_path, model_directory):
    source = _list(tmp_path, *(f"{number}.jpg" for number in range(11)))
    run = RunConfig(**{**vars(RUN), "stop_after_failures": 12})
    summary = caption_images(source, str(tmp_path / "out"), str(model_directory), run=run)
    assert summary.rows == {"unreadable": 11}
    # Captioned again, they keep their rows: the rows were there before.
    run = RunConfig(**{**vars(RUN), "stop_after_failures": 1, "retry_failed": True})
    summary = caption_images(source, str(tmp_path / "out"), str(model_directory), run=run)
    assert summary.rows == {"unreadable": 11}


def test_failures_of_different_kinds_are_the_images_own(tmp_path, model_directory):
    names = [f"{number}.jpg" for number in range(10)]
    for name in names[5:]:
        (tmp_path / name).write_text("no image")
    run = RunConfig(**{**vars(RUN), "stop_after_failures": 10})
    summary = caption_images(
        _list(tmp_path, *names), str(tmp_path / "out"), str(model_directory), run=run
    )
    assert summary.rows == {"unreadable": 5, "undecodable": 5}


@pytest.mark.parametrize(
    ("errors", "alike"),
    [
        (["No such file: /a/b.jpg", "No such file: /c/d e.jpg"], False),
        (["No such file: /a/b.jpg", "No such file: /c/d.jpg"], True),
        (["'a.jpg' is not there", "'b c.jpg' is not there"], True),
        (["more than 100 bytes", "more than 250 bytes"], True),
        (["request 8f3a9c2d failed", "request 77aa0b1e failed"], True),
        (["Access Denied", "Not Found"], False),
    ],
)
def test_reasons_are_alike_but_for_names_and_numbers(errors, alike):
    rows = [CaptionRow(uri="x", status="unreadable", error=error) for error in errors]
    assert (common_failure(rows) is not None) is alike


def test_a_captioned_image_has_no_failure_in_common():
    assert common_failure([CaptionRow(uri="x", status="ok")]) is None


class _ClientError(CaptionerError):
    """An error that captioner.errors does not know, with parameters of its own."""

    exit_code = 7

    def __init__(self, scheme: str, *, hint: str):
        super().__init__(f"{scheme}: {hint}")


def _raise(*_: object, **__: object) -> None:
    raise _ClientError("s3", hint="there are no credentials")


def test_an_error_of_the_job_while_an_image_is_read_ends_the_job(
    tmp_path, model_directory, monkeypatch
):
    photos = write_photos(tmp_path / "photos", 12)[0].parent
    monkeypatch.setattr(images, "decode", _raise)
    with pytest.raises(_ClientError, match="s3: there are no credentials"):
        caption_images(str(photos), str(tmp_path / "out"), str(model_directory), run=RUN)
    assert _rows(tmp_path / "out") == 0
    assert not list((tmp_path / "out" / "__captioner").glob("attempts/*"))


def test_an_error_in_a_worker_reaches_the_driver_as_it_is():
    """A subclass outside of captioner.errors, whose parameters are not its arguments, too."""
    failed = ray._errors_as_rows(_raise)(pa.table({"number": [1]}))
    assert ray._errors_as_rows(lambda table: 1 / 0)(failed) is failed  # later stages hand it on
    error = pickle.loads(failed["error"][0].as_py())
    assert type(error) is _ClientError
    assert (str(error), error.exit_code) == ("s3: there are no credentials", 7)
    stopped = pickle.loads(pickle.dumps(StoppedError("stopped", 15)))
    assert (type(stopped), str(stopped), stopped.exit_code) == (StoppedError, "stopped", 143)


def test_a_missing_package_for_some_uris_stops_the_job_before_the_first_shard(
    tmp_path, model_directory
):
    photos = write_photos(tmp_path / "photos", 3)
    source = _list(tmp_path, *photos, "s3://bucket/a.jpg")
    code = """
import sys
sys.modules["s3fs"] = None
from captioner.cli import main
try:
    main([*sys.argv[1:], "--dry-run"])
except SystemExit as dry:
    assert dry.code == 2
main(sys.argv[1:])
"""
    command = ["caption", source, tmp_path / "out", "--model", model_directory]
    ran = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr == "captioner: cannot open s3:// URIs: install captioner[s3]\n" * 2
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_a_dead_store_stops_a_job_on_ray_before_it_writes_a_row(tmp_path, model_directory):
    source = _list(tmp_path, *(f"s3://bucket/{number}.jpg" for number in range(20)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "RAY_AUTH_MODE": "disabled",
    }
    command = [sys.executable, "-m", "captioner.cli", "caption", source, tmp_path / "out"]
    command += ["--model", model_directory, "--engine=ray", "--shard-size=5", "--retries=0"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("captioner: cannot use s3://bucket/"), ran.stderr
    assert "Could not connect to the endpoint" in last
    assert "Traceback" not in ran.stderr
    assert not list((tmp_path / "out").glob("part-*"))
    assert not list((tmp_path / "out" / "__captioner").glob("attempts/*"))
