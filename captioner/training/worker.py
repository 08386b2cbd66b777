"""The worker processes that train a model together: their settings and their communication."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from captioner.config import TrainConfig
from captioner.config.training import LogKind
from captioner.data.dataset import Split
from captioner.model.bundle import SeenImages
from captioner.training.directory import TrainingDirectory
from captioner.training.journal import Epoch

__all__ = ["Job", "Worker"]


@dataclass(frozen=True)
class Job:
    """The settings that every worker gets.

    Attributes:
        split: the images to train and to validate on.
        output: the directory's URI; all workers reach it.
        config: how to train.
        device: name of the device that each worker computes on.
        seen: the images that the finished model has seen, those of the model it starts from too.
        log: where rank 0 logs the figures.
    """

    split: Split
    output: str
    config: TrainConfig
    device: str
    seen: SeenImages
    log: tuple[LogKind, ...] = ()

    @property
    def directory(self) -> TrainingDirectory:
        """The directory that the run writes to."""
        return TrainingDirectory(self.output)


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together.

    Attributes:
        rank: its number, from 0.
        workers: how many there are.
        local: its number and how many there are on this machine.
        gather: collects a value from every worker, in the order of their ranks.
        report: receives the number of each epoch that ends, and on rank 0 its figures.
    """

    rank: int
    workers: int
    local: tuple[int, int]
    gather: Callable[[Any], list[Any]]
    report: Callable[[int, Epoch | None], None]

    @classmethod
    def alone(cls) -> "Worker":
        """The only worker, in this process."""
        return cls(0, 1, (0, 1), lambda value: [value], lambda *_: None)

    def wait(self) -> None:
        """Returns when all workers have called it."""
        self.gather(None)
