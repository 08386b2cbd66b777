"""Published weights of encoders: which files are read, which names they may have."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision.models as torchvision_models
from timm.models import _registry
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

import tiny_backbones  # noqa: F401  # known to timm from here on
from captioner.config import ModelConfig
from captioner.errors import InputError
from captioner.model.build import build_model
from captioner.model.encoder import ImageEncoder
from captioner.model.published import read_weights
from conftest import TINY


def _encoder(backbone: str, size: int = 64) -> ImageEncoder:
    return ImageEncoder(ModelConfig(backbone=backbone, image_size=size)).eval()


def _published(backbone: str, **keywords: object) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return timm.create_model(backbone, pretrained=False, **keywords).state_dict()


# Files.


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"state_dict": state, "args": argparse.Namespace(lr=0.1), "epoch": 3},
        lambda state: {"model": {"other": torch.zeros(1)}, "model_ema": state},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"backbone.{name}": tensor for name, tensor in state.items()},
    ],
    ids=[
        "bare",
        "state_dict",
        "model",
        "both",
        "options",
        "average",
        "DDP",
        "compiled",
        "backbone",
    ],
)
def test_a_state_dict_is_found_in_what_wraps_it(wrap: Callable, tmp_path: Path):
    state = _published("test_resnet")
    torch.save(wrap(state), tmp_path / "weights.pth")

    read = read_weights(str(tmp_path / "weights.pth"))

    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_safetensors_are_read(tmp_path: Path):
    state = {f"module.{name}": tensor for name, tensor in _published("test_resnet").items()}
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    assert (
        read_weights(str(tmp_path / "weights.safetensors")).keys()
        == _published("test_resnet").keys()
    )


# Names.


def _torchvision_vit(network: nn.Module, images: Tensor) -> Tensor:
    tokens = network._process_input(images)
    tokens = torch.cat([network.class_token.expand(len(tokens), -1, -1), tokens], 1)
    return network.encoder(tokens)[:, 1:].unflatten(1, (4, 4))


def _torchvision_convnext(network: nn.Module, images: Tensor) -> Tensor:
    return network.classifier[0](network.features(images)).permute(0, 2, 3, 1)


def _torchvision_resnet(network: nn.Module, images: Tensor) -> Tensor:
    return nn.Sequential(*list(network.children())[:-2])(images).permute(0, 2, 3, 1)


def _torchvision_features(network: nn.Module, images: Tensor) -> Tensor:
    return network.features(images).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("make", "features", "backbone"),
    [
        (torchvision_models.resnet18, _torchvision_resnet, "resnet18"),
        (torchvision_models.efficientnet_b0, _torchvision_features, "efficientnet_b0"),
        (torchvision_models.mobilenet_v2, _torchvision_features, "mobilenetv2_100"),
        (torchvision_models.convnext_tiny, _torchvision_convnext, "convnext_tiny"),
        (
            lambda: VisionTransformer(64, 16, 6, 2, 64, 192, num_classes=10),
            _torchvision_vit,
            "test_vit",
        ),
    ],
    ids=["ResNet", "EfficientNet", "MobileNet", "ConvNeXt", "ViT"],
)
def test_torchvisions_weights_give_torchvisions_features(make, features, backbone):
    torch.manual_seed(0)
    network = make().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
        if hasattr(module, "layer_scale"):
            nn.init.uniform_(module.layer_scale)
    encoder = _encoder(backbone)
    encoder.load_published_weights(network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = features(network, images)
        torch.testing.assert_close(encoder.features(images), expected, rtol=1e-3, atol=1e-5)
    assert expected.std() > 0


def test_weights_of_the_first_dinov2_fit():
    """They have a token for masks, other names, and the class token's place in the embedding."""
    state = _published("tiny_dinov2")
    first = {name: tensor for name, tensor in state.items() if name != "reg_token"}
    first |= {"mask_token": torch.zeros(1, 32), "register_tokens": state["reg_token"]}
    first["pos_embed"] = torch.cat([torch.ones(1, 1, 32), state["pos_embed"]], 1)
    encoder = _encoder("tiny_dinov2", 56)
    encoder.load_published_weights(first)
    loaded = encoder.backbone.state_dict()
    assert torch.equal(loaded["reg_token"], state["reg_token"])
    assert torch.equal(loaded["pos_embed"], state["pos_embed"])
    assert torch.equal(loaded["cls_token"], state["cls_token"] + 1)


def test_position_embeddings_are_resized():
    state = _published("tiny_siglip")
    state["pos_embed"] = torch.linspace(0, 1, 4).view(1, 4, 1, 1).expand(1, 4, 4, 32).flatten(1, 2)
    encoder = _encoder("tiny_siglip", 128)
    encoder.load_published_weights(state)
    columns = encoder.backbone.pos_embed.detach().view(8, 8, 32)
    assert (columns.diff(dim=0) > 0).all()
    torch.testing.assert_close(columns[:, :1].expand_as(columns), columns, rtol=0, atol=1e-5)


def test_pooling_and_classifier_are_left_out():
    state = _published("tiny_siglip")
    assert any(name.startswith("attn_pool") for name in state)
    encoder = _encoder("tiny_siglip")
    assert not any(name.startswith("attn_pool") for name in encoder.backbone.state_dict())
    encoder.load_published_weights(state)
    assert torch.equal(encoder.backbone.norm.weight, state["norm.weight"])


def test_a_norm_after_pooling_becomes_the_norm():
    state = _published("test_vit", global_pool="avg")
    assert "fc_norm.weight" in state
    state["fc_norm.weight"] += 1
    encoder = _encoder("test_vit", 160)
    encoder.load_published_weights(state)
    assert torch.equal(encoder.backbone.norm.weight, state["fc_norm.weight"])


def test_counters_of_batches_may_be_missing():
    state = _published("test_resnet")
    old = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    _encoder("test_resnet").load_published_weights(old)


# What does not fit.


def _cut(state: dict[str, Tensor]) -> None:
    state["conv1.0.weight"] = state["conv1.0.weight"][:, :2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("layer1.0.conv1.weight"),
            r"there is no layer1\.0\.conv1\.weight$",
        ),
        (_cut, r"conv1\.0\.weight is 24 × 2 × 3 × 3, not 24 × 3 × 3 × 3$"),
        (
            lambda state: state.update({"layer4.9.conv1.weight": torch.ones(1)}),
            r"layer4\.9\.conv1\.weight is not in this backbone$",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if "layer1.0.conv" in name],
            r"there is no layer1\.0\.conv1\.weight and \d more do not fit$",
        ),
    ],
    ids=["missing", "another shape", "of a deeper network", "several"],
)
def test_what_does_not_fit_is_named(change: Callable, message: str, tmp_path: Path):
    state = _published("resnet10t")
    change(state)
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    expected = rf"^--encoder-weights {path}: the weights are not those of resnet10t: {message}"
    with pytest.raises(InputError, match=expected):
        build_model(TINY, str(path))


@pytest.mark.parametrize(
    ("published", "backbone"), [("resnet101", "resnet50"), ("convnext_small", "convnext_tiny")]
)
def test_weights_of_a_deeper_network_are_refused(published: str, backbone: str):
    """All names and shapes of the smaller one are in them."""
    with torch.device("meta"):
        state = timm.create_model(published).state_dict()
    with pytest.raises(InputError, match=rf"not those of {backbone}: .* is not in this backbone"):
        _encoder(backbone).load_published_weights(state)


# timm's download.


def test_timm_loads_its_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From a file in place of the hub; the position embeddings are fitted to the image size."""
    state = _published("tiny_clip")
    safetensors.torch.save_file(state, tmp_path / "tiny_clip.safetensors")
    file = str(tmp_path / "tiny_clip.safetensors")
    known = timm.get_pretrained_cfg("tiny_clip")
    assert known is not None
    published = dataclasses.replace(known, file=file)
    monkeypatch.setitem(_registry._model_pretrained_cfgs, "tiny_clip", published)
    config = dataclasses.replace(TINY, backbone="tiny_clip", image_size=96, grid=None)
    backbone = build_model(config, None).encoder.backbone
    assert torch.equal(backbone.norm_pre.weight, state["norm_pre.weight"])
    assert torch.equal(backbone.blocks[2].mlp.fc1.weight, state["blocks.2.mlp.fc1.weight"])
    assert backbone.pos_embed.shape == (1, 37, 32)


def test_a_backbone_without_published_weights_needs_a_file():
    config = dataclasses.replace(TINY, backbone="tiny_siglip")
    with pytest.raises(
        InputError, match=r"^timm has no weights of tiny_siglip .*--encoder-weights"
    ):
        build_model(config, None)


def test_patches_that_do_not_cover_the_images_are_refused():
    config = dataclasses.replace(TINY, backbone="tiny_dinov2", image_size=64)
    with pytest.raises(InputError, match=r"^--image-size 64: .* for example 56 or 70$"):
        build_model(config, None)
