"""The engine on Ray: the chain, and its stages. A shard is one row and one block all the way.

Workers that only read, decode or write import this module and neither torch nor timm, which take
seconds and hundreds of megabytes a process.
"""

import itertools
import logging
import os
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from captioner import storage
from captioner.caption.crash_log import CrashLog
from captioner.caption.steps import (
    CaptionJob,
    Loaded,
    Results,
    ShardResult,
    finish_shard,
    load_images,
    prompts,
)
from captioner.caption.timing import RayMetrics, Timing
from captioner.data.reading import groups
from captioner.errors import CaptionerError, InputError
from captioner.output.manifest import Shard
from captioner.schema import COLUMNS, CaptionRow

if TYPE_CHECKING:
    from captioner.caption.actors import ActorPool
    from captioner.model.base import Model

__all__ = ["CaptionStage", "load_stage", "run_on_ray", "write_stage"]

_READERS = 4  # threads of a decode task: reading waits, and Pillow decodes without Python's lock
_CPUS_OF_A_WRITE_TASK = 0.25
_BYTES_AHEAD = 1 << 33  # of decoded images, unless so many shards are more
_SHARDS_AHEAD = 4

_SHARD = pa.schema(
    {
        "number": pa.int32(),
        "images": pa.large_binary(),
        "redone": pa.list_(pa.int64()),
        "rows": pa.list_(pa.struct(list(COLUMNS))),
        "pixels": pa.list_(pa.large_binary()),
        "shapes": pa.list_(pa.list_(pa.int32())),
        "ready": pa.float64(),
        "timing": pa.struct([(each.name, pa.float64()) for each in fields(Timing)]),
        "error": pa.binary(),
    }
)


def run_on_ray(
    job: CaptionJob, model: "Model", shards: list[Shard], ray: Any, pool: "ActorPool"
) -> Results:
    """Captions shards on the cluster that this process is connected to.

    Raises:
        CaptionerError: as a stage raised it.
    """
    from ray.data import ActorPoolStrategy, DataContext

    metrics = RayMetrics(job.output, sum(map(len, shards)))
    context = _context(job, shards, pool)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    one_shard = {"batch_size": 1, "batch_format": "pyarrow"}
    constructor = {"job": job, "model": model, "threads": pool.threads}
    for_job: dict[str, Any] = {"fn_kwargs": {"job": job}, **one_shard}
    items = [_as_values(shard) for shard in shards]
    with DataContext.current(context):  # the process's other uses of Ray keep their own settings
        chain = (
            ray.data.from_items(items, override_num_blocks=len(items))
            .map_batches(load_stage, num_cpus=job.run.cpus_per_decode, **for_job)
            .map_batches(
                CaptionStage,
                fn_constructor_kwargs=constructor,
                compute=ActorPoolStrategy(min_size=pool.least, max_size=pool.most),
                num_gpus=pool.gpus,
                num_cpus=pool.cpus,
                **one_shard,
            )
            .map_batches(write_stage, num_cpus=_CPUS_OF_A_WRITE_TASK, **for_job)
        )
        for row in chain.iter_rows():
            if row["error"] is not None:
                raise pickle.loads(row["error"])  # noqa: S301 - one of this job's workers made it
            result: ShardResult = pickle.loads(row["result"])  # noqa: S301 - likewise
            metrics.add(result.rows, result.timing)
            yield result


def _context(job: CaptionJob, shards: Sequence[Shard], pool: "ActorPool") -> Any:
    """Ray Data's settings for the chain."""
    from ray.data import DataContext, ExecutionResources

    context = DataContext.get_current().copy()
    if pool.decoders is not None:
        # Ray would decode ahead until a sixth of the machine's memory is full. A shard for each
        # decode task and two for each actor are enough; Ray keeps some of it for other stages.
        pixels = job.preparation.most_bytes * max(map(len, shards))  # of one
        ahead = 2 * (pool.decoders + 2 * pool.most) * pixels
        ahead = min(ahead, max(_BYTES_AHEAD, _SHARDS_AHEAD * pixels))
        context.execution_options.resource_limits = ExecutionResources(object_store_memory=ahead)
    context.target_max_block_size = None  # never split a block: it is a shard
    context.enable_progress_bars = False
    return context


def _errors_as_rows(stage: Callable[..., pa.Table]) -> Callable[..., pa.Table]:
    """A stage that writes its errors into its row, which later stages pass on unchanged.

    Ray would add a long traceback of its own code to an error that a stage raises.
    """

    @wraps(stage)
    def run(*arguments: Any, **keywords: Any) -> pa.Table:
        table = arguments[-1]
        if "error" in table.column_names and table["error"][0].is_valid:
            return table
        try:
            return stage(*arguments, **keywords)
        except CaptionerError as error:
            return pa.Table.from_pylist([{"error": pickle.dumps(error)}], schema=_SHARD)

    return run


def _pack(shard: Shard, images_of: Sequence[Loaded] | None, timing: Timing) -> pa.Table:
    """A shard as one row, with its timing so far; without images where they are not loaded yet.

    ``ready`` is the time by the clock of this machine.
    """
    rows = pixels = shapes = None
    if images_of is not None:
        rows = [asdict(image.row) for image in images_of]
        pixels = [
            None if image.pixels_HW3 is None else image.pixels_HW3.tobytes() for image in images_of
        ]
        shapes = [
            None if image.pixels_HW3 is None else list(image.pixels_HW3.shape)
            for image in images_of
        ]
    packed = {"rows": rows, "pixels": pixels, "shapes": shapes}
    row = packed | {"ready": time.time(), "timing": asdict(timing)}
    return pa.Table.from_pylist([_as_values(shard) | row], schema=_SHARD)


def _as_values(shard: Shard) -> dict[str, Any]:
    """A shard as values of a row; its images in Arrow's stream format, with their types."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, shard.images.schema) as writer:
        writer.write_table(shard.images)
    images = sink.getvalue().to_pybytes()
    return {"number": shard.number, "images": images, "redone": shard.redone}


def _as_shard(table: pa.Table) -> Shard:
    [values] = table.select(["number", "images", "redone"]).to_pylist()
    images = pa.ipc.open_stream(values["images"]).read_all()
    return Shard(values["number"], images, values["redone"])


def _unpack(table: pa.Table, job: CaptionJob) -> tuple[Shard, list[Loaded] | None]:
    shard = _as_shard(table)
    [rows], [pixels] = table["rows"].to_pylist(), table["pixels"]
    if rows is None:
        return shard, None
    [shapes] = table["shapes"].to_pylist()
    arrays = (
        np.frombuffer(data.as_buffer(), np.uint8).reshape(shape) if data.is_valid else None
        for data, shape in zip(pixels.values, shapes, strict=True)
    )
    return shard, [
        Loaded(CaptionRow(**row), pixels_HW3, prompt=prompt)
        for row, pixels_HW3, prompt in zip(rows, arrays, prompts(job, shard.images), strict=True)
    ]


@_errors_as_rows
def load_stage(table: pa.Table, job: CaptionJob) -> pa.Table:
    """A shard in; its images loaded out, unless a process died with it."""
    storage.set_web_access(job.run.web)
    shard = _as_shard(table)
    crash_log = CrashLog(job.output)
    if crash_log.crashes(shard.number) is not None:
        return _pack(shard, None, Timing())
    crash_log.begin(shard.number)
    with ThreadPoolExecutor(job.run.decoders or _READERS) as pool:
        images = [shard.images.slice(group.start, len(group)) for group in groups(shard.images)]
        loaded = [*itertools.chain.from_iterable(pool.map(partial(load_images, job), images))]
    crash_log.end(shard.number)
    return _pack(shard, loaded, Timing(decode=sum(each.seconds for each in loaded)))


class CaptionStage:
    """A process that holds the model."""

    def __init__(self, job: CaptionJob, model: Any, threads: int | None):
        import ray
        import torch

        from captioner.caption.batches import BatchCaptioner

        if threads is not None:  # Ray sets one thread where an actor reserves less than a CPU
            torch.set_num_threads(threads)
        self.job = job
        storage.set_web_access(job.run.web)
        self.crash_log = CrashLog(job.output)
        self.error: CaptionerError | None = None
        try:
            if job.run.device == "auto" and ray.get_gpu_ids() and not torch.cuda.is_available():
                raise InputError(
                    "Ray reserved a GPU, but torch cannot use it. Compare the driver version that "
                    f"nvidia-smi shows with torch's CUDA version, {torch.version.cuda}"
                )
            self.captioner = BatchCaptioner.load(job, model)
        except CaptionerError as error:  # Ray would add a long traceback to an error raised here
            self.error = error
        self.ended: float | None = None  # when the last shard did

    @_errors_as_rows
    def __call__(self, table: pa.Table) -> pa.Table:
        """A shard in, its images loaded or not loaded yet; the shard with its captions out."""
        import torch

        from captioner.caption.suspects import caption_suspects

        if self.error is not None:
            raise self.error
        timing = self._waited(table["ready"][0].as_py())
        shard, loaded = _unpack(table, self.job)
        try:
            if loaded is None or self.crash_log.crashes(shard.number) is not None:
                rows = caption_suspects(self.job, self.captioner, shard, self.crash_log)
                loaded = [Loaded(row, None) for row in rows]
            else:
                self.crash_log.begin(shard.number)
                self.captioner(loaded)
                self.crash_log.end(shard.number)
        except torch.AcceleratorError:
            logging.getLogger(__name__).exception("the device is lost: a new process takes over")
            os._exit(1)
        timing += self.captioner.take_timing()
        timing += Timing(**table["timing"][0].as_py())
        self.ended = time.time()
        return _pack(shard, loaded, timing)

    def _waited(self, ready: float) -> Timing:
        """The time since the last shard: until this one was loaded, then until Ray handed it over.

        Ray holds a loaded shard back while captioned shards wait to be written.
        """
        if self.ended is None:
            return Timing()
        begin = time.time()
        loaded = min(max(ready, self.ended), begin)
        return Timing(
            waited_for_decode=max(0.0, loaded - self.ended),
            waited_for_write=max(0.0, begin - loaded),
        )


@_errors_as_rows
def write_stage(table: pa.Table, job: CaptionJob) -> pa.Table:
    """A captioned shard in; its result out, once its part is written."""
    shard, captioned = _unpack(table, job)
    if captioned is None:
        raise RuntimeError(f"shard {shard.number} has no rows to write")
    timing = Timing(**table["timing"][0].as_py())
    result = finish_shard(job, shard, [image.row for image in captioned], timing)
    return pa.Table.from_pylist([{"result": pickle.dumps(result), "error": None}])
