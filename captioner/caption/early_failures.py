"""A job whose first images all fail for the same kind of reason stops before it writes a row.

Such a reason is the job's and not the images': a disk that is not mounted, a list with wrong paths,
a limit that is too low. A million rows that say so would count as done, and the next run would do
nothing. The rows of the first shards are therefore withheld while all of them fail alike. They are
written as soon as one image does not, or when the job ends with fewer of them than the limit.
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
        self._passed = self._limit is None

    def admit(self, result: ShardResult) -> Iterator[ShardResult]:
        """Takes a shard's result; yields the results whose rows are written.

        Raises:
            InputError: the first images all fail alike.
        """
        if result.withheld is None:
            self._passed = True
            yield from self.release()
            yield result
            return
        self._waiting.append((result, result.withheld))
        if self._passed or len({withheld.kind for _, withheld in self._waiting}) > 1:
            self._passed = True
            yield from self.release()
            return
        count = sum(len(withheld.rows) for _, withheld in self._waiting)
        if self._limit is not None and count >= self._limit:
            row = result.withheld.rows[0]
            raise InputError(
                f"the first {count} images all fail alike: {row.status}: {row.error}, such as "
                f"{row.uri}. None of their rows is written. Fix the cause and run the same command "
                "again; to get the rows all the same, add --stop-after-failures none"
            )

    def release(self) -> Iterator[ShardResult]:
        """Writes the rows that are withheld, shard by shard."""
        waiting, self._waiting = self._waiting, []
        for result, withheld in waiting:
            write_part(self._job, withheld.shard, withheld.rows)
            yield result
