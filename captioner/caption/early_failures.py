"""Stops a job whose first images all fail for the same kind of reason, before it writes a row.

Then the job is at fault and not the images: a disk that is not mounted, a list with wrong
paths, a limit that is too low. Written rows would count as done, and the next run would skip them.
The rows of the first shards are therefore withheld while every image fails alike. They are written
once an image fails differently or succeeds, or when the job ends below the limit.
"""

from collections.abc import Iterator

from captioner.caption.steps import CaptionJob, ShardResult, Withheld, write_part
from captioner.errors import InputError

__all__ = ["EarlyFailures"]


class EarlyFailures:
    """Withholds the rows of a run's first shards while all of their images fail alike."""

    def __init__(self, job: CaptionJob):
        self._job = job
        self._limit = job.run.stop_after_failures
        self._waiting: list[tuple[ShardResult, Withheld]] = []
        self._released = self._limit is None

    def admit(self, result: ShardResult) -> Iterator[ShardResult]:
        """Takes a shard's result; yields the results whose rows are written.

        Raises:
            InputError: the first images all fail alike.
        """
        if result.withheld is None:
            self._released = True
            yield from self.release()
            yield result
            return
        self._waiting.append((result, result.withheld))
        if self._released or len({withheld.kind for _, withheld in self._waiting}) > 1:
            self._released = True
            yield from self.release()
            return
        count = sum(len(withheld.rows) for _, withheld in self._waiting)
        if self._limit is not None and count >= self._limit:
            row = result.withheld.rows[0]
            raise InputError(
                f"the first {count} images all fail for the same reason: {row.status}: "
                f"{row.error}, for example {row.uri}. None of their rows is written. Fix the cause "
                "and run the same command again; to write the rows anyway, add "
                "--stop-after-failures none"
            )

    def release(self) -> Iterator[ShardResult]:
        """Writes the rows that are withheld, shard by shard."""
        waiting, self._waiting = self._waiting, []
        for result, withheld in waiting:
            write_part(self._job, withheld.shard, withheld.rows)
            yield result
