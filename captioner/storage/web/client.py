"""Requests to web servers: redirects, proxies, deadlines, and what their errors mean.

With a proxy in the environment (``HTTP_PROXY``, ``HTTPS_PROXY``, ``NO_PROXY``), the proxy looks up
names and connects. Then a host is refused by how it is written, and the proxy decides about names.
"""

import http.client
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import unquote, urljoin

import urllib3
from urllib3.exceptions import (
    HTTPError,
    IncompleteRead,
    LocationParseError,
    ProxyError,
    SSLError,
)
from urllib3.exceptions import (
    TimeoutError as WaitedTooLong,
)
from urllib3.util import Timeout, make_headers, parse_url
from urllib3.util.url import Url

from captioner.errors import StorageError
from captioner.storage.web.access import WebAccess
from captioner.storage.web.addresses import private_host
from captioner.storage.web.bodies import read_body
from captioner.storage.web.connections import Deadline, FinalError, pool_classes
from captioner.storage.web.hosts import Hosts, retry_after

__all__ = ["Client", "HTTPStatusError"]

Result = TypeVar("Result")
#: What reads a response whose status is a success.
Reader = Callable[[urllib3.BaseHTTPResponse], Result]

_REDIRECTS = 5
_REDIRECT_STATUSES = {301, 302, 303, 307, 308}
_CONNECT_SECONDS, _SILENCE_SECONDS = 10, 20
_DRAINED = 1 << 16  # bytes of an error's page that are read, to use the connection again
_HOSTS_KEPT = 64  # with idle connections


class HTTPStatusError(OSError):
    """A server answers with a status that is not a success."""

    def __init__(self, status: int, reason: str):
        super().__init__(f"HTTP status {status} {reason}".strip())
        self.status = status


class _MissingError(HTTPStatusError, FileNotFoundError):
    """A server has no such file."""


@dataclass(frozen=True)
class _Redirect:
    url: str


class Client:
    """Requests with one set of settings; threads share its connections."""

    def __init__(self, access: WebAccess):
        self._access, self._hosts = access, Hosts(access.connections_per_host)
        self._managers: dict[str | None, urllib3.PoolManager] = {}

    def get(self, url: str, headers: Mapping[str, str], read: Reader[Result]) -> Result:
        """Requests a file, follows redirects, and reads the response.

        Raises:
            HTTPStatusError: the last status is not a success.
            PermissionError: a host is refused.
            OSError: the file cannot be read.
        """
        sent = {"User-Agent": self._access.agent, "Accept-Encoding": "identity", **headers}
        seconds = self._access.timeout
        for _ in range(_REDIRECTS + 1):
            parts = _parsed(url)
            with self._hosts.connection(str(parts.host)) as host:
                begin = time.monotonic()
                with self._response(parts, sent, seconds) as response:
                    if response.status not in _REDIRECT_STATUSES:
                        if not 200 <= response.status < 300:
                            host.postpone(retry_after(response.headers.get("Retry-After")))
                            raise _status_error(response)
                        return read(response)
                    url = _target(url, response)
                seconds = max(0.1, seconds - (time.monotonic() - begin))
        raise OSError(f"more than {_REDIRECTS} redirects")

    @contextmanager
    def _response(
        self, parts: Url, headers: Mapping[str, str], seconds: float
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """One response, whose connection is used again if its body was read."""
        manager = self._manager(parts)
        with Deadline(seconds) as deadline, _translated(deadline, self._access.timeout):
            response = manager.urlopen(
                "GET",
                parts.url,
                headers=headers,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
                timeout=Timeout(connect=_CONNECT_SECONDS, read=_SILENCE_SECONDS),
            )
            try:
                yield response
            finally:
                response.close()

    def _manager(self, parts: Url) -> urllib3.PoolManager:
        """The pool of connections to a host or to its proxy.

        Raises:
            PermissionError: the host is refused.
        """
        host = str(parts.host)
        proxy = None
        if not urllib.request.proxy_bypass(parts.netloc or host):
            proxies = urllib.request.getproxies()
            proxy = proxies.get(parts.scheme or "") or proxies.get("all")
        is_checked = proxy is not None and not self._access.allow_private_hosts
        if is_checked and (kind := private_host(host)) is not None:
            raise PermissionError(f"the host is {kind}; to allow it, add --allow-private-hosts")
        if proxy not in self._managers:
            self._managers[proxy] = self._new_manager(proxy)
        return self._managers[proxy]

    def _new_manager(self, proxy: str | None) -> urllib3.PoolManager:
        size = self._access.connections_per_host
        allow_private = proxy is not None or self._access.allow_private_hosts
        if proxy is None:
            manager = urllib3.PoolManager(_HOSTS_KEPT, maxsize=size)
        else:
            manager = _proxy_manager(proxy, size)
        manager.pool_classes_by_scheme = pool_classes(allow_private=allow_private)
        return manager


def _proxy_manager(proxy: str, size: int) -> urllib3.ProxyManager:
    try:
        parts = parse_url(proxy if "://" in proxy else f"http://{proxy}")
        headers = make_headers(proxy_basic_auth=unquote(parts.auth)) if parts.auth else None
        address = parts._replace(auth=None).url
        return urllib3.ProxyManager(address, _HOSTS_KEPT, maxsize=size, proxy_headers=headers)
    except (HTTPError, ValueError) as error:
        raise StorageError(
            "cannot use the proxy that the environment names: its address must be "
            "http://HOST:PORT or https://HOST:PORT"
        ) from error


def _parsed(url: str) -> Url:
    try:
        parts = parse_url(url)
    except LocationParseError as error:
        raise OSError("it is not a valid web address") from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise OSError("it is not a valid web address")
    if parts.auth is not None:
        raise OSError("the address contains credentials")
    return parts._replace(fragment=None)


def _target(url: str, response: urllib3.BaseHTTPResponse) -> str:
    location = response.headers.get("Location")
    if location is None:
        raise OSError(f"HTTP status {response.status} without an address to go to")
    try:
        target = urljoin(url, location)
        _parsed(target)
    except (OSError, ValueError) as error:
        raise OSError("it redirects to an address that is not allowed or not valid") from error
    _drain(response)
    return target


def _status_error(response: urllib3.BaseHTTPResponse) -> HTTPStatusError:
    reason = response.reason or http.client.responses.get(response.status, "")
    _drain(response)
    kind = _MissingError if response.status in (404, 410) else HTTPStatusError
    return kind(response.status, " ".join(reason.split())[:100])


def _drain(response: urllib3.BaseHTTPResponse) -> None:
    """Reads a short body that nobody needs."""
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length[:9]) <= _DRAINED:
        with suppress(HTTPError, OSError):
            read_body(response, "", None)


@contextmanager
def _translated(deadline: Deadline, seconds: float) -> Iterator[None]:
    """Makes OSErrors without addresses or secrets of what urllib3 raises."""
    problem = None
    try:
        yield
    except FinalError as error:
        raise error.error from error
    except HTTPStatusError:
        raise
    except (HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        problem = error
    if deadline.expired:  # what came until then may look like a whole response
        raise TimeoutError(f"the request took more than {seconds:g} seconds") from problem
    if problem is not None:
        raise _meaning(problem) from problem


def _meaning(error: Exception) -> OSError:
    cause = error.args[-1] if error.args else None
    if isinstance(error, WaitedTooLong):
        return TimeoutError(f"no answer for {_SILENCE_SECONDS} seconds")
    if isinstance(error, IncompleteRead) or isinstance(cause, http.client.IncompleteRead):
        return ConnectionError("the body is cut off")
    if isinstance(error, ProxyError):
        return ConnectionError("the proxy does not connect")
    if isinstance(error, SSLError):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return OSError(f"the server's certificate is not valid: {cause.verify_message}")
        return ConnectionError("TLS fails")
    if isinstance(error, OSError):
        return error
    if isinstance(error, LocationParseError):
        return OSError("it is not a valid web address")
    return ConnectionError("the connection broke off, or the answer is not HTTP")
