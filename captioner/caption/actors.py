"""How many processes caption on a Ray cluster, and what Ray reserves for each."""

from dataclasses import dataclass
from typing import Any

from captioner.config import RunConfig
from captioner.errors import InputError
from captioner.runtime.cluster import is_known_to_grow

__all__ = ["ActorPool", "fit_actors"]

# Actors that reserve whole CPUs could leave none for the tasks that decode and write.
_CPUS_OF_AN_ACTOR = 0.75
_CPUS_OF_AN_ACTOR_ON_ONE_CPU = 0.4
_CPUS_PER_ACTOR_WITHOUT_GPUS = 8  # logical CPUs of the cluster for each actor
_LEAST_CPUS_OF_A_DECODE_TASK = 0.1
_ROUNDING = 1e-6  # tolerance in CPUs or GPUs for rounding errors


@dataclass(frozen=True)
class ActorPool:
    """The actors that caption on Ray.

    Attributes:
        least: the smallest number of actors.
        most: the largest number of actors.
        cpus: logical CPUs that Ray reserves for each actor.
        gpus: GPUs that Ray reserves for each actor.
        threads: torch's threads in each actor; None keeps torch's default, on a GPU.
        decoders: decode tasks that fit beside the actors; None if the cluster may grow.
        room: actors that fit on the cluster at present.
        cluster: a description of the cluster, for messages.
    """

    least: int
    most: int
    cpus: float
    gpus: float
    threads: int | None
    decoders: int | None
    room: int
    cluster: str

    def describe(self) -> str:
        """One line for a person."""
        number = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return f"on Ray ({self.cluster}), {number} actors of {self.cpus:g} CPUs{gpus}"


def fit_actors(ray: Any, run: RunConfig) -> ActorPool:
    """Chooses the actors for a run, for the present cluster or for one that may grow.

    Raises:
        InputError: the actors do not fit on the cluster, and it is not known to grow.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    own_cpus = run.cpus_per_actor or (
        _CPUS_OF_AN_ACTOR if cpus > 1 else _CPUS_OF_AN_ACTOR_ON_ONE_CPU
    )
    own_gpus = _gpus_of_an_actor(run, gpus)
    room = sum(_room(node, own_cpus, own_gpus) for node in nodes)
    if run.actor_range:
        least, most = run.actor_range
    else:
        least = most = max(1, room if own_gpus else int(cpus) // _CPUS_PER_ACTOR_WITHOUT_GPUS)
    grows = run.wait_for_nodes or is_known_to_grow(ray)
    free = cpus - least * own_cpus
    pool = ActorPool(
        least=least,
        most=most,
        cpus=own_cpus,
        gpus=own_gpus,
        threads=None if own_gpus else max(1, int(run.cpus_per_actor or cpus // most)),
        decoders=None
        if grows
        else int(free / max(run.cpus_per_decode, _LEAST_CPUS_OF_A_DECODE_TASK)),
        room=room,
        cluster=f"{len(nodes)} nodes, {cpus:g} CPUs, {gpus:g} GPUs",
    )
    if not grows:
        _check_room(pool, run, free_cpus=free, cluster_gpus=gpus)
    return pool


def _gpus_of_an_actor(run: RunConfig, cluster_gpus: float) -> float:
    gpus = run.gpus_per_actor
    if gpus is None:
        gpus = 1 if run.device == "cuda" or (cluster_gpus and run.device == "auto") else 0
    if gpus > 1 and gpus % 1:
        raise InputError(f"--gpus-per-actor must be a whole number or at most 1, not {gpus:g}")
    return gpus


def _room(node: dict[str, float], cpus: float, gpus: float) -> int:
    """How many actors fit on a node; a fraction of a GPU comes from a single GPU."""
    places = int(node.get("CPU", 0) / cpus + _ROUNDING)
    if gpus:
        devices = node.get("GPU", 0)
        shared = int(devices) * int(1 / gpus + _ROUNDING) if gpus <= 1 else int(devices / gpus)
        places = min(places, shared)
    return places


def _check_room(pool: ActorPool, run: RunConfig, *, free_cpus: float, cluster_gpus: float) -> None:
    needed = f"{pool.least} actors of {pool.cpus:g} CPUs and {pool.gpus:g} GPUs"
    if run.device == "cuda" and not cluster_gpus:
        raise InputError(f"--device cuda needs a GPU: the cluster has {pool.cluster}")
    if pool.room < pool.least:
        raise InputError(
            f"no room for {needed}, only for {pool.room}: the cluster has {pool.cluster}; "
            "if more nodes will join, add --wait-for-nodes"
        )
    if free_cpus < run.cpus_per_decode:
        raise InputError(
            f"{needed} leave {max(0, free_cpus):g} CPUs to decode images, which takes "
            f"{run.cpus_per_decode:g} (--cpus-per-decode): the cluster has {pool.cluster}"
        )
