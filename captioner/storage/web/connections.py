"""Connections that check the address they connect to, and that a deadline ends.

The address is checked between the one look-up of the name and the connection; no second look-up
could answer otherwise. A pooled connection is one that was checked.
"""

import socket
import threading
from contextlib import suppress
from functools import partial
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util.connection import create_connection

from captioner.storage.web.addresses import private_kind

__all__ = ["Deadline", "FinalError", "pool_classes"]

_ADDRESSES = 4  # of one name that are tried
_HOW_TO_ALLOW = "to allow it, add --allow-private-hosts"

_current = threading.local()


class FinalError(Exception):
    """Carries an OSError through urllib3, which would wrap it in errors of its own."""

    def __init__(self, error: OSError):
        super().__init__(str(error))
        self.error = error


class Deadline:
    """Ends a request of this thread after its longest time, even while the request waits.

    urllib3's timeouts are for each wait: a server that sends one byte in a while has no end.

    Attributes:
        seconds: the time from the beginning of the ``with`` block.
        expired: whether the time was over before the block ended.
    """

    def __init__(self, seconds: float):
        self.seconds, self.expired = seconds, False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> "Deadline":
        _current.deadline = self
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()
        _current.deadline = None
        self.attach(None)

    def attach(self, connected: socket.socket | None) -> None:
        """Sets the socket that the request waits for."""
        with self._lock:
            self._socket = connected
            if self.expired:
                self._shut_down()

    def _expire(self) -> None:
        with self._lock:
            self.expired = True
            self._shut_down()

    def _shut_down(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # it is closed already
                # Not TLS's own, which must not be called while another thread reads.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def pool_classes(*, allow_private: bool) -> dict[str, Any]:
    """Classes of connection pools for a pool manager's ``pool_classes_by_scheme``."""
    return {
        "http": partial(_HTTPPool, allow_private=allow_private),
        "https": partial(_HTTPSPool, allow_private=allow_private),
    }


class _Checked(HTTPConnection):
    """What both kinds of connections add to urllib3's."""

    def __init__(self, *arguments: Any, allow_private: bool, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._allow_private = allow_private
        self._connecting: socket.socket | None = None

    def connect(self) -> None:
        """Connects; the deadline also ends the handshake of TLS."""
        try:
            super().connect()
        finally:
            if self._connecting is not None:
                _attach(None)
                self._connecting.close()
                self._connecting = None

    def getresponse(self) -> Any:
        """Waits for the headers; the deadline is in force until the body is read."""
        _attach(self.sock)
        return super().getresponse()

    def _new_conn(self) -> socket.socket:
        connected = self._connected()
        # The same connection again: TLS closes the first socket object and makes another.
        self._connecting = connected.dup()
        _attach(self._connecting)
        return connected

    def _connected(self) -> socket.socket:
        problem: OSError = ConnectionError("the host's name has no address")
        for address in self._addresses():
            try:
                place = (address, self.port)
                return create_connection(place, self.timeout, socket_options=self.socket_options)
            except TimeoutError:
                problem = TimeoutError("the host does not answer")
            except OSError as error:
                problem = ConnectionError(f"cannot connect: {error.strerror or error}")
        raise FinalError(problem)

    def _addresses(self) -> list[str]:
        """The addresses of the host that may be connected to."""
        try:
            found = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            message = f"cannot find the host's address: {getattr(error, 'strerror', '') or error}"
            is_temporary = getattr(error, "errno", 0) == socket.EAI_AGAIN
            problem = ConnectionError(message) if is_temporary else OSError(message)
            raise FinalError(problem) from error
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        if self._allow_private:
            return addresses[:_ADDRESSES]
        kinds = {address: private_kind(address) for address in addresses}
        public = [address for address, kind in kinds.items() if kind is None]
        if not public:
            address, kind = next(iter(kinds.items()))
            raise FinalError(PermissionError(f"the host is {address}, {kind}; {_HOW_TO_ALLOW}"))
        return public[:_ADDRESSES]


def _attach(connected: socket.socket | None) -> None:
    deadline: Deadline | None = getattr(_current, "deadline", None)
    if deadline is not None:
        deadline.attach(connected)


class _CheckedHTTPS(_Checked, HTTPSConnection):
    """A checked connection with TLS."""


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Checked


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _CheckedHTTPS
