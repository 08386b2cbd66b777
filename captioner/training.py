"""The epoch loop.

The loss is the notebook's: cross-entropy of each next word, padding ignored. A frozen encoder's
features are computed once; the captions of an image share its keys and values.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from captioner import bundle, dataset, storage
from captioner.captioning import choose_device, choose_dtype
from captioner.config import ModelConfig, TrainConfig
from captioner.dataset import CaptionedImage, Split
from captioner.errors import CaptionerError, InputError
from captioner.model import CaptionModel
from captioner.vocabulary import PAD, Vocabulary

__all__ = ["Trainer", "build_model", "caption_loss", "learning_rate_factor", "train"]


def caption_loss(logits_RTV: Tensor, ids_RT: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of each next word; ``logits[:, t]`` predict ``ids[:, t + 1]``."""
    return F.cross_entropy(
        logits_RTV[:, :-1].flatten(0, 1).float(),
        ids_RT[:, 1:].flatten(),
        ignore_index=PAD,
        label_smoothing=label_smoothing,
    )


def learning_rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """What the learning rate is multiplied by at a step: a linear rise, then flat or a cosine."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_model(config: ModelConfig, weights: str | None, *, seed: int = 0) -> CaptionModel:
    """A new model: a pretrained encoder, a decoder at random.

    Args:
        config: the model's settings.
        weights: a file of the encoder's published weights (``.safetensors``, or a state dict that
            torch saved, which is read without unpickling anything else); None downloads timm's.
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
        if path.endswith(".safetensors"):
            return dict(safetensors.torch.load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except Exception as error:  # torch and safetensors raise many kinds for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read the weights in {path}: {reason}") from error
    if not (isinstance(state, dict) and all(torch.is_tensor(v) for v in state.values())):
        raise InputError(f"{path} is not a state dict")
    return state


@dataclass(frozen=True)
class _Batch:
    """``inputs`` are features ``(B, h, w, C)`` or images ``(B, size, size, 3)``; ``ids_RT``."""

    inputs: Tensor
    ids_RT: Tensor


class _Source:
    """The batches of one side of the split."""

    def __init__(
        self, examples: Sequence[CaptionedImage], features: np.ndarray | None, model: CaptionModel
    ):
        self.examples, self.features, self.config = examples, features, model.config

    def batch(self, indices: Sequence[int], vocabulary: Vocabulary, captions: str) -> _Batch:
        chosen = [self.examples[i] for i in indices]
        if self.features is not None:
            inputs = self.features[np.asarray(indices)]
        else:
            pixels = [dataset.load_pixels(each.uri, self.config.image_size) for each in chosen]
            ok = [i for i, each in enumerate(pixels) if each is not None]
            chosen = [chosen[i] for i in ok]
            inputs = np.stack([pixels[i] for i in ok])  # type: ignore[misc]
        texts = [each.captions[:1] if captions == "first" else each.captions for each in chosen]
        ids_RT = dataset.collate(texts, vocabulary, self.config.max_length)
        return _Batch(torch.from_numpy(inputs), ids_RT)


class Trainer:
    """A model in training: one step, one epoch, one validation at a time."""

    def __init__(
        self, model: CaptionModel, vocabulary: Vocabulary, config: TrainConfig, *, device: str
    ):
        self.config, self.vocabulary = config, vocabulary
        self.device = choose_device(device)
        self.dtype = choose_dtype(config.precision, self.device)
        self.model = model.to(self.device)
        self.model.encoder.fine_tune(config.fine_tune_from)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        self.step = 0

    def _autocast(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _loss(self, batch: _Batch, label_smoothing: float) -> tuple[Tensor, int]:
        """The mean loss of a word, and the number of words."""
        ids_RT = batch.ids_RT.to(self.device)
        inputs = batch.inputs.to(self.device)
        with self._autocast():
            features = inputs.float() if inputs.dtype == torch.half else self.model.encoder(inputs)
            # Padding stands at the end only: no word that counts looks at it.
            logits_RTV, _ = self.model.decoder(ids_RT, features)
        words = int((batch.ids_RT[:, 1:] != PAD).sum())
        return caption_loss(logits_RTV, ids_RT, label_smoothing), words

    def train_batch(self, batch: _Batch, steps: int) -> tuple[float, int]:
        """One step of AdamW; ``steps`` is the length of the schedule."""
        factor = learning_rate_factor(self.step, steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        loss, words = self._loss(batch, self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.clip_norm is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self.config.clip_norm)
        self.optimizer.step()
        self.step += 1
        return loss.item(), words

    def train_epoch(self, source: _Source, epoch: int, progress: "tqdm[NoReturn]") -> float:
        """Trains on every image once; returns the mean loss of a word."""
        self.model.train()
        order = dataset.shuffled(len(source.examples), self.config.seed, epoch)
        steps = self.config.epochs * math.ceil(len(order) / self.config.batch_size)
        total, count = 0.0, 0
        for batch in self._batches(source, order):
            loss, words = self.train_batch(batch, steps)
            total, count = total + loss * words, count + words
            progress.update(len(batch.inputs))
            progress.set_postfix(loss=f"{total / count:.3f}", refresh=False)
        return total / count

    @torch.no_grad()
    def validate(self, source: _Source) -> float:
        """The mean loss of a word, without label smoothing."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in self._batches(source, range(len(source.examples))):
            loss, words = self._loss(batch, 0.0)
            total, count = total + loss.item() * words, count + words
        return total / count

    def _batches(self, source: _Source, order: Sequence[int]) -> Iterator[_Batch]:
        size = self.config.batch_size
        indices = [order[i : i + size] for i in range(0, len(order), size)]
        make = partial(source.batch, vocabulary=self.vocabulary, captions=self.config.captions)
        return dataset.ahead(make, indices, threads=os.cpu_count() or 1)


def train(
    split: Split,
    output: str,
    *,
    model_config: ModelConfig,
    config: TrainConfig,
    encoder_weights: str | None = None,
    device: str = "auto",
) -> list[dict[str, float]]:
    """Trains a model and writes the one with the lowest validation loss as a bundle.

    Next to the bundle go ``metrics.jsonl``, a line an epoch, and ``loss.png``.

    Args:
        split: the images.
        output: the bundle's directory, local or in a bucket.
        model_config: the model; its vocabulary's size is found from the captions.
        config: how to train.
        encoder_weights: see :func:`build_model`.
        device: see :func:`captioner.captioning.choose_device`.

    Returns:
        The metrics of each epoch.

    Raises:
        InputError: the encoder's weights cannot be had, or nearly no image can be decoded.
        OutputError: the bundle cannot be written.
    """
    texts = [c for each in split.train for c in _used(each, config)]
    vocabulary = Vocabulary.from_captions(texts, minimum_count=config.minimum_count)
    model_config = replace(model_config, vocabulary_size=len(vocabulary))
    model = build_model(model_config, encoder_weights, seed=config.seed)
    trainer = Trainer(model, vocabulary, config, device=device)
    _write_text(output, "training.json", json.dumps(asdict(config), indent=2) + "\n")
    train_source, validation_source = _sources(split, trainer)
    metrics: list[dict[str, float]] = []
    for epoch in range(1, config.epochs + 1):
        begin = time.monotonic()
        count = len(train_source.examples)
        description = f"epoch {epoch}/{config.epochs}"
        with tqdm(total=count, unit="image", desc=description, disable=None) as progress:
            train_loss = trainer.train_epoch(train_source, epoch, progress)
        seconds = time.monotonic() - begin
        metrics.append(
            {
                "epoch": epoch,
                "train_loss": train_loss,
                "validation_loss": trainer.validate(validation_source),
                "seconds": seconds,
                "images_per_second": count / seconds,
            }
        )
        if not math.isfinite(train_loss):
            raise CaptionerError(f"the loss is {train_loss} in epoch {epoch}: lower learning_rate")
        lines = "".join(json.dumps(each) + "\n" for each in metrics)
        if metrics[-1]["validation_loss"] == min(each["validation_loss"] for each in metrics):
            bundle.save(output, model, vocabulary)
        _write_text(output, "metrics.jsonl", lines)
        _plot(output, metrics)
    return metrics


def _used(image: CaptionedImage, config: TrainConfig) -> list[str]:
    return image.captions[:1] if config.captions == "first" else image.captions


def _sources(split: Split, trainer: Trainer) -> tuple[_Source, _Source]:
    """Both sides of the split; with a frozen encoder their features, bad images left out."""
    model = trainer.model
    if not model.encoder.frozen:
        return _Source(split.train, None, model), _Source(split.validation, None, model)
    everything = [*split.train, *split.validation]
    features = dataset.compute_features(
        model.encoder.eval(),
        [each.uri for each in everything],
        image_size=model.config.image_size,
        dtype=trainer.dtype,
    )
    sources = []
    begin = 0
    for side in (split.train, split.validation):
        part = features[begin : begin + len(side)]
        good = np.flatnonzero(~np.isnan(part[:, 0, 0, 0]))
        if not len(good):
            raise InputError("none of the images can be decoded")
        if len(good) < len(side):
            tqdm.write(f"{len(side) - len(good)} images cannot be decoded and are left out")
            part = part[good]
        sources.append(_Source([side[i] for i in good], part, model))
        begin += len(side)
    return sources[0], sources[1]


def _write_text(directory: str, name: str, text: str) -> None:
    storage.write(storage.join(directory, name), text.encode())


def _plot(output: str, metrics: Sequence[dict[str, float]]) -> None:
    """``loss.png``: training and validation loss over the epochs."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    epochs = [each["epoch"] for each in metrics]
    for name, label in (("train_loss", "training"), ("validation_loss", "validation")):
        axes.plot(epochs, [each[name] for each in metrics], marker="o", label=label)
    axes.set(xlabel="epoch", ylabel="cross-entropy of a word (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=120)
    storage.write(storage.join(output, "loss.png"), sink.getvalue())
