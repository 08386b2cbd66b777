"""A training run: from a split to a model directory, in this process or on Ray's workers.

The same loop runs in both. After each epoch it leaves a checkpoint; the same command goes on from
the last one, also on another number of workers. Dropout, shuffling and samples depend on the seed,
the epoch and the worker alone, so that it ends as a run that nobody disturbed.
"""

import hashlib
import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from captioner import bundle, storage
from captioner.bundle import Bundle, SeenImages
from captioner.captioning import choose_device
from captioner.config import LaunchConfig, ModelConfig, TrainConfig
from captioner.dataset import CaptionedImage, Split
from captioner.errors import CaptionerError, InputError, OutputError, first_of, printable
from captioner.features import compute_features
from captioner.journal import Epoch, write_journal
from captioner.model import CaptionModel
from captioner.progress import in_ray_job, progress_bar
from captioner.reward import ConsensusReward, content_words
from captioner.trainer import Source, Trainer
from captioner.vocabulary import Vocabulary

__all__ = ["best_of", "build_model", "train"]

_SAMPLES = 8  # validation images whose captions are kept after each epoch
_PRIVATE = "_training"  # what a run keeps for itself: the model as it began, a checkpoint
_CHECKPOINT = "checkpoint.pt"

_logger = logging.getLogger(__name__)


def build_model(config: ModelConfig, weights: str | None, *, seed: int = 0) -> CaptionModel:
    """A new model: a pretrained encoder, a decoder at random.

    Args:
        config: the model's settings.
        weights: a file of the encoder's published weights (``.safetensors``, or a state dict that
            torch saved, which is read without unpickling anything else), local or in a bucket; None
            downloads timm's.
        seed: of the decoder.

    Raises:
        InputError: the weights cannot be had, or do not fit.
    """
    torch.manual_seed(seed)
    if weights is None:
        try:
            return CaptionModel(config, pretrained=True)
        except CaptionerError:
            raise
        except Exception as error:  # whatever the hub's client raises without a network
            raise InputError(
                f"the weights of {config.backbone} cannot be downloaded "
                f"({type(error).__name__}): give --encoder-weights"
            ) from error
    model = CaptionModel(config)
    model.encoder.load_published_weights(_read_weights(weights))
    return model


def _read_weights(path: str) -> dict[str, Tensor]:
    import safetensors.torch

    try:
        data = storage.read(storage.absolute(path))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        if path.endswith(".safetensors"):
            return dict(safetensors.torch.load(data))
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, SafetensorError) as error:  # the file is damaged, and they say how
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read the weights in {path}: {reason}") from error
    except Exception as error:  # of many kinds; torch's advice is to unpickle what it refused
        raise InputError(f"{path} is not a state dict") from error
    if not (isinstance(state, dict) and all(torch.is_tensor(v) for v in state.values())):
        raise InputError(f"{path} is not a state dict")
    return state


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

    Beside the bundle stand the last epoch's in ``last/``, and what :mod:`captioner.journal` writes.
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
        (text for each in job.split.train for text in _used(each, job.config)),
        minimum_count=job.config.minimum_count,
    )
    model_config = replace(model_config, vocabulary_size=len(vocabulary))
    return build_model(model_config, encoder_weights, seed=job.config.seed), vocabulary


def _read_epochs(output: str) -> list[Epoch]:
    data = storage.read(storage.join(output, "epochs.json"))
    return [Epoch(**each) for each in json.loads(data)]


def _used(image: CaptionedImage, config: TrainConfig) -> list[str]:
    return image.captions[:1] if config.captions == "first" else image.captions


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
    judge = ConsensusReward(
        [[content_words(text) for text in each.captions] for each in validation.examples]
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
            scores = [judge.score(image, content_words(text)) for image, text in captions.items()]
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


def _advance(progress: "tqdm[NoReturn]", images: int, value: float) -> None:
    progress.update(images)
    progress.set_postfix(value=f"{value:.3f}", refresh=False)


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


# On Ray.


def _train_on_ray(job: _Job, launch: LaunchConfig) -> None:
    """Runs the loop on Ray Train's workers, which go on from the last checkpoint when one dies."""
    from captioner.pipeline import connected

    with connected(log_to_driver=True) as ray:
        _fit(ray, job, launch)


def _fit(ray: Any, job: _Job, launch: LaunchConfig) -> None:
    from ray.exceptions import RayError
    from ray.train import (
        CheckpointConfig,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
        TrainingFailedError,
    )
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = _uses_gpus(ray, launch)
    devices = "a GPU each" if use_gpu else f"on {launch.device.replace('auto', 'cpu')}"
    _logger.info("%d workers on Ray, %s", launch.workers, devices)
    if launch.device == "auto":
        job = replace(job, device="cuda" if use_gpu else "cpu")
    filesystem, path = storage.arrow_filesystem(job.private("ray"))
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"job": ray.put(job)},
        torch_config=TorchConfig(timeout_s=7200),  # a worker may wait for another's features
        scaling_config=ScalingConfig(
            num_workers=launch.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": launch.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name="run",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=launch.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        trainer.fit()
    except (TrainingFailedError, RayError) as error:
        causes = [error, *getattr(error, "worker_failures", {}).values()]
        reason = " ".join(str(causes[-1]).split()) or type(error).__name__
        raise CaptionerError(f"training failed: {reason[-500:]}") from error


def _uses_gpus(ray: Any, launch: LaunchConfig) -> bool:
    """Whether each worker gets a GPU.

    Raises:
        InputError: it is to have one, and there are too few.
    """
    from captioner.pipeline import is_known_to_grow

    gpus = ray.cluster_resources().get("GPU", 0)
    if launch.device.startswith("cuda:"):
        raise InputError(f"Ray chooses the GPUs of its workers: --device cuda, not {launch.device}")
    if launch.device == "cuda" and gpus < launch.workers and not is_known_to_grow(ray):
        raise InputError(f"{launch.workers} workers need a GPU each: the cluster has {gpus:g}")
    return launch.device == "cuda" or (launch.device == "auto" and gpus >= launch.workers)


def _ray_worker(settings: dict[str, Any]) -> None:
    import tempfile
    from pathlib import Path

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

    def report(number: int, epoch: Epoch | None) -> None:
        if epoch is None:
            ray.train.report({"epoch": number})
            return
        figures = {name: value for name, value in asdict(epoch).items() if name != "samples"}
        # Ray's checkpoint says where ours is, which a run without Ray goes on from as well.
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "checkpoint.json").write_text(
                json.dumps({"uri": job.private(_CHECKPOINT)})
            )
            ray.train.report(
                figures,
                checkpoint=ray.train.Checkpoint.from_directory(directory),
                checkpoint_dir_name=f"epoch-{number:04d}",
            )

    _train_loop(
        job,
        _Worker(
            rank=context.get_world_rank(),
            workers=context.get_world_size(),
            local=(context.get_local_rank(), context.get_local_world_size()),
            gather=gather,
            report=report,
        ),
    )
