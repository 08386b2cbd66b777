"""A server on this machine that answers as the Hugging Face hub does, for models and datasets."""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MAIN, V1 = "a" * 40, "b" * 40


@dataclass
class Repository:
    """The files of a repository at each commit; of a gated one, nobody may read them."""

    commits: dict[str, dict[str, bytes]]
    gated: bool = False

    def commit(self, revision: str) -> str:
        return {"main": MAIN, "v1": V1}.get(revision, revision)

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.commit(revision))


class Hub(http.server.ThreadingHTTPServer):
    """Serves repositories by their path: ``models/owner/name`` or ``datasets/owner/name``.

    ``requests``, ``ranges``, ``tokens`` and ``sent`` have what was asked and sent. The first answer
    with the file ``cut`` ends in the middle. Paths that end in a key of ``refusals`` are answered
    with its statuses first.
    """

    def __init__(self, repositories: dict[str, Repository]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.tokens: set[str | None] = set()
        self.sent = 0
        self.cut = ""
        self.refusals: dict[str, list[int]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(repositories: dict[str, Repository]) -> Iterator[Hub]:
    with Hub(repositories) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


def digest(data: bytes) -> str:
    """A file's ETag."""
    return hashlib.sha1(data).hexdigest()


_NAME = r"([^/]+/[^/]+)"
_API = re.compile(rf"/api/(models|datasets)/{_NAME}(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?")
_FILE = re.compile(rf"/(?:(datasets)/)?{_NAME}/resolve/([^/]+)/(.+)")


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(self.path.split("?")[0])
        self.server.requests.append(f"{self.command} {path}")
        for end, statuses in self.server.refusals.items():
            if path.endswith(end) and statuses:
                return self.fail(statuses.pop(0), "")
        if asked := _FILE.fullmatch(path):
            kind, name, revision, rest = asked.groups()
            what = "resolve"
        elif asked := _API.fullmatch(path):
            kind, name, what, revision, rest = asked.groups()
        else:
            return self.fail(404, "EntryNotFound")
        repository = self.server.repositories.get(f"{kind or 'models'}/{name}")
        if repository is None:
            return self.fail(401, "RepoNotFound")
        revision = revision or "main"
        files = repository.files(revision)
        if files is None:
            return self.fail(404, "RevisionNotFound")
        if what in ("tree", "resolve"):
            self.server.tokens.add(self.headers.get("Authorization"))
        if what == "tree":
            return self.send_tree(files, rest.rstrip("/"))
        if what == "paths-info":
            wanted = urllib.parse.parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
            return self.send_json([_entry(each, files[each]) for each in wanted if each in files])
        commit = repository.commit(revision)
        if what == "resolve":
            if repository.gated:
                return self.fail(403, "GatedRepo")
            return self.send_file(files, rest, commit)
        siblings = [{"rfilename": each} for each in files]
        return self.send_json({"id": name, "sha": commit, "siblings": siblings})

    def send_tree(self, files: dict[str, bytes], folder: str) -> None:
        below = f"{folder}/" if folder else ""
        names = [name for name in files if name.startswith(below)]
        if not names:
            return self.fail(404, "EntryNotFound")
        entries = [_entry(name, files[name]) for name in names]
        folders = sorted({name.rpartition("/")[0] for name in names} - {folder, ""})
        entries += [{"type": "directory", "path": name, "oid": "1"} for name in folders]
        if "recursive=true" not in self.path.lower():
            entries = [each for each in entries if "/" not in str(each["path"]).removeprefix(below)]
        return self.send_json(entries)

    def send_file(self, files: dict[str, bytes], name: str, commit: str) -> None:
        if name not in files:
            return self.fail(404, "EntryNotFound")
        data = files[name]
        headers = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        begin, end, status = 0, len(data), 200
        if wanted := self.headers.get("Range"):
            self.server.ranges.append(wanted)
            first, last = wanted.removeprefix("bytes=").split("-")
            begin, end = int(first), min(int(last or end) + 1, end)
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            status = 206
        if name == self.server.cut and self.command == "GET":
            self.server.cut = ""
            self.close_connection = True
            return self.send(status, data[begin:end], headers, end - begin - len(data) // 2)
        return self.send(status, data[begin:end], headers)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {})

    def fail(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code})

    def send(self, status: int, data: bytes, headers: dict[str, str], cut: int = 0) -> None:
        """Sends an answer, but for its last ``cut`` bytes."""
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.server.sent += len(data) - cut
            self.wfile.write(data[: len(data) - cut])


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
