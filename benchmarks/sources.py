"""The same photos from every kind of source, with both engines, each job killed once and resumed.

python benchmarks/sources.py PHOTOS --count 1000

Sources: a folder, tar files, Parquet files with the images' bytes, a table of URLs of a local HTTP
server, and the tar files and the folder in a bucket of a local S3 server (moto). Every row's
caption must be that of the folder's row for the same bytes, every image must have one row, and the
kept column must be that of its image. The last line is JSON: for each job its rows, how many were
written before the kill, how many differ, and the seconds of both runs. A row that is lost, doubled
or different makes the exit code 1.

Captions are greedy and in float32: in bfloat16, rounding that depends on a batch's size can change
a caption. Ray runs once, for all jobs.
"""

import hashlib
import http.server
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

TARS = 20  # more than threads of one process list at once: on Ray, tasks list them
ENGINES = ("local", "ray")
OPTIONS = ["--keep", "name", "--allow-private-hosts"]
OPTIONS += ["--precision", "fp32", "--beam", "1", "--attention", "none"]
SHARDS = 20  # of a job, about: a kill after the first two leaves work to resume
FAULTS = ("lost", "twice", "not ok", "other captions", "other names")


def write_tars(photos: list[Path], folder: Path) -> None:
    """Tar files with a JSON member for each photo."""
    folder.mkdir()
    for number in range(TARS):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for place in range(number, len(photos), TARS):
                tar.add(photos[place], photos[place].name)
                text = json.dumps({"name": photos[place].name}).encode()
                info = tarfile.TarInfo(f"{photos[place].stem}.json")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))


def write_parquet(photos: list[Path], folder: Path) -> None:
    """Parquet files as Hugging Face's datasets writes them."""
    folder.mkdir()
    for number in range(2):
        some = photos[number::2]
        images = [{"bytes": path.read_bytes(), "path": path.name} for path in some]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = pa.table({"image": pa.array(images, kind), "name": [path.name for path in some]})
        pq.write_table(table, folder / f"train-{number:05d}.parquet", row_group_size=100)


def write_table(photos: list[Path], path: Path, base: str) -> None:
    """A CSV file with the URL or the path of each photo."""
    rows = [f"{base}{each.name},{each.name}" for each in photos]
    path.write_text("\n".join(["url,name", *rows]) + "\n")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """Serves a folder on this machine; yields its URL."""
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(_Quiet, directory=str(folder))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextmanager
def serve_bucket() -> Iterator[dict[str, str]]:
    """Runs an S3 server on this machine; yields the environment of its clients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as moto:
        try:
            while not _accepts(port):
                if moto.poll() is not None:
                    raise click.ClickException(f"the S3 server ended with {moto.returncode}")
                time.sleep(0.2)
            yield {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
        finally:
            moto.terminate()


def _accepts(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def serve_ray(needed: bool) -> Iterator[dict[str, str]]:
    """Runs Ray on this machine; yields the environment of jobs on it. Its workers have ours."""
    if not needed:
        yield {}
        return
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        yield {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    finally:
        ray.shutdown()


def upload(folder: Path, bucket: str) -> None:
    """Copies the files of a folder into a bucket."""
    import s3fs

    fs = s3fs.S3FileSystem()
    fs.mkdirs(bucket.split("/")[0], exist_ok=True)
    for path in sorted(folder.iterdir()):
        fs.put(str(path), f"{bucket}/{path.name}")


def caption(source: str, output: Path, options: list[str], environment: dict[str, str]) -> int:
    """Captions a source, killed once its first parts are there and resumed.

    Returns:
        How many rows were written before the kill.

    Raises:
        click.ClickException: the job ended before it could be killed, or its resumption failed.
    """
    command = [sys.executable, "-m", "captioner", "caption", source, str(output), *options]
    environment = os.environ | environment
    with subprocess.Popen(command, env=environment, start_new_session=True) as job:
        while job.poll() is None and len([*output.glob("part-*")]) < 2:
            time.sleep(0.02)
        if job.poll() is not None:
            raise click.ClickException(f"{source}: ended with {job.returncode} before the kill")
        os.killpg(job.pid, signal.SIGKILL)
    before = sum(pq.read_metadata(part).num_rows for part in output.glob("part-*"))
    if subprocess.run(command, env=environment, check=False).returncode:
        raise click.ClickException(f"{source}: the resumed job failed")
    return before


def read(output: Path) -> list[dict[str, Any]]:
    """The rows of an output."""
    columns = ["uri", "name", "caption", "status"]
    table: pa.Table = pyarrow.dataset.dataset(output).to_table(columns)
    return table.to_pylist()


def compare(rows: list[dict[str, Any]], expected: dict[str, str]) -> dict[str, int]:
    """Counts rows that are lost, doubled or differ; ``expected`` has a caption for each name."""
    names = Counter(row["name"] for row in rows)
    return {
        "rows": len(rows),
        "lost": len(expected.keys() - names.keys()),
        "twice": sum(count > 1 for count in names.values()),
        "not ok": sum(row["status"] != "ok" for row in rows),
        "other captions": sum(row["caption"] != expected.get(row["name"]) for row in rows),
        "other names": sum(row["name"] not in row["uri"] for row in rows if "#" not in row["uri"]),
    }


def write_sources(photos: list[Path], work: Path, url: str) -> dict[str, str]:
    """Every kind of source of the same photos, of which ``work/folder`` holds nothing else."""
    write_tars(photos, work / "tars")
    write_parquet(photos, work / "parquet")
    upload(work / "tars", "photos/tars")
    upload(work / "folder", "photos/folder")
    tables = {"list": "folder/", "bucket": "s3://photos/folder/", "urls": url}
    for name, base in tables.items():
        write_table(photos, work / f"{name}.csv", base)
    return {
        "folder": f"{work}/list.csv",
        "tar files": f"{work}/tars",
        "Parquet files": f"{work}/parquet",
        "URLs": f"{work}/urls.csv",
        "tar files in S3": "s3://photos/tars",
        "files in S3": f"{work}/bucket.csv",
    }


@click.command()
@click.argument("photos", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--count", default=1000, show_default=True, help="Photos of the folder to take.")
@click.option("--engines", default=",".join(ENGINES), show_default=True)
@click.option("--only", help="Names of kinds of source, separated by commas.")
def main(photos: Path, count: int, engines: str, only: str | None) -> None:
    """Captions the first photos of a folder from every kind of source."""
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ.update(stack.enter_context(serve_bucket()))
        (work / "folder").mkdir()
        found = sorted(photos.glob("*.jpg"))[:count]
        chosen = [Path(shutil.copy(path, work / "folder" / path.name)) for path in found]
        if len({hashlib.sha256(path.read_bytes()).digest() for path in chosen}) != count:
            raise click.ClickException(f"{photos} has no {count} different photos")
        url = stack.enter_context(serve_folder(work / "folder"))
        cluster = stack.enter_context(serve_ray("ray" in engines.split(",")))
        shard = ["--shard-size", str(max(2, count // SHARDS))]
        expected: dict[str, str] = {}
        sources = write_sources(chosen, work, url)
        if only is not None:
            sources = {name: sources[name] for name in only.split(",")}
        for engine, (name, source) in itertools.product(engines.split(","), sources.items()):
            begin, output = time.monotonic(), work / f"{engine} {name}"
            options = ["--engine", engine, *shard, *OPTIONS]
            before = caption(source, output, options, cluster if engine == "ray" else {})
            rows = read(output)
            expected = expected or {row["name"]: row["caption"] for row in rows}
            done = {"before the kill": before, "seconds": round(time.monotonic() - begin, 1)}
            results[f"{name}, {engine}"] = compare(rows, expected) | done
            click.echo(f"{name}, {engine}: {results[f'{name}, {engine}']}")
    click.echo(json.dumps(results))
    if any(each[fault] for each in results.values() for fault in FAULTS):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
