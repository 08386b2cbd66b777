"""Builds a new model from its settings and the published weights of its encoder."""

from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch
from torch import Tensor

from captioner.config import ModelConfig
from captioner.errors import InputError
from captioner.model.backbone import check_patches
from captioner.model.encoder import ImageEncoder
from captioner.model.network import CaptionModel
from captioner.model.published import read_weights

__all__ = ["build_model"]

_TIMEOUT = 10  # seconds that the hub has to answer


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
    _check_encoder(config)
    torch.manual_seed(seed)
    model = CaptionModel(config)
    state = _download(config.backbone) if weights is None else read_weights(weights)
    try:
        model.encoder.load_published_weights(state)
    except InputError as error:
        raise InputError(f"--encoder-weights {weights}: {error}" if weights else error) from error
    return model


def _check_encoder(config: ModelConfig) -> None:
    """Checks that the encoder takes images of the size, without allocating memory.

    Raises:
        InputError: it does not, or what it makes of them is not a feature map.
    """
    name, size = config.backbone, config.image_size
    try:
        with torch.device("meta"), torch.inference_mode():
            encoder = ImageEncoder(config).eval()
            encoder.encode_blank_image()
    except InputError:
        raise
    except Exception as error:  # timm's backbones raise errors of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"--image-size {size}: {name} does not take images of this size: {reason[:300]}"
        ) from error
    check_patches(encoder.backbone, name, size)


def _download(backbone: str) -> dict[str, Tensor]:
    """The weights of a whole backbone, from the hub or from its cache on this machine.

    Raises:
        InputError: there are none, or they cannot be downloaded and are not in the cache.
    """
    pretrained = timm.get_pretrained_cfg(backbone)
    if pretrained is None or not pretrained.has_weights:
        raise InputError(
            f"timm has no weights of {backbone} to download: name a file of them with "
            "--encoder-weights"
        )
    repository = pretrained.hf_hub_id
    try:
        with _offline_unless_reached(repository):
            # At the size that it was trained for: the weights are then fitted to another one.
            return timm.create_model(backbone, pretrained=True).state_dict()  # type: ignore[no-any-return]
    except Exception as error:  # the hub's client raises many kinds without a network
        raise InputError(
            f"cannot download the weights of {backbone} from "
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
