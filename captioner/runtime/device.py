"""Which device to compute on, and in which precision."""

import torch

from captioner.errors import InputError

__all__ = ["choose_device", "choose_dtype"]


def choose_device(name: str) -> torch.device:
    """The device of that name; for ``auto`` a GPU where there is one.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where CUDA is not compiled in
        raise InputError(f"no device {name!r} here") from error
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
