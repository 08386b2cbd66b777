"""The inputs that a model makes of images and prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from captioner.errors import BundleError
from captioner.model.huggingface.families import Family

__all__ = ["prepare", "render"]


def prepare(
    family: Family,
    processor: Any,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    system_prompt: str | None = None,
) -> dict[str, Any]:
    """The tensors that a model takes for images and their prompts, padded on the left.

    Args:
        family: the model's.
        processor: transformers' processor for the model; for families without one, an object with
            an ``image_processor`` and a ``tokenizer``.
        images: uint8 RGB ``(H, W, 3)``.
        prompts: one for each image.
        system_prompt: the system's turn of a chat.
    """
    pictures = [Image.fromarray(image) for image in images]
    if family.prompt in (None, "prefix"):
        return _separately(processor, pictures, prompts)
    if family.name == "BLIP-2" and not any(prompts):
        return dict(processor(images=pictures, return_tensors="pt"))
    settings: dict[str, Any] = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    texts = list(prompts)
    nested: Any = pictures
    if family.prompt == "chat":
        texts = [render(processor, prompt, system_prompt) for prompt in prompts]
        nested = [[picture] for picture in pictures]
        bos = processor.tokenizer.bos_token
        if bos is not None and texts[0].startswith(bos):  # the template has it already
            settings["add_special_tokens"] = False
    elif family.name == "PaliGemma":
        texts = [f"<image>{prompt}" for prompt in prompts]
    inputs = dict(processor(images=nested, text=texts, **settings, **family.image_settings))
    for name in ("labels", "rows", "cols", "num_crops"):  # not for generation
        inputs.pop(name, None)
    return inputs


def _separately(
    processor: Any, pictures: Sequence[Image.Image], prompts: Sequence[str]
) -> dict[str, Any]:
    """Pixels, and the tokens of each prefix, which all have the same number."""
    inputs: dict[str, Any] = {
        "pixel_values": processor.image_processor(list(pictures), return_tensors="pt")[
            "pixel_values"
        ]
    }
    if any(prompts):
        tokens = processor.tokenizer(list(prompts), add_special_tokens=False, return_tensors="pt")
        inputs["input_ids"] = tokens["input_ids"]
    return inputs


def render(processor: Any, prompt: str, system_prompt: str | None = None) -> str:
    """A chat of one turn about one image, as the model's template writes it.

    Raises:
        BundleError: the model has no chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise BundleError(
            "the model has no chat template, which its prompt needs; choose the model's chat "
            "variant (its name ends in -Instruct or -it)"
        )
    turns: list[dict[str, Any]] = []
    if system_prompt is not None:
        turns.append({"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    question = [{"type": "image"}, {"type": "text", "text": prompt}]
    turns.append({"role": "user", "content": question})
    text: str = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return text
