"""The images of a training run: loaded for a worker, with the features of a frozen encoder."""

import logging
from collections.abc import Callable
from functools import partial

from captioner.errors import InputError, first_of
from captioner.training.batches import TrainingImages
from captioner.training.features import compute_features
from captioner.training.trainer import Trainer
from captioner.training.worker import Job, Worker

__all__ = ["load_images", "report_unreadable"]

_logger = logging.getLogger(__name__)


def load_images(job: Job, trainer: Trainer, worker: Worker, which: str) -> TrainingImages:
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
        report_unreadable(images.unreadable)
    return images


def report_unreadable(uris: set[str]) -> None:
    """Names the images that are left out of training and validation."""
    if uris:
        first = first_of(sorted(uris), 5)
        _logger.warning(
            "%d images cannot be read or decoded and are left out: %s", len(uris), first
        )
