"""A model directory, local or in a bucket: model.safetensors, config.json, tokenizer.json.

All three are data: nothing in a bundle is unpickled or executed.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

import safetensors.torch
import torch
from safetensors import SafetensorError

from captioner import __version__, storage
from captioner.config import ModelConfig, from_mapping
from captioner.errors import BundleError, InputError
from captioner.model import CaptionModel
from captioner.vocabulary import Vocabulary

__all__ = ["Bundle", "load", "save"]

_FORMAT = "captioner-bundle-1"
_HEAD = "decoder.head.weight"  # the embedding's weight where the two are tied: stored once


@dataclass(frozen=True)
class Bundle:
    """A model with its vocabulary, and the SHA-256 of each of its files."""

    model: CaptionModel
    vocabulary: Vocabulary
    digests: dict[str, str]

    @property
    def config(self) -> ModelConfig:
        """The model's settings."""
        return self.model.config

    @cached_property
    def grid(self) -> int:
        """The side of the model's attention maps."""
        if self.config.grid is not None:
            return self.config.grid
        size = self.config.image_size
        with torch.inference_mode():
            encoder = self.model.encoder
            blank = torch.zeros(1, size, size, 3, device=encoder.mean.device)
            return int(encoder(blank).size(1))


def save(directory: str, model: CaptionModel, vocabulary: Vocabulary) -> None:
    """Writes a bundle; config.json, which makes it one, comes last.

    Raises:
        OutputError: it cannot be written.
    """
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    if model.config.tied_embeddings:
        del state[_HEAD]
    config = {
        "format": _FORMAT,
        "captioner_version": __version__,
        "model": asdict(model.config),
    }
    storage.write(storage.join(directory, "model.safetensors"), safetensors.torch.save(state))
    storage.write(storage.join(directory, "tokenizer.json"), vocabulary.to_json().encode())
    text = json.dumps(config, indent=2) + "\n"
    storage.write(storage.join(directory, "config.json"), text.encode())


def load(directory: str) -> Bundle:
    """Reads a bundle; the model is in float32, on the CPU and in eval mode.

    Raises:
        BundleError: a file is missing, or holds what it must not.
    """
    contents = {name: _read(directory, name) for name in ("config.json", "tokenizer.json")}
    config = _parse_config(contents["config.json"], directory)
    try:
        vocabulary = Vocabulary.from_json(contents["tokenizer.json"].decode())
    except (BundleError, UnicodeDecodeError) as error:
        raise BundleError(f"the model {directory} is not sound: {error}") from error
    if len(vocabulary) != config.vocabulary_size:
        raise BundleError(
            f"the model {directory} is not sound: tokenizer.json has {len(vocabulary)} words, "
            f"config.json {config.vocabulary_size}"
        )
    contents["model.safetensors"] = _read(directory, "model.safetensors")
    try:
        model = CaptionModel(config)
        state = safetensors.torch.load(contents["model.safetensors"])
        if not all(torch.isfinite(tensor).all() for tensor in state.values()):
            raise BundleError("a weight is not finite")
        if config.tied_embeddings and "decoder.embedding.weight" in state:
            state[_HEAD] = state["decoder.embedding.weight"]
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError, InputError, BundleError) as error:
        reason = " ".join(str(error).split())  # torch lists what does not fit line by line
        raise BundleError(f"the model {directory} is not sound: {reason[:300]}") from error
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    # The version that wrote config.json does not change a caption.
    settings = json.dumps(asdict(config), sort_keys=True).encode()
    digests["config.json"] = hashlib.sha256(settings).hexdigest()
    return Bundle(model.eval(), vocabulary, digests)


def _read(directory: str, name: str) -> bytes:
    try:
        return storage.read(storage.join(directory, name))
    except FileNotFoundError as error:
        raise BundleError(f"{directory} is not a model: it has no {name}") from error
    except OSError as error:
        raise BundleError(f"cannot read {name} of the model {directory}: {error}") from error


def _parse_config(data: bytes, directory: str) -> ModelConfig:
    try:
        parsed = json.loads(data)
        if parsed["format"] != _FORMAT:
            raise BundleError(f"its format is {parsed['format']!r}, not {_FORMAT!r}")
        return from_mapping(ModelConfig, parsed["model"])
    except (ValueError, KeyError, TypeError, RecursionError, BundleError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"config.json of the model {directory} is not sound: {reason}") from error
