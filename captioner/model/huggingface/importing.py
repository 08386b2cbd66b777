"""Converts a model whose weights are pickled to safetensors, once."""

import fnmatch
import os
import pickle
import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from captioner.errors import BundleError, OutputError, one_line
from captioner.model.huggingface.families import family_of
from captioner.model.huggingface.hub import (
    fetch_config,
    hub_errors,
    is_hub_name,
    list_hub,
    parse_config,
    split_revision,
)

__all__ = ["import_model"]

_SMALL = ("*.json", "*.txt", "*.model", "*.jinja")
_FETCHED = (*_SMALL, "pytorch_model*.bin")


def import_model(source: str, directory: str) -> Path:
    """Writes a model of the hub, or of a local directory, as a directory with safetensors.

    Pickled weights are read with ``torch.load(weights_only=True)``, which runs no code.

    Args:
        source: ``owner/name[@revision]`` or a local directory.
        directory: the directory to write; it must not exist.

    Returns:
        The directory.

    Raises:
        BundleError: the model cannot be had, or its weights are not sound.
        OutputError: the directory exists, or cannot be written.
    """
    target = Path(directory)
    if target.exists():
        raise OutputError(f"{directory} exists; choose a directory that does not")
    path = _fetch(source)
    if not (path / "config.json").is_file():
        raise BundleError(f"{source} is not a model: it has no config.json")
    family_of(parse_config(source, (path / "config.json").read_bytes()), source)
    weights = _read_weights(path, source)
    try:
        _write(path, weights, target)
    except OSError as error:
        raise OutputError(f"cannot write {directory}: {one_line(error)}") from error
    return target


def _read_weights(path: Path, source: str) -> dict[str, torch.Tensor]:
    """The pickled weights in a directory.

    Raises:
        BundleError: there are none, or they are not plain weights.
    """
    files = sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise BundleError(f"the model {source} has no pytorch_model.bin to convert")
    state: dict[str, torch.Tensor] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that older versions of torch wrote
            for file in files:
                state |= torch.load(file, map_location="cpu", weights_only=True)
        # Tied weights share their memory, which safetensors refuses.
        return {name: tensor.clone().contiguous() for name, tensor in state.items()}
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise BundleError(
            f"{file.name} of the model {source} is not plain weights: {one_line(error)[:200]}"
        ) from error


def _write(path: Path, weights: dict[str, torch.Tensor], target: Path) -> None:
    """Writes the weights and the other files of a model; the directory appears when it is whole."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for pattern in _SMALL:
        for file in path.glob(pattern):
            if not file.name.endswith(".bin.index.json"):
                shutil.copyfile(file, part / file.name)
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    os.replace(part, target)


def _fetch(source: str) -> Path:
    if not is_hub_name(source):
        return Path(source)
    with hub_errors(source):
        from huggingface_hub import hf_hub_download

        name, revision = split_revision(source)
        names, cached = list_hub(name, revision)
        directory = fetch_config(name, revision, cached=cached).parent
        for each in names:
            if "/" not in each and any(fnmatch.fnmatch(each, pattern) for pattern in _FETCHED):
                hf_hub_download(name, each, revision=directory.name, local_files_only=cached)
        return directory
