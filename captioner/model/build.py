"""Builds a new model from its settings and the published weights of its encoder."""

import io

import torch
from safetensors import SafetensorError
from torch import Tensor

from captioner import storage
from captioner.config import ModelConfig
from captioner.errors import CaptionerError, InputError
from captioner.model.network import CaptionModel

__all__ = ["build_model"]


def build_model(config: ModelConfig, weights: str | None, *, seed: int = 0) -> CaptionModel:
    """Builds a model with a pretrained encoder and a random decoder.

    Args:
        config: the model's settings.
        weights: a file of the encoder's published weights, local or in a bucket: ``.safetensors``,
            or a state dict saved by torch, which is read with ``weights_only``. None downloads
            timm's weights.
        seed: of the decoder's weights.

    Raises:
        InputError: the weights cannot be downloaded or read, or do not fit the encoder.
    """
    torch.manual_seed(seed)
    if weights is None:
        try:
            return CaptionModel(config, pretrained=True)
        except CaptionerError:
            raise
        except Exception as error:  # whatever the hub's client raises without a network
            raise InputError(
                f"the weights of {config.backbone} cannot be downloaded "
                f"({type(error).__name__}): give --encoder-weights"
            ) from error
    model = CaptionModel(config)
    model.encoder.load_published_weights(_read_weights(weights))
    return model


def _read_weights(path: str) -> dict[str, Tensor]:
    import safetensors.torch

    try:
        data = storage.read(storage.absolute(path))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        if path.endswith(".safetensors"):
            return dict(safetensors.torch.load(data))
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, SafetensorError) as error:  # the file is damaged, and they say how
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read the weights in {path}: {reason}") from error
    except Exception as error:  # of many kinds; torch's advice is to unpickle what it refused
        raise InputError(f"{path} is not a state dict") from error
    if not (isinstance(state, dict) and all(torch.is_tensor(v) for v in state.values())):
        raise InputError(f"{path} is not a state dict")
    return state
