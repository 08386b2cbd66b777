"""Files on the web, from a server on this machine that misbehaves."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest

from captioner import storage
from captioner.caption.job import caption_images
from captioner.config import RunConfig
from conftest import write_photos

pytest.importorskip("aiohttp")


class _Handler(BaseHTTPRequestHandler):
    files: dict[str, bytes]

    def do_GET(self) -> None:
        """A status where the path is one; a body that is cut off where it says so."""
        name = self.path.strip("/").split("?")[0]
        status = int(name) if name.isdecimal() else 200
        body = self.files.get(name.removeprefix("cut-"), b"hello")
        if name == "moved.jpg":
            self.send_response(302)
            self.send_header("Location", "/photo-0000.jpg")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if name.startswith("cut-") else body)

    def log_message(self, *arguments: object) -> None:
        """Silent."""


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        _Handler.files = {}
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("404", "HTTP status 404 Not Found"),
        ("403", "HTTP status 403 Forbidden"),
        ("500", "HTTP status 500 Internal Server Error"),
    ],
)
def test_the_reason_is_the_status_and_not_the_address(name, message, address):
    with pytest.raises(OSError, match=f"^{message}$"):
        storage.read(f"{address}/{name}?token=secret", retries=0)


def test_a_body_that_is_cut_off_is_an_error(address):
    assert storage.read(f"{address}/x") == b"hello"
    with pytest.raises(OSError, match=r"not enough|not completed"):
        storage.read(f"{address}/cut-x", retries=1)


def test_each_address_of_a_list_has_its_row(address, model_directory, tmp_path):
    for path in write_photos(tmp_path / "photos", 3):
        _Handler.files[path.name] = path.read_bytes()
    names = [
        "photo-0000.jpg",
        "photo-0001.jpg?size=large",
        "404",
        "cut-photo-0002.jpg",
        "moved.jpg",
    ]
    (tmp_path / "list.txt").write_text("".join(f"{address}/{name}\n" for name in names))
    run = RunConfig(engine="local", retries=0, max_error_rate=1)

    caption_images(str(tmp_path / "list.txt"), str(tmp_path / "o"), str(model_directory), run=run)

    rows = pq.read_table(tmp_path / "o").to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "unreadable", "unreadable", "ok"]
    assert rows[2]["error"] == "HTTP status 404 Not Found"
    assert rows[0]["caption"] == rows[4]["caption"]
