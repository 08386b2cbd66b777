"""The outcome of a caption job: the audit, summary.json, and the limit on failed images."""

import time
from collections import Counter
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from captioner.caption.crash_log import CrashLog
from captioner.caption.inputs import Inputs
from captioner.caption.summary import Done, Summary
from captioner.errors import (
    CaptionerError,
    DeviceError,
    ErrorRateError,
    IncompleteError,
    counted,
)
from captioner.output.audit import audit, count_finished
from captioner.output.directory import OutputDirectory
from captioner.output.manifest import read_manifest
from captioner.output.rows import read_rows
from captioner.runtime.signals import Signals

__all__ = ["Outcome", "check_error_rate"]

_SHOWN = 20  # images without a row that an error names


class Outcome:
    """Records the outcome of a run, what it did and what the output holds, in summary.json."""

    def __init__(self, directory: OutputDirectory, images: int, unlisted: int):
        self._directory, self._images, self._unlisted = directory, images, unlisted
        self._crash_log = CrashLog(directory.uri)
        self._started, self._begin = _now(), time.monotonic()

    def close(self, done: Done) -> Summary:
        """After all shards.

        Raises:
            IncompleteError: images have no row.
        """
        self._directory.delete_leftovers()
        accounts = audit(self._directory)
        summary = self._write(done, accounts.rows, missing=len(accounts.missing))
        if accounts.missing:
            first = ", ".join(accounts.missing_names[:_SHOWN])
            raise IncompleteError(
                f"{counted(len(accounts.missing), 'image')} without a row; run the same command "
                f"again. Missing: {first}"
            )
        self._crash_log.delete()
        return summary

    def close_after(self, problem: BaseException, done: Done, signals: Signals) -> None:
        """After an error or a signal, which leaves no time to read the parts."""
        self._directory.delete_leftovers()
        orderly = isinstance(problem, (CaptionerError, KeyboardInterrupt))
        # After a lost device the crash log names the image at fault.
        if orderly and not isinstance(problem, DeviceError):
            self._crash_log.clear_after_orderly_end()
        if signals.received is not None or isinstance(problem, KeyboardInterrupt):
            finished = count_finished(self._directory, read_manifest(self._directory))
            self._write(done, {}, missing=self._images - finished, error="stopped")
            return
        accounts = audit(self._directory)
        error = str(problem) or type(problem).__name__
        self._write(done, accounts.rows, missing=len(accounts.missing), error=error)

    def _write(
        self, done: Done, rows: dict[str, int], *, missing: int, error: str | None = None
    ) -> Summary:
        summary = Summary(
            output=self._directory.uri,
            images=self._images,
            rows=rows,
            missing=missing,
            unlisted=self._unlisted,
            captioned=done.images,
            seconds=time.monotonic() - self._begin,
            started=self._started,
            ended=_now(),
            timing=done.timing,
            error=error,
        )
        self._directory.write_summary(summary.figures())
        return summary


def check_error_rate(summary: Summary, inputs: Inputs, unlisted: set[str]) -> None:
    """Compares the share of listed images that are not ok with the limit.

    Raises:
        ErrorRateError: it is larger.
    """
    rows = Counter(summary.rows)
    if unlisted:
        rows -= _statuses(inputs.directory, unlisted)
    images = rows.total()
    bad = (images - rows["ok"]) / images if images else 0.0
    if bad > inputs.run.max_error_rate:
        raise ErrorRateError(
            f"{summary.counts()}: {bad:.1%} of the listed images are not ok, "
            f"more than --max-error-rate {inputs.run.max_error_rate:.1%}; "
            "captioner report shows why"
        )


def _statuses(directory: OutputDirectory, uris: set[str]) -> Counter[str]:
    """The rows of some images, by status."""
    wanted, counts = pa.array(sorted(uris), pa.string()), Counter[str]()
    for rows in read_rows(directory, ["uri", "status"]):
        counts.update(rows.filter(pc.is_in(rows["uri"], wanted))["status"].to_pylist())
    return counts


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
