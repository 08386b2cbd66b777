"""Builds a new model from its settings and the published weights of its encoder."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor

from captioner import storage
from captioner.config import ModelConfig
from captioner.errors import CaptionerError, InputError
from captioner.model.network import CaptionModel

__all__ = ["build_model"]

_TIMEOUT = 10  # seconds that the hub has to answer
# The keys that training scripts save a state dict under.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "model_state", "state_dict_ema")


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
        return _download(config)
    model = CaptionModel(config)
    model.encoder.load_published_weights(_read_weights(weights))
    return model


def _download(config: ModelConfig) -> CaptionModel:
    """A model whose encoder has timm's weights, from the hub or from its cache on this machine.

    Raises:
        InputError: they cannot be downloaded, and are not in the cache.
    """
    pretrained = timm.get_pretrained_cfg(config.backbone, allow_unregistered=True)
    repository = getattr(pretrained, "hf_hub_id", None)
    try:
        with _offline_unless_reached(repository):
            return CaptionModel(config, pretrained=True)
    except CaptionerError:
        raise
    except Exception as error:  # the hub's client raises many kinds without a network
        raise InputError(
            f"cannot download the weights of {config.backbone} from "
            f"{repository or 'its publisher'} ({type(error).__name__}): check the network, or name "
            "a file of them with --encoder-weights"
        ) from error


@contextmanager
def _offline_unless_reached(repository: str | None) -> Iterator[None]:
    """Where the hub does not answer one request, only its cache is used while entered.

    Its client would retry each file for most of a minute.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    before = constants.HF_HUB_OFFLINE
    if repository is not None and not before:
        try:
            HfApi().model_info(repository, timeout=_TIMEOUT)
        except HfHubHTTPError:  # it answers: the download says what is wrong
            pass
        except Exception:  # no network, in the words of whichever HTTP client it has
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


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
    for name in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
            break
    if not (isinstance(state, dict) and state and all(torch.is_tensor(v) for v in state.values())):
        raise InputError(f"{path} is not a state dict: it holds other things than tensors")
    prefix = "module."  # of DataParallel
    return {str(name).removeprefix(prefix): value for name, value in state.items()}
