"""Both jobs on a Ray of three nodes on this machine, one of which dies in each; last line JSON.

python benchmarks/cluster_jobs.py PHOTOS DATA --train-list … --val-list … --encoder-weights …

Each node is `ray start`'s own processes: a head without CPUs and two workers of two. The jobs are
submitted from the checkout, as a user does it. A node's death is `kill -9` of its raylet.
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
from collections.abc import Callable
from pathlib import Path

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
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",  # nothing here listens outside this machine
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
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
        wait_until(lambda: not self.run("job", "list").returncode)

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
        wait_until(lambda: self._joined() > before)
        return node

    def _joined(self) -> int:
        return self.run("status", f"--address={self.address}").stdout.count(" node_")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of `ray`."""
        return subprocess.run(
            [RAY, *arguments], env=self.environment, capture_output=True, text=True, check=False
        )

    def submit(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        """`ray job submit` of a script in jobs/, from the checkout."""
        command = [RAY, "job", "submit", "--submission-id", name, "--working-dir", ".", "--"]
        return subprocess.Popen(
            [*command, sys.executable, f"jobs/{name}.py", *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def status(self, name: str) -> str:
        """Ray's word for how a job stands."""
        printed = self.run("job", "status", name).stdout.upper()
        words = ("SUCCEEDED", "FAILED", "STOPPED", "RUNNING", "PENDING")
        return next((word for word in words if word in printed), printed)

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


def finish(job: subprocess.Popen[str], cluster: Cluster, name: str) -> dict[str, object]:
    """Waits for a job; its exit code, its status and the last lines of its log."""
    printed, _ = job.communicate(timeout=SECONDS)
    lines = [line for line in printed.splitlines() if line.strip()]
    click.echo("\n".join(lines))
    return {"exit_code": job.returncode, "status": cluster.status(name)}


@click.command()
@click.argument("photos", type=click.Path(exists=True, resolve_path=True))
@click.argument("data", type=click.Path(exists=True, resolve_path=True))
@click.option("--train-list", type=click.Path(exists=True, resolve_path=True), required=True)
@click.option("--val-list", type=click.Path(exists=True, resolve_path=True), required=True)
@click.option("--encoder-weights", type=click.Path(exists=True, resolve_path=True), required=True)
def main(photos: str, data: str, train_list: str, val_list: str, encoder_weights: str) -> None:
    """Captions PHOTOS and trains on DATA."""
    directory = Path(tempfile.mkdtemp(prefix="cluster-jobs-"))
    cluster = Cluster()
    results: dict[str, dict[str, object]] = {}
    try:
        kept, doomed = cluster.add_worker(), cluster.add_worker()
        output = directory / "captions"
        options = ["--actors", "2", "--shard-size", "16", "--device", "cpu"]
        job = cluster.submit("caption", photos, str(output), *options)
        wait_until(lambda: len(list(output.glob("part-*"))) >= 2 or job.poll() is not None)
        os.kill(raylet(doomed), signal.SIGKILL)
        before = len(list(output.glob("part-*")))
        results["caption"] = finish(job, cluster, "caption") | {"parts_before_the_kill": before}
        summary = json.loads((output / "__captioner/summary.json").read_text())
        figures = ("images", "rows", "missing", "images_per_second")
        results["caption"] |= {name: summary[name] for name in figures}

        doomed = cluster.add_worker()
        model = directory / "model"
        options = ["--train-list", train_list, "--val-list", val_list, "--workers", "2"]
        options += ["--encoder-weights", encoder_weights, "--epochs", "3", "--views", "1"]
        options += ["--device", "cpu", "--cpus-per-worker", "0.9"]
        job = cluster.submit("train", data, str(model), *options)
        wait_until(lambda: (model / "epochs.json").exists() or job.poll() is not None)
        os.kill(raylet(doomed), signal.SIGKILL)
        before = len(json.loads((model / "epochs.json").read_text()))
        results["train"] = finish(job, cluster, "train") | {"epochs_before_the_kill": before}
        epochs = json.loads((model / "epochs.json").read_text())
        results["train"] |= {"epochs": len(epochs), "loss": epochs[-1]["validation_loss"]}
        assert kept.poll() is None
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)
    click.echo(json.dumps(results))


if __name__ == "__main__":
    main()
