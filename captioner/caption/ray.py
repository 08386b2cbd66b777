"""The caption job on Ray: one chain of the stages in captioner.caption.ray_stages."""

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

from captioner import errors
from captioner.caption.plan import _choose_compile, _plan
from captioner.caption.ray_stages import CaptionStage, load_stage, write_stage
from captioner.caption.steps import CaptionJob, Written
from captioner.caption.timing import RayMetrics, Work
from captioner.config import RunConfig
from captioner.errors import (
    InputError,
)
from captioner.model.bundle import Bundle
from captioner.output.manifest import Shard
from captioner.runtime.cluster import connected, is_known_to_grow

_logger = logging.getLogger(__name__)


_ACTOR_CPUS = 0.75  # a whole one would let actors keep the other tasks from being scheduled


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
