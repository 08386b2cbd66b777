"""Jobs that are killed, stopped, or cannot write: nothing is lost, and nothing is there twice."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from captioner.cli import main
from conftest import write_photos
from containers import MAKERS
from web_server import WebServer, serving

pytestmark = pytest.mark.slow

FAULTS = Path(__file__).parents[1] / "faults.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
# Small images in small shards, so that there is much to be killed in.
SMALL = ["--shard-size", "6", "--batch-size", "3", "--device", "cpu", "--attention", "mean"]


def _command(photos: Path, output: Path, model: Path, engine: str, *more: str) -> list[str]:
    command = [sys.executable, "-m", "captioner.cli", "caption", str(photos), str(output)]
    return [*command, "--model", str(model), "--engine", engine, *SMALL, *more]


@contextmanager
def _started(command: list[str], **options: object) -> Iterator[subprocess.Popen[str]]:
    """A job in a session of its own, of which nothing is left in the end."""
    job = subprocess.Popen(
        command,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        env=options.pop("env", ENVIRONMENT),
        **options,
    )
    try:
        yield job
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**ENVIRONMENT, **environment},
    )


def _run_here(command: list[str]) -> None:
    """Runs a command that succeeds, without the start of a process."""
    ran = CliRunner().invoke(main, command[3:])
    assert ran.exit_code == 0, ran.output


def _wait(job: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        assert job.poll() is None, f"the job ended too early: {job.communicate()}"
        time.sleep(0.005)


def _parts(output: Path) -> int:
    return len(list(output.glob("part-*")))


def _processes() -> dict[int, tuple[int, str]]:
    """Every process's parent and command line, but of those that only wait to be reaped."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (entry / "cmdline").read_text().replace("\0", " ")
        except (OSError, ValueError):  # it ended meanwhile
            continue
        if state != "Z":
            found[int(entry.name)] = int(parent), command
    return found


def _descendants(pid: int) -> dict[int, str]:
    processes = _processes()
    found: dict[int, str] = {}
    frontier = {pid}
    while frontier:
        frontier = {child for child, (parent, _) in processes.items() if parent in frontier}
        found |= {child: processes[child][1] for child in frontier}
    return found


def _check_ended(processes: dict[int, str]) -> None:
    """None of them goes on: a worker of Ray may need seconds to notice that its raylet ended."""
    deadline = time.monotonic() + 30
    while left := processes.keys() & _processes().keys():
        assert time.monotonic() < deadline, {pid: processes[pid] for pid in left}
        time.sleep(0.1)


def _books(output: Path, photos: Path) -> tuple[int, int, Counter[str]]:
    """Images without a row, images with more than one, and the rows by status."""
    rows = [
        row
        for part in sorted(output.glob("part-*"))
        for row in pq.read_table(part, columns=["uri", "status"]).to_pylist()
    ]
    expected = {str(path) for path in photos.iterdir()}
    counted = Counter(row["uri"] for row in rows)
    assert counted.keys() <= expected
    twice = sum(count > 1 for count in counted.values())
    return len(expected - counted.keys()), twice, Counter(row["status"] for row in rows)


def _check(output: Path, photos: Path) -> Counter[str]:
    """Every image exactly once, and nothing left behind; returns the rows by status."""
    lost, twice, statuses = _books(output, photos)
    assert (lost, twice) == (0, 0)
    _check_tidy(output)
    summary = json.loads((output / "__captioner" / "summary.json").read_text())
    assert summary["rows"] == statuses
    assert summary["missing"] == 0
    return statuses


def _check_tidy(output: Path) -> None:
    left = [path for path in output.rglob("*") if ".tmp-" in path.name or path.suffix == ".json"]
    assert {path.name for path in left} <= {"run.json", "summary.json"}


# Images that kill.


@pytest.mark.parametrize(
    ("stage", "engine", "runs"),
    [
        ("decode", "local", 4),
        pytest.param("decode", "ray", 1, marks=pytest.mark.thorough),
        ("model", "ray", 1),
    ],
)
def test_an_image_that_kills_its_process_is_set_aside(
    stage, engine, runs, model_directory, tmp_path
):
    photos, output = tmp_path / "photos", tmp_path / "out"
    paths = write_photos(photos, 20)
    if stage == "decode":
        paths[8].write_bytes(paths[8].read_bytes() + b"KILL")
    else:
        Image.new("RGB", (64, 64), (255, 0, 255)).save(paths[8], format="png")
    command = [sys.executable, str(FAULTS), engine, "caption", str(photos), str(output)]
    command += ["--model", str(model_directory), *SMALL]
    variables = {"KILL_MODEL": "1"} if stage == "model" else {}
    done = _run(command, RUNS=str(runs), **variables)
    assert done.returncode == 0, done.stderr
    assert _check(output, photos) == {"ok": 19, "failed": 1}
    [failed] = pq.read_table(output, filters=[("status", "=", "failed")]).to_pylist()
    assert failed["uri"] == str(paths[8])
    assert failed["error"] == "the process that captioned this image died more than once"


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.thorough)])
def test_a_device_that_breaks_stops_the_job_and_sets_no_image_aside(
    engine, model_directory, tmp_path
):
    photos, output, broken = tmp_path / "photos", tmp_path / "out", tmp_path / "broken"
    count = 12 if engine == "local" else 6  # Ray takes longer for a shard
    write_photos(photos, count)
    broken.touch()
    arguments = ["caption", str(photos), str(output), "--model", str(model_directory), *SMALL]
    command = [sys.executable, str(FAULTS), engine, *arguments]
    # Locally the first process dies with a batch, three more with the probe.
    runs = "5" if engine == "local" else "1"
    done = _run(command, BROKEN_DEVICE=str(broken), RUNS=runs)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().split("\n")[-1]
    assert re.fullmatch(
        r"captioner: cpu of machine \S+ seems to be broken: 3 processes in a row died there .*"
        r"no image is set aside because of it",
        last,
    ), done.stderr
    assert _parts(output) == 0
    broken.unlink()  # it is repaired
    _run_here(_command(photos, output, model_directory, "local"))  # the engine may change
    assert _check(output, photos) == {"ok": count}


# Kills from outside.


def _kill_drivers(command: list[str], output: Path, kills: int, generator: random.Random) -> None:
    for _ in range(kills):
        before = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
        with _started(command) as job:
            _wait(job, lambda before=before: _parts(output) > len(before))
            time.sleep(generator.uniform(0, 0.3))
            assert job.poll() is None, job.communicate()
            os.kill(job.pid, signal.SIGKILL)
        assert {path: path.stat().st_mtime_ns for path in before} == before


def _kill_workers(
    command: list[str], output: Path, kind: str, kills: int, generator: random.Random
) -> None:
    """Kills Ray's processes whose title matches, one after another, in one job that goes on."""
    with _started(command) as job:
        for _ in range(kills):
            before = _parts(output)
            _wait(job, lambda before=before: _parts(output) > before)
            time.sleep(generator.uniform(0, 0.3))
            found: list[int] = []

            def find(found: list[int] = found) -> bool:
                matching = _descendants(job.pid).items()
                found += [pid for pid, title in matching if re.search(kind, title)]
                return bool(found)

            _wait(job, find)
            os.kill(generator.choice(found), signal.SIGKILL)
        _, error = job.communicate(timeout=400)
        assert job.returncode == 0, error


def test_random_kills_lose_nothing_and_write_nothing_twice(model_directory, tmp_path):
    """A handful; CAPTIONER_TEST_KILLS in the environment sets another number."""
    kills = int(os.environ.get("CAPTIONER_TEST_KILLS", "3"))
    on_ray = {"driver": kills // 10, "actor": max(1, kills // 5)}
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # with which a failure's moments can be drawn again
    generator = random.Random(seed)
    survived, lost, twice = {}, 0, 0
    for engine, drivers in (("local", kills - sum(on_ray.values())), ("ray", on_ray["driver"])):
        output, photos = tmp_path / engine, tmp_path / f"photos-{engine}"
        write_photos(photos, (100 if engine == "local" else 16) * kills)  # Ray takes longer
        command = _command(photos, output, model_directory, engine)
        _kill_drivers(command, output, drivers, generator)
        survived[f"{engine}: driver"] = drivers
        if engine == "ray":
            _kill_workers(command, output, r"^ray::.*CaptionStage", on_ray["actor"], generator)
            survived["ray: actor"] = on_ray["actor"]
        else:
            _run_here(command)
        books = _books(output, photos)
        lost, twice = lost + books[0], twice + books[1]
        _check_tidy(output)
    print(json.dumps({"kills": survived, "rows_lost": lost, "rows_twice": twice, "seed": seed}))
    assert (lost, twice) == (0, 0)
    assert sum(survived.values()) == kills


def _write_urls(photos: Path, folder: Path, server: WebServer) -> str:
    """A list of photos on a server, each with a number."""
    folder.mkdir()
    lines = ["url,number"]
    for number, path in enumerate(sorted(photos.iterdir())):
        server.files[path.name] = path.read_bytes()
        lines.append(f"{server.address}/{path.name},{number}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "list.csv")


@pytest.mark.parametrize("kind", ["tar", "parquet", "urls"])
def test_a_job_over_other_sources_is_killed_and_resumed(kind, model_directory, tmp_path):
    photos, output, folder = tmp_path / "photos", tmp_path / "out", tmp_path / "in"
    count = 300  # more than are captioned before the kill
    write_photos(photos, count)
    with serving() as server:
        if kind == "urls":
            source = _write_urls(photos, folder, server)
        else:
            source = MAKERS[kind](photos, folder)
        command = _command(Path(source), output, model_directory, "local")
        command += ["--keep", "number", "--allow-private-hosts"]
        _kill_drivers(command, output, 1, random.Random(0))
        before = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
        assert 0 < len(before) < count // 6
        _run_here(command)
    rows = pq.read_table(output, columns=["number", "status"]).to_pylist()
    assert [int(row["number"]) for row in rows] == [*range(count)]
    assert {row["status"] for row in rows} == {"ok"}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    _check_tidy(output)


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.thorough)])
def test_a_writer_killed_before_its_renaming_leaves_nothing_behind(
    engine, model_directory, tmp_path
):
    photos, output = tmp_path / "photos", tmp_path / "out"
    write_photos(photos, 30)
    command = [sys.executable, str(FAULTS), engine, "caption", str(photos), str(output)]
    command += ["--model", str(model_directory), *SMALL]
    done = _run(command, KILL_RENAME=str(tmp_path / "killed"))
    assert (tmp_path / "killed").exists()
    if engine == "local":  # where the writer is a thread of the job
        assert done.returncode == -signal.SIGKILL
        assert list(output.glob(".part-*.tmp-*"))
        _run_here(_command(photos, output, model_directory, "local"))
    else:
        assert done.returncode == 0, done.stderr
    assert _check(output, photos) == {"ok": 30}


_CLUSTER = """
import os, signal, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from captioner.config import DecodeConfig, RunConfig
from captioner.caption.job import caption_images

photos, output, model = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
second = cluster.add_node(num_cpus=2)
ray.init(address=cluster.address, log_to_driver=False)
[raylet] = second.all_processes["raylet"]

def kill():
    while len(list(Path(output).glob("part-*"))) < 5:
        time.sleep(0.01)
    os.kill(raylet.process.pid, signal.SIGKILL)
    print("killed", flush=True)

thread = threading.Thread(target=kill, daemon=True)
thread.start()
run = RunConfig(engine="ray", shard_size=6, batch_size=3, device="cpu")
caption_images(photos, output, model, run=run, decode=DecodeConfig(attention="mean"))
thread.join(1)
deadline = time.monotonic() + 60  # until Ray has noticed
while (alive := sum(node["Alive"] for node in ray.nodes())) > 1 and time.monotonic() < deadline:
    time.sleep(0.2)
print(alive, "alive")
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.thorough
def test_a_node_that_dies_costs_nothing(model_directory, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out"
    write_photos(photos, 120)
    code = [sys.executable, "-c", _CLUSTER, str(photos), str(output), str(model_directory)]
    done = _run(code)
    assert done.returncode == 0, done.stderr
    assert {"killed", "1 alive"} <= set(done.stdout.split("\n"))  # between lines of Ray's
    assert _check(output, photos) == {"ok": 120}


# Stopped in order.


@pytest.mark.parametrize(
    ("engine", "number"),
    [
        ("local", signal.SIGTERM),
        pytest.param("local", signal.SIGINT, marks=pytest.mark.thorough),
        ("ray", signal.SIGTERM),
    ],
)
def test_a_stopped_job_says_how_to_resume_and_leaves_no_process(
    engine, number, model_directory, tmp_path
):
    photos, output = tmp_path / "photos", tmp_path / "out"
    count = 300 if engine == "local" else 120  # Ray takes longer for a shard
    write_photos(photos, count)
    command = _command(photos, output, model_directory, engine)
    with _started(command) as job:
        _wait(job, lambda: _parts(output) >= 3)
        processes = _descendants(job.pid)
        os.kill(job.pid, number)
        _, error = job.communicate(timeout=60)
    assert job.returncode == 128 + number, error
    last = error.replace("\r", "\n").strip().split("\n")[-1]
    done = re.fullmatch(
        rf"captioner: stopped by {number.name}: (\d+) of {count} images done; "
        "run the same command again to resume",
        last,
    )
    assert done, error
    assert int(done[1]) == 6 * _parts(output)
    assert "Traceback" not in error
    _check_ended(processes)
    _check_tidy(output)
    summary = json.loads((output / "__captioner" / "summary.json").read_text())
    assert summary["error"] == "stopped"
    assert summary["rows"] == {}  # the parts are not read on the way out
    assert summary["missing"] == count - int(done[1])
    _run_here(_command(photos, output, model_directory, "local"))  # the engine may change
    assert _check(output, photos) == {"ok": count}


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_stopped_while_ray_starts_leaves_no_process(
    number, model_directory, tmp_path
):
    photos, output = tmp_path / "photos", tmp_path / "out"
    write_photos(photos, 6)
    with _started(_command(photos, output, model_directory, "ray")) as job:
        _wait(job, lambda: any("gcs_server" in each for each in _descendants(job.pid).values()))
        processes = _descendants(job.pid)
        os.kill(job.pid, number)
        _, error = job.communicate(timeout=60)
    assert job.returncode == 128 + number, error
    assert error.splitlines()[-1] == (
        f"captioner: stopped by {number.name} before the first image; "
        "run the same command again to resume"
    )
    assert "Traceback" not in error
    _check_ended(processes)


@contextmanager
def _silent_server() -> Iterator[str]:
    """The URL of a server that takes requests and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.thorough)])
def test_a_stop_waits_neither_for_reads_that_hang_nor_for_a_lost_output(
    engine, model_directory, tmp_path
):
    output, source = tmp_path / "out", tmp_path / "list.txt"
    with _silent_server() as url:
        source.write_text("".join(f"{url}/{number}.jpg\n" for number in range(20)))
        command = [*_command(source, output, model_directory, engine), "--allow-private-hosts"]
        with _started(command) as job:
            _wait(job, lambda: any((output / "__captioner").glob("attempts/*.json")))
            (output / "__captioner").rename(tmp_path / "lost")
            begin = time.monotonic()
            job.send_signal(signal.SIGTERM)
            _, error = job.communicate(timeout=60)
            seconds = time.monotonic() - begin
    assert job.returncode == 128 + signal.SIGTERM, error
    assert error.splitlines()[-1].startswith("captioner: stopped by SIGTERM"), error
    assert "Traceback" not in error
    assert seconds < 30


# What cannot be written.


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.thorough)])
def test_a_part_that_cannot_be_written_is_one_line(engine, model_directory, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out"
    count = 300 if engine == "local" else 120
    write_photos(photos, count)
    command = _command(photos, output, model_directory, engine)
    obstacle = output / f"part-{count // 6 - 1:06d}.parquet"
    with _started(command) as job:
        _wait(job, lambda: _parts(output) >= 1)
        obstacle.mkdir()
        _, error = job.communicate(timeout=400)
    assert job.returncode == 2, error
    lines = [line for line in error.replace("\r", "\n").split("\n") if "captioner" in line]
    assert lines == [f"captioner: cannot write {obstacle}: Is a directory"], error
    assert "Traceback" not in error
    obstacle.rmdir()
    _check_tidy(output)
    _run_here(_command(photos, output, model_directory, "local"))  # the engine may change
    assert _check(output, photos) == {"ok": count}


def test_a_full_disk_is_one_line_and_the_job_resumes_later(model_directory, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out"
    write_photos(photos, 120)
    command = _command(photos, output, model_directory, "local", "--shard-size", "60")
    limited = ["bash", "-c", 'ulimit -f 6; exec "$@"', "bash", *command]
    done = _run(limited)
    assert done.returncode == 2, done.stderr
    first = output / "part-000000.parquet"
    message = f"captioner: cannot write {first}: File too large"
    assert done.stderr.strip().split("\n")[-1] == message
    assert _parts(output) == 0
    _check_tidy(output)
    _run_here(command)
    assert _check(output, photos) == {"ok": 120}


def test_an_output_turned_read_only_is_one_line_and_the_job_resumes_later(
    model_directory, tmp_path
):
    photos, output = tmp_path / "photos", tmp_path / "out"
    write_photos(photos, 300)
    command = _command(photos, output, model_directory, "local")
    limited = command
    if os.geteuid() == 0:  # whom permissions do not bind
        if shutil.which("setpriv") is None:
            pytest.skip("the superuser's rights cannot be put down here")
        limited = ["setpriv", "--bounding-set=-dac_override", *command]
    with _started(limited) as job:
        _wait(job, lambda: _parts(output) >= 2)
        for directory in (output, output / "__captioner"):
            directory.chmod(0o555)
        _, error = job.communicate(timeout=60)
    assert job.returncode == 2, error
    last = error.replace("\r", "\n").strip().split("\n")[-1]
    assert re.fullmatch(r"captioner: cannot write .+: Permission denied", last), error
    assert "Traceback" not in error
    for directory in (output, output / "__captioner"):
        directory.chmod(0o755)
    _run_here(command)
    assert _check(output, photos) == {"ok": 300}
