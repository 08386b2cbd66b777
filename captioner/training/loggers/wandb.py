"""Weights & Biases, by its own client; the environment says where: ``WANDB_MODE`` and others.

Without a network (``WANDB_MODE=offline``) the client writes to ``wandb/`` in the run's directory,
which ``wandb sync`` sends later.
"""

import logging
import os
import uuid
from collections.abc import Mapping, Sequence

from captioner import storage
from captioner.errors import InputError, one_line
from captioner.training.directory import TrainingDirectory

__all__ = ["WandbLogger"]

_SECONDS = 15.0  # for sending what is left at the end of a run; it also stays on the disk
_OF_EPOCHS = ("train_*", "validation_*", "seconds", "images_per_second")

_logger = logging.getLogger(__name__)


class WandbLogger:
    """Sends figures at once. The run's id is in its directory: a resumed run is one run there.

    Neither the command, nor the environment, nor what is printed is sent.

    Raises:
        InputError: the service refuses the run, or cannot be reached.
    """

    def __init__(self, directory: TrainingDirectory):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._failed = False
        identity = directory.read_id("wandb")
        if identity is None:
            identity = uuid.uuid4().hex
            directory.write_id("wandb", identity)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "captioner",
                dir=storage.as_path(directory.uri) if storage.is_local(directory.uri) else None,
                name=directory.name,
                id=identity,
                resume="allow",
                settings=wandb.Settings(
                    console="off",
                    disable_code=True,
                    disable_git=True,
                    finish_timeout=_SECONDS,
                    silent=True,
                    x_disable_meta=True,
                    x_save_requirements=False,
                ),
            )
        except Exception as error:  # of the client, which has no common base for its errors
            raise InputError(
                f"--log wandb: {one_line(error)}; WANDB_MODE=offline logs without the service"
            ) from error
        self._run.config.update(directory.read_settings(), allow_val_change=True)
        self._run.define_metric("step/*", step_metric="step")
        for name in _OF_EPOCHS:
            self._run.define_metric(name, step_metric="epoch")
        if self._run.settings.mode == "online":
            _logger.info("wandb shows this run at %s", self._run.url)

    def log_step(self, step: int, figures: Mapping[str, float]) -> None:
        """Sends a step's figures."""
        self._log({**figures, "step": step})

    def log_epoch(
        self, epoch: int, figures: Mapping[str, float], captions: Sequence[tuple[str, str]]
    ) -> None:
        """Sends an epoch's figures; ``samples.md`` has the captions."""
        self._log({**figures, "epoch": epoch})

    def flush(self) -> None:
        """Does nothing: the client sends by itself."""

    def close(self, *, failed: bool) -> None:
        """Waits a few seconds until everything is sent; ``wandb sync`` sends the rest."""
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:  # figures must not cost the training
            self._warn(error)

    def _log(self, figures: Mapping[str, float]) -> None:
        try:
            self._run.log(dict(figures))
        except Exception as error:  # figures must not cost the training
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._failed:
            _logger.warning("wandb receives no more figures: %s", one_line(error))
        self._failed = True
