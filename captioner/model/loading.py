"""Finds a model by its URI: one that captioner trained, or a pretrained one."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from captioner import storage
from captioner.config import PRETRAINED_SETTINGS, DecodeConfig
from captioner.data.preparation import Preparation
from captioner.errors import BundleError, InputError
from captioner.model import bundle
from captioner.model.base import Caption, Model
from captioner.model.huggingface.hub import Location, is_hub_name
from captioner.model.huggingface.model import find_model
from captioner.model.native import Captioner

if TYPE_CHECKING:
    import torch

__all__ = ["NativeModel", "is_pretrained", "load_model"]

_LARGEST_CONFIG = 10_000_000  # bytes


def load_model(uri: str) -> Model:
    """Finds a model; a pretrained model's weights are not read yet.

    Args:
        uri: a directory, local or in a bucket; or ``owner/name[@revision]`` on a model hub.

    Raises:
        BundleError: the model does not exist, or cannot be used.
        InputError: a package for it is missing.
    """
    if is_pretrained(uri):
        return find_model(uri)
    return NativeModel.read(uri)


def is_pretrained(uri: str) -> bool:
    """Whether a model is in transformers' format: its config.json has a ``model_type``."""
    if is_hub_name(uri):
        return True
    try:
        place = storage.join(storage.absolute(uri), "config.json")
        config = json.loads(storage.read(place, _LARGEST_CONFIG))
    except (OSError, ValueError, InputError):  # loading it as a bundle reports the error
        return False
    return isinstance(config, dict) and "format" not in config and "model_type" in config


class NativeModel:
    """A model that captioner trained.

    The weights are read to check them. Pickled, the model is small: it holds where the weights are,
    and :meth:`load` reads them again on the machine where it runs.

    Args:
        uri: the model's directory.
        read: the model as it was read from there.
    """

    def __init__(self, uri: str, read: bundle.Bundle):
        self.uri, self.config, self.digests = uri, read.config, read.digests
        self._read: bundle.Bundle | None = read

    @classmethod
    def read(cls, uri: str) -> "NativeModel":
        """Reads a model's directory, local or in a bucket.

        Raises:
            BundleError: the model does not exist, or cannot be used.
        """
        return cls(storage.absolute(uri), bundle.load(uri))

    def __getstate__(self) -> dict[str, Any]:
        """The model without its weights."""
        # The bundled model may be at another path on another machine.
        uri = None if self.uri == bundle.DEFAULT else self.uri
        return vars(self) | {"uri": uri, "_read": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The model of another process."""
        vars(self).update(state)
        self.uri = self.uri or bundle.DEFAULT

    @property
    def preparation(self) -> Preparation:
        """A square of the model's image size."""
        return Preparation.of(self.config)

    @property
    def identity(self) -> dict[str, Any]:
        """The digests of the bundle's files."""
        digests = self.digests
        return {
            "model": digests["model.safetensors"],
            "model settings": digests["config.json"],
            "vocabulary": digests["tokenizer.json"],
        }

    @property
    def low_score(self) -> float | None:
        """The bundle's, measured on validation images."""
        return self.config.low_score

    def resolve(self, decode: DecodeConfig) -> DecodeConfig:
        """The settings with the model's beam width, and maps for each word.

        Raises:
            InputError: a setting is for pretrained models, or for models of words.
        """
        if decode.allow_unknown and self.config.tokenizer == "bpe":
            raise InputError(
                "--allow-unknown is for models of words, and this model's subwords spell any word: "
                "remove --allow-unknown"
            )
        for each in dataclasses.fields(decode):
            if each.name in PRETRAINED_SETTINGS and getattr(decode, each.name) != each.default:
                option = "--" + each.name.replace("_", "-")
                raise InputError(
                    f"{option} is for pretrained models, and this model was trained by captioner: "
                    f"remove {option}"
                )
        decode = dataclasses.replace(decode, seed=0).with_model_defaults(self.config)
        if decode.attention == "auto":
            decode = dataclasses.replace(decode, attention="tokens")
        return decode

    def load(
        self, decode: DecodeConfig, *, device: str, precision: str, compiled: bool = False
    ) -> "_LoadedNative":
        """Moves the model to a device.

        Raises:
            BundleError: the model is not on this machine, or has changed since it was found.
        """
        read, self._read = self._read or self._read_here(), None  # a captioner changes its weights
        return _LoadedNative(
            Captioner(read, decode, device=device, precision=precision, compiled=compiled)
        )

    def _read_here(self) -> bundle.Bundle:
        """Reads the weights on this machine; those of a bucket are fetched once to its cache."""
        location = Location(
            uri=self.uri,
            kind="local" if storage.is_local(self.uri) else "bucket",
            files=bundle.FILES,
            identity=hashlib.sha256("".join(self.digests.values()).encode()).hexdigest(),
        )
        read = bundle.load(str(location.fetch()))
        if read.digests != self.digests:
            raise BundleError(
                f"the model {self.uri} has changed since the job began; run the same command again"
            )
        return read


class _LoadedNative:
    """A native model on a device, with the interface of :class:`LoadedModel`."""

    def __init__(self, captioner: Captioner):
        self._captioner = captioner

    @property
    def device(self) -> "torch.device":
        return self._captioner.device

    @property
    def dtype(self) -> "torch.dtype":
        return self._captioner.dtype

    def caption(
        self, images: Sequence[np.ndarray], prompts: Sequence[str] | None = None
    ) -> list[Caption]:
        """Captions square images of the model's size; ignores prompts."""
        return [
            Caption(
                text=caption.text,
                tokens=caption.tokens,
                token_logprobs=caption.token_logprobs,
                score=caption.score,
                attention_THW=caption.attention_THW,
                finish="stop" if caption.ended else "length",
            )
            for caption in self._captioner(np.stack(images))
        ]
