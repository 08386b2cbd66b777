"""The local engine: threads read and decode the next images while the model captions."""

import itertools
import operator
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pyarrow as pa
import torch

from captioner.caption.batches import BatchCaptioner
from captioner.caption.crash_log import CrashLog
from captioner.caption.profiling import Profiler
from captioner.caption.steps import (
    CaptionJob,
    Loaded,
    Results,
    ShardResult,
    finish_shard,
    load_images,
)
from captioner.caption.suspects import caption_suspects
from captioner.caption.timing import Timing
from captioner.data.reading import groups
from captioner.errors import DeviceError
from captioner.model.base import Model
from captioner.output.manifest import Shard
from captioner.runtime.prefetch import look_ahead
from captioner.schema import CaptionRow

__all__ = ["run_local"]

_BATCHES_AHEAD = 2  # of decoded images, at least
_IMAGES_AHEAD = 4  # for each thread that decodes, at least
_BYTES_AHEAD = 1 << 30  # of decoded images, at most
#: An image in progress: its shard's number, and its group with its place in it.
_Loading = tuple[int, Future[list[Loaded]], int]

_CRASH_LOG_SECONDS = 5  # to wait for the crash log's entries when the job stops


def run_local(
    job: CaptionJob, model: Model, shards: list[Shard], captioned: Callable[[int], None]
) -> Results:
    """Captions shards, beginning with the shards that processes died on.

    Args:
        job: the settings.
        model: the model.
        shards: the shards.
        captioned: called with the number of images after each batch; a shard may take minutes.

    Raises:
        DeviceError: the device is lost: only another process can use it again.
    """
    captioner = BatchCaptioner.load(job, model)
    try:
        if job.run.profile is None:
            yield from _Engine(job, captioner, nullcontext, captioned).run(shards)
            return
        only_one = len(shards) == 1 and len(shards[0]) <= captioner.batch_size
        with Profiler(job.run.profile, skip=0 if only_one else 1) as profiler:
            yield from _Engine(job, captioner, profiler.batch, captioned).run(shards)
    except torch.AcceleratorError as error:
        first = str(error).strip().split("\n")[0]
        raise DeviceError(
            f"{captioner.device} stopped working: {first}. Run the same command again: finished "
            "shards are kept, and an image that causes this error is found and marked as failed"
        ) from error


class _Engine:
    """Threads that read, the model, and a thread that writes."""

    def __init__(
        self,
        job: CaptionJob,
        captioner: BatchCaptioner,
        around_batch: Callable[[], AbstractContextManager[None]],
        captioned: Callable[[int], None],
    ):
        self._job, self._captioner = job, captioner
        self._around_batch, self._captioned = around_batch, captioned
        self._crash_log = CrashLog(job.output)
        self._decoders = job.run.decoders or os.cpu_count() or 1
        self._begun: list[Future[None]] = []  # entries in the crash log

    def run(self, shards: list[Shard]) -> Results:
        """Captions shards; yields their results as the parts are written."""
        suspects = self._crash_log.shards()
        for shard in shards:
            if shard.number in suspects:  # first, while no other image is in progress
                rows = caption_suspects(self._job, self._captioner, shard, self._crash_log)
                self._captioned(len(rows))
                yield finish_shard(self._job, shard, rows, self._captioner.take_timing())
        readers = ThreadPoolExecutor(self._decoders, thread_name_prefix="decode")
        writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        try:
            others = [shard for shard in shards if shard.number not in suspects]
            yield from self._caption(others, readers, writer)
        finally:
            # Do not wait for reads, which may hang for minutes; wait for the part being written.
            readers.shutdown(wait=False, cancel_futures=True)
            writer.shutdown(cancel_futures=True)
            wait([each for each in self._begun if not each.cancelled()], _CRASH_LOG_SECONDS)

    def _caption(
        self, shards: list[Shard], readers: ThreadPoolExecutor, writer: ThreadPoolExecutor
    ) -> Results:
        """Captions shards; a shard's part is written while the next shard is captioned."""
        writing: Future[ShardResult] | None = None
        for shard, batches in self._batches(shards, readers):
            rows: list[CaptionRow] = []
            for batch in batches:
                with self._around_batch():
                    self._captioner(batch)
                self._captioned(len(batch))
                rows += [loaded.row for loaded in batch]
            if writing:
                yield self._written(writing)
            writing = writer.submit(self._write, shard, rows)
        if writing:
            yield self._written(writing)

    def _batches(
        self, shards: list[Shard], readers: ThreadPoolExecutor
    ) -> Iterator[tuple[Shard, Iterator[list[Loaded]]]]:
        """Each shard with its batches of loaded images; threads load ahead, across shards."""
        loading = look_ahead(
            self._load(shards, readers),
            lambda: min(
                max(_BATCHES_AHEAD * self._captioner.batch_size, _IMAGES_AHEAD * self._decoders),
                _BYTES_AHEAD // self._job.preparation.most_bytes,
            ),
        )
        numbered = {shard.number: shard for shard in shards}
        for number, images in itertools.groupby(loading, key=operator.itemgetter(0)):
            yield numbered[number], self._batches_of(images)

    def _batches_of(self, images: Iterator[_Loading]) -> Iterator[list[Loaded]]:
        while some := list(itertools.islice(images, self._captioner.batch_size)):
            begin = time.perf_counter()
            batch = [group.result()[place] for _, group, place in some]
            self._captioner.timing.waited_for_decode += time.perf_counter() - begin
            yield batch

    def _load(self, shards: Iterable[Shard], readers: ThreadPoolExecutor) -> Iterator[_Loading]:
        """Each image in progress; asking for one begins to read its group."""

        def load(begun: Future[None], images: pa.Table) -> list[Loaded]:
            begun.result()
            return load_images(self._job, images)

        for shard in shards:
            # In another thread, to keep the model busy.
            begun = readers.submit(self._crash_log.begin, shard.number)
            self._begun = [*(each for each in self._begun if not each.done()), begun]
            for group in groups(shard.images):
                images = shard.images.slice(group.start, len(group))
                loading = readers.submit(load, begun, images)
                yield from ((shard.number, loading, place) for place in range(len(group)))

    def _write(self, shard: Shard, rows: list[CaptionRow]) -> ShardResult:
        self._crash_log.end(shard.number)
        return finish_shard(self._job, shard, rows, Timing())

    def _written(self, writing: Future[ShardResult]) -> ShardResult:
        begin = time.perf_counter()
        result = writing.result()
        timing = Timing(waited_for_write=time.perf_counter() - begin)
        timing += result.timing
        timing += self._captioner.take_timing()
        return replace(result, timing=timing)
