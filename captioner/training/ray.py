"""Training on Ray Train's workers."""

import json
import logging
import os
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from captioner import storage
from captioner.config import LaunchConfig
from captioner.errors import CaptionerError, InputError
from captioner.runtime.device import choose_device
from captioner.training.journal import Epoch
from captioner.training.loop import train_loop
from captioner.training.worker import Job, Worker

__all__ = ["train_on_ray"]

_logger = logging.getLogger(__name__)


def train_on_ray(job: Job, launch: LaunchConfig) -> None:
    """Trains on Ray Train's workers, which resume from the last checkpoint when one of them dies.

    Raises:
        CaptionerError: the training failed, or more workers died than ``launch`` allows.
        InputError: there are too few GPUs, or there is no cluster.
    """
    from captioner.runtime.cluster import connected

    with connected(log_to_driver=True) as ray:
        use_gpu = _uses_gpus(ray, launch)
        devices = "a GPU each" if use_gpu else f"on {launch.device.replace('auto', 'cpu')}"
        _logger.info("%d workers on Ray, %s", launch.workers, devices)
        if launch.device == "auto":
            job = replace(job, device="cuda" if use_gpu else "cpu")
        _fit(ray, job, launch, use_gpu=use_gpu)


def _fit(ray: Any, job: Job, launch: LaunchConfig, *, use_gpu: bool) -> None:
    from ray.exceptions import RayError
    from ray.train import ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
        """Leaves Ctrl-C to captioner: Ray's handler ends the process with code 1 and no message."""

        def _register_sigint_handler(self, controller: Any) -> None:
            pass

    trainer = Trainer(
        _ray_worker,
        train_loop_config={"job": ray.put(job)},
        torch_config=TorchConfig(timeout_s=7200),  # a worker may wait for another's features
        scaling_config=ScalingConfig(
            num_workers=launch.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": launch.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=_run_config(job, launch),
    )
    try:
        trainer.fit()
    except (TrainingFailedError, RayError) as error:
        causes = [error, *getattr(error, "worker_failures", {}).values()]
        reason = " ".join(str(causes[-1]).split()) or type(error).__name__
        raise CaptionerError(f"training failed: {reason[-500:]}") from error


def _run_config(job: Job, launch: LaunchConfig) -> Any:
    """Ray Train's settings of the run: its files, what follows a failure, what it prints."""
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, UserCallback

    class TellFailures(UserCallback):  # type: ignore[misc]  # Ray has no types
        """Prints one line for each failure, in place of Ray's traceback."""

        failures = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            self.failures += 1
            ranks = ", ".join(map(str, sorted(worker_exceptions)))
            outcome = "training resumes from the last epoch"
            if self.failures > launch.max_failures:
                outcome = "training ends"
            print(
                f"captioner: worker {ranks} failed, failure {self.failures} of at most "
                f"{launch.max_failures}: {outcome}",
                file=sys.stderr,
                flush=True,
            )

    filesystem, path = storage.arrow_filesystem(job.directory.private("ray"))
    return RunConfig(
        name="run",
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(max_failures=launch.max_failures),
        checkpoint_config=CheckpointConfig(num_to_keep=2),
        # Ray logs a traceback for each step of replacing a worker; errors are raised as well.
        logging_config=LoggingConfig(log_level="CRITICAL"),
        callbacks=[TellFailures()],
    )


def _uses_gpus(ray: Any, launch: LaunchConfig) -> bool:
    """Whether each worker gets a GPU.

    Raises:
        InputError: it is to have one, and there are too few.
    """
    from captioner.runtime.cluster import is_known_to_grow

    gpus = ray.cluster_resources().get("GPU", 0)
    if launch.device.startswith("cuda:"):
        raise InputError(
            f"--device {launch.device}: Ray chooses the GPUs of its workers; use --device cuda"
        )
    if launch.device == "cuda" and gpus < launch.workers and not is_known_to_grow(ray):
        raise InputError(
            f"--device cuda: {launch.workers} workers need a GPU each, but the cluster has {gpus:g}"
        )
    return launch.device == "cuda" or (launch.device == "auto" and gpus >= launch.workers)


def _ray_worker(settings: dict[str, Any]) -> None:
    import ray
    import ray.train
    from torch import distributed

    # One of Ray Train's loggers minds no level but the root's, and tells each report in full.
    logging.getLogger().setLevel(logging.WARNING)
    context = ray.train.get_context()
    job = ray.get(settings["job"])
    if choose_device(job.device).type == "cuda":
        job = replace(job, device=str(ray.train.torch.get_device()))
    elif job.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))

    def gather(value: Any) -> list[Any]:
        values = [None] * context.get_world_size()
        distributed.all_gather_object(values, value)
        return values

    train_loop(
        job,
        Worker(
            rank=context.get_world_rank(),
            workers=context.get_world_size(),
            local=(context.get_local_rank(), context.get_local_world_size()),
            gather=gather,
            report=partial(_report, job.directory.checkpoint),
        ),
    )


def _report(checkpoint: str, number: int, epoch: Epoch | None) -> None:
    """Reports an epoch to Ray Train, on rank 0 with its figures and a checkpoint.

    Ray's checkpoint holds the URI of captioner's, from which a run without Ray resumes too.
    """
    import ray.train

    if epoch is None:
        ray.train.report({"epoch": number})
        return
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "checkpoint.json").write_text(json.dumps({"uri": checkpoint}))
        ray.train.report(
            epoch.figures(),
            checkpoint=ray.train.Checkpoint.from_directory(directory),
            checkpoint_dir_name=f"epoch-{number:04d}",
        )
