"""The stages of a caption job as Ray Data runs them: a shard is one row, one block, all the way.

A worker that only reads, decodes or writes imports this, and so neither torch nor timm: they take
seconds and hundreds of megabytes a process.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import partial, wraps
from typing import Any

import numpy as np
import pyarrow as pa

from captioner.caption.crash_log import Attempts
from captioner.caption.steps import CaptionJob, Loaded, load_image, write_part
from captioner.caption.timing import Work
from captioner.errors import CaptionerError, InputError
from captioner.output.manifest import Shard
from captioner.schema import COLUMNS, CaptionRow, rows_to_table

__all__ = ["CaptionStage", "load_stage", "write_stage"]

# Threads of a decode task: reading waits for the network, and Pillow decodes without Python's lock.
_READERS = 4

_SHARD = pa.schema(
    {
        "number": pa.int32(),
        "uris": pa.list_(pa.string()),
        "sizes": pa.list_(pa.int64()),
        "redone": pa.list_(pa.int64()),
        "rows": pa.list_(pa.struct(list(COLUMNS))),
        "pixels": pa.list_(pa.large_binary()),
        "ready": pa.float64(),
        "work": pa.struct([(each.name, pa.float64()) for each in fields(Work)]),
        "problem": pa.list_(pa.string()),
    }
)


def _with_problems(stage: Callable[..., pa.Table]) -> Callable[..., pa.Table]:
    """A stage whose errors come out in its row, and go through the stages after it as they are.

    Raised in a stage they would reach the driver as pages of Ray's own frames.
    """

    @wraps(stage)
    def run(*arguments: Any, **keywords: Any) -> pa.Table:
        table = arguments[-1]
        if "problem" in table.column_names and table["problem"][0].is_valid:
            return table
        try:
            return stage(*arguments, **keywords)
        except CaptionerError as error:
            problem = [type(error).__name__, str(error)]
            return pa.Table.from_pylist([{"problem": problem}], schema=_SHARD)

    return run


def _pack(shard: Shard, images_of: Sequence[Loaded] | None, work: Work) -> pa.Table:
    """A shard as one row, with what it took so far; without images where they are yet to be loaded.

    ``ready`` is the time by the clock of this machine.
    """
    rows = pixels = None
    if images_of is not None:
        rows = [asdict(image.row) for image in images_of]
        pixels = [
            None if image.pixels_HW3 is None else image.pixels_HW3.tobytes() for image in images_of
        ]
    row = {"rows": rows, "pixels": pixels, "ready": time.time(), "work": asdict(work)}
    return pa.Table.from_pylist([asdict(shard) | row], schema=_SHARD)


def _unpack(table: pa.Table, image_size: int) -> tuple[Shard, list[Loaded] | None]:
    [values] = table.select(["number", "uris", "sizes", "redone"]).to_pylist()
    shard = Shard(**values)
    [rows], [pixels] = table["rows"].to_pylist(), table["pixels"]
    if rows is None:
        return shard, None
    shape = (image_size, image_size, 3)
    arrays = (
        np.frombuffer(data.as_buffer(), np.uint8).reshape(shape) if data.is_valid else None
        for data in pixels.values
    )
    return shard, [
        Loaded(CaptionRow(**row), pixels_HW3) for row, pixels_HW3 in zip(rows, arrays, strict=True)
    ]


@_with_problems
def load_stage(table: pa.Table, job: CaptionJob) -> pa.Table:
    """A shard in; its images loaded out, unless a process died with it."""
    [shard] = (Shard(**row) for row in table.to_pylist())
    attempts = Attempts(job.output)
    if attempts.deaths(shard.number) is not None:
        return _pack(shard, None, Work())
    attempts.begin(shard.number)
    with ThreadPoolExecutor(job.run.decoders or _READERS) as pool:
        loaded = list(pool.map(partial(load_image, job), shard.uris, shard.sizes))
    attempts.end(shard.number)
    return _pack(shard, loaded, Work(decode=sum(each.seconds for each in loaded)))


class CaptionStage:
    """A process that holds the model."""

    def __init__(self, job: CaptionJob, bundle: Any, threads: int | None):
        import ray
        import torch

        from captioner.caption.batches import BatchCaptioner

        if threads is not None:  # Ray sets one thread where an actor reserves less than a CPU
            torch.set_num_threads(threads)
        self.job = job
        self.attempts = Attempts(job.output)
        self.problem: CaptionerError | None = None
        try:
            if job.run.device == "auto" and ray.get_gpu_ids() and not torch.cuda.is_available():
                raise InputError(
                    "Ray set a GPU aside, but torch cannot use it: nvidia-smi shows the driver, "
                    f"torch.version.cuda is {torch.version.cuda}"
                )
            self.captioner = BatchCaptioner.load(job, ray.get(bundle))
        except CaptionerError as problem:  # raised here, it would come as pages of Ray's frames
            self.problem = problem
        self.ended: float | None = None  # when the last shard did

    @_with_problems
    def __call__(self, table: pa.Table) -> pa.Table:
        """A shard in, its images loaded or yet to be; the shard with its captions out."""
        import torch

        from captioner.caption.batches import caption_alone

        if self.problem is not None:
            raise self.problem
        work = self._waited(table["ready"][0].as_py())
        shard, loaded = _unpack(table, self.job.image_size)
        try:
            if loaded is None or self.attempts.deaths(shard.number) is not None:
                rows = caption_alone(self.job, self.captioner, shard, self.attempts)
                loaded = [Loaded(row, None) for row in rows]
            else:
                self.attempts.begin(shard.number)
                self.captioner(loaded)
                self.attempts.end(shard.number)
        except torch.AcceleratorError:
            logging.getLogger(__name__).exception("the device is lost: a new process takes over")
            os._exit(1)
        work += self.captioner.take_work()
        work += Work(**table["work"][0].as_py())
        self.ended = time.time()
        return _pack(shard, loaded, work)

    def _waited(self, ready: float) -> Work:
        """Since the last shard: for this one to be loaded, then for Ray to hand it over.

        Ray holds a shard back that is loaded while those that are captioned wait to be written.
        """
        if self.ended is None:
            return Work()
        begin = time.time()
        loaded = min(max(ready, self.ended), begin)
        return Work(starved=max(0.0, loaded - self.ended), held=max(0.0, begin - loaded))


@_with_problems
def write_stage(table: pa.Table, job: CaptionJob) -> pa.Table:
    """A captioned shard in; the number of its rows by status out, and what it took."""
    begin = time.perf_counter()
    shard, captioned = _unpack(table, job.image_size)
    assert captioned is not None
    counts = write_part(job, shard, rows_to_table([image.row for image in captioned]))
    work = Work(**table["work"][0].as_py())
    work += Work(write=time.perf_counter() - begin)
    return pa.Table.from_pylist([{"rows": counts, "work": asdict(work), "problem": None}])
