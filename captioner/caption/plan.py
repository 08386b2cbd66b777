"""What a caption job is about to do, and what it did."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from captioner.caption.timing import Work
from captioner.config import RunConfig
from captioner.errors import (
    InputError,
)
from captioner.output.manifest import Shard
from captioner.runtime.device import choose_device, choose_dtype

__all__ = ["Plan", "Summary", "choose_engine"]

_COMPILE_FROM = 10_000  # images: compiling takes as long as it then saves on about so many


_HELD_UP = {"model": "the model", "decode": "reading and decoding", "write": "writing"}


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


def _plan(images: int, shards: Sequence[Shard], workers: str) -> Plan:
    return Plan(images, sum(len(shard.uris) for shard in shards), len(shards), workers)


def _describe_process(run: RunConfig) -> str:
    device = choose_device(run.device)
    dtype = str(choose_dtype(run.precision, device)).removeprefix("torch.")
    return f"in this process, on {device}, in {dtype}, {_describe_batch(run)}"


def _describe_batch(run: RunConfig) -> str:
    found = "as many images a batch as pays"
    return found if run.batch_size == "auto" else f"{run.batch_size} images a batch"


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
