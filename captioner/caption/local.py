"""The job in this process: threads read and decode the next images while the model captions."""

import itertools
import operator
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from captioner.caption.batches import BatchCaptioner, caption_alone
from captioner.caption.crash_log import Attempts
from captioner.caption.profiling import Profiler
from captioner.caption.steps import CaptionJob, Loaded, Written, load_image, write_part
from captioner.caption.timing import Work
from captioner.model.bundle import Bundle
from captioner.output.manifest import Shard
from captioner.schema import CaptionRow, rows_to_table

__all__ = ["run_local"]

Item = TypeVar("Item")


def run_local(job: CaptionJob, bundle: Bundle, shards: list[Shard]) -> Written:
    """Does the shards, those first that were in a process's hands when it died."""
    captioner = BatchCaptioner.load(job, bundle)
    if job.run.profile is None:
        yield from _run(job, captioner, shards, nullcontext)
        return
    only_one = len(shards) == 1 and len(shards[0].uris) <= captioner.batch_size
    with Profiler(job.run.profile, skip=0 if only_one else 1) as profiler:
        yield from _run(job, captioner, shards, profiler.batch)


def _run(
    job: CaptionJob,
    captioner: BatchCaptioner,
    shards: list[Shard],
    around_batch: Callable[[], AbstractContextManager[None]],
) -> Written:
    attempts = Attempts(job.output)
    suspects = attempts.suspects()
    for shard in shards:
        if shard.number in suspects:  # before all others, so that nothing else goes on meanwhile
            rows = caption_alone(job, captioner, shard, attempts)
            yield write_part(job, shard, rows_to_table(rows)), captioner.take_work()
    others = {shard.number: shard for shard in shards if shard.number not in suspects}
    decoders = job.run.decoders or os.cpu_count() or 1
    readers = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
    writer = ThreadPoolExecutor(1, thread_name_prefix="write")
    try:
        writing: Future[tuple[dict[str, int], Work]] | None = None

        def written() -> tuple[dict[str, int], Work]:
            assert writing is not None
            begin = time.perf_counter()
            counts, work = writing.result()
            work += Work(held=time.perf_counter() - begin)
            work += captioner.take_work()
            return counts, work

        loading = _ahead(
            _load(job, others.values(), readers, attempts),
            lambda: max(2 * captioner.batch_size, 4 * decoders),
        )
        for number, images in itertools.groupby(loading, key=operator.itemgetter(0)):
            rows = []
            while some := list(itertools.islice(images, captioner.batch_size)):
                begin = time.perf_counter()
                batch = [loaded.result() for _, loaded in some]
                captioner.work.starved += time.perf_counter() - begin
                with around_batch():
                    captioner(batch)
                rows += [loaded.row for loaded in batch]
            if writing:
                yield written()
            writing = writer.submit(_finish, job, others[number], rows, attempts)
        if writing:
            yield written()
    finally:
        for pool in (readers, writer):
            pool.shutdown(cancel_futures=True)


def _load(
    job: CaptionJob, shards: Iterable[Shard], readers: ThreadPoolExecutor, attempts: Attempts
) -> Iterator[tuple[int, Future[Loaded]]]:
    """Each image with its shard's number; asking for one begins to read it."""

    def load(begun: Future[None], uri: str, size: int | None) -> Loaded:
        begun.result()
        return load_image(job, uri, size)

    for shard in shards:
        begun = readers.submit(attempts.begin, shard.number)  # here it would keep the model waiting
        for uri, size in zip(shard.uris, shard.sizes, strict=True):
            yield shard.number, readers.submit(load, begun, uri, size)


def _ahead(items: Iterable[Item], count: Callable[[], int]) -> Iterator[Item]:
    """The items, asked for so many before they are handed out."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        while len(waiting) > count():
            yield waiting.popleft()
    yield from waiting


def _finish(
    job: CaptionJob, shard: Shard, rows: list[CaptionRow], attempts: Attempts
) -> tuple[dict[str, int], Work]:
    begin = time.perf_counter()
    attempts.end(shard.number)
    counts = write_part(job, shard, rows_to_table(rows))
    return counts, Work(write=time.perf_counter() - begin)
