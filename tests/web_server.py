"""A web server on this machine that misbehaves as its paths say."""

import gzip
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class WebServer(ThreadingHTTPServer):
    """Serves ``files`` by name; ``requests`` has what was asked.

    What a path begins with says how it misbehaves; the name of the file comes last: see
    :class:`_Handler`.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {"hello": b"hello"}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.seen: Counter[str] = Counter()
        self.sent = 0
        self.lock = threading.Lock()
        self.active = self.most_active = 0
        self.stopped = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: clients break off here."""


@contextmanager
def serving() -> Iterator[WebServer]:
    with WebServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.stopped.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers.items())))
            self.server.seen[self.path] += 1
            self.server.active += 1
            self.server.most_active = max(self.server.most_active, self.server.active)
        try:
            kind, _, rest = self.path.strip("/").split("?")[0].partition("/")
            name = rest.rpartition("/")[2] or kind
            body = self.server.files.get(name)
            getattr(self, f"do_{kind}", self.do_plain)(rest, body)
        finally:
            with self.server.lock:
                self.server.active -= 1

    def do_plain(self, rest: str, body: bytes | None) -> None:
        if body is None:
            self.answer(404, b"no such file")
        else:
            self.answer(200, body)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        headers = {"Content_Length": str(len(body))} | headers
        for name, value in headers.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.write(body)

    def write(self, body: bytes) -> None:
        for begin in range(0, len(body), 1 << 14):
            self.wfile.write(body[begin : begin + (1 << 14)])
            self.server.sent += len(body[begin : begin + (1 << 14)])

    def do_status(self, rest: str, body: bytes | None) -> None:
        """``status/STATUS``."""
        self.answer(int(rest.partition("/")[0]), b"an error page")

    def do_once(self, rest: str, body: bytes | None) -> None:
        """``once/STATUS/AFTER/NAME``: the status with ``Retry-After``, the next time the file."""
        status, after, _ = rest.split("/")
        if self.server.seen[self.path] == 1:
            self.answer(int(status), b"", Retry_After=after.replace("_", " "))
        else:
            self.answer(200, body or b"")

    def do_busy(self, rest: str, body: bytes | None) -> None:
        """``busy/SECONDS``: always 429."""
        self.answer(429, b"", Retry_After=rest)

    def do_to(self, rest: str, body: bytes | None) -> None:
        """``to/ADDRESS``: redirects there, or to a path of this server."""
        if "://" not in rest:
            rest = f"/{rest}"
        rest = unquote(rest)
        self.answer(302, b"", Location=rest)

    def do_loop(self, rest: str, body: bytes | None) -> None:
        self.answer(302, b"", Location=f"/loop/{time.monotonic_ns()}")

    def do_nowhere(self, rest: str, body: bytes | None) -> None:
        self.answer(302, b"")

    def do_cut(self, rest: str, body: bytes | None) -> None:
        body = body or b""
        self.answer(200, body[: len(body) // 2], Content_Length=str(len(body)))
        self.close_connection = True

    def do_short(self, rest: str, body: bytes | None) -> None:
        """A length that is less than the body's."""
        self.answer(200, body or b"", Content_Length=str(len(body or b"") // 2))
        self.close_connection = True

    def do_length(self, rest: str, body: bytes | None) -> None:
        """``length/TEXT/NAME``: a wrong Content-Length."""
        self.answer(200, body or b"", Content_Length=rest.partition("/")[0])
        self.close_connection = True

    def do_nolength(self, rest: str, body: bytes | None) -> None:
        self.answer(200, body or b"", Content_Length="", Connection="close")
        self.close_connection = True

    def do_chunked(self, rest: str, body: bytes | None) -> None:
        """``chunked/NAME``; ``chunked/cut/NAME`` lacks the end."""
        body = body or b""
        self.answer(200, b"", Content_Length="", Transfer_Encoding="chunked")
        for begin in range(0, len(body), 1000):
            piece = body[begin : begin + 1000]
            self.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if rest.startswith("cut"):
            self.close_connection = True
        else:
            self.write(b"0\r\n\r\n")

    def do_gzip(self, rest: str, body: bytes | None) -> None:
        """``gzip/NAME``; ``gzip/cut/NAME`` lacks the end, ``gzip/bad/NAME`` is not gzip."""
        packed = gzip.compress(body or b"")
        packed = packed[:-9] if rest.startswith("cut") else packed
        packed = b"not gzip" if rest.startswith("bad") else packed
        self.answer(200, packed, Content_Encoding="gzip")

    def do_brotli(self, rest: str, body: bytes | None) -> None:
        self.answer(200, body or b"", Content_Encoding="br")

    def do_endless(self, rest: str, body: bytes | None) -> None:
        """A body without end or length."""
        self.answer(200, b"", Content_Length="", Connection="close")
        self.close_connection = True
        with suppress(OSError):
            while not self.server.stopped.is_set():
                self.write(bytes(1 << 14))

    def do_slow(self, rest: str, body: bytes | None) -> None:
        """``slow/body``, ``slow/headers`` or ``slow/nothing``: a byte now and then, or none."""
        self.close_connection = True
        if rest == "body":
            self.answer(200, b"", Content_Length="100000")
        elif rest == "headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        with suppress(OSError):
            while not self.server.stopped.wait(0.05):
                if rest != "nothing":
                    self.wfile.write(b"x")
                    self.wfile.flush()

    def do_pause(self, rest: str, body: bytes | None) -> None:
        """``pause/NAME``: the file, after a moment in which other requests can come."""
        time.sleep(0.1)
        self.answer(200, body or b"")

    def do_ranges(self, rest: str, body: bytes | None) -> None:
        """``ranges/NAME`` sends the range that is asked for; ``ranges/wrong/NAME`` another one."""
        body = body or b""
        begin, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        first, end = int(begin), int(last) + 1 if last else len(body)
        told = first + 1 if rest.startswith("wrong") else first
        self.answer(206, body[first:end], Content_Range=f"bytes {told}-{end - 1}/{len(body)}")

    def do_garbage(self, rest: str, body: bytes | None) -> None:
        self.wfile.write(b"\x00\x01\x02 this is not HTTP\r\n\r\n")
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Silent."""
