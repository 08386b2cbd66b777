"""TensorBoard: ``tensorboard/`` in the run's directory."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from captioner import storage
from captioner.errors import OutputError
from captioner.training.directory import TrainingDirectory
from captioner.training.journal import escape_markdown

__all__ = ["TensorBoardLogger"]

_EVENTS = "tensorboard/events.out.tfevents.1.captioner"


class TensorBoardLogger:
    """Appends to one event file, which an open TensorBoard follows.

    Where a run was killed before its checkpoint, the epoch's records come twice, and TensorBoard
    shows the later ones.
    """

    def __init__(self, directory: TrainingDirectory):
        self._uri = storage.join(directory.uri, _EVENTS)
        self._pending: list[Callable[[Any], None]] = []  # each receives the writer

    def log_step(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes a step's figures."""
        self._pending.append(partial(_add, step, figures, time.time()))

    def log_epoch(
        self, epoch: int, figures: Mapping[str, float], captions: Sequence[tuple[str, str]]
    ) -> None:
        """Takes an epoch's figures and captions."""
        lines = [f"- {escape_markdown(name)}: {escape_markdown(text)}" for name, text in captions]
        text, now = "\n".join(lines), time.time()
        self._pending += [
            partial(_add, epoch, figures, now),
            lambda writer: writer.add_text("captions", text, epoch, now),
        ]

    def flush(self) -> None:
        """Appends the records.

        Raises:
            OutputError: the file cannot be written.
        """
        if self._pending:
            _append(self._uri, self._records())
            self._pending.clear()

    def close(self, *, failed: bool) -> None:
        """Drops what was not flushed: a resumed run computes it again."""
        self._pending.clear()

    def _records(self) -> bytes:
        from tensorboardX import SummaryWriter

        with tempfile.TemporaryDirectory() as folder:
            writer = SummaryWriter(folder)
            for add in self._pending:
                add(writer)
            writer.close()
            [path] = Path(folder).iterdir()
            return path.read_bytes()


def _add(place: int, figures: Mapping[str, float], now: float, writer: Any) -> None:
    for name, value in figures.items():
        writer.add_scalar(name, value, place, now)


def _append(uri: str, records: bytes) -> None:
    """Appends to a file; in a bucket, rewrites the file."""
    try:
        if storage.is_local(uri):
            path = Path(storage.as_path(uri))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(records)
            return
        before = storage.read(uri)
    except FileNotFoundError:
        before = b""
    except OSError as error:
        raise OutputError(f"cannot write {uri}: {error.strerror or error}") from error
    storage.write(uri, before + records)
