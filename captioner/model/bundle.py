"""A model directory, local or in a bucket: model.safetensors, config.json, tokenizer.json.

All three are data: nothing in a bundle is unpickled or executed. Training also writes images.json,
the names of the images that the model has seen, which is not part of the model.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from captioner import __version__, storage
from captioner.config import ModelConfig, from_mapping, parse_json
from captioner.errors import BundleError, InputError, OutputError
from captioner.model.network import CaptionModel
from captioner.model.vocabulary import Vocabulary

__all__ = [
    "DEFAULT",
    "FILES",
    "IMAGES",
    "Bundle",
    "SeenImages",
    "load",
    "load_config",
    "load_images",
    "save",
    "save_images",
]

#: The model that comes with captioner.
DEFAULT = str(Path(__file__).parents[1] / "bundled" / "flickr8k")

#: The file that lists the images that a model has seen.
IMAGES = "images.json"

_FORMAT = "captioner-bundle-1"
_HEAD = "decoder.head.weight"  # the embedding's weight where the two are tied: stored once
_WEIGHTS = "model.safetensors"

#: The files of a model.
FILES = ("config.json", _WEIGHTS, "tokenizer.json")

_FLOATING = {"F16": 2, "BF16": 2, "F32": 4}  # bytes of a weight
_LARGEST_CONFIG = 1 << 20
_LARGEST_TOKENIZER = 1 << 24
_LARGEST_HEADER = 1 << 24
_LARGEST_IMAGES = 1 << 28


@dataclass(frozen=True)
class Bundle:
    """A model with its vocabulary.

    Attributes:
        model: the network.
        vocabulary: its words or subwords.
        digests: the SHA-256 of each file; for config.json of the settings in it.
        grid: the height and width of the attention maps, in cells.
    """

    model: CaptionModel
    vocabulary: Vocabulary
    digests: dict[str, str]
    grid: tuple[int, int]

    @property
    def config(self) -> ModelConfig:
        """The model's settings."""
        return self.model.config


@dataclass(frozen=True)
class SeenImages:
    """The images that a model has seen, by their names in the dataset.

    Attributes:
        trained: the training images.
        validated: the images by whose scores the best epoch was chosen.
    """

    trained: frozenset[str]
    validated: frozenset[str]

    def __or__(self, other: "SeenImages") -> "SeenImages":
        return SeenImages(self.trained | other.trained, self.validated | other.validated)


def save(
    directory: str,
    model: CaptionModel,
    vocabulary: Vocabulary,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a bundle; config.json, which completes it, is written last.

    Args:
        directory: local or in a bucket; created if it does not exist.
        model: the network.
        vocabulary: its words.
        dtype: type of the stored weights, float32, float16 or bfloat16; None keeps their type.

    Raises:
        OutputError: the bundle cannot be written, or a weight is too large for ``dtype``.
    """
    state = {
        name: _stored(name, tensor.detach().cpu(), dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.config.tied_embeddings and name == _HEAD)
    }
    config = {
        "format": _FORMAT,
        "captioner_version": __version__,
        "model": asdict(model.config),
    }
    storage.write(storage.join(directory, _WEIGHTS), safetensors.torch.save(state))
    storage.write(storage.join(directory, "tokenizer.json"), vocabulary.to_json().encode())
    text = json.dumps(config, indent=2) + "\n"
    storage.write(storage.join(directory, "config.json"), text.encode())


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype)
    if overflowing := tensor[tensor.isfinite() & ~stored.isfinite()].tolist():
        raise OutputError(f"the weight {overflowing[0]:g} in {name} is too large for {dtype}")
    return stored


def load(directory: str) -> Bundle:
    """Reads a bundle; the model is in float32, on the CPU and in eval mode.

    A bundle need not be trusted: no name in it is looked up outside timm's registry, and no
    memory is allocated for weights that config.json asks for and model.safetensors does not hold.

    Raises:
        InputError: the URI contains credentials.
        BundleError: a file is missing or damaged, or the files do not fit together.
    """
    directory = storage.absolute(directory)
    with _errors_of(directory):
        contents = {
            "config.json": _read(directory, "config.json", _LARGEST_CONFIG),
            "tokenizer.json": _read(directory, "tokenizer.json", _LARGEST_TOKENIZER),
        }
        config = _parse_config(contents["config.json"])
        vocabulary = Vocabulary.from_json(contents["tokenizer.json"].decode(), config.tokenizer)
        if len(vocabulary) != config.vocabulary_size:
            raise BundleError(
                f"tokenizer.json has {len(vocabulary)} entries, config.json "
                f"{config.vocabulary_size}"
            )
        expected, grid = _outline(config)
        contents[_WEIGHTS] = _read_weights(directory, expected)
        state = safetensors.torch.load(contents[_WEIGHTS])
        for name, tensor in state.items():
            if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # NaN too
                raise BundleError(f"{name} contains a weight that is not finite")
        if config.tied_embeddings:
            state[_HEAD] = state["decoder.embedding.weight"]
        model = CaptionModel(config)
        model.load_state_dict(state)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    # Without captioner_version and low_score, which do not change a caption.
    settings = {name: value for name, value in asdict(config).items() if name != "low_score"}
    text = json.dumps(settings, sort_keys=True).encode()
    digests["config.json"] = hashlib.sha256(text).hexdigest()
    if config.grid is not None:
        grid = config.grid, config.grid
    return Bundle(model.eval(), vocabulary, digests, grid)


def load_config(directory: str) -> ModelConfig:
    """Reads the settings of a bundle's model alone.

    Raises:
        InputError: the URI contains credentials.
        BundleError: the file is missing or damaged.
    """
    directory = storage.absolute(directory)
    with _errors_of(directory):
        return _parse_config(_read(directory, "config.json", _LARGEST_CONFIG))


@contextmanager
def _errors_of(directory: str) -> Iterator[None]:
    """Names the bundle in what is wrong with its files.

    Raises:
        BundleError: a file is missing or damaged, or the files do not fit together.
    """
    try:
        yield
    except _UnreadableError:
        raise
    except (SafetensorError, UnicodeDecodeError, InputError, BundleError) as error:
        reason = " ".join(str(error).split())  # timm's messages may have several lines
        raise BundleError(f"the model {directory} cannot be used: {reason[:300]}") from error


def save_images(directory: str, images: SeenImages) -> None:
    """Writes the names of the images that the model in a directory has seen.

    Raises:
        OutputError: the file cannot be written.
    """
    names = {"trained": sorted(images.trained), "validated": sorted(images.validated)}
    text = json.dumps(names, indent=0) + "\n"
    storage.write(storage.join(directory, IMAGES), text.encode())


def load_images(directory: str) -> SeenImages | None:
    """Reads the names of the images that the model in a directory has seen.

    Returns:
        The names, or None if the model has no list of images.

    Raises:
        InputError: the URI contains credentials, or its file system is not installed.
        BundleError: the file is damaged.
    """
    try:
        with storage.open_binary(storage.join(storage.absolute(directory), IMAGES)) as file:
            data = file.read(_LARGEST_IMAGES)
    except OSError:  # a bucket without the right to list answers 403 for a missing file
        return None
    try:
        parsed = parse_json(data)
        lists = parsed["trained"], parsed["validated"]
        names_only = (isinstance(s, list) and all(isinstance(n, str) for n in s) for s in lists)
        if not all(names_only):
            raise TypeError
    except (InputError, KeyError, TypeError) as error:
        raise BundleError(
            f"{IMAGES} of the model {directory} is damaged: it should hold two lists of names"
        ) from error
    return SeenImages(*map(frozenset, lists))


class _UnreadableError(BundleError):
    """A file cannot be read, which says nothing about the bundle itself."""


@contextmanager
def _opened(directory: str, name: str) -> Iterator[BinaryIO]:
    try:
        with storage.open_binary(storage.join(directory, name)) as file:
            yield file
    except FileNotFoundError as error:
        raise BundleError(f"it has no {name}") from error
    except InputError as error:  # the file system is not installed
        raise _UnreadableError(str(error)) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise _UnreadableError(f"cannot read {name} of the model {directory}: {reason}") from error


def _read(directory: str, name: str, limit: int) -> bytes:
    with _opened(directory, name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BundleError(f"{name} is larger than {limit} bytes")
    return data


def _parse_config(data: bytes) -> ModelConfig:
    try:
        parsed = parse_json(data)
        if parsed["format"] != _FORMAT:
            raise InputError(f"the format is {parsed['format']!r}, not {_FORMAT!r}")
        return from_mapping(ModelConfig, parsed["model"])
    except (InputError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise BundleError(f"config.json: {reason}") from error


def _outline(config: ModelConfig) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The model's tensors, without allocating memory, and the grid of its features."""
    try:
        with torch.device("meta"), torch.inference_mode():
            model = CaptionModel(config).eval()
            size = config.image_size
            features_BhwC = model.encoder(torch.zeros(1, size, size, 3))
    except Exception as error:  # timm's backbones raise errors of many types
        raise BundleError(f"config.json: {error or type(error).__name__}") from error
    _, height, width, channels = features_BhwC.shape
    if channels != model.encoder.channels:
        raise BundleError(
            f"config.json: {config.backbone} gives features of {channels} channels, not "
            f"{model.encoder.channels}"
        )
    state = model.state_dict()
    if config.tied_embeddings:
        del state[_HEAD]
    return state, (height, width)


def _read_weights(directory: str, expected: Mapping[str, Tensor]) -> bytes:
    """The bytes of model.safetensors, read only if its header lists the expected tensors."""
    with _opened(directory, _WEIGHTS) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LARGEST_HEADER:
            raise BundleError(f"{_WEIGHTS}: a header of {length} bytes is too large")
        try:
            header = parse_json(file.read(length))
        except InputError as error:
            raise BundleError(f"{_WEIGHTS}: the header cannot be read: {error}") from error
        end = 8 + length + _check_header(header, expected)
        file.seek(0)
        data = file.read(end + 1)
    if len(data) != end:
        raise BundleError(
            f"{_WEIGHTS} is {'longer' if len(data) > end else 'shorter'} than the {end} bytes that "
            "its header says"
        )
    return data


def _check_header(header: Any, expected: Mapping[str, Tensor]) -> int:
    """Compares a safetensors header with the expected tensors; returns their size in bytes."""
    if not isinstance(header, dict):
        raise BundleError(f"{_WEIGHTS}: the header is not an object")
    stored = header.keys() - {"__metadata__"}
    if missing := sorted(expected.keys() - stored):
        raise BundleError(f"{_WEIGHTS} lacks the tensor {missing[0]}")
    if extra := sorted(stored - expected.keys()):
        raise BundleError(f"{_WEIGHTS} has an unknown tensor {extra[0]!r}")
    total = 0
    for name, tensor in expected.items():
        entry = header[name] if isinstance(header[name], dict) else {}
        kind, shape = entry.get("dtype"), entry.get("shape")
        kinds = _FLOATING if tensor.is_floating_point() else {"I64": 8}
        if kind not in tuple(kinds) or shape != list(tensor.shape):
            raise BundleError(
                f"{name} is {kind} {shape}, not {' or '.join(kinds)} {list(tensor.shape)}"
            )
        total += tensor.numel() * kinds[kind]
    return total
