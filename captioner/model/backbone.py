"""Backbones of timm: finds one by its name, makes it for an image size, describes its images."""

import difflib
import re
from dataclasses import replace
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.layers import DropPath
from torch import nn

from captioner.config import ModelConfig
from captioner.errors import InputError

__all__ = ["check_patches", "create_backbone", "with_encoder"]


def with_encoder(config: ModelConfig, name: str) -> ModelConfig:
    """The settings with another encoder, and with the images that it was trained on.

    The size, the mean, the standard deviation and the interpolation come from timm's data
    configuration of the published weights. Images stay squares of the whole picture: nothing is
    cropped.

    Args:
        config: the model's settings.
        name: a model in timm, with or without the tag of its weights: ``resnet50`` or
            ``resnet50.tv_in1k``.

    Raises:
        InputError: timm has no such backbone.
    """
    _check_name(name)
    published = timm.get_pretrained_cfg(name)
    data = resolve_data_config({}, pretrained_cfg=published.to_dict() if published else {})
    return replace(
        config,
        backbone=name,
        image_size=min(data["input_size"][1:]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
    )


def _check_name(name: str) -> None:
    """Checks that timm has a backbone; names of hub repositories and directories are refused.

    Raises:
        InputError: timm has no such backbone, or no weights with this tag.
    """
    architecture, _, tag = name.partition(".")
    if not (re.fullmatch(r"\w+(\.\w+)?", name, re.ASCII) and timm.is_model(architecture)):
        close = difflib.get_close_matches(architecture, timm.list_models(), 3)
        advice = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise InputError(f"timm has no backbone {name!r}; {advice}")
    tags = [each.partition(".")[2] for each in timm.list_pretrained(architecture)]
    if tag and tag not in tags:
        known = f"it has {', '.join(tags)}" if tags else "it has none"
        raise InputError(f"timm has no backbone {name!r}: weights of {architecture}: {known}")


def create_backbone(name: str, image_size: int) -> Any:
    """Makes a backbone with random weights, without classifier and pooling.

    Args:
        name: its name in timm.
        image_size: height and width of its images, in pixels.

    Returns:
        A network with ``forward_features``; timm's networks share no class of their own.

    Raises:
        InputError: timm has no such backbone, or it does not take images of this size.
    """
    _check_name(name)
    keywords = {"num_classes": 0, "global_pool": ""}
    # Position embeddings and windows are made for a size; convolutions take any.
    if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        keywords["img_size"] = image_size
    try:
        try:
            backbone = timm.create_model(name, pretrained=False, **keywords)
        except AssertionError:  # some cannot be made without pooling
            del keywords["global_pool"]
            backbone = timm.create_model(name, pretrained=False, **keywords)
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"timm cannot make {name} for images of {image_size}×{image_size} pixels: {reason}"
        ) from error
    for module in backbone.modules():
        if isinstance(module, DropPath):  # stochastic depth is a setting of training
            module.drop_prob = 0.0
    return backbone


def check_patches(backbone: nn.Module, name: str, image_size: int) -> None:
    """Checks that patches cover the images: a Vision Transformer leaves what is over out.

    Args:
        backbone: any backbone; convolutions take every size.
        name: its name in timm.
        image_size: height and width of its images, in pixels.

    Raises:
        InputError: the size is not a multiple of the patches' size.
    """
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    if not isinstance(patch, tuple) or not hasattr(backbone, "num_prefix_tokens"):
        return
    step = patch[0]
    if image_size % step:
        below = image_size // step * step
        sizes = " or ".join(str(size) for size in (below, below + step) if size >= 32)
        raise InputError(
            f"--image-size {image_size}: {name} divides images into patches of {step}×{step} "
            f"pixels; use a multiple of {step}, for example {sizes}"
        )
