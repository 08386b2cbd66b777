"""What the training loop asks of a logger, and several loggers as one."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol

__all__ = ["Logger", "Loggers"]


class Logger(Protocol):
    """Receives the figures of a run, on the worker that writes.

    A run that was killed trains again what follows its checkpoint: figures may come twice.
    """

    def log_step(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of a step, or of the validation after it, called ``step/NAME``."""

    def log_epoch(
        self, epoch: int, figures: Mapping[str, float], captions: Sequence[tuple[str, str]]
    ) -> None:
        """Takes the figures of an epoch, and the names and captions of some validation images."""

    def flush(self) -> None:
        """Writes what it has taken."""

    def close(self, *, failed: bool) -> None:
        """Ends the log; what was not flushed may be lost."""


class Loggers:
    """The loggers of a run; a context manager that closes them."""

    def __init__(self, loggers: Sequence[Logger] = ()):
        self._loggers = loggers

    def log_step(self, step: int, figures: Mapping[str, float]) -> None:
        """See :meth:`Logger.log_step`; the names are still without ``step/``."""
        named = {f"step/{name}": value for name, value in figures.items() if name != "step"}
        for each in self._loggers:
            each.log_step(step, named)

    def log_epoch(
        self, epoch: int, figures: Mapping[str, float], captions: Sequence[tuple[str, str]]
    ) -> None:
        """See :meth:`Logger.log_epoch`."""
        named = {name: value for name, value in figures.items() if name not in ("epoch", "step")}
        for each in self._loggers:
            each.log_epoch(epoch, named, captions)

    def flush(self) -> None:
        """See :meth:`Logger.flush`."""
        for each in self._loggers:
            each.flush()

    def close(self, *, failed: bool) -> None:
        """See :meth:`Logger.close`."""
        for each in self._loggers:
            each.close(failed=failed)

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)
