"""The training loop that every worker runs: epochs, validation, checkpoints. It knows no Ray."""

import logging
import math
import sys
import time
from collections.abc import Callable
from functools import partial

from captioner.errors import CaptionerError, InputError, first_of
from captioner.runtime.progress import Progress, progress_bar
from captioner.training.batches import TrainingImages
from captioner.training.features import compute_features
from captioner.training.journal import Epoch, StepLog, best_of
from captioner.training.self_critical import SelfCriticalTraining
from captioner.training.trainer import StepFigures, Trainer
from captioner.training.validation import Validation
from captioner.training.worker import Job, Worker

__all__ = ["train_loop"]

_SAMPLES = 8  # validation images whose captions the journal keeps after each epoch

_logger = logging.getLogger(__name__)


def train_loop(job: Job, worker: Worker) -> None:
    """Trains until all epochs are done, from the checkpoint where there is one.

    Raises:
        InputError: none of the images can be read or decoded.
        CaptionerError: the loss is not finite.
        OutputError: the directory cannot be written.
    """
    initial = job.directory.load_initial()
    trainer = Trainer(
        initial.model,
        initial.vocabulary,
        job.config,
        device=job.device,
        rank=worker.rank,
        workers=worker.workers,
    )
    training = _load_images(job, trainer, worker, "training")
    validation = _load_images(job, trainer, worker, "validation")
    _Loop(job, worker, trainer, training, validation).run()


class _Loop:
    """The epochs of a run, on one worker."""

    def __init__(
        self,
        job: Job,
        worker: Worker,
        trainer: Trainer,
        training: TrainingImages,
        validation: TrainingImages,
    ):
        self._job, self._worker, self._trainer = job, worker, trainer
        self._training, self._validation = training, Validation(trainer, validation)
        self._portions = job.split.portions
        self._self_critical = None
        if job.config.scst_epochs:
            self._self_critical = SelfCriticalTraining(trainer, training.examples)
        self._reported = training.unreadable | validation.unreadable
        self._steps: list[StepFigures] = []
        # No worker writes the next checkpoint before all have read this one: an epoch needs all.
        self._epochs, state = job.directory.load_checkpoint()
        if state is not None:
            trainer.load_state(state)
        self._last = job.config.epochs + job.config.scst_epochs

    def run(self) -> None:
        """Trains the epochs that are left."""
        if self._worker.rank == 0:
            if not self._epochs:
                self._job.directory.delete_models()
            elif len(self._epochs) < self._last:
                _logger.info("resuming after epoch %d of %d", len(self._epochs), self._last)
        for number in range(len(self._epochs) + 1, self._last + 1):
            if self._stops_early():
                break
            epoch = self._run_epoch(number)
            if epoch is not None:
                self._finish(epoch)
            else:
                self._epochs.append(None)  # type: ignore[arg-type]  # only their number counts here
            self._worker.report(number, epoch)

    def _stops_early(self) -> bool:
        """Whether too many epochs have passed since the best; rank 0, which knows all, decides."""
        patience, stops = self._job.config.early_stopping, False
        if patience is not None and self._worker.rank == 0 and self._epochs:
            best = best_of(self._epochs).epoch
            stops = len(self._epochs) - best >= patience
            if stops:
                _logger.info(
                    "stopped early after epoch %d of %d: epoch %d is the best",
                    len(self._epochs),
                    self._last,
                    best,
                )
        return bool(self._worker.gather(stops)[0])

    def _run_epoch(self, number: int) -> Epoch | None:
        """Trains and validates; returns the figures on rank 0."""
        critical = number > self._job.config.epochs
        step = None
        if critical:
            assert self._self_critical is not None, "self-critical epochs need its images"
            step = self._self_critical.step
            if number == self._job.config.epochs + 1:
                self._self_critical.begin()
        images = sum(portion.images_per_epoch for portion in self._portions)
        begin = time.monotonic()
        with self._progress(images, f"epoch {number}/{self._last}") as progress:
            report = partial(self._report_step, progress)
            value = self._trainer.train_epoch(self._training, number, report, step=step)
        seconds = time.monotonic() - begin
        losses, captions = self._validate(number)
        if self._worker.rank != 0:
            return None
        validated = self._validation.figures(losses, captions)
        return Epoch(
            epoch=number,
            train_loss=None if critical else value,
            train_cider=100 * value if critical else None,
            validation_loss=validated.loss,
            validation_cider=validated.cider,
            seconds=seconds,
            images_per_second=images / seconds,
            samples=[captions.get(i, "") for i in self._shown],
            validation_by_data=validated.by_data,
        )

    def _report_step(self, progress: Progress, images: int, figures: StepFigures) -> None:
        progress.update(images)
        progress.set_postfix(value=f"{figures.value:.3f}")
        if self._worker.rank == 0:
            self._steps.append(figures)

    def _validate(self, number: int) -> tuple[list[float], dict[int, str]]:
        """The loss on each data set, and all workers' captions by the index of their image."""
        shared = len(self._validation.images.examples) // self._worker.workers
        with self._progress(shared, f"validation {number}/{self._last}") as progress:
            losses, own = self._validation.run(progress.update)
        gathered = self._worker.gather(own)
        captions = {image: text for each in gathered for image, text in each.items()}
        found = self._training.unreadable | self._validation.images.unreadable
        unreadable = set().union(*self._worker.gather(found))
        if self._worker.rank == 0:
            _report_unreadable(unreadable - self._reported)
        self._reported |= unreadable
        for portion, indices in zip(self._portions, self._validation.ranges, strict=True):
            if not any(i in captions for i in indices):
                of = f" of {portion.name}" if portion.name else ""
                raise InputError(f"none of the images{of} to validate on can be read or decoded")
        if not all(map(math.isfinite, losses)):
            raise CaptionerError(
                f"the validation loss is not finite after epoch {number}: run the same command "
                "again with a lower --learning-rate"
            )
        return losses, captions

    @property
    def _shown(self) -> list[int]:
        """The validation images whose captions the journal keeps: the first of each data set."""
        ranges = self._validation.ranges
        return [i for each in ranges for i in each[: max(1, _SAMPLES // len(ranges))]]

    @property
    def _examples(self) -> list[tuple[str, list[str]]]:
        """The names and references of the images whose captions the journal keeps."""
        shown = [self._validation.images.examples[i] for i in self._shown]
        return [(each.uri.rsplit("/", 1)[-1], each.captions) for each in shown]

    def _finish(self, epoch: Epoch) -> None:
        """Reports an epoch and writes the models, the journal and, last, the checkpoint."""
        self._epochs.append(epoch)
        # Not print: on Ray Train's workers it would come twice.
        sys.stdout.write(f"epoch {epoch.epoch}/{self._last}: {epoch.describe()}\n")
        sys.stdout.flush()
        directory, trainer = self._job.directory, self._trainer
        directory.save_models(self._epochs, trainer.result, trainer.vocabulary, self._job.seen)
        log = StepLog([*self._steps])
        self._steps.clear()
        directory.save_journal(self._epochs, self._examples, log)
        directory.save_checkpoint(self._epochs, trainer.state())

    def _progress(self, total: int, description: str) -> Progress:
        return progress_bar(
            total, unit="image", description=description, quiet=self._worker.rank != 0
        )


def _load_images(job: Job, trainer: Trainer, worker: Worker, which: str) -> TrainingImages:
    """The images of a split; with a frozen encoder their features.

    Raises:
        InputError: none of the images can be read or decoded.
    """
    examples = job.split.train if which == "training" else job.split.validation
    config, model = job.config, trainer.model
    make: Callable[..., TrainingImages] = partial(
        TrainingImages,
        examples,
        model=model.config,
        vocabulary=trainer.vocabulary,
        captions=config.captions,
        augmentation=config.augmentation,
        portions=job.split.portions,
    )
    if not model.encoder.frozen:
        return make(views=None)
    views = compute_features(
        model.encoder.eval(),
        examples,
        image_size=model.config.image_size,
        views=config.views if which == "training" else 1,
        augmentation=config.augmentation,
        dtype=trainer.dtype,
        share=worker.local,
        wait=worker.wait,
    )
    images = make(views=views)
    images.unreadable = set().union(*worker.gather(images.unreadable))
    if len(images.unreadable) == len(examples):
        raise InputError(f"none of the {which} images can be read or decoded")
    if worker.rank == 0:
        _report_unreadable(images.unreadable)
    return images


def _report_unreadable(uris: set[str]) -> None:
    """Names the images that are left out of training and validation."""
    if uris:
        first = first_of(sorted(uris), 5)
        _logger.warning(
            "%d images cannot be read or decoded and are left out: %s", len(uris), first
        )
