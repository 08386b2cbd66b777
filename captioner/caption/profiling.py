"""What torch does in a few batches of a caption job, as a trace that Chrome opens."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from torch.profiler import profile, record_function

from captioner import storage

__all__ = ["Profiler"]

_BATCHES = 3  # that are recorded: some megabytes
_SILENT = "99"  # above all that torch's profiler tells stderr


class Profiler:
    """Records the first few batches but one, which has kernels to compile and memory to find.

    To be entered around a job. The trace is written as soon as these batches are done, or when the
    job ends before; not where it fails before.

    Args:
        target: the file to write, local or in a bucket; packed where its name ends in ``.gz``.
        skip: batches before those that are recorded.
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
        """To be entered around a batch.

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
        assert self._profile is not None
        recorded, self._profile = self._profile, None
        recorded.stop()
        if not write:
            return
        with tempfile.TemporaryDirectory() as directory:
            path = Path(
                directory, "trace.json.gz" if self._target.endswith(".gz") else "trace.json"
            )
            recorded.export_chrome_trace(str(path))
            storage.write(self._target, path.read_bytes())
