"""Images a second of pretrained captioners, against a plain loop of ``generate``.

``python benchmarks/pretrained_speed.py [--model blip|git] [--images N] [--tokens T]`` builds
BLIP-base or GIT-base in their real sizes with random weights (nothing is downloaded), and captions
the same images three ways: a loop of transformers' ``generate`` at its best batch size, captioner
without maps, and captioner with maps, whose replay costs one forward pass more. All generate the
same number of tokens. The last line is JSON; a ratio is captioner's speed over the loop's.
"""

import argparse
import json
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


def speed(
    caption: Callable[[list[np.ndarray]], object], images: list[np.ndarray], batch: int
) -> float:
    """Images a second, after one batch to warm up."""
    caption(images[:batch])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for first in range(0, len(images), batch):
        caption(images[first : first + batch])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return len(images) / (time.perf_counter() - begin)


def main() -> None:
    """Measures, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["blip", "git"], default="blip")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--batches", default="4,16,64", help="batch sizes to try")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model, processor = build(arguments.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
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
    def plain(some: list[np.ndarray]) -> None:
        pictures = [Image.fromarray(image) for image in some]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(device, dtype)
        ids = model.generate(
            pixel_values=pixels, do_sample=False, num_beams=1, max_new_tokens=arguments.tokens
        )
        processor.tokenizer.batch_decode(ids, skip_special_tokens=True)

    sizes = [int(size) for size in arguments.batches.split(",")]
    loop = {size: speed(plain, images, min(size, len(images))) for size in sizes}
    best = max(loop, key=lambda size: loop[size])
    result = {"model": arguments.model, "device": device, "batch": best, "generate": loop[best]}
    family = FAMILIES[arguments.model]
    for name, attention in (("without_maps", "none"), ("with_maps", "tokens")):
        settings = GenerationSettings(max_new_tokens=arguments.tokens, beam=1, attention=attention)
        captioner = PretrainedCaptioner(family, model, processor, settings.resolved(family))
        result[name] = speed(captioner.caption, images, min(best, len(images)))
        result[f"{name}_ratio"] = result[name] / loop[best]
    for name, value in result.items():
        print(f"{name:20} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
