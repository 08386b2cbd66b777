"""A file system that reads single files of web servers."""

import threading
from typing import Any

import urllib3
from fsspec.spec import AbstractFileSystem

from captioner.storage.web.access import WebAccess, current_access
from captioner.storage.web.bodies import read_body
from captioner.storage.web.client import Client

__all__ = ["WebFileSystem", "web_file_system"]


class WebFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Single files of web servers; a path is the whole address."""

    protocol = ("http", "https")
    cachable = False

    def __init__(self, access: WebAccess):
        super().__init__()
        self.access = access
        self._client = Client(access)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **keywords: Any
    ) -> bytes:
        """A file's bytes from ``start`` up to ``end``; a request for a range only after a start."""
        if not start:
            return self._client.get(path, {}, lambda response: _body(response, end))
        last = "" if end is None else end - 1

        def read(response: urllib3.BaseHTTPResponse) -> bytes:
            if response.status != 206:
                raise OSError("the server does not send ranges of a file")
            given = response.headers.get("Content-Range", "")
            if not given.replace("bytes ", "").startswith(f"{start}-"):
                raise OSError(f"the server sends another range: {given[:60]}")
            return _body(response, None if end is None else end - start)

        return self._client.get(path, {"Range": f"bytes={start}-{last}"}, read)

    def info(self, path: str, **keywords: Any) -> dict[str, Any]:
        """A file's size, if the server tells it, and its version, by a request without its body."""

        def read(response: urllib3.BaseHTTPResponse) -> dict[str, Any]:
            headers = response.headers
            length = headers.get("Content-Length", "")
            is_size = length.isdecimal() and not headers.get("Content-Encoding")
            version = headers.get("ETag") or headers.get("Last-Modified")
            size = int(length) if is_size else None
            return {"name": path, "size": size, "type": "file", "ETag": version}

        return self._client.get(path, {}, read)

    def isdir(self, path: str) -> bool:
        """Always false: the web has no directories."""
        return False

    def ls(self, path: str, detail: bool = True, **keywords: Any) -> Any:
        """Always refused.

        Raises:
            OSError: always.
        """
        raise OSError("a web server does not list files: make a list of their addresses")

    def find(self, path: str, *arguments: Any, **keywords: Any) -> Any:
        """As :meth:`ls`."""
        return self.ls(path)


def _body(response: urllib3.BaseHTTPResponse, end: int | None) -> bytes:
    return read_body(response, response.headers.get("Content-Encoding", ""), end)


_lock = threading.Lock()
_file_system: WebFileSystem | None = None


def web_file_system() -> WebFileSystem:
    """The web with this process's settings; all threads share its connections and limits."""
    global _file_system
    access = current_access()
    with _lock:
        if _file_system is None or _file_system.access != access:
            _file_system = WebFileSystem(access)
        return _file_system
