"""Reads a pretrained model from the directory that holds its files. Runs none of its code."""

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from captioner.errors import BundleError, InputError, one_line
from captioner.model.huggingface.captioner import PretrainedCaptioner
from captioner.model.huggingface.families import Family, family_of
from captioner.model.huggingface.hub import weights_among
from captioner.model.huggingface.prompts import render
from captioner.model.huggingface.settings import GenerationSettings
from captioner.runtime.device import choose_device, choose_dtype
from captioner.runtime.memory import keep_freed_memory

__all__ = ["import_transformers", "load_directory", "load_processor"]

_SPARE = 1.1  # times the weights, that loading takes at least


def import_transformers() -> Any:
    """The library, kept from writing to the terminal.

    Raises:
        InputError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "a pretrained model needs captioner[hf]: pip install 'captioner[hf]'"
        ) from error
    library: Any = transformers
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def load_directory(
    directory: Path,
    settings: GenerationSettings,
    *,
    name: str | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> PretrainedCaptioner:
    """A captioner of the model in a directory.

    Args:
        directory: holds config.json, weights in safetensors, tokenizer and image processor.
        settings: how it captions; resolved here for the model's family.
        name: the model as the user named it, for messages.
        device: see :func:`captioner.runtime.device.choose_device`.
        precision: ``auto``, ``fp32`` or ``bf16``.

    Raises:
        BundleError: the model cannot be loaded.
        InputError: a setting is not for this family, or a package is missing.
    """
    name = name or str(directory)
    family = family_of(json.loads((directory / "config.json").read_text()), name)
    settings = settings.resolved(family)
    library = import_transformers()
    on = choose_device(device)
    dtype = choose_dtype(precision, on)
    _check_memory(directory, name, on, dtype)
    only_here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _loading_errors(name, family):
        model = library.AutoModelForImageTextToText.from_pretrained(
            directory, use_safetensors=True, dtype=dtype, **only_here
        )
        processor = load_processor(directory, family)
        model = model.eval().to(on)
    if family.prompt == "chat":
        render(processor, settings.prompt or "")  # may refuse
    if on.type == "cpu":
        keep_freed_memory()
    return PretrainedCaptioner(family, model, processor, settings)


def load_processor(directory: Path, family: Family) -> Any:
    """A model's image processor and tokenizer, in one object."""
    library = import_transformers()
    only_here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if family.prompt is None:  # AutoProcessor gives only a tokenizer
        return SimpleNamespace(
            image_processor=library.AutoImageProcessor.from_pretrained(directory, **only_here),
            tokenizer=library.AutoTokenizer.from_pretrained(directory, **only_here),
        )
    return library.AutoProcessor.from_pretrained(directory, **only_here)


@contextlib.contextmanager
def _loading_errors(name: str, family: Family) -> Iterator[None]:
    """Makes one line of what transformers raises for a model that it cannot load."""
    try:
        yield
    except ImportError as error:
        reason = one_line(error)[:200]
        raise InputError(
            f"the model {name} ({family.name}) needs a package that is not installed: {reason}; "
            "try pip install 'captioner[hf]'"
        ) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise BundleError(f"not enough memory for the model {name}: {one_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = one_line(error)[:300] or type(error).__name__
        raise BundleError(f"cannot load the model {name} ({family.name}): {reason}") from error
    except Exception as error:  # safetensors raises a class of its own for a damaged file
        if type(error).__name__ != "SafetensorError":
            raise
        raise BundleError(f"the weights of the model {name} are damaged: {error}") from error


def _check_memory(directory: Path, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses a model whose weights alone are larger than the memory that is free.

    Raises:
        BundleError: it is.
    """
    free = _free_memory(device)
    if free is None:
        return
    names = sorted(path.name for path in directory.iterdir())
    count = sum(_parameters(directory / each) for each in weights_among(names))
    needed = int(count * dtype.itemsize * _SPARE)
    if needed > free:
        raise BundleError(
            f"not enough memory for the model {name}: {count / 1e9:.1f} billion parameters in "
            f"{str(dtype).removeprefix('torch.')} take {needed / 1e9:.1f} GB, and {device} has "
            f"{free / 1e9:.1f} GB free; use a smaller model"
            + (" or --precision bf16" if dtype == torch.float32 else "")
        )


def _parameters(path: Path) -> int:
    """The parameters in a safetensors file, by its header."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
        shapes = [each["shape"] for name, each in header.items() if name != "__metadata__"]
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"the weights {path} are damaged: {one_line(error)}") from error
    return sum(int(torch.Size(shape).numel()) for shape in shapes)


def _free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    free: list[int] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return min(free, default=None)
