"""The training loop of one worker: epochs, checkpoints, validation."""

import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from captioner import storage
from captioner.config import TrainConfig
from captioner.data.dataset import Split
from captioner.errors import CaptionerError, InputError, first_of, printable
from captioner.evaluation.cider import CiderD
from captioner.model import bundle
from captioner.model.bundle import SeenImages
from captioner.model.tokenization import scoring_words
from captioner.runtime.progress import Progress, progress_bar
from captioner.training.batches import Source
from captioner.training.features import compute_features
from captioner.training.journal import Epoch, write_journal
from captioner.training.trainer import Trainer

__all__ = ["best_of"]

_SAMPLES = 8  # validation images whose captions are kept after each epoch


_PRIVATE = "_training"  # what a run keeps for itself: the model as it began, a checkpoint


_CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class _Job:
    """What every worker is told."""

    split: Split
    output: str
    config: TrainConfig
    device: str
    logged: bool  # whether its output is a log that people follow
    seen: SeenImages

    def private(self, name: str) -> str:
        """The URI of a file or directory that the run keeps for itself."""
        return storage.join(self.output, f"{_PRIVATE}/{name}")


@dataclass(frozen=True)
class _Worker:
    """One of the processes that train together, and its way to the others."""

    rank: int
    workers: int
    local: tuple[int, int]  # this process and how many there are, on this machine
    gather: Callable[[Any], list[Any]]
    report: Callable[[int, Epoch | None], None]  # an epoch's number, and what rank 0 knows of it

    def wait(self) -> None:
        """Returns when all workers are here."""
        self.gather(None)


def _train_loop(job: _Job, worker: _Worker) -> None:
    """What each worker does; it is given all it needs, and knows no Ray."""
    config = job.config
    initial = bundle.load(job.private("initial"))
    trainer = Trainer(
        initial.model,
        initial.vocabulary,
        config,
        device=job.device,
        rank=worker.rank,
        workers=worker.workers,
    )
    training, validation = _sources(job.split, trainer, worker)
    if config.scst_epochs:
        trainer.reward_for(training.examples)
    judge = CiderD(
        [[scoring_words(text) for text in each.captions] for each in validation.examples]
    )
    reported = training.unreadable | validation.unreadable
    # Nobody writes the next one before all have read this one: an epoch needs all of them.
    epochs = _resume(job, trainer)
    last = config.epochs + config.scst_epochs
    for number in range(len(epochs) + 1, last + 1):
        begin = time.monotonic()
        with progress_bar(
            len(training.examples),
            unit="image",
            description=f"epoch {number}/{last}",
            logged=job.logged,
            quiet=worker.rank != 0,
        ) as progress:
            value = trainer.train_epoch(training, number, partial(_advance, progress))
        seconds = time.monotonic() - begin
        if np.isfinite(value):
            loss, mine = trainer.validate(validation)
        if not (np.isfinite(value) and np.isfinite(loss)):
            raise CaptionerError(f"the loss is not finite in epoch {number}: lower learning_rate")
        bad = set().union(*worker.gather(training.unreadable | validation.unreadable))
        if worker.rank == 0:
            _report_bad(bad - reported)
        reported |= bad
        captions = {image: text for each in worker.gather(mine) for image, text in each.items()}
        if not captions:
            raise InputError("none of the images to validate on can be read or decoded")
        if worker.rank == 0:
            scores = [judge.score(image, scoring_words(text)) for image, text in captions.items()]
            critical = number > config.epochs
            epoch = Epoch(
                epoch=number,
                train_loss=None if critical else value,
                train_cider=100 * value if critical else None,
                validation_loss=loss,
                validation_cider=100 * sum(scores) / len(scores),
                seconds=seconds,
                images_per_second=len(training.examples) / seconds,
                samples=[
                    captions.get(i, "") for i in range(min(_SAMPLES, len(validation.examples)))
                ],
            )
            epochs.append(epoch)
            # Not print: on Ray Train's workers it would come twice.
            sys.stdout.write(f"epoch {number}/{last}: {epoch.describe()}\n")
            sys.stdout.flush()
            _keep(job, trainer, epochs, validation)
        else:
            epochs.append(None)  # type: ignore[arg-type]  # only their number counts here
        worker.report(number, epochs[-1])


def _advance(progress: Progress, images: int, value: float) -> None:
    progress.update(images)
    progress.set_postfix(value=f"{value:.3f}")


def _as_json(epochs: Sequence[Epoch]) -> str:
    return json.dumps([asdict(each) for each in epochs])


def _resume(job: _Job, trainer: Trainer) -> list[Epoch]:
    """Loads the last checkpoint, where there is one; the epochs that are done."""
    try:
        data = storage.read(job.private(_CHECKPOINT))
    except FileNotFoundError:
        return []
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    epochs = [Epoch(**each) for each in json.loads(state.pop("epochs"))]
    trainer.load_state(state)
    return epochs


def best_of(epochs: Sequence[Epoch]) -> Epoch:
    """The epoch whose model is kept: the highest CIDEr, and the lowest loss among equals."""
    return max(epochs, key=lambda each: (each.validation_cider, -each.validation_loss))


def _keep(job: _Job, trainer: Trainer, epochs: Sequence[Epoch], validation: Source) -> None:
    """Writes the bundles, the journal and, last, the checkpoint after an epoch."""
    directories = [storage.join(job.output, "last")]
    if best_of(epochs) is epochs[-1]:
        directories.append(job.output)
    for directory in directories:
        bundle.save_images(directory, job.seen)
        bundle.save(directory, trainer.kept, trainer.vocabulary)
    names = [each.uri.rsplit("/", 1)[-1] for each in validation.examples[:_SAMPLES]]
    write_journal(job.output, epochs, names)
    storage.write(storage.join(job.output, "epochs.json"), _as_json(epochs).encode())
    sink = io.BytesIO()
    torch.save({"epochs": _as_json(epochs), **trainer.state()}, sink)
    storage.write(job.private(_CHECKPOINT), sink.getvalue())


def _sources(split: Split, trainer: Trainer, worker: _Worker) -> tuple[Source, Source]:
    """Both sides of the split; with a frozen encoder their features."""
    config, vocabulary, model = trainer.config, trainer.vocabulary, trainer.model
    sides = []
    source = partial(
        Source,
        model=model.config,
        vocabulary=vocabulary,
        captions=config.captions,
        augmentation=config.augmentation,
    )
    for examples, count in ((split.train, config.views), (split.validation, 1)):
        if not model.encoder.frozen:
            sides.append(source(examples, None))
            continue
        views = compute_features(
            model.encoder.eval(),
            examples,
            image_size=model.config.image_size,
            views=count,
            augmentation=config.augmentation,
            dtype=trainer.dtype,
            share=worker.local,
            wait=worker.wait,
        )
        side = source(examples, views)
        side.unreadable = set().union(*worker.gather(side.unreadable))
        if len(side.unreadable) == len(examples):
            raise InputError("none of the images can be read or decoded")
        if worker.rank == 0:
            _report_bad(side.unreadable)
        sides.append(side)
    return sides[0], sides[1]


def _report_bad(uris: set[str]) -> None:
    """Names the images that are left out of training and validation."""
    if uris:
        first = first_of(sorted(uris), 5)
        text = f"{len(uris)} images cannot be read or decoded and are left out: {first}"
        tqdm.write(printable(text), file=sys.stderr)
