"""A pretrained model that is found and not loaded. Imports neither torch nor transformers."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from captioner.config import DecodeConfig
from captioner.data.preparation import Preparation
from captioner.data.prompts import columns_of, fill
from captioner.errors import InputError
from captioner.model.huggingface.families import Family, family_of
from captioner.model.huggingface.hub import Location, locate
from captioner.model.huggingface.settings import GenerationSettings

if TYPE_CHECKING:
    from captioner.model.huggingface.captioner import PretrainedCaptioner

__all__ = ["PretrainedModel", "find_model"]

_NATIVE = {"max_words": "--max-new-tokens", "allow_unknown": None}
_SHARED = tuple(field.name for field in dataclasses.fields(GenerationSettings))


def find_model(uri: str) -> "PretrainedModel":
    """A pretrained model, by its directory or its name on the hub.

    Raises:
        BundleError: there is no such model, or it is not of a family that captioner knows.
        InputError: transformers is not installed.
    """
    location = locate(uri)
    family = family_of(location.config, uri)
    if importlib.util.find_spec("transformers") is None:
        raise InputError(
            f"{uri} is a pretrained model, which needs captioner[hf]: pip install 'captioner[hf]'"
        )
    return PretrainedModel(location, family)


@dataclass(frozen=True)
class PretrainedModel:
    """A model in the form of transformers. Small: it holds where the weights are."""

    location: Location
    family: Family

    @property
    def preparation(self) -> Preparation:
        """The aspect is kept: the model's own processor resizes the image."""
        return Preparation(max_pixels=self.family.max_pixels)

    @property
    def identity(self) -> dict[str, Any]:
        """The hub's commit, or a digest of the directory's files."""
        return {"model": self.location.identity, "model family": self.family.name}

    @property
    def low_score(self) -> float | None:
        """None: published models do not tell."""
        return None

    def resolve(self, decode: DecodeConfig) -> DecodeConfig:
        """The settings with the family's own.

        Raises:
            InputError: a setting is not for this family, or the prompt's braces do not match.
        """
        for name, instead in _NATIVE.items():
            if getattr(decode, name):
                option = "--" + name.replace("_", "-")
                raise InputError(
                    f"{option} is for models that captioner trained: "
                    + (f"use {instead}" if instead else f"remove {option}")
                )
        settings = _settings(decode).resolved(self.family)
        columns_of(settings.prompt or "")
        resolved = {name: getattr(settings, name) for name in _SHARED if name != "length_penalty"}
        return dataclasses.replace(decode, **resolved)

    def load(
        self, decode: DecodeConfig, *, device: str, precision: str, compiled: bool = False
    ) -> "PretrainedCaptioner":
        """Fetches the files to this machine where they are not, and reads them.

        Raises:
            BundleError: the model cannot be had or loaded.
        """
        from captioner.model.huggingface.loading import load_directory

        settings = _settings(decode)
        if settings.prompt is not None:
            settings = dataclasses.replace(settings, prompt=fill(settings.prompt, {}))
        return load_directory(
            self.location.fetch(),
            settings,
            name=self.location.uri,
            device=device,
            precision=precision,
        )


def _settings(decode: DecodeConfig) -> GenerationSettings:
    values = {name: getattr(decode, name) for name in _SHARED}
    if decode.length_penalty == 1:
        values["length_penalty"] = None
    return GenerationSettings(**values)
