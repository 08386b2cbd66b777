"""The caption job: shards → decode → caption → part files, in this process or on Ray.

A part is written atomically under its shard's name: a task that runs twice writes the same file
twice, and what was done before a crash stays done.
"""

import logging
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from captioner import errors, images, storage
from captioner.attempts import Attempts
from captioner.bundle import Bundle
from captioner.bundle import load as load_bundle
from captioner.captioning import choose_device, choose_dtype
from captioner.compaction import expose
from captioner.config import DecodeConfig, ListingConfig, RunConfig
from captioner.errors import (
    CaptionerError,
    ErrorRateError,
    IncompleteError,
    InputError,
    StoppedError,
)
from captioner.inprocess import run_local
from captioner.manifest import OutputDirectory, Shard, list_source, new_shards
from captioner.memory import keep_few_kernels
from captioner.progress import progress_bar
from captioner.ray_stages import CaptionStage, load_stage, write_stage
from captioner.schema import MANIFEST, SCHEMA_VERSION
from captioner.stages import CaptionJob, Written
from captioner.stopping import Signals, catch_signals, keep_handlers
from captioner.work import RayMetrics, Work

__all__ = ["Plan", "Summary", "caption_images", "choose_engine", "connected", "plan_captioning"]

_ACTOR_CPUS = 0.75  # a whole one would let actors keep the other tasks from being scheduled

_COMPILE_FROM = 10_000  # images: compiling takes as long as it then saves on about so many

_HELD_UP = {"model": "the model", "decode": "reading and decoding", "write": "writing"}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a run did and what the output holds now.

    ``rows`` counts all rows of the output by status, ``missing`` the images without one; ``gone``
    are images that an earlier run listed and this one did not: their rows are kept. ``work``
    is what this run's time went to, ``error`` why it ended early.
    """

    output: str
    images: int
    rows: dict[str, int]
    missing: int
    gone: int
    captioned: int
    seconds: float
    started: str
    ended: str
    work: Work
    error: str | None = None

    @property
    def images_per_second(self) -> float:
        """Of this run, from its first shard to its last, start-up included."""
        return self.captioned / self.seconds if self.seconds else 0.0

    def describe(self) -> str:
        """One line for a person."""
        done = f"{self.captioned} now, {self.images_per_second:.1f} images/s"
        if self.work.bottleneck:
            done += f", held up by {_HELD_UP[self.work.bottleneck]}"
        if self.gone:
            done += f"; {self.gone} images are not listed any more; their rows are kept"
        return f"{self.counts()}; {done}"

    def figures(self) -> dict[str, Any]:
        """For summary.json."""
        speed = {"images_per_second": self.images_per_second}
        return asdict(self) | speed | {"work": self.work.figures()}

    def counts(self) -> str:
        """The images by status."""
        counts = ", ".join(f"{count} {status}" for status, count in self.rows.items() if count)
        return f"{self.output}: {self.images} images ({counts})"


@dataclass(frozen=True)
class Plan:
    """What a job is about to do: ``shards`` are those without a part, of ``remaining`` images."""

    images: int
    remaining: int
    shards: int
    workers: str

    def describe(self) -> str:
        """One line for a person."""
        if not self.shards:
            return f"{self.images} images, all captioned"
        part = f"{self.remaining} to caption" if self.remaining < self.images else "all to caption"
        return f"{self.images} images, {part}, in {self.shards} shards; {self.workers}"


def plan_captioning(
    source: str,
    output: str,
    model: str,
    *,
    decode: DecodeConfig | None = None,
    run: RunConfig | None = None,
    listing: ListingConfig | None = None,
    overwrite: bool = False,
) -> Plan:
    """What :func:`caption_images` would do with the same arguments; writes nothing.

    Raises:
        CaptionerError: what :func:`caption_images` would raise before its first image.
    """
    decode, run, listing = decode or DecodeConfig(), run or RunConfig(), listing or ListingConfig()
    directory = OutputDirectory(storage.absolute(output))
    bundle = load_bundle(model)
    listed = list_source(storage.absolute(source), listing)
    goes_on = directory.check(_settings(bundle, decode), overwrite=overwrite) and not overwrite
    manifest = directory.manifest() if goes_on else MANIFEST.empty_table()
    manifest = pa.concat_tables([manifest, new_shards(manifest, listed, run.shard_size)])
    shards = list(directory.remaining(manifest, begun=goes_on))
    if run.retry_failed and goes_on:
        shards += directory.not_ok(manifest)
    if choose_engine(run) == "local":
        return _plan(len(manifest), shards, _describe_process(run))
    with connected() as ray:
        return _plan(len(manifest), shards, _Actors.fitting(ray, run).describe())


def _plan(images: int, shards: Sequence[Shard], workers: str) -> Plan:
    return Plan(images, sum(len(shard.uris) for shard in shards), len(shards), workers)


def _describe_process(run: RunConfig) -> str:
    device = choose_device(run.device)
    dtype = str(choose_dtype(run.precision, device)).removeprefix("torch.")
    return f"in this process, on {device}, in {dtype}, {_describe_batch(run)}"


def _describe_batch(run: RunConfig) -> str:
    found = "as many images a batch as pays"
    return found if run.batch_size == "auto" else f"{run.batch_size} images a batch"


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
        ErrorRateError: more rows of the output than ``run.max_error_rate`` allows are not ok.
        StoppedError: SIGTERM or Ctrl-C ended the job.
    """
    decode, run, listing = decode or DecodeConfig(), run or RunConfig(), listing or ListingConfig()
    choose_engine(run)  # may refuse
    directory = OutputDirectory(storage.absolute(output))
    keep_few_kernels()
    with catch_signals() as signals:
        try:
            bundle = load_bundle(model)
            listed = list_source(storage.absolute(source), listing)
            with directory.locked():
                directory.begin(_settings(bundle, decode), overwrite=overwrite)
                manifest = directory.extend(listed, run.shard_size)
                # A limit leaves images out that are still there.
                found = manifest["uri"] if listing.limit else [each.uri for each in listed]
                gone = len(manifest) - len(found)
                job = CaptionJob(
                    output=directory.uri,
                    image_size=bundle.config.image_size,
                    grid=0 if decode.attention == "none" else bundle.grid,
                    decode=decode,
                    run=run,
                )
                return _caption(job, bundle, directory, manifest, signals, gone=gone)
        except (Exception, KeyboardInterrupt) as problem:
            # After a signal anything else comes of it, as an import that was cut off.
            if signals.received is None and not isinstance(problem, KeyboardInterrupt):
                raise
            raise _stopped(directory, signals.received or signal.SIGINT) from problem


def _caption(
    job: CaptionJob,
    bundle: Bundle,
    directory: OutputDirectory,
    manifest: pa.Table,
    signals: Signals,
    *,
    gone: int,
) -> Summary:
    """Does what is left of a job, and closes the books however that ends."""
    shards = list(directory.remaining(manifest))
    if job.run.retry_failed:
        failed = list(directory.not_ok(manifest))
        directory.delete_held()
        expose(directory, manifest, {shard.number for shard in failed})
        shards += failed
    attempts, written, work = Attempts(job.output), Counter[str](), Work()
    started, begin = _now(), time.monotonic()

    def close(error: str | None = None) -> tuple[Summary, list[str]]:
        seconds = time.monotonic() - begin
        accounts = directory.accounts()
        summary = Summary(
            output=job.output,
            images=accounts.images,
            rows=accounts.rows,
            missing=len(accounts.missing),
            gone=gone,
            captioned=sum(written.values()),
            seconds=seconds,
            started=started,
            ended=_now(),
            work=work,
            error=error,
        )
        directory.write_summary(summary.figures())
        return summary, accounts.missing

    try:
        if shards:
            _run(job, bundle, shards, written, work, signals, total=len(manifest))
        elif job.run.profile is not None:
            _logger.warning("no image is left to caption: %s is not written", job.run.profile)
    except BaseException as problem:
        # What is told already is not to be hidden by what goes wrong now.
        with suppress(CaptionerError):
            directory.tidy()
            if isinstance(problem, (CaptionerError, KeyboardInterrupt)):
                attempts.forgive()
            close(str(problem) or ("stopped" if signals.received else type(problem).__name__))
        raise
    directory.tidy()
    summary, missing = close()
    if missing:
        first = ", ".join(missing[:20])
        raise IncompleteError(f"{len(missing)} images have no row: {first}")
    attempts.clear()
    bad = (summary.images - summary.rows.get("ok", 0)) / summary.images
    if bad > job.run.max_error_rate:
        raise ErrorRateError(
            f"{summary.counts()}: {bad:.1%} are not ok, "
            f"more than --max-error-rate {job.run.max_error_rate:.1%}; captioner report shows why"
        )
    return summary


def _stopped(directory: OutputDirectory, number: int) -> StoppedError:
    manifest = directory.manifest()
    done = len(manifest) - sum(len(shard.uris) for shard in directory.remaining(manifest))
    return StoppedError(
        f"stopped by {signal.Signals(number).name}: {done} of {len(manifest)} images done; "
        "run the same command again to go on",
        number,
    )


def _run(
    job: CaptionJob,
    bundle: Bundle,
    shards: list[Shard],
    written: Counter[str],
    work: Work,
    signals: Signals,
    *,
    total: int,
) -> None:
    """Runs the engine with a progress bar; adds up the rows written, by status, and the work."""
    engine: Callable[[CaptionJob, Bundle, list[Shard]], Written] = run_local
    if choose_engine(job.run) == "ray":
        engine = partial(_run_ray, total=total)
    else:
        on_cpu = choose_device(job.run.device).type == "cpu"
        job = replace(job, run=_choose_compile(job.run, shards, on_cpu=on_cpu))
        _logger.info(_plan(total, shards, _describe_process(job.run)).describe())
    done = total - sum(len(shard.uris) for shard in shards)
    bar = progress_bar(total, unit="image", initial=done)
    with bar as progress, closing(engine(job, bundle, shards)) as running:
        for counts, some in running:
            written.update(counts)
            work += some
            if bad := sum(written.values()) - written["ok"]:
                progress.set_postfix(bad=bad, refresh=False)
            progress.update(sum(counts.values()))
            signals.check()


def choose_engine(run: RunConfig) -> str:
    """``local`` or ``ray``; ``auto`` takes Ray in a Ray job, on a cluster or with several GPUs.

    Raises:
        InputError: it is Ray, and there is to be a profile, or one GPU of a machine is named.
    """
    engine: str = run.engine
    one_gpu = run.device.startswith("cuda:")
    if engine == "auto" and one_gpu:
        engine = "local"
    elif engine == "auto":
        job = os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
        engine = "ray" if job or torch.cuda.device_count() > 1 else "local"
    if engine == "ray" and one_gpu:
        raise InputError(
            f"--device {run.device} is for --engine local: Ray chooses the GPU of each process"
        )
    if engine == "ray" and run.profile is not None:
        raise InputError("a profile is of a job in this process, not on Ray: give --engine local")
    return engine


def _choose_compile(run: RunConfig, shards: Sequence[Shard], *, on_cpu: bool) -> RunConfig:
    if run.compile != "auto":
        return run
    pays = on_cpu and sum(len(shard.uris) for shard in shards) >= _COMPILE_FROM
    return replace(run, compile="on" if pays else "off")


def _settings(bundle: Bundle, decode: DecodeConfig) -> dict[str, Any]:
    """What decides the rows: the job's fingerprint is made of it."""
    return {
        "model": bundle.digests["model.safetensors"],
        "model settings": bundle.digests["config.json"],
        "vocabulary": bundle.digests["tokenizer.json"],
        "preprocessing version": images.PREPROCESSING_VERSION,
        "schema version": SCHEMA_VERSION,
        **asdict(decode.of_model(bundle.config)),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# On Ray: one chain of the stages in captioner.ray_stages.


def _run_ray(job: CaptionJob, bundle: Bundle, shards: list[Shard], total: int) -> Written:
    with connected() as ray:
        actors = _Actors.fitting(ray, job.run)
        # By what the actors are to have: this process may be on a machine without a GPU.
        job = replace(job, run=_choose_compile(job.run, shards, on_cpu=not actors.gpus))
        _logger.info(_plan(total, shards, actors.describe()).describe())
        metrics = RayMetrics(job.output, sum(len(shard.uris) for shard in shards))
        for counts, work in _chain(ray, job, bundle, shards, actors):
            metrics.add(counts, work)
            yield counts, work


@dataclass(frozen=True)
class _Actors:
    """How many processes caption on Ray, at least and at most, and what Ray sets aside for each.

    ``decoders`` is how many decode tasks have room beside them, None where the cluster may grow.
    """

    least: int
    most: int
    cpus: float
    gpus: float
    threads: int | None
    decoders: int | None
    cluster: str

    @classmethod
    def fitting(cls, ray: Any, run: RunConfig) -> "_Actors":
        """As the settings and the cluster say.

        Raises:
            InputError: the cluster has no room for them, and will not have.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        cluster = f"{len(nodes)} nodes, {cpus:g} CPUs, {gpus:g} GPUs"
        own_cpus = run.cpus_per_actor or (_ACTOR_CPUS if cpus > 1 else 0.4)
        own_gpus = run.gpus_per_actor
        if own_gpus is None:
            own_gpus = 1 if run.device == "cuda" or (gpus and run.device == "auto") else 0
        if own_gpus > 1 and own_gpus % 1:
            raise InputError(f"gpus_per_actor must be whole or at most 1, not {own_gpus:g}")
        room = sum(_room(node, own_cpus, own_gpus) for node in nodes)
        least, most = run.actor_range or (None, None)
        if least is None or most is None:
            least = most = max(1, room if own_gpus else int(cpus) // 8)
        needed = f"{least} actors of {own_cpus:g} CPUs and {own_gpus:g} GPUs"
        free = cpus - least * own_cpus
        grows = run.wait_for_nodes or is_known_to_grow(ray)
        if run.device == "cuda" and not gpus and not grows:
            raise InputError(f"there is no GPU for --device cuda: the cluster has {cluster}")
        if room < least and not grows:
            raise InputError(
                f"no room for {needed}, but for {room}: the cluster has {cluster}; "
                "if it is going to grow, give --wait-for-nodes"
            )
        if free < run.cpus_per_decode and not grows:
            raise InputError(
                f"{needed} leave {max(0, free):g} CPUs to decode images, which takes "
                f"{run.cpus_per_decode:g}: the cluster has {cluster}"
            )
        threads = None if own_gpus else max(1, int(run.cpus_per_actor or cpus // most))
        decoders = None if grows else int(free / max(run.cpus_per_decode, 0.1))
        return cls(least, most, own_cpus, own_gpus, threads, decoders, cluster)

    def describe(self) -> str:
        """What of a plan is theirs."""
        number = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return f"on Ray ({self.cluster}), {number} actors of {self.cpus:g} CPUs{gpus}"


def _room(node: dict[str, float], cpus: float, gpus: float) -> int:
    """How many actors a node holds; the share of a GPU is one GPU's."""
    places = int(node.get("CPU", 0) / cpus + 1e-6)
    if gpus:
        devices = node.get("GPU", 0)
        shared = int(devices) * int(1 / gpus + 1e-6) if gpus <= 1 else int(devices / gpus)
        places = min(places, shared)
    return places


def is_known_to_grow(ray: Any) -> bool:
    """Whether an autoscaler has told Ray how large the cluster can be; not all of them do.

    That is not public in Ray 2.60.
    """
    state = getattr(getattr(ray, "_private", None), "state", None)
    ask = getattr(getattr(state, "state", None), "get_max_resources_from_cluster_config", None)
    return ask is not None and bool(ask())


def _chain(
    ray: Any, job: CaptionJob, bundle: Bundle, shards: list[Shard], actors: _Actors
) -> Written:
    from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

    context = DataContext.get_current().copy()
    if actors.decoders is not None:
        # Ray would decode ahead until a sixth of the machine's memory is full. A shard for each
        # decode task and two for each actor are enough; Ray keeps some of it for other stages.
        pixels = 3 * job.image_size**2 * max(len(shard.uris) for shard in shards)  # bytes of one
        ahead = 2 * (actors.decoders + 2 * actors.most) * pixels
        context.execution_options.resource_limits = ExecutionResources(object_store_memory=ahead)
    context.target_max_block_size = None  # never split a block: it is a shard
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    one_shard = {"batch_size": 1, "batch_format": "pyarrow"}
    load: dict[str, Any] = {"fn_kwargs": {"job": job}, "num_cpus": job.run.cpus_per_decode}
    constructor = {"job": job, "bundle": ray.put(bundle), "threads": actors.threads}
    items = [asdict(shard) for shard in shards]
    with DataContext.current(context):  # what else the process does with Ray keeps its own settings
        chain = (
            ray.data.from_items(items, override_num_blocks=len(items))
            .map_batches(load_stage, **load, **one_shard)
            .map_batches(
                CaptionStage,
                fn_constructor_kwargs=constructor,
                compute=ActorPoolStrategy(min_size=actors.least, max_size=actors.most),
                num_gpus=actors.gpus,
                num_cpus=actors.cpus,
                **one_shard,
            )
            .map_batches(write_stage, fn_kwargs={"job": job}, num_cpus=0.25, **one_shard)
        )
        for row in chain.iter_rows():
            if problem := row.pop("problem"):
                name, message = problem
                raise getattr(errors, name)(message)
            yield row["rows"], Work(**row["work"])


@contextmanager
def connected(*, log_to_driver: bool = False) -> Iterator[Any]:
    """Joins the cluster that RAY_ADDRESS names, or starts Ray here for this job alone."""
    if not os.environ.get("RAY_ADDRESS"):
        # Read when Ray is imported. Without a token of our own Ray leaves one in the home
        # directory, where clusters that are started later trip over it.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("http"):
        raise InputError(
            f"RAY_ADDRESS is {address}, which is for ray job submit: unset it, or give "
            "--engine local"
        )
    import ray

    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.WARNING}
    if address == "local":
        options["include_dashboard"] = log_to_driver  # Ray Train asks it what has become of actors
    logging.getLogger("ray._private.worker").addFilter(_is_not_of_handlers)
    # A thread of its own begins: there Ray leaves the handler of SIGTERM alone, and a signal
    # interrupts the waiting for it, never Ray in the midst of starting its processes. They end with
    # the thread that started them, so that it stays.
    with ThreadPoolExecutor(1, thread_name_prefix="ray") as pool:
        beginning = pool.submit(ray.init, address=address, **options)
        try:
            try:
                with keep_handlers():  # one of Ray's C++ libraries puts its own in their place
                    beginning.result()
            except (OSError, RuntimeError, ValueError) as error:
                what = "start Ray" if address == "local" else f"reach Ray at RAY_ADDRESS, {address}"
                raise InputError(f"cannot {what}: {' '.join(str(error).split())}") from error
            yield ray
        finally:
            wait([beginning])
            ray.shutdown(wait_for_processes=True)


def _is_not_of_handlers(record: logging.LogRecord) -> bool:
    """Whether it is not Ray's warning that it left SIGTERM's handler alone."""
    return "SIGTERM handler is not set" not in record.getMessage()
