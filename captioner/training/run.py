"""A training run: from a split to a model directory, in this process or on Ray's workers.

The same loop runs in both. After each epoch it leaves a checkpoint; the same command goes on from
the last one, also on another number of workers. Dropout, shuffling and samples depend on the seed,
the epoch and the worker alone, so that it ends as a run that nobody disturbed.
"""

import hashlib
import json
import logging
import math
from dataclasses import asdict, replace
from typing import Any

from captioner import storage
from captioner.config import LaunchConfig, ModelConfig, TrainConfig
from captioner.data.dataset import Split
from captioner.errors import InputError, OutputError
from captioner.model import bundle
from captioner.model.build import build_model
from captioner.model.bundle import Bundle, SeenImages
from captioner.model.loading import is_pretrained
from captioner.model.network import CaptionModel
from captioner.model.vocabulary import Vocabulary
from captioner.runtime.progress import in_ray_job
from captioner.training.batches import captions_to_encode
from captioner.training.journal import Epoch
from captioner.training.loop import _PRIVATE, _Job, _train_loop, _Worker
from captioner.training.ray import _train_on_ray

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
    begin_with: str | None = None,
    overwrite: bool = False,
) -> list[Epoch]:
    """Trains a model, and writes the one with the highest validation CIDEr as a bundle.

    Beside the bundle stand the last epoch's in ``last/``, and what
    :mod:`captioner.training.journal` writes.
    Both have a list of the images that they have seen: those of ``begin_with`` too.
    The same call goes on where a run that was killed stopped. The settings of self-critical
    training may have changed meanwhile, where none of it is done; ``scst_epochs`` always.

    Args:
        split: the images.
        output: the bundle's directory, local or in a bucket; with several machines one that all
            of them reach.
        model_config: the model, unless ``begin_with`` is one; its vocabulary's size is found from
            the captions.
        config: how to train.
        launch: on what to train.
        encoder_weights: see :func:`build_model`.
        begin_with: a bundle whose weights and vocabulary to go on with, instead of a new model.
        overwrite: begin anew where ``output`` holds a model.

    Returns:
        The figures of each epoch.

    Raises:
        InputError: the encoder's weights cannot be had, or nearly no image can be decoded.
        BundleError: ``begin_with`` is not a sound bundle.
        OutputError: ``output`` holds another model, another process trains one there (in a bucket
            that is not noticed), or it cannot be written.
    """
    launch = launch or LaunchConfig()
    workers = max(1, launch.workers)
    if not config.epochs + config.scst_epochs:
        raise InputError("there is nothing to train: epochs and scst_epochs are 0")
    batches = math.ceil(len(split.train) / config.batch_size)
    if len(split.train) < workers * batches:  # the batches' sizes differ by one at most
        raise InputError(f"a batch has too few images for {workers} workers")
    if begin_with and is_pretrained(begin_with):
        raise InputError(
            f"--model {begin_with}: captioner does not train pretrained models; give a model that "
            "captioner trained, or leave --model out"
        )
    earlier = bundle.load(begin_with) if begin_with else None
    if earlier is not None:
        model_config = earlier.model.config
    job = _Job(split, output, config, launch.device, in_ray_job(), _seen(split, begin_with))
    settings = {
        "model": asdict(model_config),
        "train": asdict(config),
        "encoder_weights": encoder_weights and encoder_weights.rsplit("/", 1)[-1],
        "begin_with": earlier and earlier.digests["model.safetensors"],
        "captions": _digest(split),
    }
    # First what may be refused: such a directory is left as it is, without a lock.
    initial = None
    _check_place(output)
    if overwrite or not _begun(output, settings):
        initial = _initial(job, model_config, encoder_weights, earlier)
    with storage.locked(job.private("lock")):
        if overwrite:
            _delete_run(output)
        if initial is not None and (overwrite or not _begun(output, settings)):
            bundle.save(job.private("initial"), *initial)
        text = json.dumps(settings, indent=2) + "\n"
        storage.write(storage.join(output, "training.json"), text.encode())
        if launch.workers:
            _train_on_ray(job, launch)
        else:
            _train_loop(job, _Worker(0, 1, (0, 1), lambda value: [value], lambda *_: None))
    return _read_epochs(output)


def _seen(split: Split, begin_with: str | None) -> SeenImages:
    """What the model will have seen, before this training too."""
    own = SeenImages(
        frozenset(image.name for image in split.train),
        frozenset(image.name for image in split.validation),
    )
    earlier = bundle.load_images(begin_with) if begin_with else None
    return own if earlier is None else own | earlier


def _initial(
    job: _Job, model_config: ModelConfig, encoder_weights: str | None, earlier: Bundle | None
) -> tuple[CaptionModel, Vocabulary]:
    """The model that every worker begins with."""
    if earlier is not None:
        return earlier.model, earlier.vocabulary
    vocabulary = Vocabulary.from_captions(
        (
            caption
            for each in job.split.train
            for caption in captions_to_encode(each, job.config.captions, model_config.tokenizer)
        ),
        minimum_count=job.config.minimum_count,
        kind=model_config.tokenizer,
    )
    model_config = replace(model_config, vocabulary_size=len(vocabulary))
    return build_model(model_config, encoder_weights, seed=job.config.seed), vocabulary


def _read_epochs(output: str) -> list[Epoch]:
    data = storage.read(storage.join(output, "epochs.json"))
    return [Epoch(**each) for each in json.loads(data)]


def _digest(split: Split) -> str:
    """Changes with the images' names and captions, not with the directory that they are in."""
    sides = [[(e.uri.rsplit("/", 1)[-1], e.captions) for e in split.train]]
    sides += [[(e.uri.rsplit("/", 1)[-1], e.captions) for e in split.validation]]
    return hashlib.sha256(json.dumps(sides).encode()).hexdigest()


def _delete_run(output: str) -> None:
    for name in ("training.json", "epochs.json"):
        storage.delete(storage.join(output, name))
    private = storage.join(output, _PRIVATE)
    for name in storage.names(private):
        if name != "lock":  # another run would lock the next file of that name
            storage.delete(storage.join(private, name))


def _names(output: str) -> list[str]:
    try:
        return storage.names(output)
    except OSError as error:
        raise OutputError(f"cannot use {output} for output: {error.strerror or error}") from error


def _check_place(output: str) -> None:
    """Looks whether ``output`` is empty, or a model's.

    Raises:
        OutputError: it is neither, or is no directory.
    """
    names = _names(output)
    ours = {"training.json", "config.json", _PRIVATE} & set(names)
    if not ours and any(not name.startswith(".") for name in names):
        raise OutputError(f"{output} is not empty, and no model's directory")


def _begun(output: str, settings: dict[str, Any]) -> bool:
    """Whether this run has begun in ``output``.

    Raises:
        OutputError: ``output`` holds another run, or a model.
    """
    names = _names(output)
    advice = "use another directory, or --overwrite"
    if "training.json" not in names:
        if "config.json" in names:
            raise OutputError(f"{output} holds a model already: {advice}")
        return False
    try:
        earlier = json.loads(storage.read(storage.join(output, "training.json")))
        epochs = len(_read_epochs(output)) if "epochs.json" in names else 0
        begun_critical = epochs > settings["train"]["epochs"]
        differing = [
            name
            for part in ("model", "train")
            for name, value in json.loads(json.dumps(settings[part])).items()
            if earlier[part][name] != value
            and not name.startswith("scst_" if not begun_critical else "scst_epochs")
        ]
        others = settings.keys() - {"model", "train"}
        differing += sorted(name for name in others if earlier[name] != settings[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{output}/training.json cannot be read: {advice}") from error
    if differing:
        names_differing = ", ".join(differing)
        raise OutputError(f"{output} was begun with other settings ({names_differing}): {advice}")
    return True


# On Ray.
