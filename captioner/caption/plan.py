"""What a caption job is about to do, and where: a dry run shows the plan, a job executes it."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from captioner.caption.actors import ActorPool, fit_actors
from captioner.config import RunConfig
from captioner.errors import InputError, counted
from captioner.output.manifest import Shard
from captioner.runtime.cluster import connected
from captioner.runtime.device import choose_device, resolve_precision

__all__ = [
    "InProcess",
    "OnRay",
    "Placement",
    "Plan",
    "choose_engine",
    "make_plan",
    "placed",
    "precision_on_ray",
]

_COMPILE_FROM = 10_000  # images: compiling takes as long as it then saves on about so many
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class InProcess:
    """A job in this process, on one device."""

    device: torch.device
    precision: Literal["fp32", "bf16"]

    @property
    def on_cpu(self) -> bool:
        """Whether the model computes on a CPU."""
        return self.device.type == "cpu"

    def describe(self) -> str:
        """One line for a person."""
        return f"in this process, on {self.device}, in {_DTYPES[self.precision]}"


@dataclass(frozen=True)
class OnRay:
    """A job on a Ray cluster that this process is connected to."""

    ray: Any
    pool: ActorPool
    precision: Literal["fp32", "bf16"]

    @property
    def on_cpu(self) -> bool:
        """Whether the model computes on CPUs; the driver's machine may lack the actors' GPUs."""
        return not self.pool.gpus

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.pool.describe()}, in {_DTYPES[self.precision]}"


Placement = InProcess | OnRay


@dataclass(frozen=True)
class Plan:
    """What a job is about to do.

    Attributes:
        images: images of the output, finished ones included.
        shards: what is to be captioned.
        run: the settings, with a value for each ``auto`` that the placement decides.
        placement: where the model runs.
    """

    images: int
    shards: tuple[Shard, ...]
    run: RunConfig
    placement: Placement

    @property
    def remaining(self) -> int:
        """The number of images to caption."""
        return _count(self.shards)

    def describe(self) -> str:
        """One line for a person."""
        if not self.shards:
            return f"{counted(self.images, 'image')}, all captioned"
        part = f"{self.remaining} to caption" if self.remaining < self.images else "all to caption"
        if self.run.batch_size == "auto":
            batches = "with the fastest batch size"
        else:
            batches = f"{counted(self.run.batch_size, 'image')} per batch"
        work = f"{counted(self.images, 'image')}, {part}, in {counted(len(self.shards), 'shard')}"
        return f"{work}; {self.placement.describe()}, {batches}"


def make_plan(images: int, shards: Sequence[Shard], run: RunConfig, placement: Placement) -> Plan:
    """The plan to caption some shards of an output that has so many images."""
    run = replace(run, precision=placement.precision)
    if run.compile == "auto":
        pays = placement.on_cpu and _count(shards) >= _COMPILE_FROM
        run = replace(run, compile="on" if pays else "off")
    return Plan(images, tuple(shards), run, placement)


def _count(shards: Sequence[Shard]) -> int:
    return sum(map(len, shards))


def choose_engine(run: RunConfig) -> Literal["local", "ray"]:
    """The engine; ``auto`` is Ray in a Ray job, on a cluster or with several GPUs.

    Raises:
        InputError: the engine is Ray, but a profile or one GPU of a machine is asked for.
    """
    engine, one_gpu = run.engine, run.device.startswith("cuda:")
    if engine == "auto" and one_gpu:
        engine = "local"
    elif engine == "auto":
        job = os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
        engine = "ray" if job or torch.cuda.device_count() > 1 else "local"
    if engine == "ray" and one_gpu:
        raise InputError(
            f"--device {run.device} needs --engine local: Ray chooses the GPU of each process"
        )
    if engine == "ray" and run.profile is not None:
        raise InputError("--profile needs --engine local: it records one process")
    return engine


@contextmanager
def placed(run: RunConfig, *, dry: bool = False) -> Iterator[Placement]:
    """Finds the place for a run; on Ray, stays connected to the cluster while entered.

    Args:
        run: the settings.
        dry: do not wait for a cluster to grow.

    Raises:
        InputError: there is no such device, no such cluster, or no room on it.
    """
    if choose_engine(run) == "local":
        device = choose_device(run.device)
        yield InProcess(device, resolve_precision(run.precision, device))
        return
    with connected() as ray:
        pool = fit_actors(ray, run)
        yield OnRay(ray, pool, precision_on_ray(ray, pool, run, dry=dry))


def precision_on_ray(
    ray: Any, pool: ActorPool, run: RunConfig, *, dry: bool
) -> Literal["fp32", "bf16"]:
    """The precision of all actors, resolved by a task with an actor's resources.

    A dry run does not wait for a place: it takes bf16 for GPUs that are yet to come.
    """
    if run.precision != "auto":
        return run.precision
    if not pool.gpus and _is_this_machine(ray):
        return resolve_precision("auto", torch.device("cpu"))
    if dry and not pool.room:
        return "bf16" if pool.gpus else resolve_precision("auto", torch.device("cpu"))
    ask = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus)(_precision_here)
    precision: Literal["fp32", "bf16"] = ray.get(ask.remote(run.device))
    return precision


def _is_this_machine(ray: Any) -> bool:
    """Whether the cluster is this machine alone."""
    return {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]} == {
        socket.gethostname()
    }


def _precision_here(device: str) -> str:
    return resolve_precision("auto", choose_device(device))
