"""Politeness to hosts: few connections at a time, and waiting where a host asks for it."""

import email.utils
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

__all__ = ["LONGEST_WAIT", "Host", "Hosts", "retry_after"]

#: Seconds that a request waits at most because of a host's ``Retry-After``.
LONGEST_WAIT = 60.0
_LONGEST_CLOSED = 86_400.0  # seconds that a host's word counts


class Host:
    """One host: its free connections, and from when on it wants requests again."""

    def __init__(self, connections: int):
        self._slots = threading.BoundedSemaphore(connections)
        self._not_before = 0.0
        self.users = 0

    def postpone(self, seconds: float) -> None:
        """Makes no request of this process reach the host for some time."""
        until = time.monotonic() + min(seconds, _LONGEST_CLOSED)
        self._not_before = max(self._not_before, until)

    @property
    def remaining(self) -> float:
        """Seconds until requests may reach the host."""
        return max(0.0, self._not_before - time.monotonic())

    def acquire(self) -> None:
        """Waits for a connection, and until the host wants requests.

        Raises:
            OSError: the host wants none for longer than :data:`LONGEST_WAIT`.
        """
        while True:
            self._wait()
            self._slots.acquire()
            if not self.remaining:
                return
            self._slots.release()

    def release(self) -> None:
        """Gives the connection back."""
        self._slots.release()

    def _wait(self) -> None:
        while remaining := self.remaining:
            if remaining > LONGEST_WAIT:
                raise OSError(
                    f"the server refuses requests for another {remaining:.0f} seconds; "
                    "try again later with --retry-failed"
                )
            time.sleep(remaining)


class Hosts:
    """The hosts that threads of this process use at the moment, or that asked to wait."""

    def __init__(self, connections: int):
        self._connections = connections
        self._lock = threading.Lock()
        self._hosts: dict[str, Host] = {}

    @contextmanager
    def connection(self, name: str) -> Iterator[Host]:
        """Holds one of a host's connections.

        Raises:
            OSError: as :meth:`Host.acquire`.
        """
        with self._lock:
            host = self._hosts.setdefault(name, Host(self._connections))
            host.users += 1
        try:
            host.acquire()
            try:
                yield host
            finally:
                host.release()
        finally:
            with self._lock:
                host.users -= 1
                if not host.users and not host.remaining:
                    del self._hosts[name]


def retry_after(value: str | None) -> float:
    """The seconds that a ``Retry-After`` asks to wait: a number or a date; 0 if it is neither."""
    value = (value or "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
