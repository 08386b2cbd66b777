"""Images a second of training, side by side in one run; the last line is JSON.

python benchmarks/train_speed.py DATA --train-list DATA/train.txt --val-list DATA/val.txt

The preset `small` goes on with the model that comes with captioner. All contenders take the same
steps: five captions an image, 32 images, AdamW.

  captioner     `captioner train`: cached features of a frozen encoder, moving average of weights
  plain         the loop that one writes first, on the same features in memory: padding is computed
                as words are; no moving average
  fused         the same with torch's fused attention, and dropout drawn anew for each word
  re-encoding   the plain loop, with the images decoded and encoded at each step
  1, 2 workers  `captioner train --workers`, on a Ray of this machine; its cores are shared out
"""

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch
from caption_speed import describe_machine
from torch import Tensor, nn
from torch.nn import functional as F

from captioner import storage
from captioner.config import PRESETS, LaunchConfig, TrainConfig
from captioner.data.dataset import Split, read_dataset
from captioner.model import bundle, layers
from captioner.model.vocabulary import PAD
from captioner.runtime.cluster import connected
from captioner.runtime.device import choose_device, choose_dtype
from captioner.runtime.memory import keep_freed_memory
from captioner.training import run as training
from captioner.training.batches import TrainingImages, plan_batches
from captioner.training.features import compute_features


def train(split: Split, config: TrainConfig, workers: int = 0) -> float:
    """Images a second in the last epoch of `captioner train`."""
    launch = LaunchConfig(workers=workers, device="cpu")
    with tempfile.TemporaryDirectory() as directory:
        epochs = training.train(
            split,
            f"{directory}/model",
            model_config=PRESETS["small"].model,
            config=config,
            launch=launch,
            initial_model=bundle.DEFAULT,
        )
    return epochs[-1].images_per_second


def plain(split: Split, config: TrainConfig, *, cached: bool, fused: bool = False) -> float:
    """Images a second of a plain loop's second epoch."""
    loaded = bundle.load(bundle.DEFAULT)
    network, settings = loaded.model, loaded.config
    dtype = choose_dtype(config.precision, choose_device("cpu"))
    views = None
    if cached:
        views = compute_features(
            network.encoder, split.train, image_size=settings.image_size, dtype=dtype
        )
    if fused:
        for module in network.modules():
            if isinstance(module, layers.Dropout):
                module.shared = False
    source = TrainingImages(split.train, views, settings, loaded.vocabulary, config.captions)
    network.train()
    trained = [each for each in network.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, fused=True)
    for epoch in (1, 2):
        begin = time.perf_counter()
        for places in plan_batches(source.lengths, config, epoch):
            batch = source.batch([(place, 0) for place in places])
            inputs = batch.inputs.to(dtype) if cached else batch.inputs
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = network(inputs, batch.ids_RT[:, :-1])
                loss = F.cross_entropy(
                    logits,
                    batch.ids_RT[:, 1:].flatten(),
                    ignore_index=PAD,
                    label_smoothing=config.label_smoothing,
                )
            loss.backward()
            nn.utils.clip_grad_norm_(trained, config.clip_norm or 1.0)
            optimizer.step()
    return len(split.train) / (time.perf_counter() - begin)


def fused_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    hidden: Tensor | None = None,
    pooling_PL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Torch's own attention; its weights, which training has no use for, are all zero."""
    assert pooling_PL is None
    visible = None if hidden is None else ~hidden
    output = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible)
    return output, query.new_zeros(()).expand(*query.shape[:3], keys.size(2))


@click.command()
@click.argument("data")
@click.option("--train-list", required=True)
@click.option("--val-list", required=True)
@click.option("--images", default=1500, show_default=True, help="Of those to train on.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(), help="Write the last line there too.")
def main(
    data: str, train_list: str, val_list: str, images: int, rounds: int, json_file: str | None
) -> None:
    """Trains on some of DATA's images, for two epochs each time."""
    keep_freed_memory()
    whole = read_dataset(storage.absolute(data)).split(train_list, val_list)
    split = Split(whole.train[:images], whole.validation[:50], [])
    few = Split(split.train[: images // 5], split.validation, [])
    config = replace(PRESETS["small"].train, epochs=2, views=1, warmup_steps=10)
    speeds: dict[str, list[float]] = {}

    def note(name: str, speed: float) -> None:
        speeds.setdefault(name, []).append(speed)
        click.echo(f"{name}: {speed:.1f} images/s")

    train(split, replace(config, epochs=1))  # the features are cached from here on
    for number in range(rounds):
        note("captioner", train(split, config))
        note("plain", plain(split, config, cached=True))
        with patch.object(layers, "_attend", fused_attention):
            note("fused", plain(split, config, cached=True, fused=True))
        note("re-encoding", plain(few, config, cached=False))
        with connected():  # only now: Ray's own processes take a share of the cores
            for workers in (1, 2):
                note(f"{workers} workers", train(split, config, workers))
        click.echo(f"{number + 1} of {rounds} rounds done")

    def ratio(name: str, other: str) -> float:
        pairs = zip(speeds[name], speeds[other], strict=True)
        return round(float(np.median([a / b for a, b in pairs])), 2)

    machine: dict[str, Any] = describe_machine("torch", "ray")
    results = {
        "machine": machine,
        "images": images,
        "images a second": {n: round(statistics.median(s), 1) for n, s in speeds.items()},
        "ratios": {
            "captioner / plain": ratio("captioner", "plain"),
            "captioner / fused": ratio("captioner", "fused"),
            "captioner / re-encoding": ratio("captioner", "re-encoding"),
            "2 workers / 1 worker": ratio("2 workers", "1 workers"),
        },
    }
    if json_file:
        Path(json_file).write_text(json.dumps(results, indent=2) + "\n")
    click.echo(json.dumps(results))


if __name__ == "__main__":
    main()
