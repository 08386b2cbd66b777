"""Progress of long work: a bar on a terminal, a line every few seconds anywhere else.

    with progress_bar(len(images), unit="image", description="validation") as progress:
        for image in images:
            …
            progress.update()

Each phase of a job (features, an epoch, validation) has a bar of its own, whose description names
the phase.
"""

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

__all__ = ["Progress", "in_ray_job", "progress_bar"]

_SECONDS = 5.0  # between two lines; work that takes less than this writes none


def in_ray_job() -> bool:
    """Whether ``ray job submit`` runs this process, whose output is a log that people follow."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


class Progress:
    """Counts finished work and reports it; this base class reports nothing. A context manager."""

    def update(self, count: int = 1) -> None:
        """Adds ``count`` units to the finished work."""

    def set_postfix(self, **figures: object) -> None:
        """Sets the figures that follow the counts, such as a loss, by name."""

    def close(self) -> None:
        """Ends the reports."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close()


class _Bar(Progress):
    """A bar on a terminal."""

    def __init__(self, total: int, unit: str, initial: int, description: str):
        self._bar: tqdm[Any] = tqdm(total=total, initial=initial, unit=unit, desc=description)

    def update(self, count: int = 1) -> None:
        self._bar.update(count)

    def set_postfix(self, **figures: object) -> None:
        self._bar.set_postfix(figures, refresh=False)

    def close(self) -> None:
        self._bar.close()


class _Lines(Progress):
    """A line every few seconds, even while nothing is finished: the job is seen to be alive."""

    def __init__(self, total: int, unit: str, initial: int, description: str):
        self._total, self._unit, self._description = total, unit, description
        self._initial = self._done = initial
        self._figures: dict[str, object] = {}
        self._begin = time.monotonic()
        self._ended = threading.Event()
        self._written = False
        self._thread = threading.Thread(target=self._report, name="progress", daemon=True)
        self._thread.start()

    def update(self, count: int = 1) -> None:
        self._done += count

    def set_postfix(self, **figures: object) -> None:
        self._figures = figures

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        if self._written:
            _write(self.line())

    def _report(self) -> None:
        while not self._ended.wait(_SECONDS):
            _write(self.line())
            self._written = True

    def line(self) -> str:
        """For example ``epoch 3/14: 640 of 6000 images, 52.1 images/s, 1:43 left, loss 2.1``."""
        seconds = time.monotonic() - self._begin
        rate = (self._done - self._initial) / seconds if seconds else 0.0
        parts = [f"{self._done} of {self._total} {self._unit}s", f"{rate:.1f} {self._unit}s/s"]
        if rate and self._done < self._total:
            parts.append(f"{_clock((self._total - self._done) / rate)} left")
        parts += [f"{name} {value}" for name, value in self._figures.items()]
        return (f"{self._description}: " if self._description else "") + ", ".join(parts)


def _clock(seconds: float) -> str:
    """Seconds as ``1:43`` or ``2:01:43``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _write(line: str) -> None:
    """Writes to stderr; ignores a stream that is closed or full."""
    if sys.stderr is None:  # closed before Python started
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return


def progress_bar(
    total: int,
    *,
    unit: str,
    initial: int = 0,
    description: str = "",
    logged: bool = True,
    quiet: bool = False,
) -> Progress:
    """Reports progress towards ``total``, with rate and time left, until it is closed.

    Args:
        total: how many units of work there are.
        unit: a unit's name, in the singular.
        initial: how many units were finished earlier; they do not count towards the rate.
        description: the phase, which comes before the counts.
        logged: without a terminal, write lines.
        quiet: report nothing, as on all workers but the first.
    """
    if quiet:
        return Progress()
    if sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty():
        return _Bar(total, unit, initial, description)
    return _Lines(total, unit, initial, description) if logged else Progress()
