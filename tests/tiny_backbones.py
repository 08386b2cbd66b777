"""Tiny Vision Transformers with what sets DINOv2, SigLIP and CLIP apart, known to timm by name."""

from functools import partial
from typing import Any

from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer, _cfg, _create_vision_transformer

_TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2}

default_cfgs = {
    "tiny_dinov2": _cfg(input_size=(3, 56, 56), num_classes=0, crop_pct=1.0),
    "tiny_siglip": _cfg(input_size=(3, 64, 64), num_classes=0, mean=(0.5,) * 3, std=(0.5,) * 3),
    "tiny_clip": _cfg(
        input_size=(3, 64, 64),
        num_classes=16,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
}

__all__ = ["tiny_clip", "tiny_dinov2", "tiny_siglip"]

_create = partial(_create_vision_transformer, use_naflex=False)


@register_model
def tiny_dinov2(pretrained: bool = False, **keywords: Any) -> VisionTransformer:
    """Patches of 14, a class token, four registers, layer scale."""
    own = {"patch_size": 14, "init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}
    return _create("tiny_dinov2", pretrained=pretrained, **{**_TINY, **own, **keywords})


@register_model
def tiny_siglip(pretrained: bool = False, **keywords: Any) -> VisionTransformer:
    """No class token, and pooling by attention."""
    own = {"patch_size": 16, "class_token": False, "global_pool": "map"}
    return _create("tiny_siglip", pretrained=pretrained, **{**_TINY, **own, **keywords})


@register_model
def tiny_clip(pretrained: bool = False, **keywords: Any) -> VisionTransformer:
    """A norm before the blocks."""
    own = {"patch_size": 16, "pre_norm": True}
    return _create("tiny_clip", pretrained=pretrained, **{**_TINY, **own, **keywords})
