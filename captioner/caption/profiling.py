"""Records what torch does in a few batches of a caption job, as a trace that Chrome opens."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from torch.profiler import profile, record_function

from captioner import storage

__all__ = ["Profiler"]

_BATCHES = 3  # recorded batches, which take some megabytes
_SILENT = "99"  # a log level above all messages of torch's profiler


class Profiler:
    """Records a few batches after the first, which compiles kernels and allocates memory.

    Enter it around a job. The trace is written as soon as the batches are done, or when a shorter
    job ends; a job that fails earlier writes none.

    Args:
        target: the file to write, local or in a bucket; compressed if its name ends in ``.gz``.
        skip: batches before the recorded ones.
    """

    def __init__(self, target: str, *, skip: int = 1):
        os.environ.setdefault("KINETO_LOG_LEVEL", _SILENT)
        self._target = storage.absolute(target)
        self._first, self._last = skip + 1, skip + _BATCHES
        self._batch = 0
        self._profile: profile | None = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if self._profile:
            self._stop(write=kind is None)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Enter it around each batch.

        Raises:
            OutputError: the trace cannot be written.
        """
        self._batch += 1
        if self._batch == self._first:
            self._profile = profile()
            self._profile.start()
        with record_function(f"batch {self._batch}"):
            yield
        if self._batch == self._last:
            self._stop(write=True)

    def _stop(self, *, write: bool) -> None:
        recorded, self._profile = self._profile, None
        if recorded is None:
            return
        recorded.stop()
        if not write:
            return
        with tempfile.TemporaryDirectory() as directory:
            path = Path(
                directory, "trace.json.gz" if self._target.endswith(".gz") else "trace.json"
            )
            recorded.export_chrome_trace(str(path))
            storage.write(self._target, path.read_bytes())
