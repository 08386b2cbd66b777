"""Images a second of pretrained captioners, against a plain loop of ``generate``.

``python benchmarks/pretrained_speed.py [--model blip|git] [--images N] [--tokens T]`` builds
BLIP-base or GIT-base in their real sizes with random weights (nothing is downloaded), and captions
the same images three ways: a loop of transformers' ``generate`` at its best batch size, captioner
without maps, and captioner with maps. All have the same weights and number type and generate the
same tokens. The ways run in turn, several rounds after one warm-up; a ratio is the loop's seconds
over captioner's, the median over the rounds. On a CPU that other programs use, ``cpu_ratio``, by
CPU seconds of this process, says more than the ratio of wall times. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from captioner.model.huggingface.captioner import PretrainedCaptioner
from captioner.model.huggingface.families import FAMILIES
from captioner.model.huggingface.settings import GenerationSettings
from captioner.runtime.memory import keep_freed_memory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny_pretrained


def build(name: str) -> tuple[Any, Any]:
    """A model in its real size, and its processor; the tokenizer is a small one."""
    processor: Any
    _, [processor] = tiny_pretrained.FAMILIES[name]()
    processor.tokenizer.padding_side = "left"
    if name == "blip":
        config = transformers.BlipConfig(image_text_hidden_size=256)
        config.vision_config.image_size = 384
        config.text_config.encoder_hidden_size = config.vision_config.hidden_size
        processor.image_processor.size = {"height": 384, "width": 384}
        return transformers.BlipForConditionalGeneration(config), processor
    config = transformers.GitConfig()
    processor.image_processor.size = {"shortest_edge": 224}
    processor.image_processor.crop_size = {"height": 224, "width": 224}
    return transformers.GitForCausalLM(config), processor


def seconds(
    caption: Callable[[list[np.ndarray]], object], images: list[np.ndarray], batch: int
) -> tuple[float, float]:
    """Wall seconds and CPU seconds of this process to caption the images."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(images), batch):
        caption(images[first : first + batch])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Measures, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["blip", "git"], default="blip")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="times that each way runs")
    parser.add_argument("--batches", default="4,16,64", help="batch sizes to try")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model, processor = build(arguments.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()  # as captioner does for each model; the loop profits too
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = model.eval().to(device, dtype)
    # No end: each way then generates the same number of tokens.
    for module in (model, getattr(model, "text_decoder", model)):
        module.generation_config.eos_token_id = -1
    if arguments.model == "blip":
        model.config.text_config.sep_token_id = -1
    generator = np.random.default_rng(0)
    images = [
        generator.integers(0, 256, (480, 640, 3), dtype=np.uint8) for _ in range(arguments.images)
    ]

    @torch.inference_mode()
    def plain(some: list[np.ndarray]) -> list[str]:
        pictures = [Image.fromarray(image) for image in some]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(device, dtype)
        ids = model.generate(
            pixel_values=pixels, do_sample=False, num_beams=1, max_new_tokens=arguments.tokens
        )
        return list(processor.tokenizer.batch_decode(ids, skip_special_tokens=True))

    family = FAMILIES[arguments.model]
    ways: dict[str, Callable[[list[np.ndarray]], Any]] = {"generate": plain}
    for name, attention in (("without_maps", "none"), ("with_maps", "tokens")):
        settings = GenerationSettings(max_new_tokens=arguments.tokens, beam=1, attention=attention)
        captioner = PretrainedCaptioner(family, model, processor, settings.resolved(family))
        ways[name] = captioner.caption
    for caption in ways.values():  # warms up
        caption(images[:2])
    texts = [caption.text for caption in ways["without_maps"](images[:2])]
    if texts != [text.strip() for text in plain(images[:2])]:
        raise SystemExit("captioner and generate give different captions")
    sizes = [min(int(size), len(images)) for size in arguments.batches.split(",")]
    loop = {size: seconds(plain, images, size)[0] for size in sizes}
    best = min(loop, key=lambda size: loop[size])
    # In turn, since the speed of a machine changes over minutes.
    rounds = [
        {name: seconds(caption, images, best) for name, caption in ways.items()}
        for _ in range(arguments.rounds)
    ]
    result: dict[str, Any] = {"model": arguments.model, "device": device, "batch": best}
    for name in ways:
        result[name] = len(images) / statistics.median(each[name][0] for each in rounds)
    for kind, place in (("ratio", 0), ("cpu_ratio", 1)):
        for name in ("without_maps", "with_maps"):
            ratios = [each["generate"][place] / each[name][place] for each in rounds]
            result[f"{name}_{kind}"] = statistics.median(ratios)
    for name, value in result.items():
        print(f"{name:20} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
