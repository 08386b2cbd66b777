"""Protects work from standard streams that are closed, full or without a reader."""

import errno
import io
import os
import sys

__all__ = ["error_of_stdout", "has_own_streams", "protect_streams"]


class _Lenient(io.FileIO):
    """A descriptor to write to, which keeps its first error instead of raising it."""

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "wb", closefd=False)
        self.error: OSError | None = None

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        """Writes as much as can be written; claims to have written the rest, too."""
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes


class _Stream(io.TextIOWrapper):
    """A standard stream of this process."""


def protect_streams() -> None:
    """Makes stdout and stderr of this process never raise.

    Descriptors that are closed are opened on /dev/null: the next file that is opened would get
    their numbers, and the messages. Streams that somebody has replaced stay as they are.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or isinstance(stream, _Stream):
            continue
        setattr(sys, name, _protected(number, stream))


def _protected(number: int, stream: "io.TextIOWrapper | None") -> _Stream:
    return _Stream(
        io.BufferedWriter(_Lenient(number)),  # type: ignore[type-var]
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=number == 2 or os.isatty(number),
    )


def has_own_streams() -> bool:
    """Whether :func:`protect_streams` has taken charge: the process is ours alone."""
    return isinstance(sys.stdout, _Stream)


def error_of_stdout() -> str | None:
    """Why output was lost, for example a full disk; None if no output was lost.

    A reader that stops early, as in ``| head``, is not an error.
    """
    if not isinstance(sys.stdout, _Stream):
        return None
    sys.stdout.flush()
    error = sys.stdout.buffer.raw.error  # type: ignore[attr-defined]
    if error is None or error.errno == errno.EPIPE:
        return None
    return str(error.strerror)
