"""What the training loop asks of a logger, and several loggers as one."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import TracebackType
from typing import Protocol

from captioner.config.training import LogKind
from captioner.errors import InputError
from captioner.training.directory import TrainingDirectory

__all__ = ["Logger", "Loggers", "check_packages"]

_PACKAGES: tuple[LogKind, ...] = ("wandb", "mlflow")  # each in the extra of its name


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

    @classmethod
    def open(cls, kinds: Sequence[LogKind], directory: TrainingDirectory) -> "Loggers":
        """Opens a run's loggers, which continue what an earlier process logged of it.

        Raises:
            InputError: a service refuses the run, or cannot be reached.
        """
        opened: list[Logger] = []
        try:
            for kind in dict.fromkeys(kinds):
                opened.append(_open(kind, directory))  # noqa: PERF401  # what is open is closed
        except BaseException:
            cls(opened).close(failed=True)
            raise
        return cls(opened)

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


def check_packages(kinds: Sequence[LogKind]) -> None:
    """Checks that the packages of some loggers are installed, without importing them.

    Raises:
        InputError: one is missing.
    """
    for kind in kinds:
        if kind in _PACKAGES:
            spec = find_spec(kind)
            # wandb writes to a folder "wandb", which Python takes for a package without a file.
            if spec is None or spec.origin is None:
                raise InputError(
                    f"--log {kind} needs captioner[{kind}]: pip install 'captioner[{kind}]'"
                )


def _open(kind: LogKind, directory: TrainingDirectory) -> Logger:
    if kind == "wandb":
        from captioner.training.loggers.wandb import WandbLogger

        return WandbLogger(directory)
    if kind == "mlflow":
        from captioner.training.loggers.mlflow import MlflowLogger

        return MlflowLogger(directory)
    from captioner.training.loggers.tensorboard import TensorBoardLogger

    return TensorBoardLogger(directory)
