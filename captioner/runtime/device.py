"""Which device to compute on, and in which precision."""

import platform
from pathlib import Path
from typing import Literal

import torch

from captioner.errors import InputError

__all__ = ["choose_device", "choose_dtype", "identify", "resolve_precision"]

_BOOT = Path("/proc/sys/kernel/random/boot_id")  # one for a machine and all of its containers


def choose_device(name: str) -> torch.device:
    """The device of that name; for ``auto`` a GPU if there is one.

    Raises:
        InputError: this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where CUDA is not compiled in
        raise InputError(
            f"no device {name!r} here; use auto, cpu, cuda, cuda:1 or mps, as the machine has"
        ) from error
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in: for ``auto``, bfloat16 where the hardware multiplies in it."""
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if device.type == "cuda":
        hardware = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        hardware = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    else:
        hardware = False
    return torch.bfloat16 if hardware else torch.float32


def resolve_precision(precision: str, device: torch.device) -> Literal["fp32", "bf16"]:
    """Resolves the precision ``auto`` for a device; returns any other unchanged."""
    return "bf16" if choose_dtype(precision, device) == torch.bfloat16 else "fp32"


def identify(device: torch.device) -> str:
    """A name for this very piece of hardware, the same in all processes that use it."""
    if device.type == "cuda":
        return f"GPU {torch.cuda.get_device_properties(device).uuid}"
    machine = _BOOT.read_text().strip() if _BOOT.exists() else platform.node()
    return f"{device.type} of machine {machine}"
