"""Both jobs on a Ray cluster of three nodes on this machine; a node dies in each; last line JSON.

python benchmarks/cluster_jobs.py PHOTOS DATA -- OPTIONS OF captioner train

Each node has the processes of `ray start`: a head without CPUs and two workers with two each. The
jobs are submitted from the checkout, as a user does it. A node dies by `kill -9` of its raylet. The
driver of the training is killed as well, later, and the same command is submitted again.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).parent / "ray")
SECONDS = 900  # that anything may take


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until(condition: Callable[[], object]) -> None:
    """Returns when it holds."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise click.ClickException("waited too long")
        time.sleep(0.2)


class Cluster:
    """A head and workers, each in a session of its own."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="ray-")  # a socket's path must be short
        port, dashboard, agent, client = free_ports(4)
        self.address = f"127.0.0.1:{port}"
        self._url = f"http://127.0.0.1:{dashboard}"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",  # nothing here listens outside this machine
            "RAY_API_SERVER_ADDRESS": self._url,
            "OMP_NUM_THREADS": "1",
        }
        self.environment.pop("RAY_ADDRESS", None)
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._start(
            "--head",
            "--num-cpus=0",
            f"--port={port}",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}",
            f"--temp-dir={self.directory}",
        )
        wait_until(lambda: self._ask("/api/version"))

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        command = [RAY, "start", "--block", "--disable-usage-stats", *options]
        command += ["--node-ip-address=127.0.0.1", "--object-store-memory=200000000"]
        node = subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.nodes.append(node)
        return node

    def add_worker(self) -> subprocess.Popen[bytes]:
        """A node of two CPUs, which has joined when this returns."""
        [agent] = free_ports(1)
        before = self._joined()
        options = [f"--address={self.address}", "--num-cpus=2"]
        node = self._start(*options, f"--dashboard-agent-listen-port={agent}")
        wait_until(lambda: self._joined() - before)
        return node

    def _ask(self, path: str) -> Any:
        """What the head's HTTP interface answers; None if it does not answer."""
        try:
            with urllib.request.urlopen(self._url + path, timeout=10) as answer:
                return json.load(answer)
        except OSError:
            return None

    def _joined(self) -> set[str]:
        """The ids of the nodes that are alive; a killed one is among them until Ray notices."""
        nodes = (self._ask("/nodes?view=summary") or {"data": {"summary": []}})["data"]["summary"]
        raylets = (node["raylet"] for node in nodes)
        return {each["nodeId"] for each in raylets if each.get("state") == "ALIVE"}

    def submit(self, submission: str, script: str, *arguments: str) -> subprocess.Popen[str]:
        """`ray job submit` of a script in jobs/, from the checkout."""
        command = [RAY, "job", "submit", "--submission-id", submission, "--working-dir", ".", "--"]
        return subprocess.Popen(
            [*command, sys.executable, f"jobs/{script}.py", *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def driver(self, script: str) -> int:
        """The process id of the driver of a submitted job."""
        start = f"{sys.executable}\0jobs/{script}.py\0".encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                ours = self._url.encode() in (path / "environ").read_bytes()
                if ours and (path / "cmdline").read_bytes().startswith(start):
                    return int(path.name)
            except OSError:
                continue
        raise click.ClickException(f"no driver runs jobs/{script}.py")

    def status(self, submission: str) -> str:
        """The status of a job, such as SUCCEEDED."""
        job = self._ask(f"/api/jobs/{submission}") or {}
        return str(job.get("status"))

    def stop(self) -> None:
        """Ends what was started, and nothing else."""
        for node in reversed(self.nodes):
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def raylet(node: subprocess.Popen[bytes]) -> int:
    """The process id of a node's raylet."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if parent == node.pid and words[0].endswith(b"/raylet"):
            return int(path.name)
    raise click.ClickException("a node without a raylet")


def finish(job: subprocess.Popen[str], cluster: Cluster, submission: str) -> dict[str, Any]:
    """Waits for a job, prints its log, and returns its exit code and status."""
    printed, _ = job.communicate(timeout=SECONDS)
    click.echo(f"log of {submission}:")
    click.echo("\n".join(line for line in printed.splitlines() if line.strip()))
    return {"exit_code": job.returncode, "status": cluster.status(submission)}


def read_epochs(model: Path) -> list[dict[str, Any]]:
    """The figures of the epochs that are done."""
    path = model / "epochs.json"
    return json.loads(path.read_text()) if path.exists() else []


def caption(cluster: Cluster, photos: str, output: Path) -> dict[str, Any]:
    """Captions photos while a node dies."""
    doomed = cluster.add_worker()
    options = ["--actors", "2", "--shard-size", "16", "--device", "cpu"]
    job = cluster.submit("caption", "caption", photos, str(output), *options)
    wait_until(lambda: len(list(output.glob("part-*"))) >= 2 or job.poll() is not None)
    os.kill(raylet(doomed), signal.SIGKILL)
    before = len(list(output.glob("part-*")))
    result = finish(job, cluster, "caption") | {"parts_before_the_kill": before}
    summary = json.loads((output / "__captioner/summary.json").read_text())
    figures = ("images", "rows", "missing", "images_per_second")
    return result | {name: summary[name] for name in figures}


def train(cluster: Cluster, data: str, model: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """Trains while a node dies, then the driver; the same command ends the run."""
    doomed = cluster.add_worker()
    arguments = ["train", data, str(model), "--workers", "2", "--cpus-per-worker", "0.9"]
    arguments += ["--device", "cpu", *options]
    job = cluster.submit("train-1", *arguments)
    wait_until(lambda: read_epochs(model) or job.poll() is not None)
    os.kill(raylet(doomed), signal.SIGKILL)
    before = len(read_epochs(model))
    wait_until(lambda: len(read_epochs(model)) >= before + 2 or job.poll() is not None)
    os.kill(cluster.driver("train"), signal.SIGKILL)
    killed = finish(job, cluster, "train-1")
    resumed_after = len(read_epochs(model))
    result = finish(cluster.submit("train-2", *arguments), cluster, "train-2")
    return result | {
        "status_of_the_killed": killed["status"],
        "epochs_before_the_kills": [before, resumed_after],
        "epochs": read_epochs(model),
    }


@click.command()
@click.argument("photos", type=click.Path(exists=True, resolve_path=True))
@click.argument("data", type=click.Path(exists=True, resolve_path=True))
@click.argument("train_options", nargs=-1, type=click.UNPROCESSED)
def main(photos: str, data: str, train_options: tuple[str, ...]) -> None:
    """Captions PHOTOS and trains on DATA, with TRAIN_OPTIONS; paths in these are absolute."""
    directory = Path(tempfile.mkdtemp(prefix="cluster-jobs-"))
    cluster = Cluster()
    try:
        kept = cluster.add_worker()
        results = {
            "caption": caption(cluster, photos, directory / "captions"),
            "train": train(cluster, data, directory / "model", train_options),
        }
        assert kept.poll() is None
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)
    click.echo(json.dumps(results))


if __name__ == "__main__":
    main()
