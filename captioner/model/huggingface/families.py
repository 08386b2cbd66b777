"""What captioner knows of each family of pretrained captioners. Imports neither torch nor Ray."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from captioner.errors import BundleError, first_of

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models: one ``model_type`` of transformers.

    Attributes:
        name: the family's name, for people.
        prompt: what a prompt is to the model: a ``prefix`` that the caption continues, a ``task``
            token, a ``text`` before the caption, or the user's turn of a ``chat``; None where the
            model takes no prompt.
        default_prompt: the prompt of a job that gives none.
        maps: where attention maps come from: ``cross`` attention to the image, or ``self``
            attention to the image's tokens; None where the model has no meaningful maps.
        default_attention: whether a job that does not ask keeps maps.
        special_columns: columns of the attention, before the image's patches, that are no part of
            the image.
        vision: path of the module that encodes images.
        language: path of the module whose attention is computed step by step for maps.
        attentions: path of the attention modules, ``*`` standing for the layer's number.
        new_tokens: default of the largest number of generated tokens.
        max_pixels: pixels that an image keeps until the model's own processor resizes it.
        images: settings of the image processor that make an image one tile.
    """

    name: str
    prompt: Literal["prefix", "task", "text", "chat"] | None
    default_prompt: str = ""
    maps: Literal["cross", "self"] | None
    default_attention: Literal["tokens", "none"] = "none"
    special_columns: int = 0
    vision: str
    language: str
    attentions: str = ""
    new_tokens: int = 64
    max_pixels: int = 1 << 20
    images: tuple[tuple[str, Any], ...] = ()

    @property
    def image_settings(self) -> dict[str, Any]:
        """Settings of the image processor."""
        return dict(self.images)


_CHAT_PROMPT = "Describe this image in one sentence."


def _chat(
    name: str, language: str = "model.language_model", vision: str = "vision_tower", **more: Any
) -> Family:
    return Family(
        name=name,
        prompt="chat",
        default_prompt=_CHAT_PROMPT,
        maps="self",
        vision=f"model.{vision}",
        language=language,
        attentions=f"{language}.layers.*.self_attn",
        new_tokens=256,
        **more,
    )


#: The families by ``model_type`` in config.json.
FAMILIES: Mapping[str, Family] = {
    "blip": Family(
        name="BLIP",
        prompt="prefix",
        maps="cross",
        default_attention="tokens",
        special_columns=1,
        vision="vision_model",
        language="text_decoder",
        attentions="text_decoder.bert.encoder.layer.*.crossattention.self",
    ),
    "git": Family(
        name="GIT",
        prompt="prefix",
        maps="self",
        default_attention="tokens",
        special_columns=1,
        vision="git.image_encoder",
        language="git",
        attentions="git.encoder.layer.*.attention.self",
    ),
    "vision-encoder-decoder": Family(
        name="ViT-GPT2",
        prompt=None,
        maps="cross",
        default_attention="tokens",
        special_columns=1,
        vision="encoder",
        language="decoder",
        attentions="decoder.transformer.h.*.crossattention",
    ),
    "florence2": Family(
        name="Florence-2",
        prompt="task",
        default_prompt="<CAPTION>",
        maps="cross",
        default_attention="tokens",
        special_columns=1,
        vision="model.vision_tower",
        language="model.language_model",
        attentions="model.language_model.decoder.layers.*.encoder_attn",
        new_tokens=256,
    ),
    "blip-2": Family(
        name="BLIP-2",
        prompt="text",
        maps=None,
        vision="vision_model",
        language="language_model",
    ),
    "paligemma": Family(
        name="PaliGemma",
        prompt="text",
        default_prompt="caption en",
        maps="self",
        vision="model.vision_tower",
        language="model.language_model",
        attentions="model.language_model.layers.*.self_attn",
    ),
    "gemma3": _chat("Gemma 3", images=(("do_pan_and_scan", False),)),
    "llava": _chat("LLaVA"),
    "smolvlm": _chat(
        "SmolVLM",
        language="model.text_model",
        vision="vision_model",
        images=(("do_image_splitting", False),),
    ),
    "internvl": _chat("InternVL", images=(("crop_to_patches", False),)),
    "qwen2_5_vl": _chat("Qwen2.5-VL", vision="visual"),
    "qwen3_vl": _chat("Qwen3-VL", vision="visual"),
}


def family_of(config: Mapping[str, Any], place: str) -> Family:
    """The family of a model, by its config.json.

    Raises:
        BundleError: captioner knows no such family.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    names = [family.name for family in FAMILIES.values()]
    known = first_of(names, len(names))
    if "auto_map" in config:
        raise BundleError(
            f"the model {place} needs Python code of its own, which captioner does not run; "
            f"choose a model of one of these families: {known}"
        )
    raise BundleError(
        f"the model {place} is of type {kind!r}, which is not an image captioner that captioner "
        f"knows; choose a model of one of these families: {known}"
    )
