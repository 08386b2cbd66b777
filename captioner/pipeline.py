"""The caption job: shards → decode → caption → part files, in this process or on Ray.

Both engines call the same functions and cut a shard into the same batches, so they write the same
rows. A part is written atomically under its shard's name: a task that runs twice writes the same
file twice, and what was done before a crash stays done.
"""

import io
import logging
import os
import secrets
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from captioner import attention, images, storage
from captioner.bundle import Bundle
from captioner.bundle import load as load_bundle
from captioner.captioning import Captioner
from captioner.config import DecodeConfig, ListingConfig, RunConfig
from captioner.errors import IncompleteError
from captioner.manifest import OutputDirectory, Shard, list_source, part_name
from captioner.schema import (
    COLUMNS,
    SCHEMA_VERSION,
    STATUSES,
    CaptionRow,
    part_schema,
    rows_to_table,
)

__all__ = ["CaptionJob", "Summary", "caption_images", "choose_engine"]

# Threads of a decode task on Ray: reading waits for the network, and Pillow decodes without
# Python's lock.
_READERS = 4


@dataclass(frozen=True, kw_only=True)
class CaptionJob:
    """What the stages need to know; small, and the same on every machine.

    ``grid`` is the side of an attention map, 0 where none are kept.
    """

    output: str
    image_size: int
    grid: int
    decode: DecodeConfig
    run: RunConfig


@dataclass
class _Loaded:
    """An image on its way: the row it will be, and its pixels while it is to be captioned."""

    row: CaptionRow
    pixels_HW3: np.ndarray | None


@dataclass(frozen=True)
class Summary:
    """What a run did and what the output holds now; ``rows`` counts all of it by status."""

    output: str
    images: int
    rows: dict[str, int]
    captioned: int
    seconds: float
    started: str
    ended: str

    @property
    def images_per_second(self) -> float:
        """Of this run, from its first shard to its last, start-up included."""
        return self.captioned / self.seconds if self.seconds else 0.0

    def describe(self) -> str:
        """One line for a person."""
        counts = ", ".join(f"{count} {status}" for status, count in self.rows.items() if count)
        done = f"{self.captioned} now, {self.images_per_second:.1f} images/s"
        return f"{self.output}: {self.images} images ({counts}); {done}"


def caption_images(
    source: str,
    output: str,
    model: str,
    *,
    decode: DecodeConfig | None = None,
    run: RunConfig | None = None,
    listing: ListingConfig | None = None,
    overwrite: bool = False,
) -> Summary:
    """Captions the images of a source into an output directory; goes on where an earlier run ended.

    Args:
        source: a directory, or a file of URIs: see :func:`captioner.manifest.list_source`.
        output: see :class:`captioner.manifest.OutputDirectory`.
        model: a bundle's directory.
        decode: what decides the captions; must be the same when a job is gone on with.
        run: how the job runs.
        listing: which files are images.
        overwrite: delete what an earlier job wrote to the output first.

    Raises:
        InputError: the source cannot be listed.
        BundleError: the model cannot be loaded.
        OutputError: the output is another job's, or cannot be written.
        IncompleteError: the job ended with images that have no row.
    """
    decode, run = decode or DecodeConfig(), run or RunConfig()
    source, output = storage.absolute(source), storage.absolute(output)
    bundle = load_bundle(model)
    listed = list_source(source, listing or ListingConfig())
    directory = OutputDirectory(output)
    directory.begin(_settings(bundle, decode), overwrite=overwrite)
    manifest = directory.extend(listed, run.shard_size)
    remaining = list(directory.remaining(manifest))
    job = CaptionJob(
        output=output,
        image_size=bundle.config.image_size,
        grid=0 if decode.attention == "none" else bundle.grid,
        decode=decode,
        run=run,
    )
    started, begin = _now(), time.monotonic()
    left = sum(len(shard.uris) for shard in remaining)
    captioned = _run(job, bundle, remaining, done=len(manifest) - left) if remaining else 0
    accounts = directory.accounts()
    summary = Summary(
        output=output,
        images=accounts.images,
        rows=accounts.rows,
        captioned=captioned,
        seconds=time.monotonic() - begin,
        started=started,
        ended=_now(),
    )
    directory.write_summary(
        asdict(summary)
        | {"images_per_second": summary.images_per_second, "missing": len(accounts.missing)}
    )
    if accounts.missing:
        first = ", ".join(accounts.missing[:20])
        raise IncompleteError(f"{len(accounts.missing)} images have no row: {first}")
    return summary


def _run(job: CaptionJob, bundle: Bundle, shards: list[Shard], *, done: int) -> int:
    """Runs the engine with a progress bar; returns the number of rows written."""
    engine = _run_ray if choose_engine(job.run) == "ray" else _run_local
    total = done + sum(len(shard.uris) for shard in shards)
    written, bad = 0, 0
    with tqdm(total=total, initial=done, unit="image", disable=None) as progress:
        for counts in engine(job, bundle, shards):
            rows = sum(counts.values())
            written, bad = written + rows, bad + rows - counts["ok"]
            if bad:
                progress.set_postfix(bad=bad, refresh=False)
            progress.update(rows)
    return written


def choose_engine(run_config: RunConfig) -> str:
    """``local`` or ``ray``; ``auto`` takes Ray in a Ray job, on a cluster or with several GPUs."""
    if run_config.engine != "auto":
        return run_config.engine
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return "ray"
    import torch

    return "ray" if torch.cuda.device_count() > 1 else "local"


def _settings(bundle: Bundle, decode: DecodeConfig) -> dict[str, Any]:
    """What decides the rows: the job's fingerprint is made of it."""
    return {
        "model": bundle.digests["model.safetensors"],
        "model settings": bundle.digests["config.json"],
        "vocabulary": bundle.digests["tokenizer.json"],
        "preprocessing version": images.PREPROCESSING_VERSION,
        "schema version": SCHEMA_VERSION,
        **asdict(decode),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# The stages, one function each. Both engines are made of these.


def load_image(job: CaptionJob, uri: str, size: int | None) -> _Loaded:
    """Reads and decodes one image. What is wrong with it stands in its row."""
    limit = job.run.max_bytes
    if size is not None and size > limit:
        error = f"more than {limit} bytes"
        return _Loaded(CaptionRow(uri=uri, bytes=size, status="rejected", error=error), None)
    try:
        data = storage.read(uri, limit)
    except Exception as problem:  # a bucket's client raises what it likes: this row says so
        row = CaptionRow(uri=uri, bytes=size, status="unreadable", error=_one_line(problem))
        return _Loaded(row, None)
    decoded = images.decode(
        data, job.image_size, max_pixels=job.run.max_pixels, max_bytes=job.run.max_bytes
    )
    row = CaptionRow(
        uri=uri,
        width=decoded.width,
        height=decoded.height,
        bytes=len(data),
        status=decoded.status,
        error=decoded.error,
    )
    return _Loaded(row, decoded.pixels_HW3)


def caption_batch(captioner: Captioner, batch: Sequence[_Loaded]) -> None:
    """Captions the images of a batch that are ok: fills their rows and drops their pixels."""
    ready = [(each.row, each.pixels_HW3) for each in batch if each.pixels_HW3 is not None]
    if not ready:
        return
    captions = captioner(np.stack([pixels_HW3 for _, pixels_HW3 in ready]))
    for each in batch:
        each.pixels_HW3 = None
    for (row, _), caption in zip(ready, captions, strict=True):
        row.caption, row.tokens = caption.text, caption.tokens
        row.token_logprobs, row.score = caption.token_logprobs, caption.score
        if caption.attention_TGG is not None:
            row.attention, row.attention_peak = attention.encode(
                caption.attention_TGG, captioner.decode.attention_levels
            )


def write_part(job: CaptionJob, shard: int, rows: pa.Table) -> dict[str, int]:
    """Writes a shard's rows as its part; returns the number of rows by status."""
    schema = part_schema(
        attention=job.decode.attention, grid=job.grid, levels=job.decode.attention_levels
    )
    sink = io.BytesIO()
    pq.write_table(rows.cast(schema), sink, compression="zstd")
    storage.write(storage.join(job.output, part_name(shard)), sink.getvalue())
    counted = Counter(rows["status"].to_pylist())
    return {status: counted[status] for status in STATUSES}


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


# In this process: threads read and decode the next shard while the model captions this one.


def _run_local(
    job: CaptionJob, bundle: Bundle, shards: Iterable[Shard]
) -> Iterator[dict[str, int]]:
    captioner = Captioner(bundle, job.decode, device=job.run.device, precision=job.run.precision)
    decoders = job.run.decoders or os.cpu_count() or 1
    readers = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
    writer = ThreadPoolExecutor(1, thread_name_prefix="write")
    try:
        writing: Future[dict[str, int]] | None = None
        for shard, loading in _load_ahead(job, shards, readers):
            rows = []
            for futures in _batches(loading, job.run.batch_size):
                batch = [future.result() for future in futures]
                caption_batch(captioner, batch)
                rows += [loaded.row for loaded in batch]
            if writing:
                yield writing.result()
            writing = writer.submit(write_part, job, shard.number, rows_to_table(rows))
        if writing:
            yield writing.result()
    finally:
        for pool in (readers, writer):
            pool.shutdown(cancel_futures=True)


def _load_ahead(
    job: CaptionJob, shards: Iterable[Shard], readers: ThreadPoolExecutor
) -> Iterator[tuple[Shard, list[Future[_Loaded]]]]:
    """Shards and their images' futures; the next shard is begun before one is handed out."""
    ahead: deque[tuple[Shard, list[Future[_Loaded]]]] = deque()
    for shard in shards:
        images_of = zip(shard.uris, shard.sizes, strict=True)
        futures = [readers.submit(load_image, job, uri, size) for uri, size in images_of]
        ahead.append((shard, futures))
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


# On Ray: one chain. A shard is one row in and one block all the way, so that it stays together.


def _run_ray(job: CaptionJob, bundle: Bundle, shards: Iterable[Shard]) -> Iterator[dict[str, int]]:
    ray = connect()
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.target_max_block_size = None  # never split a block: it is a shard
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    cpus = int(ray.cluster_resources().get("CPU", 1))
    actors = gpus or max(1, cpus // 8)
    threads = None if gpus else max(1, cpus // actors)
    rows = [asdict(shard) for shard in shards]
    # Fractions of a CPU: whole ones would let the actors keep the tasks from ever being scheduled.
    yield from (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(
            _load_stage,
            fn_kwargs={"job": job},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0.5,
        )
        .map_batches(
            _CaptionStage,
            fn_constructor_kwargs={"job": job, "bundle": ray.put(bundle), "threads": threads},
            batch_size=job.run.batch_size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors),
            num_gpus=1 if gpus else 0,
            num_cpus=0.75,
        )
        .map_batches(
            _write_stage,
            fn_kwargs={"job": job},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0.25,
        )
        .iter_rows()
    )


def connect(*, log_to_driver: bool = False) -> Any:
    """Joins the cluster that RAY_ADDRESS names, or starts Ray here for this job alone."""
    if not os.environ.get("RAY_ADDRESS"):
        # Read when Ray is imported. Without a token of our own Ray leaves one in the home
        # directory, where clusters that are started later trip over it.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "local"
        local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        ray.init(
            address=address, log_to_driver=log_to_driver, logging_level=logging.WARNING, **local
        )
    return ray


def _load_stage(table: pa.Table, job: CaptionJob) -> pa.Table:
    """One shard in; its images' rows out, with their pixels."""
    [shard] = (Shard(**row) for row in table.to_pylist())
    with ThreadPoolExecutor(job.run.decoders or _READERS) as pool:
        loaded = list(pool.map(partial(load_image, job), shard.uris, shard.sizes))
    pixels = [None if each.pixels_HW3 is None else each.pixels_HW3.tobytes() for each in loaded]
    return (
        rows_to_table([each.row for each in loaded])
        .append_column("shard", pa.array([shard.number] * len(loaded), pa.int32()))
        .append_column("shard_rows", pa.array([len(loaded)] * len(loaded), pa.int32()))
        .append_column("pixels", pa.array(pixels, pa.large_binary()))
    )


class _CaptionStage:
    """Rows with pixels in; rows with captions out."""

    def __init__(self, job: CaptionJob, bundle: Any, threads: int | None):
        import ray
        import torch

        if threads is not None:  # Ray sets one thread where an actor reserves less than a CPU
            torch.set_num_threads(threads)
        self.shape = (job.image_size, job.image_size, 3)
        self.captioner = Captioner(
            ray.get(bundle), job.decode, device=job.run.device, precision=job.run.precision
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = [CaptionRow(**row) for row in table.select(COLUMNS.names).to_pylist()]
        batch = [
            _Loaded(row, np.frombuffer(data.as_buffer(), np.uint8).reshape(self.shape))
            if data.is_valid
            else _Loaded(row, None)
            for row, data in zip(rows, table["pixels"], strict=True)
        ]
        caption_batch(self.captioner, batch)
        return (
            rows_to_table(rows)
            .append_column("shard", table["shard"])
            .append_column("shard_rows", table["shard_rows"])
        )


def _write_stage(table: pa.Table, job: CaptionJob) -> pa.Table:
    """Whole shards in; one row of counts by status out for each."""
    counts = []
    for number in table["shard"].unique().to_pylist():
        rows = table.filter(pc.equal(table["shard"], number))
        expected = rows["shard_rows"][0].as_py()
        assert len(rows) == expected, f"shard {number} has {len(rows)} rows of {expected}"
        counts.append(write_part(job, number, rows.select(COLUMNS.names)))
    return pa.Table.from_pylist(counts)
