"""Buckets: a real S3 server (moto's, in its own process) behind a proxy that injects faults."""

import dataclasses
import http.client
import io
import itertools
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_compaction import SIZE, finish, rows_of_parts

from captioner import storage
from captioner.caption.job import caption_images
from captioner.cli import main
from captioner.config import RunConfig, TrainConfig
from captioner.data import dataset
from captioner.errors import InputError, OutputError, StorageError
from captioner.output.audit import audit
from captioner.output.compaction import compact, isolate_shards
from captioner.output.directory import OutputDirectory
from captioner.output.manifest import read_manifest
from captioner.output.rows import read_row, read_rows
from captioner.storage import Listed
from captioner.training import run as training
from conftest import ODD_NAMES, TINY, tiny_model, write_photos

s3fs = pytest.importorskip("s3fs")

IMAGES = (".jpg", ".png")
RUN = RunConfig(engine="local", shard_size=8, batch_size=8, precision="fp32", device="cpu")
KEY, SECRET = "AKIAEXAMPLE", "wJalr/SECRET+example"  # made up
READ_TIMEOUT = 2  # seconds


# The server, and the proxy in front of it.


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start_moto(**environment: str) -> tuple[subprocess.Popen, int]:
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment,
    )
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server, port
        assert server.poll() is None, "moto does not start"
        assert time.monotonic() < deadline
        time.sleep(0.1)


FAULTS = ("500", "503", "reset", "no answer", "truncated")


class _Proxy(ThreadingHTTPServer):
    """Passes requests on, but for some.

    Which ones hangs on the seed, the request and how often it came before, not on the threads'
    order: a run is repeatable.
    """

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, upstream: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.reset()

    def reset(self) -> None:
        self.rate, self.seed, self.kinds = 0.0, 0, FAULTS
        self.permanent: dict[str, str] = {}  # the end of a path: its fault, each time
        self.requests: Counter[tuple[str, str]] = Counter()
        self.faults: Counter[str] = Counter()
        self.sent = 0  # bytes

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news."""

    def fault(self, method: str, target: str) -> str | None:
        path = urllib.parse.unquote(target.split("?")[0])
        with self.lock:
            self.requests[method, path] += 1
            time_of = self.requests[method, path]
            found = next((f for end, f in self.permanent.items() if path.endswith(end)), None)
            if found is None:
                inside = "/".join(
                    path.split("/")[2:]
                )  # the bucket's name depends on the tests before
                generator = random.Random(f"{self.seed} {method} {inside} {time_of}")
                found = generator.choice(self.kinds) if generator.random() < self.rate else None
            if found:
                self.faults[found] += 1
            return found

    def count(self, method: str) -> int:
        return sum(count for (each, _), count in self.requests.items() if each == method)


class _Handler(BaseHTTPRequestHandler):
    server: _Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Silent."""

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault(self.command, self.path)
        if fault in ("403", "500", "503"):
            self._refuse(int(fault))
        elif fault == "no answer":
            self.server.closing.wait(2 * READ_TIMEOUT)
            self.close_connection = True
        elif fault == "reset":
            self._reset()
        elif fault == "no conditions" and self.headers.get("If-None-Match"):
            self._refuse(501)
        else:
            self._answer(body, truncated=fault == "truncated")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    def _refuse(self, status: int) -> None:
        codes = {403: "AccessDenied", 500: "InternalError", 501: "NotImplemented", 503: "SlowDown"}
        code = codes[status]
        text = f"<Error><Code>{code}</Code><Message>Please try again.</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _answer(self, body: bytes, *, truncated: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        data = response.read()
        connection.close()
        if truncated and not data:  # nothing to cut off, but the answer itself
            self._reset()
            return
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        stated = response.getheader("Content-Length") if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(stated or 0))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if truncated else data)
        with self.server.lock:
            self.server.sent += len(data)
        self.close_connection = truncated


@pytest.fixture(scope="module")
def proxy() -> Iterator[_Proxy]:
    moto, port = _start_moto()
    try:
        with _Proxy(port) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            yield server
            server.closing.set()
            server.shutdown()
            thread.join()
    finally:
        moto.terminate()
        moto.wait(20)


_numbers = itertools.count()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    """What a user's environment says, and nothing of the machine's own; for child processes too."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    settings = {"config_kwargs": {"connect_timeout": 2, "read_timeout": READ_TIMEOUT}}
    values = {
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
        "FSSPEC_S3": json.dumps(settings),
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    s3fs.S3FileSystem.clear_instance_cache()
    yield values
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(
    proxy: _Proxy, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The URI of a new bucket."""
    proxy.reset()
    more = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
    }
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    environment |= more
    name = f"bucket-{next(_numbers)}"
    fsspec.filesystem("s3").mkdir(name)
    proxy.reset()
    yield f"s3://{name}"
    proxy.reset()


def _upload(directory: Path, uri: str) -> None:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(8) as pool:
        relative = [path.relative_to(directory).as_posix() for path in paths]
        uris = [storage.join(uri, name) for name in relative]
        list(pool.map(storage.write, uris, [path.read_bytes() for path in paths]))


def _rows(output: str) -> list[dict]:
    parts = [name for name in storage.names(output) if name.startswith("part-")]
    return [
        row
        for part in parts
        for row in pq.read_table(storage.open_binary(f"{output}/{part}")).to_pylist()
    ]


# Files.


def test_objects_are_written_listed_read_and_deleted(bucket):
    photos = f"{bucket}/photos"
    storage.write(f"{photos}/b.jpg", b"22")
    storage.write(f"{photos}/a/c d%.PNG", b"333")
    storage.write(f"{photos}/notes.txt", b"4")
    storage.write(f"{bucket}/photos2/elsewhere.jpg", b"5")
    expected = [Listed(f"{photos}/a/c d%.PNG", 3), Listed(f"{photos}/b.jpg", 2)]
    assert storage.find(photos, IMAGES) == storage.find(f"{photos}/", IMAGES) == expected
    assert [storage.read(each.uri) for each in expected] == [b"333", b"22"]
    assert storage.names(photos) == ["a", "b.jpg", "notes.txt"]
    assert storage.names(bucket) == ["photos", "photos2"]
    assert storage.is_directory(photos)
    assert storage.is_directory(bucket)
    assert not storage.is_directory(f"{photos}/b.jpg")
    first = storage.version(f"{photos}/b.jpg")
    storage.write(f"{photos}/b.jpg", b"23")
    assert len({storage.version(f"{photos}/b.jpg"), first, ""}) == 3
    with storage.open_binary(f"{photos}/a/c d%.PNG") as file:
        assert file.read() == b"333"
    storage.delete(f"{photos}/b.jpg")
    storage.delete(f"{photos}/a")
    storage.delete(f"{photos}/none")
    assert storage.names(photos) == ["notes.txt"]


@pytest.mark.parametrize(
    "name",
    [name for name in ODD_NAMES if "\n" not in name],  # moto refuses line breaks
)
def test_an_object_of_any_name_is_written_listed_read_and_deleted(bucket, name):
    storage.write(f"{bucket}/photos/{name}", b"pixels")
    assert storage.find(f"{bucket}/photos", IMAGES) == [Listed(f"{bucket}/photos/{name}", 6)]
    assert storage.read(f"{bucket}/photos/{name}") == b"pixels"
    storage.delete(f"{bucket}/photos/{name}")
    assert storage.names(f"{bucket}/photos") == []


def test_what_is_not_there_is_an_error(bucket):
    storage.write(f"{bucket}/file", b"1")
    with pytest.raises(InputError, match=rf"^{bucket}/none does not exist$"):
        storage.find(f"{bucket}/none", IMAGES)
    with pytest.raises(InputError, match=rf"^{bucket}/file is a file, not a directory of images$"):
        storage.find(f"{bucket}/file", IMAGES)
    with pytest.raises(NotADirectoryError):
        storage.names(f"{bucket}/file")
    assert storage.names(f"{bucket}/none") == []
    assert storage.version(f"{bucket}/none") == ""
    for limit in (None, 10):
        with pytest.raises(FileNotFoundError, match=r"^The specified key does not exist"):
            storage.read(f"{bucket}/none.jpg", limit)
    assert storage.find(bucket, IMAGES) == []


def test_a_folder_that_a_console_made_is_no_file(bucket):
    storage.write(f"{bucket}/photos/a.jpg", b"1")
    s3 = fsspec.filesystem("s3")
    s3.call_s3("put_object", Bucket=bucket[5:], Key="photos/x.jpg/", Body=b"")
    s3.call_s3("put_object", Bucket=bucket[5:], Key="photos/", Body=b"")
    assert storage.find(f"{bucket}/photos", IMAGES) == [Listed(f"{bucket}/photos/a.jpg", 1)]
    s3.call_s3("put_object", Bucket=bucket[5:], Key="out/", Body=b"")
    assert storage.names(f"{bucket}/out") == []
    OutputDirectory(f"{bucket}/out").begin({})  # which it would not in somebody else's folder


def test_what_is_to_be_new_takes_no_objects_place(bucket, proxy):
    storage.write(f"{bucket}/a", b"1", new=True)
    with pytest.raises(FileExistsError):
        storage.write(f"{bucket}/a", b"22", new=True)
    assert storage.read(f"{bucket}/a") == b"1"
    proxy.permanent["b"] = "no conditions"
    storage.write(f"{bucket}/b", b"1", new=True)
    assert storage.read(f"{bucket}/b") == b"1"


def test_a_directory_is_deleted_and_not_what_its_name_is_a_pattern_for(bucket):
    for name in ("out[1]/a/b", "out1/a/b"):
        storage.write(f"{bucket}/{name}", b"1")
    storage.delete(f"{bucket}/out[1]/a")
    assert storage.find(bucket, ("",)) == [Listed(f"{bucket}/out1/a/b", 1)]


@pytest.mark.slow
def test_more_than_a_page_of_objects_is_listed(bucket, proxy):
    names = [f"{bucket}/photos/{number:04d}.jpg" for number in range(1203)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda uri: storage.write(uri, b"1"), names))
    proxy.requests.clear()
    assert storage.find(f"{bucket}/photos", IMAGES) == [Listed(uri, 1) for uri in names]
    assert proxy.count("GET") == 2, "one request a page"
    assert len(storage.names(f"{bucket}/photos")) == 1203
    proxy.rate, proxy.seed = 0.3, 3
    assert len(storage.find(f"{bucket}/photos", IMAGES)) == 1203
    assert proxy.faults


def test_what_looks_like_a_version_is_a_part_of_the_key(bucket):
    names = ["a.jpg", "a.jpg?versionId=", "a.jpg?versionId=b.jpg", "c?versionId=1/d.jpg"]
    for name in names:
        storage.write(f"{bucket}/photos/{name}", name.encode())
    listed = storage.find(f"{bucket}/photos", ("",))
    assert listed == [Listed(f"{bucket}/photos/{name}", len(name)) for name in names]
    assert [storage.read(each.uri) for each in listed] == [name.encode() for name in names]
    assert [storage.size(each.uri) for each in listed] == [len(name) for name in names]
    storage.delete(f"{bucket}/photos/{names[2]}")
    assert [each.uri for each in storage.find(f"{bucket}/photos/c?versionId=1", ("",))] == [
        f"{bucket}/photos/{names[3]}"
    ]
    assert storage.names(f"{bucket}/photos") == ["a.jpg", "a.jpg?versionId=", "c?versionId=1"]


def test_a_listing_is_never_stale(bucket):
    photos = f"{bucket}/photos"
    storage.write(f"{photos}/a.jpg", b"1")
    assert len(storage.find(photos, IMAGES)) == len(storage.names(photos)) == 1
    others = "import fsspec, sys; fsspec.filesystem('s3').pipe_file(sys.argv[1], b'22')"
    subprocess.run([sys.executable, "-c", others, f"{photos}/b.jpg"], check=True)
    assert [each.size for each in storage.find(photos, IMAGES)] == [1, 2]
    assert storage.names(photos) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(("limit", "length"), [(None, 100), (0, 1), (99, 100), (100, 100)])
def test_an_object_is_read_with_one_request(bucket, proxy, limit, length):
    storage.write(f"{bucket}/a", b"x" * 100)
    storage.write(f"{bucket}/empty", b"")
    proxy.requests.clear()
    assert storage.read(f"{bucket}/a", limit) == b"x" * length
    assert storage.read(f"{bucket}/empty", limit) == b""
    path = bucket.removeprefix("s3:/")
    assert proxy.requests == {("GET", f"{path}/a"): 1, ("GET", f"{path}/empty"): 1}


def test_threads_and_forked_processes_read(bucket):
    for number in range(16):
        storage.write(f"{bucket}/{number}", b"%d" % number)

    def read_all() -> bool:
        with ThreadPoolExecutor(8) as pool:
            uris = [f"{bucket}/{number % 16}" for number in range(64)]
            return list(pool.map(storage.read, uris)) == [b"%d" % (n % 16) for n in range(64)]

    assert read_all()
    code = """
import multiprocessing, sys
from captioner import storage
uri = sys.argv[1]
assert storage.read(uri) == b"3"
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(storage.read, [uri] * 20) == [b"3"] * 20
assert storage.read(uri) == b"3"
"""
    command = [sys.executable, "-W", "ignore", "-c", code, f"{bucket}/3"]
    subprocess.run(command, check=True, timeout=60)


# Faults.


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=[pytest.mark.slow] if f == "no answer" else []) for f in FAULTS],
)
def test_what_does_not_pass_is_an_oserror_of_one_line(bucket, proxy, fault):
    storage.write(f"{bucket}/a.jpg", b"x" * 5000)
    proxy.permanent["a.jpg"] = fault
    with pytest.raises(OSError, match=r".") as caught:
        storage.read(f"{bucket}/a.jpg", 10_000, retries=1)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    # botocore tries a request three times in all, but no body; we everything once more.
    assert sum(proxy.faults.values()) == (2 if fault == "truncated" else 6)


def _attempt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without botocore's own attempts, which the user's environment may set."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("retries", [0, 1, 6])
def test_a_truncated_body_is_never_taken_for_an_object(bucket, proxy, retries):
    storage.write(f"{bucket}/a.jpg", b"x" * 5000)
    proxy.rate, proxy.kinds = 0.5, ("truncated",)

    def whole() -> bool:
        try:
            data = storage.read(f"{bucket}/a.jpg", 10_000, retries=retries)
        except OSError:
            return False
        assert data == b"x" * 5000
        return True

    outcomes = Counter(whole() for _ in range(10))
    assert proxy.faults["truncated"]
    assert (outcomes[False] == 0) == (retries == 6)


def test_what_will_not_pass_is_not_tried_again(bucket, proxy):
    for uri in (f"{bucket}/none.jpg", f"{bucket}-none/a.jpg"):
        proxy.requests.clear()
        with pytest.raises(FileNotFoundError):
            storage.read(uri, retries=5)
        assert proxy.count("GET") == 1


def test_a_write_that_fails_leaves_no_object(bucket, proxy, monkeypatch):
    _attempt_once(monkeypatch)
    for fault in ("500", "503", "reset"):
        proxy.permanent["part-000000.parquet"] = fault
        with pytest.raises(OutputError, match=rf"^cannot write {bucket}/part-000000.parquet: "):
            storage.write(f"{bucket}/part-000000.parquet", b"x" * 5000)
        proxy.permanent.clear()
        assert storage.names(bucket) == []


@pytest.mark.slow
def test_a_large_write_that_fails_leaves_no_object(bucket, proxy):
    """From 100 MB on it is an upload of several parts."""
    proxy.permanent["large"] = "reset"
    with pytest.raises(OutputError):
        storage.write(f"{bucket}/large", bytes(100 * 2**20))
    proxy.permanent.clear()
    original, count = proxy.fault, itertools.count()

    def fail_after_a_part(method: str, target: str) -> str | None:
        fault = original(method, target)
        return "500" if "uploadId" in target and method == "PUT" and next(count) else fault

    proxy.fault = fail_after_a_part
    try:
        with pytest.raises(OutputError):
            storage.write(f"{bucket}/large", bytes(100 * 2**20))
    finally:
        del proxy.fault
    assert next(count) > 2
    assert storage.names(bucket) == []
    uploads = fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket=bucket[5:])
    assert "Uploads" not in uploads
    storage.write(f"{bucket}/large", bytes(100 * 2**20))
    assert storage.find(f"{bucket}", ("large",)) == [Listed(f"{bucket}/large", 100 * 2**20)]


# Whole jobs.


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred and twenty sound photos, an empty one and one that is none."""
    directory = tmp_path_factory.mktemp("photos")
    write_photos(directory, 120)
    (directory / "empty.jpg").touch()
    (directory / "text.jpg").write_text("this is no image")
    return directory


@pytest.fixture
def source(bucket: str, photos: Path, model_directory: Path) -> str:
    _upload(photos, f"{bucket}/in")
    _upload(model_directory, f"{bucket}/model")
    return f"{bucket}/in"


def _command(bucket: str, engine: str) -> list[str]:
    command = [sys.executable, "-m", "captioner.cli", "caption", f"{bucket}/in", f"{bucket}/out"]
    command += ["--model", f"{bucket}/model", "--engine", engine, "--device", "cpu"]
    return [*command, "--shard-size", "8", "--batch-size", "8", "--precision", "fp32"]


def _tally(output: str, expected: list[str]) -> dict[str, int]:
    """Rows by status, and how many images have no row, or more than one."""
    rows = _rows(output)
    counts = Counter(row["uri"] for row in rows)
    assert counts.keys() <= set(expected)
    return {
        **Counter(row["status"] for row in rows),
        "lost": len(set(expected) - counts.keys()),
        "twice": sum(count > 1 for count in counts.values()),
    }


def _uris(source: str, photos: Path) -> list[str]:
    return [f"{source}/{path.name}" for path in sorted(photos.iterdir())]


SOUND = {"ok": 120, "undecodable": 2, "lost": 0, "twice": 0}


def test_a_job_from_bucket_to_bucket_asks_for_an_image_once(source, bucket, proxy, photos):
    proxy.requests.clear()
    summary = caption_images(source, f"{bucket}/out", f"{bucket}/model", run=RUN)
    assert summary.rows == {"ok": 120, "undecodable": 2}
    path = source.removeprefix("s3:/")
    asked = {each: n for each, n in proxy.requests.items() if each[1].startswith(f"{path}/")}
    assert asked == {("GET", f"{path}/{image.name}"): 1 for image in photos.iterdir()}
    expected = _uris(source, photos)
    assert [row["uri"] for row in _rows(f"{bucket}/out")] == expected
    assert _tally(f"{bucket}/out", expected) == SOUND
    result = CliRunner().invoke(main, ["report", f"{bucket}/out"])
    assert result.exit_code == 0, result.output
    assert "122 images listed" in result.output
    assert "0 images have no row" in result.output
    arguments = ["caption", source, f"{bucket}/out", "--model", f"{bucket}/model", "--overwrite"]
    arguments += ["--max-error-rate", "1"]
    result = CliRunner().invoke(main, [*arguments, "--limit", "3", "--engine", "local"])
    assert result.exit_code == 0, result.output
    assert _tally(f"{bucket}/out", expected[:3])["lost"] == 0
    assert len(_rows(f"{bucket}/out")) == 3, "what was there before is gone"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.thorough)])
def test_no_row_is_lost_or_doubled_by_faults(engine, source, bucket, proxy, photos, capsys):
    """Prints what it counted: ``pytest tests/test_buckets.py -k no_row_is_lost``."""
    proxy.requests.clear()
    proxy.rate, proxy.seed = 0.2, 3
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    command = [*_command(bucket, engine), "--decoders", "4"]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    rate, proxy.rate = proxy.rate, 0.0
    assert ran.returncode == 0, ran.stderr
    tally = _tally(f"{bucket}/out", _uris(source, photos))
    counted = {"engine": engine, "rate": rate, "requests": sum(proxy.requests.values())}
    with capsys.disabled():
        print("\n" + json.dumps(counted | {"faults": dict(proxy.faults), "rows": tally}))
    assert tally == SOUND
    assert set(proxy.faults) == set(FAULTS)


def test_parts_are_merged_and_split_in_spite_of_faults(bucket, proxy):
    output = finish(f"{bucket}/out")
    rows, accounts = rows_of_parts(output.uri), audit(output)
    proxy.rate, proxy.kinds = 0.1, ("500", "503", "reset", "truncated")
    assert compact(output.uri, int(4.5 * SIZE)).after == 3
    assert audit(output) == accounts
    [row] = read_row(output, 5, 2).to_pylist()
    assert row == rows.slice(22, 1).to_pylist()[0]
    assert proxy.faults
    proxy.reset()
    assert rows_of_parts(output.uri).equals(rows)
    isolate_shards(output, read_manifest(output), {3})
    assert len(output.parts()) == 4
    assert rows_of_parts(output.uri).equals(rows)


def test_what_is_asked_about_a_merged_part_is_not_all_of_it(bucket, proxy):
    output = finish(f"{bucket}/out")
    compact(output.uri, 10**9)
    [part] = output.parts()
    proxy.sent = 0
    audit(output)
    assert proxy.sent < storage.sizes(output.uri)[part.name] / 2
    proxy.requests.clear()
    assert len(list(read_rows(output))) == 1
    path = f"/{output.uri.removeprefix('s3://')}/{part.name}"
    assert proxy.requests["GET", path] == 2, "its end and its row group"


def test_an_image_that_cannot_be_had_is_the_only_one_unreadable(
    source, bucket, proxy, photos, monkeypatch
):
    _attempt_once(monkeypatch)
    images = sorted(photos.iterdir())
    proxy.permanent = {images[3].name: "truncated", images[50].name: "500", images[99].name: "503"}
    summary = caption_images(source, f"{bucket}/out", f"{bucket}/model", run=RUN)
    assert summary.rows == {"ok": 117, "undecodable": 2, "unreadable": 3}
    unreadable = [row for row in _rows(f"{bucket}/out") if row["status"] == "unreadable"]
    uris = _uris(source, photos)
    assert [row["uri"] for row in unreadable] == [uris[3], uris[50], uris[99]]
    assert all(row["error"] and "\n" not in row["error"] for row in unreadable)


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_was(source, bucket, proxy, photos):
    job = subprocess.Popen(
        _command(bucket, "local"), start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 240
        while not [name for name in storage.names(f"{bucket}/out") if name.startswith("part-")]:
            assert time.monotonic() < deadline
            assert job.poll() is None, "the job ended before it could be killed"
            time.sleep(0.01)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    parts = [name for name in storage.names(f"{bucket}/out") if name.startswith("part-")]
    before = {name: storage.version(f"{bucket}/out/{name}") for name in parts}
    assert len(before) < 16
    done = sum(len(pq.read_table(storage.open_binary(f"{bucket}/out/{name}"))) for name in parts)
    proxy.requests.clear()
    ran = subprocess.run(
        _command(bucket, "local"), capture_output=True, text=True, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stderr
    path = source.removeprefix("s3:/")
    read = sum(each.startswith(f"{path}/") for _, each in proxy.requests)
    assert read == 122 - done, "a finished image was read again"
    assert {name: storage.version(f"{bucket}/out/{name}") for name in parts} == before
    assert _tally(f"{bucket}/out", _uris(source, photos)) == SOUND


@pytest.mark.slow
@pytest.mark.thorough
def test_rays_workers_get_the_variables_of_the_runtime_environment(
    source, bucket, environment, photos
):
    """As ``ray job submit --runtime-env-json`` gives them: the workers inherit none here."""
    code = """
import json, os, sys
import ray
variables = json.loads(sys.stdin.read())
runtime = {"env_vars": variables}
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000,
         log_to_driver=False, runtime_env=runtime)
os.environ.update(variables)  # the job's own process has them, too
from captioner.config import RunConfig
from captioner.caption.job import caption_images
run = RunConfig(engine="ray", device="cpu")
print(caption_images(*sys.argv[1:], run=run).rows)
"""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in environment and not name.startswith(("AWS_", "FSSPEC_"))
    }
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, source, f"{bucket}/out", f"{bucket}/model"],
        input=json.dumps(environment),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=clean | {"RAY_AUTH_MODE": "disabled"},
    )
    assert ran.returncode == 0, ran.stderr
    assert _tally(f"{bucket}/out", _uris(source, photos)) == SOUND


@pytest.mark.slow
def test_a_model_is_trained_from_bucket_to_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    (data / "Images").mkdir(parents=True)
    lines, names = ["image,caption"], [f"{number:02d}.png" for number in range(12)]
    for number, name in enumerate(names):
        word, colour = [("red", (220, 30, 30)), ("blue", (30, 30, 220))][number % 2]
        Image.new("RGB", (64, 64), colour).save(data / "Images" / name)
        lines.append(f"{name},A {word} square .")
    (data / "captions.txt").write_text("\n".join(lines) + "\n")
    (data / "train.txt").write_text("\n".join(names[:8]))
    (data / "val.txt").write_text("\n".join(names[8:]))
    _upload(data, f"{bucket}/data")
    split = dataset.read_dataset(f"{bucket}/data").split(
        f"{bucket}/data/train.txt", f"{bucket}/data/val.txt"
    )
    assert (len(split.train), len(split.validation)) == (8, 4)
    weights = tmp_path / "encoder.pth"
    torch.save(tiny_model().encoder.backbone.state_dict(), weights)
    training.train(
        split,
        f"{bucket}/model",
        model_config=dataclasses.replace(TINY, pre_norm=True),
        config=TrainConfig(epochs=2, batch_size=4, minimum_count=1, fine_tune_from=None),
        encoder_weights=str(weights),
    )
    expected = ["config.json", "curves.png", "metrics.jsonl", "model.safetensors", "tokenizer.json"]
    assert set(expected) <= set(storage.names(f"{bucket}/model"))
    summary = caption_images(f"{bucket}/data", f"{bucket}/out", f"{bucket}/model", run=RUN)
    assert summary.rows == {"ok": 12}
    lists = ["--train-list", f"{bucket}/data/train.txt", "--val-list", f"{bucket}/data/val.txt"]
    result = CliRunner().invoke(main, ["train", f"{bucket}/data", f"{bucket}/model", *lists])
    assert result.exit_code == 2
    assert "holds a run with other settings" in result.output


# Mistakes.


def _mistake(*arguments: str) -> str:
    """The one line that the command line answers with."""
    s3fs.S3FileSystem.clear_instance_cache()
    result = CliRunner().invoke(main, [*arguments, "--engine", "local"])
    assert result.exit_code == 2, result.output
    [line] = result.output.splitlines()
    assert SECRET not in line
    return line


def test_a_bucket_that_is_not_there_is_one_line(bucket, source, proxy):
    model = ("--model", f"{bucket}/model")
    line = _mistake("caption", f"{bucket}-none/in", f"{bucket}/out", *model)
    assert line.startswith(f"captioner: cannot list {bucket}-none/in: ")
    assert "The specified bucket does not exist" in line
    line = _mistake("caption", source, f"{bucket}-none/out", *model)
    assert line.startswith(f"captioner: cannot write {bucket}-none/out/__captioner/run.json: ")
    assert "The specified bucket does not exist" in line
    line = _mistake("caption", source, f"{bucket}/out", "--model", f"{bucket}-none/model")
    assert line == f"captioner: the model {bucket}-none/model cannot be used: it has no config.json"


@pytest.mark.slow
def test_wrong_credentials_are_one_line(environment, model_directory, tmp_path, monkeypatch):
    """A server that knows nobody."""
    strict, port = _start_moto(INITIAL_NO_AUTH_ACTION_COUNT="0")
    photos = str(write_photos(tmp_path / "photos", 1)[0].parent)
    model = ("--model", str(model_directory))
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
        cases = {"Unable to locate credentials": {}}
        cases["Access Key Id"] = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        cases["profile (nobody) could not be found"] = {"AWS_PROFILE": "nobody"}
        for message, variables in cases.items():
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            line = _mistake("caption", "s3://bucket/in", str(tmp_path / "out"), *model)
            assert line.startswith("captioner: cannot use s3://bucket/in: ")
            assert message in line
            line = _mistake("caption", photos, "s3://bucket/out", *model)
            assert line.startswith("captioner: cannot use s3://bucket/out")
            assert message in line
            line = _mistake("caption", photos, "s3://bucket/out", "--model", "s3://bucket/model")
            assert line.startswith("captioner: cannot use s3://bucket/model/")
            assert message in line
            with pytest.raises(StorageError, match=re.escape(message)):
                storage.read("s3://bucket/in/a.jpg")
    finally:
        strict.terminate()
        strict.wait(20)


def test_an_endpoint_where_nothing_listens_is_one_line_soon(
    bucket, model_directory, tmp_path, monkeypatch
):
    arguments = ["caption", f"{bucket}/in", f"{tmp_path}/out", "--model", str(model_directory)]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:{_free_port()}")
    assert "was not a valid URI" in _mistake(*arguments)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{_free_port()}")
    begin = time.monotonic()
    line = _mistake(*arguments)
    assert time.monotonic() - begin < 40
    assert line.startswith(f"captioner: cannot use {bucket}/in: Could not connect to the endpoint")


def test_a_list_against_an_endpoint_where_nothing_listens_gives_no_rows(
    bucket, model_directory, tmp_path, monkeypatch
):
    [photo] = write_photos(tmp_path / "photos", 1)
    (tmp_path / "list.txt").write_text(f"{photo}\n{bucket}/a.jpg\n{bucket}/b.jpg\n")
    output = tmp_path / "out"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{_free_port()}")
    with pytest.raises(StorageError, match=rf"^cannot use {bucket}/a.jpg: Could not connect to"):
        caption_images(str(tmp_path / "list.txt"), str(output), str(model_directory), run=RUN)
    assert not list(output.glob("part-*"))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    access = storage.WebAccess(allow_private_hosts=True)
    # One host of many on the web.
    with storage.web_access(access), pytest.raises(OSError, match="Connection refused"):
        storage.read(f"http://127.0.0.1:{_free_port()}/a.jpg", retries=0)


def test_an_object_that_may_not_be_read_or_is_gone_is_the_only_one_unreadable(
    bucket, proxy, model_directory, tmp_path
):
    [photo] = write_photos(tmp_path, 1)
    storage.write(f"{bucket}/secret.jpg", photo.read_bytes())
    storage.write(f"{bucket}/photo.jpg", photo.read_bytes())
    uris = [f"{bucket}/{name}.jpg" for name in ("secret", "gone", "photo")]
    (tmp_path / "list.txt").write_text("\n".join(uris))
    proxy.permanent = {"secret.jpg": "403"}
    with pytest.raises(PermissionError):
        storage.read(uris[0])
    output = str(tmp_path / "out")
    run = dataclasses.replace(RUN, max_error_rate=1.0)
    summary = caption_images(str(tmp_path / "list.txt"), output, str(model_directory), run=run)
    assert summary.rows == {"ok": 1, "unreadable": 2}


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://{KEY}:{SECRET}@bucket/a.jpg",
        "s3://KEY:SECRET+example@bucket/a.jpg",
        "https://user:SECRET@host/a.jpg",
        "https://user:SECRET@host:80/a.jpg",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri, tmp_path, model_directory):
    photos, model = str(write_photos(tmp_path / "photos", 1)[0].parent), str(model_directory)
    output, listing = str(tmp_path / "out"), tmp_path / "list.txt"
    listing.write_text(f"{photos}/photo-0000.jpg\n{uri}\n")
    cases = [(uri, output, model), (photos, uri, model), (photos, output, uri)]
    for source, target, bundle_uri in [*cases, (str(listing), output, model)]:
        line = _mistake("caption", source, target, "--model", bundle_uri)
        assert "contains credentials: give them in the environment" in line
        assert "SECRET" not in line
        assert KEY not in line
    assert not Path(output).exists()
    with pytest.raises(InputError) as caught:
        storage.read(uri)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/12:30@noon.jpg",
        "s3://bucket/photo@2x.jpg",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/name/photo@2x.jpg",
        "abfs://container@account.dfs.core.windows.net/a.jpg",
        "https://host:8080/photo@2x.jpg",
        "/photos/a:b@c.jpg",
    ],
)
def test_what_only_looks_like_credentials_is_left(uri):
    assert storage.absolute(uri) == uri


@pytest.mark.parametrize(
    ("scheme", "package", "extra"),
    [
        ("s3", "s3fs", "s3"),
        ("gs", "gcsfs", "gcs"),
        ("gcs", "gcsfs", "gcs"),
        ("abfs", "adlfs", "azure"),
        ("az", "adlfs", "azure"),
    ],
)
def test_a_package_that_is_missing_is_named(scheme, package, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    result = CliRunner().invoke(
        main, ["caption", f"{scheme}://bucket/in", str(tmp_path), "--model", f"{scheme}://bucket/m"]
    )
    assert result.exit_code == 2
    spelled = {"gcs": "gs", "az": "abfs"}.get(scheme, scheme)
    expected = f"captioner: cannot open {spelled}:// URIs: install captioner[{extra}]\n"
    assert result.output == expected


def test_images_in_tars_of_a_bucket_come_in_ranges_in_spite_of_faults(
    bucket, proxy, photos, model_directory
):
    images = sorted(photos.iterdir())
    for number in range(3):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w") as tar:
            for path in images[number::3]:
                tar.add(path, path.name)
        storage.write(f"{bucket}/in/{number:05d}.tar", sink.getvalue())
    source = f"{bucket}/in/{{00000..00002}}.tar"
    proxy.requests.clear()
    summary = caption_images(source, f"{bucket}/out", str(model_directory), run=RUN)
    assert summary.rows == {"ok": 120, "undecodable": 2}
    gets = sum(n for (kind, path), n in proxy.requests.items() if kind == "GET" and ".tar" in path)
    assert gets < 40, "a few requests for each shard, not one for each image"
    expected = [(path.name, each["caption"]) for path, each in _by_name(f"{bucket}/out", images)]
    proxy.rate, proxy.seed = 0.1, 5
    proxy.kinds = ("500", "503", "reset", "truncated")
    caption_images(source, f"{bucket}/again", str(model_directory), run=RUN)
    proxy.reset()
    again = [(path.name, each["caption"]) for path, each in _by_name(f"{bucket}/again", images)]
    assert again == expected


def test_images_in_parquet_files_of_a_bucket_come_in_ranges_in_spite_of_faults(
    bucket, proxy, photos, model_directory
):
    images = sorted(photos.iterdir())
    for number in range(2):
        cells = [{"bytes": path.read_bytes(), "path": path.name} for path in images[number::2]]
        sink = io.BytesIO()
        pq.write_table(pa.table({"image": cells}), sink, row_group_size=20)
        storage.write(f"{bucket}/in/train-{number:05d}.parquet", sink.getvalue())
    proxy.requests.clear()
    arguments = f"{bucket}/in", str(model_directory)
    summary = caption_images(arguments[0], f"{bucket}/out", arguments[1], run=RUN)
    assert summary.rows == {"ok": 120, "undecodable": 2}
    gets = [n for (kind, path), n in proxy.requests.items() if kind == "GET" and "/in/" in path]
    assert sum(gets) < 40, "a few requests for each row group, not one for each image"
    proxy.rate, proxy.seed = 0.1, 5
    proxy.kinds = ("500", "503", "reset", "truncated")
    caption_images(arguments[0], f"{bucket}/again", arguments[1], run=RUN)
    proxy.reset()
    first, again = (_rows(f"{bucket}/{name}") for name in ("out", "again"))
    assert [(row["uri"], row["caption"]) for row in again] == [
        (row["uri"], row["caption"]) for row in first
    ]


def _by_name(output: str, images: list[Path]) -> list[tuple[Path, dict]]:
    """Each image with its one row."""
    rows = {row["uri"].removeprefix("tar://").split("::")[0]: row for row in _rows(output)}
    assert len(rows) == len(_rows(output)) == len(images)
    return [(path, rows[path.name]) for path in images]
