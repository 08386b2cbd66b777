"""The same photos from every kind of source, with both engines, each job killed once and resumed.

python benchmarks/sources.py PHOTOS --count 1000

Sources: a folder, tar files, Parquet files with the images' bytes, a table of URLs of a local HTTP
server, and the tar files and the folder in a bucket of a local S3 server (moto). Every row's
caption must be that of the folder's row for the same bytes, every image must have one row, and the
kept column must be that of its image. The last line is JSON: for each job its rows, how many were
written before the kill, and how many differ.
"""

import hashlib
import http.server
import io
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
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

TARS = 8
ENGINES = ("local", "ray")


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
            while socket.socket().connect_ex(("127.0.0.1", port)):
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


def upload(folder: Path, bucket: str) -> None:
    """Copies the files of a folder into a bucket."""
    import s3fs

    fs = s3fs.S3FileSystem()
    fs.mkdirs(bucket.split("/")[0], exist_ok=True)
    for path in sorted(folder.iterdir()):
        fs.put(str(path), f"{bucket}/{path.name}")


def caption(source: str, output: Path, engine: str, *options: str) -> int:
    """Captions a source; kills the job once its first parts are there. Returns their rows."""
    command = [sys.executable, "-m", "captioner", "caption", source, str(output)]
    command += ["--engine", engine, "--shard-size", "64", "--allow-private-hosts", *options]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as job:
        while job.poll() is None and len([*output.glob("part-*")]) < 2:
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGKILL)
    before = sum(pq.read_metadata(part).num_rows for part in output.glob("part-*"))
    subprocess.run(command, env=environment, check=True)
    return before


def read(output: Path) -> list[dict[str, Any]]:
    """The rows of an output."""
    table: pa.Table = pyarrow.dataset.dataset(output).to_table()
    return table.to_pylist()


def compare(rows: list[dict[str, Any]], expected: dict[str, str], before: int) -> dict[str, int]:
    """Counts rows that are lost, doubled or differ; ``expected`` has a caption for each name."""
    names = Counter(row["name"] for row in rows)
    return {
        "rows": len(rows),
        "before the kill": before,
        "lost": len(expected.keys() - names.keys()),
        "twice": sum(count > 1 for count in names.values()),
        "other captions": sum(row["caption"] != expected.get(row["name"]) for row in rows),
        "other names": sum(row["name"] not in row["uri"] for row in rows if "#" not in row["uri"]),
    }


@click.command()
@click.argument("photos", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--count", default=1000, show_default=True, help="Photos of the folder to take.")
@click.option("--engines", default=",".join(ENGINES), show_default=True)
def main(photos: Path, count: int, engines: str) -> None:
    """Captions the first photos of a folder from every kind of source."""
    with tempfile.TemporaryDirectory() as place, serve_bucket() as environment:
        work = Path(place)
        os.environ.update(environment)
        (work / "folder").mkdir()
        chosen = [
            Path(shutil.copy(path, work / "folder" / path.name))
            for path in sorted(photos.glob("*.jpg"))[:count]
        ]
        assert len({hashlib.sha256(path.read_bytes()).digest() for path in chosen}) == len(chosen)
        write_tars(chosen, work / "tars")
        write_parquet(chosen, work / "parquet")
        write_table(chosen, work / "list.csv", "folder/")
        upload(work / "tars", "photos/tars")
        upload(work / "folder", "photos/folder")
        write_table(chosen, work / "bucket.csv", "s3://photos/folder/")
        results = {}
        with serve_folder(work / "folder") as url:
            write_table(chosen, work / "urls.csv", url)
            sources = {
                "folder": (str(work / "list.csv"), []),
                "tar files": (str(work / "tars"), []),
                "Parquet files": (str(work / "parquet"), []),
                "URLs": (str(work / "urls.csv"), ["--allow-private-hosts"]),
                "tar files in S3": ("s3://photos/tars", []),
                "files in S3": (str(work / "bucket.csv"), []),
            }
            expected: dict[str, str] = {}
            for engine in engines.split(","):
                for number, (name, (source, options)) in enumerate(sources.items()):
                    output = work / f"out-{engine}-{number}"
                    before = caption(source, output, engine, "--keep", "name", *options)
                    rows = read(output)
                    expected = expected or {row["name"]: row["caption"] for row in rows}
                    results[f"{name}, {engine}"] = compare(rows, expected, before)
                    click.echo(f"{name}, {engine}: {results[f'{name}, {engine}']}")
        click.echo(json.dumps(results))


if __name__ == "__main__":
    main()
