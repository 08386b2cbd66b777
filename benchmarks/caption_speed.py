"""Images a second: captioner beside what people use, in one run; the last line is JSON.

pip install -e '.[benchmark]'
python benchmarks/caption_speed.py PHOTOS --json benchmarks/caption_speed.json

The model is the preset `notebook` with weights at random; a caption is 12 words long, whoever
writes it. Contenders take turns, so that a machine that slows down slows all of them:

  notebook   the reference system's loop: all words computed again for each next one
  hugging    Hugging Face's generate: BLIP's text decoder of the same sizes, with its cache
  captioner  captioner's engine alone, on decoded images
  local      `captioner caption --engine local`: JPEG in, Parquet out
  ray        the same with --engine ray, on a Ray that runs already
  plain ray  read_images, map_batches, write_parquet, as Ray's documentation has it, around
             captioner's engine
  tuned ray  the same with larger batches and all threads for torch: Ray gives an actor of one CPU
             one thread

`limit` is the speed of the machine's matrix products over the operations that a caption takes.
"""

import importlib.metadata
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from captioner.caption import job as pipeline
from captioner.config import PRESETS, DecodeConfig, RunConfig
from captioner.model import bundle
from captioner.model.native import Captioner
from captioner.model.network import CaptionModel
from captioner.model.vocabulary import EOS, START, Vocabulary
from captioner.runtime import cluster

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

WORDS = 12
DECODE = DecodeConfig(max_words=WORDS, allow_unknown=True)
SHARD = 64  # images


def make_bundle(directory: str) -> bundle.Bundle:
    """The preset `notebook` that never ends a caption by itself."""
    words = [f"word{number:x}" for number in range(1201)]
    vocabulary = Vocabulary.from_captions([" ".join(words)], minimum_count=1)
    torch.manual_seed(0)
    config = replace(PRESETS["notebook"].model, vocabulary_size=len(vocabulary))
    model = CaptionModel(config)
    with torch.no_grad():
        model.decoder.head.weight[EOS] = 0  # the best of the others' logits is above 0
    bundle.save(directory, model, vocabulary)
    return bundle.load(directory)


class Notebook:
    """The reference system: no cache, features pooled before they are projected."""

    def __init__(self, directory: str, dtype: torch.dtype):
        from oracle import oracle_of

        model = bundle.load(directory).model
        encoder, decoder = oracle_of(model)
        assert encoder is not None
        self.encoder, self.decoder = encoder.to(dtype), decoder.to(dtype)
        self.mean, self.std, self.dtype = model.encoder.mean, model.encoder.std, dtype

    @torch.no_grad()
    def __call__(self, images_BHW3: np.ndarray) -> torch.Tensor:
        """The chosen words ``(B, 12)``."""
        images = (torch.from_numpy(images_BHW3) / 255 - self.mean) / self.std
        memory_BPC = self.encoder(images.permute(0, 3, 1, 2).to(self.dtype))
        ids_BT = torch.full((len(images), 1), START)
        for _ in range(WORDS):
            logits_BTV, self.attention = self.decoder(ids_BT, memory_BPC, None)
            ids_BT = torch.cat([ids_BT, logits_BTV[:, -1].argmax(1, keepdim=True)], 1)
        return ids_BT[:, 1:]


class Hugging:
    """`generate` of transformers, attention returned; the encoder is torchvision's ResNet-50."""

    def __init__(self, directory: str, dtype: torch.dtype):
        from transformers.models.blip.configuration_blip import BlipTextConfig
        from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

        from oracle import oracle_of

        model = bundle.load(directory).model
        encoder, _ = oracle_of(model)
        assert encoder is not None
        config = model.config
        text = BlipTextConfig(  # type: ignore[call-arg]
            vocab_size=config.vocabulary_size,
            hidden_size=config.width,
            encoder_hidden_size=model.encoder.channels,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_length,
            is_decoder=True,
            use_cache=True,
            bos_token_id=START,
            eos_token_id=EOS,
            sep_token_id=EOS,
            pad_token_id=0,
            attn_implementation="eager",  # the one that returns attention
        )
        self.encoder = encoder.to(dtype)
        self.decoder = BlipTextLMHeadModel(text).eval().to(dtype)
        self.mean, self.std, self.dtype = model.encoder.mean, model.encoder.std, dtype

    @torch.no_grad()
    def __call__(self, images_BHW3: np.ndarray) -> torch.Tensor:
        """The chosen words ``(B, 12)``."""
        images = (torch.from_numpy(images_BHW3) / 255 - self.mean) / self.std
        memory_BPC = self.encoder(images.permute(0, 3, 1, 2).to(self.dtype))
        written = self.decoder.generate(
            input_ids=torch.full((len(images), 1), START),
            encoder_hidden_states=memory_BPC,
            encoder_attention_mask=torch.ones(memory_BPC.shape[:2], dtype=torch.long),
            max_new_tokens=WORDS,
            min_new_tokens=WORDS,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
        )
        assert written.attentions is not None
        return written.sequences[:, 1:]


class PlainStage:
    """What a map_batches of Ray's documentation has: a class with the model."""

    def __init__(self, directory: str, precision: str, threads: int | None):
        if threads:
            torch.set_num_threads(threads)
        self.captioner = Captioner(
            bundle.load(directory), DECODE, device="cpu", precision=precision
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Captions a batch."""
        captions = self.captioner(batch["image"])
        return {
            "path": batch["path"],
            "caption": [caption.text for caption in captions],
            "attention": np.stack([caption.attention_THW for caption in captions]),
        }


def plain_ray(
    photos: str,
    output: str,
    directory: str,
    precision: str,
    *,
    batch: int,
    threads: int | None = None,
) -> None:
    """The pipeline that one writes first, unless ``threads`` says how many torch has."""
    import ray
    from ray.data import ActorPoolStrategy

    size = PRESETS["notebook"].model.image_size
    (
        ray.data.read_images(photos, size=(size, size), mode="RGB", include_paths=True)
        .map_batches(
            PlainStage,
            fn_constructor_args=[directory, precision, threads],
            batch_size=batch,
            compute=ActorPoolStrategy(size=1),
        )
        .write_parquet(output)
    )


def job(engine: str, photos: str, output: str, directory: str, run: RunConfig) -> float:
    """A caption job; its images a second between its first part and its last."""
    run = replace(run, engine=engine, shard_size=SHARD, device="cpu")
    summary = pipeline.caption_images(photos, output, directory, decode=DECODE, run=run)
    assert summary.rows["ok"] == summary.images
    first, *others = sorted(Path(output).glob("part-*"), key=lambda path: path.stat().st_mtime)
    rows = sum(pq.read_metadata(path).num_rows for path in others)
    return rows / (others[-1].stat().st_mtime - first.stat().st_mtime)


def matrix_speed(dtype: torch.dtype) -> float:
    """Operations a second in large matrix products, with the faster of two libraries.

    On a CPU, torch computes products with MKL or oneDNN, and convolutions with oneDNN. MKL may be
    the slower one, so a convolution of 1×1 pixels, which is a product, is timed too.
    """
    size = 2048
    matrix = torch.randn(size, size).to(dtype)
    pixels = torch.randn(size // 256, size, 16, 16).to(dtype, memory_format=torch.channels_last)
    weights = matrix[:, :, None, None].contiguous(memory_format=torch.channels_last)
    products = (lambda: torch.mm(matrix, matrix), lambda: torch.conv2d(pixels, weights))
    return max(timed(product, 2 * size**3) for product in products for _ in range(10))


def operations(captioner: Captioner, images: np.ndarray) -> float:
    """Of captioner's own engine, an image."""
    with FlopCounterMode(display=False) as counter:
        captioner(images)
    return counter.get_total_flops() / len(images)


def timed(call: Callable[[], object], images: int) -> float:
    """Images a second."""
    begin = time.perf_counter()
    call()
    return images / (time.perf_counter() - begin)


def describe_machine(*packages: str) -> dict[str, object]:
    """What the figures were measured on, and with which versions of these packages."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next(line for line in lines if line.startswith("flags")).split()
    return {
        "date": date.today().isoformat(),
        "cpu": names[0] if names else platform.processor(),
        "matrix extensions": [each for each in ("avx512_bf16", "amx_bf16") if each in flags],
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def measure(
    photos: str, directory: str, precision: str, *, batch: int, large: int, rounds: int
) -> dict[str, Any]:
    """All contenders in one precision."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    files = sorted(Path(photos).iterdir())
    size = PRESETS["notebook"].model.image_size
    decoded = [
        np.asarray(Image.open(path).convert("RGB").resize((size, size))) for path in files[:large]
    ]
    images, many = np.stack(decoded[:batch]), np.stack(decoded)
    notebook, hugging = Notebook(directory, dtype), Hugging(directory, dtype)
    captioner = Captioner(bundle.load(directory), DECODE, device="cpu", precision=precision)
    run = RunConfig(precision=precision, batch_size=large, compile="off")  # type: ignore[arg-type]
    speeds: dict[str, list[float]] = {}

    def note(name: str, speed: float) -> None:
        speeds.setdefault(name, []).append(speed)
        click.echo(f"{precision} {name}: {speed:.2f} images/s")

    vocabulary = captioner.vocabulary
    ours = [caption.tokens for caption in captioner(images)]
    theirs = [vocabulary.words(ids) for ids in notebook(images).tolist()]
    equal = sum(one == other for one, other in zip(ours, theirs, strict=True))
    if precision == "fp32":
        assert equal == len(images), f"{equal} of {len(images)} captions are the notebook's"
    assert all(len(words) == WORDS for words in ours)
    hugging(images[:2])
    captioner(many)
    per_image = operations(captioner, images[:8])
    for number in range(rounds):
        note("limit", matrix_speed(dtype) / per_image)
        note("notebook, batch 1", timed(lambda: [notebook(images[i : i + 1]) for i in (0, 1)], 2))
        note(f"notebook, batch {batch}", timed(lambda: notebook(images), len(images)))
        note(f"hugging, batch {batch}", timed(lambda: hugging(images), len(images)))
        note(f"hugging, batch {large}", timed(lambda: hugging(many), len(many)))
        note(f"captioner, batch {batch}", timed(lambda: captioner(images), len(images)))
        note(f"captioner, batch {large}", timed(lambda: captioner(many), len(many)))
        for engine in ("local", "ray"):
            with tempfile.TemporaryDirectory() as output:
                begin = time.perf_counter()
                note(engine, job(engine, photos, f"{output}/out", directory, run))
                seconds = time.perf_counter() - begin
                note(f"{engine}, start-up included", len(files) / seconds)
        for name, settings in (
            ("plain ray", {"batch": batch}),
            ("tuned ray", {"batch": large, "threads": torch.get_num_threads()}),
        ):
            with tempfile.TemporaryDirectory() as output:
                begin = time.perf_counter()
                plain_ray(photos, f"{output}/out", directory, precision, **settings)
                seconds = time.perf_counter() - begin
                note(f"{name}, start-up included", len(files) / seconds)
        click.echo(f"{precision}: {number + 1} of {rounds} rounds done")

    def ratio(name: str, other: str) -> float:
        pairs = zip(speeds[name], speeds[other], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 2)

    def best(name: str) -> str:
        named = [each for each in speeds if each.startswith(name)]
        return max(named, key=lambda each: statistics.median(speeds[each]))

    own = best("captioner, batch")
    return {
        "images a second": {n: round(statistics.median(s), 2) for n, s in speeds.items()},
        "gigaoperations an image": round(per_image / 1e9, 2),
        "captions that are the notebook's": f"{equal} of {len(images)}",
        "ratios": {
            "captioner / notebook": ratio(own, best("notebook")),
            "captioner / hugging": ratio(own, best("hugging")),
            "captioner / limit": ratio(own, "limit"),
            "local / captioner": ratio("local", own),
            "ray / captioner": ratio("ray", own),
            "ray / plain ray, start-up included": ratio(
                "ray, start-up included", "plain ray, start-up included"
            ),
            "ray / tuned ray, start-up included": ratio(
                "ray, start-up included", "tuned ray, start-up included"
            ),
        },
    }


@click.command()
@click.argument("photos", type=click.Path(exists=True, file_okay=False, resolve_path=True))
@click.option("--images", default=512, show_default=True, help="Of PHOTOS, for whole jobs.")
@click.option("--batch", default=32, show_default=True)
@click.option("--large-batch", default=64, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16", "both"]), default="both")
@click.option("--json", "json_file", type=click.Path(), help="Write the last line there too.")
def main(
    photos: str,
    images: int,
    batch: int,
    large_batch: int,
    rounds: int,
    precision: str,
    json_file: str | None,
) -> None:
    """Measures on some of the JPEG files in PHOTOS."""
    with tempfile.TemporaryDirectory() as directory:
        chosen = Path(directory, "photos")
        chosen.mkdir()
        files = sorted(Path(photos).glob("*.jp*g"))[:images]
        if len(files) <= SHARD:
            raise click.ClickException(f"{len(files)} images are too few: take more than {SHARD}")
        for path in files:
            shutil.copy(path, chosen)
        model = f"{directory}/model"
        make_bundle(model)
        results: dict[str, Any] = {"images": len(files)}
        results["machine"] = describe_machine("torch", "ray", "transformers")
        with cluster.connected():
            for each in ["fp32", "bf16"] if precision == "both" else [precision]:
                results[each] = measure(
                    str(chosen), model, each, batch=batch, large=large_batch, rounds=rounds
                )
    text = json.dumps(results)
    if json_file:
        Path(json_file).write_text(json.dumps(results, indent=2) + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
