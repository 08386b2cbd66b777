"""A dataset of the Hugging Face hub by its name, against a server that answers as the hub does."""

import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("huggingface_hub")

COMMIT = "a" * 40
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Hub(http.server.ThreadingHTTPServer):
    """Serves the dataset ``owner/photos``; ``owner/gated`` is listed but not readable."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.sent = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(self.path.split("?")[0])
        self.server.requests.append(f"{self.command} {path}")
        if "/tree/" in path or "/resolve/" in path:
            self.server.tokens.add(self.headers.get("Authorization"))
        match = re.match(r"(?:/api)?/datasets/owner/(photos|gated)(?=/|$)(.*)", path)
        if match is None:
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        repository, rest = match.groups()
        if tree := re.fullmatch(r"/tree/main/?(.*)", rest):
            below = tree[1].rstrip("/") + "/" if tree[1] else ""
            names = [name for name in self.server.files if name.startswith(below)]
            if not names:
                return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            entries = [self.entry(name) for name in names]
            folders = sorted(
                {name.rpartition("/")[0] for name in names} - {tree[1].rstrip("/"), ""}
            )
            entries += [{"type": "directory", "path": name, "oid": "1"} for name in folders]
            if "recursive=true" not in self.path.lower():
                entries = [e for e in entries if "/" not in str(e["path"]).removeprefix(below)]
            return self.send(200, json.dumps(entries).encode())
        if re.fullmatch(r"/paths-info/main", rest):
            asked = urllib.parse.parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
            found = [self.entry(name) for name in asked if name in self.server.files]
            return self.send(200, json.dumps(found).encode())
        if resolved := re.fullmatch(r"/resolve/main/(.+)", rest):
            if repository == "gated":
                return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return self.send_file(self.server.files[resolved[1]])
        return self.send(200, json.dumps({"id": f"owner/{repository}", "sha": COMMIT}).encode())

    def entry(self, name: str) -> dict[str, object]:
        data = self.server.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}

    def send_file(self, data: bytes) -> None:
        begin, end = 0, len(data)
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            begin, end = int(first), min(int(last) + 1, len(data))
        self.server.sent += end - begin
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT}
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self.send(206, data[begin:end], headers)

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {"README.md": b"# Photos"}
    for split, first in (("train", 0), ("test", 4)):
        cells = [{"bytes": b"%d" % n, "path": None} for n in range(first, first + 4)]
        table = pa.table({"image": pa.array(cells, IMAGE), "label": [*range(first, first + 4)]})
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=2)
        files[f"data/{split}-00000-of-00001.parquet"] = sink.getvalue()
    server = Hub(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


READ = """
import sys
from captioner.config import ListingConfig
from captioner.data.listing import list_source
from captioner.data.reading import groups, read_images
from captioner.errors import CaptionerError
from captioner.storage import absolute
try:
    images = list_source(absolute(sys.argv[1]), ListingConfig(keep="label"))
except CaptionerError as error:
    print("ERROR", error)
else:
    for group in groups(images):
        some = images.slice(group.start, len(group))
        for row, data in zip(some.to_pylist(), read_images(some, 1000, 0)):
            print(row["uri"], row["kept"]["label"], data, row["version"])
"""


@pytest.fixture
def read(hub: Hub) -> Callable[..., list[str]]:
    """Lists and reads a source in a process of its own: the client reads its settings once."""

    def run(source: str, **environment: str) -> list[str]:
        host, port = hub.server_address[:2]
        settings = {"HF_ENDPOINT": f"http://{host}:{port}", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", READ, source],
            env=os.environ | settings | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_the_images_of_a_dataset_are_read(hub, read):
    lines = read("hf://datasets/owner/photos", HF_TOKEN="hf_made_up")
    names = ["test-00000-of-00001.parquet"] * 4 + ["train-00000-of-00001.parquet"] * 4
    numbers = [4, 5, 6, 7, 0, 1, 2, 3]
    for line, name, number in zip(lines, names, numbers, strict=True):
        place = f"hf://datasets/owner/photos/data/{name}"
        version = f"{len(hub.files[f'data/{name}'])} {_digest(hub.files[f'data/{name}'])}"
        assert line == f"{place}#image={number % 4} {number} b'{number}' {version}"
    assert hub.tokens == {"Bearer hf_made_up"}
    assert hub.sent < 10 * sum(map(len, hub.files.values()))


def test_a_path_below_a_dataset_is_a_source(read):
    lines = read("hf://datasets/owner/photos/data/train-00000-of-00001.parquet")
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("source", "environment", "message"),
    [
        ("hf://datasets/owner/none", {}, r"^ERROR cannot use .*owner/none .repository not found"),
        ("hf://datasets/owner/gated", {}, r"^ERROR cannot read hf://datasets/owner/gated/data/.*"),
        ("hf://datasets/owner/photos", {"HF_ENDPOINT": "http://127.0.0.1:9"}, r"^ERROR cannot "),
    ],
)
def test_a_dataset_that_cannot_be_had_is_one_line(source, environment, message, read):
    [line] = read(source, **environment)
    assert re.search(message, line), line
