"""Images a second of the encoders by what is done to them, side by side; the last line is JSON.

python benchmarks/encoder_speed.py

  plain       as timm has it, channels last
  folded      BatchNorm folded into the convolutions
  compiled    that, compiled by inductor with frozen weights
  tuned, torch's     a training step of `small` from stage 4 on, with torch's depthwise gradient
  tuned, captioner's the same with captioner's
"""

import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import click
import torch
import torch._inductor.config as inductor
from caption_speed import describe_machine

from captioner import model
from captioner.captioning import choose_dtype
from captioner.config import PRESETS
from captioner.folding import fold_batch_norm
from captioner.memory import keep_freed_memory
from captioner.model import ImageEncoder


def variants(preset: str, images: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is to be timed of a preset's encoder."""
    config = PRESETS[preset].model
    dtype = choose_dtype("auto", torch.device("cpu"))
    torch.manual_seed(0)
    plain = ImageEncoder(config).eval()
    folded = copy.deepcopy(plain)
    fold_batch_norm(folded, config.image_size)
    for encoder in (plain, folded):
        encoder.to(dtype).to(memory_format=torch.channels_last)
    compiled = torch.compile(folded, dynamic=False)
    with inductor.patch(freezing=True), torch.no_grad():
        compiled(images)

    @torch.no_grad()
    def run(encoder: Callable[[torch.Tensor], torch.Tensor]) -> None:
        encoder(images)

    return {
        "plain": lambda: run(plain),
        "folded": lambda: run(folded),
        "compiled": lambda: run(compiled),
    }


def tuning(images: torch.Tensor) -> dict[str, Callable[[], object]]:
    """A step of `small`'s encoder, with either gradient."""
    config = PRESETS["small"].model
    dtype = choose_dtype("auto", torch.device("cpu"))
    ours = ImageEncoder(config)
    with patch.object(model, "quicken", lambda _: None):
        theirs = ImageEncoder(config)
    for encoder in (ours, theirs):
        encoder.train()
        encoder.fine_tune(4)

    def step(encoder: ImageEncoder) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features = encoder(images)
        features.float().sum().backward()

    return {"tuned, torch's": lambda: step(theirs), "tuned, captioner's": lambda: step(ours)}


@click.command()
@click.option("--batch", default=8, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--json", "json_file", type=click.Path(), help="Write the last line there too.")
def main(batch: int, rounds: int, json_file: str | None) -> None:
    """Times the encoders of both presets."""
    keep_freed_memory()
    results: dict[str, object] = {"machine": describe_machine("torch", "timm")}
    for preset in ("small", "notebook"):
        size = PRESETS[preset].model.image_size
        images = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8)
        calls = variants(preset, images)
        if preset == "small":
            calls |= tuning(images)
        speeds: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds + 1):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                if number:  # the first finds its kernels and its memory
                    speeds[name].append(batch / (time.perf_counter() - begin))
        results[preset] = {name: round(statistics.median(s), 1) for name, s in speeds.items()}
        click.echo(f"{preset}, images a second: {results[preset]}")
    if json_file:
        Path(json_file).write_text(json.dumps(results, indent=2) + "\n")
    click.echo(json.dumps(results))


if __name__ == "__main__":
    main()
