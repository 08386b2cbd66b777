"""SIGTERM and Ctrl-C: an orderly end, also where it is Ray that waits."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

__all__ = ["Signals", "catch_signals", "keep_handlers"]


_STOPPING = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Signals:
    """What has arrived: the number of the first signal, or None."""

    received: int | None = None

    def check(self) -> None:
        """Raises KeyboardInterrupt where a signal came while nothing could be raised."""
        if self.received is not None:
            raise KeyboardInterrupt


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """While entered, SIGTERM raises KeyboardInterrupt in the main thread, as Ctrl-C does.

    KeyboardInterrupt itself, because it is what Ray's waiting loops let through. After the first
    signal SIGTERM is ignored, for the end to be orderly; Ctrl-C interrupts that too. A signal
    that is ignored already stays so. In another thread than the main one this does nothing.
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

    with keep_handlers():
        for number in _STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, stop)
        yield signals


@contextmanager
def keep_handlers() -> Iterator[None]:
    """Puts the handlers of SIGTERM and Ctrl-C back in the end, whatever was done to them."""
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in _STOPPING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
