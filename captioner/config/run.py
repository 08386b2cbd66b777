"""Settings of a caption job: where it runs, its speed and limits."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from captioner.config.settings import SettingError, Settings, setting

if TYPE_CHECKING:
    from captioner.storage import WebAccess

__all__ = ["Precision", "RunConfig"]

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """How a caption job runs.

    ``precision``, ``max_pixels`` and ``max_bytes`` can change a row: they are part of a job's
    fingerprint, and a resumed job needs the same. All other fields may differ.
    """

    GROUP = "Speed"

    engine: Literal["auto", "local", "ray"] = setting(
        "auto",
        "Where the job runs: in this process (local) or on a Ray cluster (ray); auto chooses ray "
        "in a Ray job, if RAY_ADDRESS is set, or with several GPUs.",
    )
    device: str = setting(
        "auto", "Device: auto, cpu, cuda, cuda:1 or mps; auto chooses a GPU if there is one."
    )
    precision: Precision = setting(
        "auto", "Precision of matrix products; auto chooses bf16 if the hardware computes in bf16."
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto",
        "Compile the encoder, which takes several seconds; auto compiles on a CPU for 10000 "
        "images or more.",
    )
    batch_size: int | Literal["auto"] = setting(
        64,
        "Images per forward pass; auto, for caption jobs only, starts with 8 and doubles while "
        "that is faster.",
        minimum=1,
        maximum=1_000_000,
    )
    shard_size: int = setting(
        256, "Images per shard; each shard becomes one part file.", minimum=1, maximum=1_000_000
    )
    decoders: int | None = setting(
        None,
        "Threads that read and decode images; on Ray, per decode task.",
        minimum=1,
        unset="one per CPU; on Ray 4",
    )
    actors: str | None = setting(
        None,
        "Number of captioning processes: N, or MIN:MAX for Ray to scale.",
        unset="one per GPU, or one per 8 CPUs",
        group="Ray cluster",
    )
    cpus_per_actor: float | None = setting(
        None,
        "Logical CPUs per captioning process; without a GPU also its threads.",
        minimum=0.1,
        unset="an equal share of the cluster",
        group="Ray cluster",
    )
    gpus_per_actor: float | None = setting(
        None,
        "GPUs per captioning process; with a fraction, processes share a GPU.",
        minimum=0,
        unset="1 if the cluster has GPUs, else 0",
        group="Ray cluster",
    )
    cpus_per_decode: float = setting(
        0.5, "Logical CPUs per task that reads and decodes a shard.", minimum=0, group="Ray cluster"
    )
    wait_for_nodes: bool = setting(
        False,
        "Wait for the cluster to grow if it has no room for the captioning processes yet.",
        group="Ray cluster",
    )
    max_pixels: int = setting(
        256_000_000,
        "Largest image, in pixels; larger images are rejected without decoding.",
        minimum=1,
        group="Limits and failures",
    )
    max_bytes: int = setting(
        256_000_000,
        "Largest file, in bytes; larger files are rejected without reading.",
        minimum=1,
        group="Limits and failures",
    )
    retries: int = setting(
        3,
        "Number of retries after the first failure to read an image.",
        minimum=0,
        group="Limits and failures",
    )
    retry_failed: bool = setting(
        False, "Caption again the images whose status is not ok.", group="Limits and failures"
    )
    stop_after_failures: int | None = setting(
        50,
        "Stop before writing any row when the first N images all fail for the same kind of reason.",
        minimum=1,
        unset="never",
        group="Limits and failures",
    )
    profile: str | None = setting(
        None, "File for a Chrome trace of three batches; local engine only.", unset="no trace"
    )
    max_error_rate: float = setting(
        0.1,
        "Exit with 3 if the share of listed images that are not ok is larger, 0 to 1.",
        minimum=0,
        maximum=1,
        group="Limits and failures",
    )

    user_agent: str | None = setting(
        None,
        "Header User-Agent for web servers; include a way to contact you.",
        unset="captioner/VERSION",
        group="Web addresses",
    )
    connections_per_host: int = setting(
        6,
        "Simultaneous connections to one web host, per process; each Ray worker is a process.",
        minimum=1,
        maximum=1000,
        group="Web addresses",
    )
    http_timeout: float = setting(
        60.0,
        "Longest time of a request to a web server, in seconds, from connection to last byte.",
        minimum=0.1,
        maximum=86_400,
        group="Web addresses",
    )
    allow_private_hosts: bool = setting(
        False,
        "Allow web addresses of this machine and of private networks.",
        group="Web addresses",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.actors is not None:
            self.actor_range  # noqa: B018
        agent = self.user_agent
        if agent is not None and not (agent.strip() and agent.isascii() and agent.isprintable()):
            raise SettingError("user_agent", f"must be ASCII text on one line, not {agent!r}")

    def row_settings(self) -> dict[str, Any]:
        """The settings that can change a row, by name; ``precision`` is not resolved."""
        return {name: getattr(self, name) for name in ("precision", "max_pixels", "max_bytes")}

    @property
    def web(self) -> "WebAccess":
        """How each process of the job accesses web servers."""
        from captioner.storage import WebAccess

        return WebAccess(
            user_agent=self.user_agent,
            connections_per_host=self.connections_per_host,
            timeout=self.http_timeout,
            allow_private_hosts=self.allow_private_hosts,
        )

    @property
    def actor_range(self) -> tuple[int, int] | None:
        """The least and the largest number of actors, where they are given.

        Raises:
            InputError: ``actors`` is not two numbers, or not in order.
        """
        if self.actors is None:
            return None
        match = re.fullmatch(r"(\d+)(?::(\d+))?", self.actors, re.ASCII)
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            raise SettingError("actors", f"must be N or MIN:MAX, not {self.actors!r}")
        return least, most
