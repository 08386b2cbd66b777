"""A training run: from a split to a model directory, in this process or on Ray's workers.

The same loop runs in both. It leaves a checkpoint after each epoch; the same command resumes from
the last one, also on another number of workers. Dropout, shuffling and samples depend on the seed,
the epoch and the worker alone: a resumed run ends as one that was never interrupted.
"""

import hashlib
import json
import logging
import signal
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from captioner.config import LaunchConfig, ModelConfig, TrainConfig
from captioner.data.dataset import Split
from captioner.errors import InputError, StoppedError
from captioner.model import bundle
from captioner.model.build import build_model
from captioner.model.bundle import Bundle, SeenImages
from captioner.model.loading import is_pretrained
from captioner.model.network import CaptionModel
from captioner.model.vocabulary import Vocabulary
from captioner.runtime.signals import catch_signals
from captioner.training.batches import captions_to_encode, steps_per_epoch
from captioner.training.directory import TrainingDirectory
from captioner.training.journal import Epoch
from captioner.training.loggers.base import check_packages
from captioner.training.loop import train_loop
from captioner.training.ray import train_on_ray
from captioner.training.words import check_vocabulary, prepare_vocabulary
from captioner.training.worker import Job, Worker

__all__ = ["train"]

_logger = logging.getLogger(__name__)


def train(
    split: Split,
    output: str,
    *,
    model_config: ModelConfig,
    config: TrainConfig,
    launch: LaunchConfig | None = None,
    encoder_weights: str | None = None,
    initial_model: str | None = None,
    overwrite: bool = False,
) -> list[Epoch]:
    """Trains a model and writes the one with the highest validation CIDEr as a bundle.

    ``last/`` in the output holds the bundle of the last epoch, and ``metrics.jsonl`` the figures of
    each epoch. Both bundles list the images that they have seen, those of
    ``initial_model`` included. The same call resumes a run that was stopped. It may then have more
    epochs, another learning rate and schedule, and, before the first self-critical epoch, other
    settings of self-critical training.

    Args:
        split: the images.
        output: the bundle's directory, local or in a bucket; with several machines, one that all
            machines reach.
        model_config: the settings of a new model, unless ``initial_model`` is given; the captions
            decide the size of its vocabulary.
        config: how to train.
        launch: where to train.
        encoder_weights: a file of the encoder's published weights, local or in a bucket; None
            downloads timm's weights.
        initial_model: a bundle with the weights and the vocabulary to start from.
        overwrite: replace a model in ``output``.

    Returns:
        The figures of each epoch.

    Raises:
        InputError: the encoder's weights cannot be loaded, none of the images can be decoded, a
            service to log to needs a package or cannot be reached, or the vocabulary does not
            fit the captions.
        BundleError: ``initial_model`` is damaged or not a bundle.
        OutputError: ``output`` holds another model, another process trains a model there (not
            detected in a bucket), or it cannot be written.
        StoppedError: SIGTERM or Ctrl-C ended the run.
    """
    launch = launch or LaunchConfig()
    _check_batches(split, config, max(1, launch.workers))
    check_packages(launch.log)
    with catch_signals() as signals:
        try:
            earlier = _load_start(initial_model) if initial_model else None
            seen = _seen(split, initial_model)
            job = Job(split, output, config, launch.device, seen, launch.log)
            settings = {
                "model": asdict(model_config if earlier is None else earlier.model.config),
                "train": asdict(config),
                "encoder_weights": encoder_weights and encoder_weights.rsplit("/", 1)[-1],
                "initial_model": earlier and earlier.digests["model.safetensors"],
                "captions": _digest(split),
            }
            if len(split.portions) > 1:
                settings["data"] = {each.name: each.weight for each in split.portions}
            run = _Run(job, settings, overwrite=overwrite)
            run.prepare(model_config, encoder_weights, earlier)
            return run.execute(launch)
        except KeyboardInterrupt as problem:
            number = signals.received or signal.SIGINT
            raise _stopped(output, config.epochs + config.scst_epochs, number) from problem


class _Run:
    """A run in its directory."""

    def __init__(self, job: Job, settings: dict[str, Any], *, overwrite: bool):
        self._job, self._settings, self._overwrite = job, settings, overwrite
        self._initial: tuple[CaptionModel, Vocabulary] | None = None

    def prepare(
        self, model_config: ModelConfig, encoder_weights: str | None, earlier: Bundle | None
    ) -> None:
        """Makes the model to start from, unless the run has begun.

        What is refused is refused here: the directory stays as it is, without a lock.
        """
        directory = self._job.directory
        directory.check()
        if self._overwrite or not directory.holds(self._settings):
            self._initial = _initial(self._job, model_config, encoder_weights, earlier)

    def execute(self, launch: LaunchConfig) -> list[Epoch]:
        """Trains what is left."""
        directory = self._job.directory
        with directory.locked():
            if self._overwrite:
                directory.clear()
            if self._initial is not None and (
                self._overwrite or not directory.holds(self._settings)
            ):
                directory.begin(*self._initial)
            directory.write_settings(self._settings)
            if launch.workers:
                train_on_ray(self._job, launch)
            else:
                train_loop(self._job, Worker.alone())
            return directory.read_epochs()


def _load_start(model: str) -> Bundle:
    """The model to start from. Its low score is not that of what training makes of it.

    Raises:
        InputError: it is a pretrained model of another library.
        BundleError: it is not a sound bundle.
    """
    if is_pretrained(model):
        raise InputError(
            f"--model {model}: captioner does not train pretrained models; give a model that "
            "captioner trained, or leave --model out"
        )
    start = bundle.load(model)
    start.model.config = replace(start.config, low_score=None)
    return start


def _check_batches(split: Split, config: TrainConfig, workers: int) -> None:
    if not config.epochs + config.scst_epochs:
        raise InputError("nothing to train: --epochs and --scst-epochs are both 0")
    images = sum(portion.images_per_epoch for portion in split.portions)
    batches = steps_per_epoch(split.portions, config.batch_size)
    if images < workers * batches:  # the batches' sizes differ by one at most
        raise InputError(
            f"--workers {workers}: some batches would have fewer images than workers; "
            "use fewer workers or a larger --batch-size"
        )
    steps = batches * config.epochs
    if config.epochs and config.warmup_steps >= steps:
        _logger.warning(
            "the learning rate never reaches its peak: --warmup-steps is %d, but the run has %d "
            "steps; use a lower --warmup-steps",
            config.warmup_steps,
            steps,
        )


def _seen(split: Split, initial_model: str | None) -> SeenImages:
    """The images that the model will have seen, before this run too."""
    own = SeenImages(
        frozenset(image.name for image in split.train),
        frozenset(image.name for image in split.validation),
    )
    earlier = bundle.load_images(initial_model) if initial_model else None
    return own if earlier is None else own | earlier


def _initial(
    job: Job, model_config: ModelConfig, encoder_weights: str | None, earlier: Bundle | None
) -> tuple[CaptionModel, Vocabulary]:
    """The model that every worker starts from."""
    kind = model_config.tokenizer if earlier is None else earlier.vocabulary.kind
    captions = [
        caption
        for each in job.split.train
        for caption in captions_to_encode(each, job.config.captions, kind)
    ]
    if earlier is not None:
        return prepare_vocabulary(earlier, captions, job.config)
    vocabulary = Vocabulary.from_captions(
        captions,
        minimum_count=job.config.minimum_count,
        largest=job.config.largest_vocabulary,
        kind=kind,
    )
    check_vocabulary(vocabulary, captions, model_config.max_length)
    model_config = replace(model_config, vocabulary_size=len(vocabulary))
    return build_model(model_config, encoder_weights, seed=job.config.seed), vocabulary


def _digest(split: Split) -> str:
    """Changes with the images' names and captions, not with the directory that they are in."""
    parts = [
        [(each.uri.rsplit("/", 1)[-1], each.captions) for each in examples]
        for examples in (split.train, split.validation)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _stopped(output: str, epochs: int, number: int) -> StoppedError:
    name = signal.Signals(number).name
    done = 0
    with suppress(Exception):  # what goes wrong now must not hide the signal
        done = len(TrainingDirectory(output).load_checkpoint()[0])
    return StoppedError(
        f"stopped by {name}: {done} of {epochs} epochs done; run the same command again to resume",
        number,
    )
