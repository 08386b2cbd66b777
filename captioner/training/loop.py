"""The training loop that every worker runs: epochs, validation, checkpoints. It knows no Ray."""

import copy
import logging
import math
import sys
import time
from functools import partial

from captioner.errors import CaptionerError, InputError
from captioner.model.network import CaptionModel
from captioner.runtime.progress import Progress, progress_bar
from captioner.training.batches import TrainingImages, steps_per_epoch
from captioner.training.images import load_images, report_unreadable
from captioner.training.journal import Epoch, StepValidation, best_of, rank_of
from captioner.training.loggers.base import Loggers
from captioner.training.self_critical import SelfCriticalTraining
from captioner.training.trainer import StepFigures, Trainer
from captioner.training.validation import Validated, Validation
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
    training = load_images(job, trainer, worker, "training")
    validation = load_images(job, trainer, worker, "validation")
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
        self._loggers = Loggers()
        # Of the epoch that has begun: its validations, the model of the best of them where that is
        # the best of the run, and the seconds that they took.
        self._validations: list[StepValidation] = []
        self._best_within: CaptionModel | None = None
        self._seconds_away = 0.0
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
        ends = self._is_finished()
        if ends:
            return
        kinds = self._job.log if self._worker.rank == 0 else ()
        with Loggers.open(kinds, self._job.directory) as self._loggers:
            while not ends:
                number = len(self._epochs) + 1
                epoch = self._run_epoch(number)
                if epoch is not None:
                    self._finish(epoch)
                else:
                    self._epochs.append(None)  # type: ignore[arg-type]  # only their number counts
                self._worker.report(number, epoch)
                ends = self._is_finished()

    def _is_finished(self) -> bool:
        return len(self._epochs) >= self._last or self._stops_early()

    def _stops_early(self) -> bool:
        """Whether too many epochs have passed since the best; rank 0, which knows all, decides."""
        patience, stops = self._job.config.early_stopping, False
        if patience is not None and self._worker.rank == 0 and self._epochs:
            best = best_of(self._epochs).epoch
            stops = len(self._epochs) - best >= patience
            if stops:
                _logger.info(
                    "stopped early after epoch %d of %d; the best epoch is %d",
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
        self._validations, self._best_within, self._seconds_away = [], None, 0.0
        begin = time.monotonic()
        with self._progress(images, f"epoch {number}/{self._last}") as progress:
            report = partial(self._after_step, progress, number)
            value = self._trainer.train_epoch(self._training, number, report, step=step)
        seconds = time.monotonic() - begin - self._seconds_away
        validated = self._validate(f"{number}/{self._last}", f"epoch {number}")
        if validated is None:
            return None
        figures, captions = validated
        return Epoch(
            epoch=number,
            train_loss=None if critical else value,
            train_cider=100 * value if critical else None,
            validation_loss=figures.loss,
            validation_cider=figures.cider,
            seconds=seconds,
            images_per_second=images / seconds,
            samples=[captions.get(i, "") for i in self._shown],
            validation_by_data=figures.by_data,
            step=number * self._steps_per_epoch,
            validations=[*self._validations],
        )

    def _after_step(
        self, progress: Progress, epoch: int, images: int, figures: StepFigures
    ) -> None:
        """Logs a step; validates after it where that is due."""
        progress.update(images)
        if epoch > self._job.config.epochs:  # self-critical
            progress.set_postfix(CIDEr=f"{100 * figures.value:.1f}")
        else:
            progress.set_postfix(loss=f"{figures.value:.3f}")
        self._loggers.log_step(figures.step, vars(figures))
        every = self._job.config.validate_every
        # After the last step of an epoch it is validated in any case.
        if every and not figures.step % every and figures.step % self._steps_per_epoch:
            begin = time.monotonic()
            self._validate_within(epoch, figures.step)
            self._seconds_away += time.monotonic() - begin

    def _validate_within(self, epoch: int, step: int) -> None:
        """Validates within an epoch, and keeps the model where it is the best so far.

        The model is in memory until the epoch ends: a run that is killed before that trains the
        epoch again, and the files agree with the checkpoint.
        """
        trains = self._trainer.model.training
        validated = self._validate(f"step {step}", f"step {step}")
        self._trainer.model.train(trains)
        if validated is None:
            return
        figures, _ = validated
        validation = StepValidation(step, figures.loss, figures.cider, figures.by_data)
        earlier = [*(each.best for each in self._epochs), *self._validations]
        if all(rank_of(validation) > rank_of(each) for each in earlier):
            self._best_within = copy.deepcopy(self._trainer.result).cpu()
        self._validations.append(validation)
        _print(f"epoch {epoch}/{self._last}, step {step}: {validation.describe()}")
        self._job.directory.save_metrics(self._epochs, self._validations)
        self._log_validation(step, validation.figures())

    def _log_validation(self, step: int, figures: dict[str, float]) -> None:
        """Logs a validation by its step."""
        of_validation = {k: value for k, value in figures.items() if k.startswith("validation_")}
        self._loggers.log_step(step, of_validation)
        self._loggers.flush()

    def _validate(self, description: str, place: str) -> tuple[Validated, dict[int, str]] | None:
        """On rank 0 the figures, and all workers' captions by the index of their image.

        Args:
            description: of the progress.
            place: where in the run, for a message.
        """
        shared = len(self._validation.images.examples) // self._worker.workers
        with self._progress(shared, f"validation {description}") as progress:
            losses, own = self._validation.run(progress.update)
        gathered = self._worker.gather(own)
        captions = {image: text for each in gathered for image, text in each.items()}
        found = self._training.unreadable | self._validation.images.unreadable
        unreadable = set().union(*self._worker.gather(found))
        if self._worker.rank == 0:
            report_unreadable(unreadable - self._reported)
        self._reported |= unreadable
        for portion, indices in zip(self._portions, self._validation.ranges, strict=True):
            if not any(i in captions for i in indices):
                of = f" of {portion.name}" if portion.name else ""
                raise InputError(f"none of the images{of} to validate on can be read or decoded")
        if not all(map(math.isfinite, losses)):
            raise CaptionerError(
                f"the validation loss is not finite after {place}: run the same command "
                "again with a lower --learning-rate"
            )
        if self._worker.rank != 0:
            return None
        return self._validation.figures(losses, captions), captions

    @property
    def _steps_per_epoch(self) -> int:
        return steps_per_epoch(self._portions, self._job.config.batch_size)

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
        _print(f"epoch {epoch.epoch}/{self._last}: {epoch.describe()}")
        directory, trainer = self._job.directory, self._trainer
        directory.save_models(
            self._epochs,
            trainer.result,
            trainer.vocabulary,
            self._job.seen,
            best=self._best_within,
        )
        directory.save_journal(self._epochs, self._examples)
        names = [name for name, _ in self._examples]
        captions = [*zip(names, epoch.samples, strict=True)]
        self._loggers.log_epoch(epoch.epoch, epoch.figures(), captions)
        if self._job.config.validate_every and epoch.step is not None:
            self._log_validation(epoch.step, epoch.figures())
        self._loggers.flush()
        directory.save_checkpoint(self._epochs, trainer.state())

    def _progress(self, total: int, description: str) -> Progress:
        return progress_bar(
            total, unit="image", description=description, quiet=self._worker.rank != 0
        )


def _print(line: str) -> None:
    """Writes a line to standard output; print would write it twice on Ray Train's workers."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
