"""The job in this process: threads read and decode the next shard while the model captions this."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from captioner.bundle import Bundle
from captioner.containment import Attempts, BatchCaptioner, caption_alone
from captioner.manifest import Shard
from captioner.schema import CaptionRow, rows_to_table
from captioner.stages import CaptionJob, Counts, Loaded, load_image, write_part

__all__ = ["run_local"]


def run_local(job: CaptionJob, bundle: Bundle, shards: list[Shard]) -> Counts:
    """Does the shards, those first that were in a process's hands when it died."""
    captioner = BatchCaptioner.load(job, bundle)
    attempts = Attempts(job.output)
    suspects = attempts.suspects()
    for shard in shards:
        if shard.number in suspects:  # before all others, so that nothing else goes on meanwhile
            rows = caption_alone(job, captioner, shard, attempts)
            yield write_part(job, shard, rows_to_table(rows))
    others = (shard for shard in shards if shard.number not in suspects)
    decoders = job.run.decoders or os.cpu_count() or 1
    readers = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
    writer = ThreadPoolExecutor(1, thread_name_prefix="write")
    try:
        writing: Future[dict[str, int]] | None = None
        for shard, loading in _load_ahead(job, others, readers, attempts):
            rows = []
            for futures in _batches(loading, job.run.batch_size):
                batch = [future.result() for future in futures]
                captioner(batch)
                rows += [loaded.row for loaded in batch]
            if writing:
                yield writing.result()
            writing = writer.submit(_finish, job, shard, rows, attempts)
        if writing:
            yield writing.result()
    finally:
        for pool in (readers, writer):
            pool.shutdown(cancel_futures=True)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def _load_ahead(
    job: CaptionJob, shards: Iterable[Shard], readers: ThreadPoolExecutor, attempts: Attempts
) -> Iterator[tuple[Shard, list[Future[Loaded]]]]:
    """Shards and their images' futures; the next shard is begun before one is handed out."""
    ahead: deque[tuple[Shard, list[Future[Loaded]]]] = deque()
    for shard in shards:
        begun = readers.submit(attempts.begin, shard.number)  # here it would keep the model waiting
        images_of = zip(shard.uris, shard.sizes, strict=True)
        futures = [readers.submit(_load, job, begun, uri, size) for uri, size in images_of]
        ahead.append((shard, futures))
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


def _load(job: CaptionJob, begun: Future[None], uri: str, size: int | None) -> Loaded:
    begun.result()
    return load_image(job, uri, size)


def _finish(
    job: CaptionJob, shard: Shard, rows: list[CaptionRow], attempts: Attempts
) -> dict[str, int]:
    attempts.end(shard.number)
    return write_part(job, shard, rows_to_table(rows))
