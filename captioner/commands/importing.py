"""Imports of packages that take long: only a command that needs them imports them."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import click

__all__ = ["INTERRUPTED", "importing"]

INTERRUPTED = "captioner: stopped by SIGINT"


@contextmanager
def importing() -> Iterator[None]:
    """A context for imports: without garbage collection, and Ctrl-C ends the process at once.

    Garbage collection takes a fifth of the imports' time and frees almost nothing: what imports
    make stays. Later collections, such as the one at exit, skip it too. A package whose import is
    interrupted by an exception may continue with a part of it missing.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop_at_once)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
        if interrupt is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupt)


def _stop_at_once(*_: object) -> None:
    click.echo(INTERRUPTED, err=True)
    os._exit(130)
