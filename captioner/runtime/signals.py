"""SIGTERM and Ctrl-C: an orderly end, in the time that a cluster grants."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

__all__ = ["Signals", "catch_signals", "keep_handlers", "limit_stopping"]

_STOPPING = (signal.SIGTERM, signal.SIGINT)

_limit: float | None = None  # seconds; see limit_stopping


@dataclass
class Signals:
    """The number of the first signal that arrived, or None."""

    received: int | None = None

    def check(self) -> None:
        """Raises KeyboardInterrupt where a signal arrived while nothing could be raised."""
        if self.received is not None:
            raise KeyboardInterrupt


def limit_stopping(seconds: float | None) -> None:
    """Ends this process so many seconds after the first signal that :func:`catch_signals` catches.

    Clean-up may wait for a store that does not answer, and Kubernetes kills a pod 30 seconds after
    SIGTERM. For programs that own their process; None, as at first, sets no limit.
    """
    global _limit
    _limit = seconds


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """While entered, SIGTERM raises KeyboardInterrupt in the main thread, as Ctrl-C does.

    It is KeyboardInterrupt because Ray's waiting loops let that through. After the first signal
    SIGTERM is ignored, for the end to be orderly; Ctrl-C interrupts the end as well. A signal that
    is ignored already stays ignored. In any thread but the main one this does nothing.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signals.received = number
        raise KeyboardInterrupt

    with keep_handlers(), _watchdog():
        for number in _STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, stop)
        yield signals


@contextmanager
def _watchdog() -> Iterator[None]:
    """Ends the process after the time limit, whatever the main thread does.

    The interpreter itself writes a signal's number to a socket as the signal arrives. The handler
    has to wait for the main thread, which may be in a library; and it could not start a thread if
    it interrupted the start of another one, which holds the lock.
    """
    if _limit is None:
        yield
        return
    numbers, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    before = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_after, args=(numbers, _limit), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        wakeup.close()


def _end_after(numbers: socket.socket, seconds: float) -> None:
    """Waits for a signal, and then so many seconds, to end the process."""
    with numbers:
        while received := numbers.recv(1):
            if received[0] in _STOPPING:
                time.sleep(seconds)
                _end(received[0])


def _end(number: int) -> None:
    """Ends the process at once, with the exit code of the signal."""
    print(
        f"captioner: stopped by {signal.Signals(number).name}, without the time to clean up; "
        "run the same command again to resume",
        file=sys.stderr,
        flush=True,
    )
    os._exit(128 + number)


@contextmanager
def keep_handlers() -> Iterator[None]:
    """Restores the handlers of SIGTERM and Ctrl-C when the block ends."""
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in _STOPPING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
