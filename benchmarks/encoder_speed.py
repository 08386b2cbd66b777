"""Images a second of the encoders by what is done to them, side by side; the last line is JSON.

python benchmarks/encoder_speed.py

  plain       as timm has it, channels last
  folded      BatchNorm folded into the convolutions
  compiled    that, compiled by inductor with frozen weights
  int8        the plain encoder in eight bits, compiled (--int8, which needs `pip install torchao`)
  tuned, torch's     a training step of `small` from stage 4 on, with torch's depthwise gradient
  tuned, captioner's the same with captioner's
"""

import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import click
import torch
import torch._inductor.config as inductor
from caption_speed import describe_machine
from torch import nn

from captioner.config import PRESETS
from captioner.model import encoder as model
from captioner.model.encoder import ImageEncoder
from captioner.model.folding import fold_batch_norm
from captioner.runtime.device import choose_dtype
from captioner.runtime.memory import keep_freed_memory


def compile_frozen(module: nn.Module, images: torch.Tensor) -> Callable[[torch.Tensor], object]:
    """The module compiled for such images."""
    compiled = torch.compile(module, dynamic=False)
    with inductor.patch(freezing=True), torch.no_grad():
        compiled(images)
    return compiled


def quantize(encoder: ImageEncoder, images: torch.Tensor) -> nn.Module:
    """The encoder with eight-bit weights and activations, whose ranges these images give."""
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    graph = torch.export.export(copy.deepcopy(encoder), (images,)).module()
    prepared = quantize_pt2e.prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        prepared(images)
    converted: nn.Module = quantize_pt2e.convert_pt2e(prepared)
    return converted


def variants(preset: str, images: torch.Tensor, int8: bool) -> dict[str, Callable[[], object]]:
    """What is to be timed of a preset's encoder."""
    config = PRESETS[preset].model
    dtype = choose_dtype("auto", torch.device("cpu"))
    torch.manual_seed(0)
    plain = ImageEncoder(config).eval()
    quantized = compile_frozen(quantize(plain, images), images) if int8 else None
    folded = copy.deepcopy(plain)
    fold_batch_norm(folded, config.image_size)
    for encoder in (plain, folded):
        encoder.to(dtype).to(memory_format=torch.channels_last)
    compiled = compile_frozen(folded, images)

    @torch.no_grad()
    def run(encoder: Callable[[torch.Tensor], object]) -> None:
        encoder(images)

    encoders: dict[str, Callable[[torch.Tensor], object]]
    encoders = {"plain": plain, "folded": folded, "compiled": compiled}
    if quantized is not None:
        encoders["int8"] = quantized
    return {name: partial(run, encoder) for name, encoder in encoders.items()}


def tuning(images: torch.Tensor) -> dict[str, Callable[[], object]]:
    """A step of `small`'s encoder, with either gradient."""
    config = PRESETS["small"].model
    dtype = choose_dtype("auto", torch.device("cpu"))
    ours = ImageEncoder(config)
    with patch.object(model, "replace_depthwise_convolutions", lambda _: None):
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
@click.option("--int8", is_flag=True, help="Also in eight bits; needs torchao.")
@click.option("--json", "json_file", type=click.Path(), help="Write the last line there too.")
def main(batch: int, rounds: int, int8: bool, json_file: str | None) -> None:
    """Times the encoders of both presets."""
    keep_freed_memory()
    results: dict[str, object] = {"machine": describe_machine("torch", "timm")}
    for preset in ("small", "notebook"):
        size = PRESETS[preset].model.image_size
        images = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8)
        calls = variants(preset, images, int8)
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
