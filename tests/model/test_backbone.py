"""Backbones of timm: their names, their image settings, the grids of their features."""

import dataclasses

import numpy as np
import pytest
import timm
import torch

import tiny_backbones  # noqa: F401  # known to timm from here on
from captioner.config import PRESETS, DecodeConfig, ModelConfig
from captioner.data.dataset import CaptionedImage
from captioner.data.preparation import Preparation
from captioner.data.views import load_view
from captioner.errors import InputError
from captioner.model.backbone import check_patches, create_backbone, with_encoder
from captioner.model.build import build_model
from captioner.model.bundle import Bundle
from captioner.model.encoder import ImageEncoder
from captioner.model.native import Captioner
from captioner.training.features import compute_features
from conftest import TINY, tiny_model, write_photos

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5,) * 3, (0.5,) * 3)


def _skip_where_unknown(name: str) -> None:
    if not timm.is_model(name.partition(".")[0]):
        pytest.skip(f"timm {timm.__version__} has no {name}")


@pytest.mark.parametrize(
    ("name", "size", "normalisation", "interpolation"),
    [
        ("vit_small_patch14_dinov2", 518, IMAGENET, "bicubic"),
        ("vit_base_patch16_siglip_256", 256, HALF, "bicubic"),
        ("vit_base_patch16_clip_224.openai", 224, CLIP, "bicubic"),
        ("convnext_tiny.fb_in22k", 224, IMAGENET, "bicubic"),
        ("resnet50.tv_in1k", 224, IMAGENET, "bilinear"),
        ("tf_efficientnet_lite2", 260, HALF, "bicubic"),
        ("vit_base_patch16_sapiens2", 768, IMAGENET, "bilinear"),
    ],
)
def test_an_encoder_brings_the_images_that_it_was_trained_on(
    name, size, normalisation, interpolation
):
    _skip_where_unknown(name)
    config = with_encoder(PRESETS["small"].model, name)

    assert (config.backbone, config.image_size) == (name, size)
    assert (config.mean, config.std) == normalisation
    assert config.interpolation == interpolation
    assert Preparation.of(config) == Preparation(size=size, interpolation=interpolation)
    unchanged = {each.name for each in dataclasses.fields(config)} - {
        *("backbone", "image_size", "mean", "std", "interpolation")
    }
    for field in unchanged:
        assert getattr(config, field) == getattr(PRESETS["small"].model, field)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5", r"timm has no backbone 'resnet5'; did you mean resnet50, .*\?"),
        ("zzzzzzzz", r"timm has no backbone 'zzzzzzzz'; see timm\.list_models\(\)"),
        (
            "resnet50.tv",
            r"timm has no backbone 'resnet50\.tv': weights of resnet50: it has .*tv_in",
        ),
        ("tiny_clip.openai", r"weights of tiny_clip: it has none"),
        ("hf-hub:somebody/model", "timm has no backbone"),
    ],
)
def test_a_name_that_timm_does_not_know_is_one_line(name: str, message: str):
    with pytest.raises(InputError, match=message) as caught:
        with_encoder(ModelConfig(), name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("vit_small_patch14_dinov2", 98, (7, 7)),
        ("vit_small_patch14_reg4_dinov2", 98, (7, 7)),  # a class token and four registers
        ("vit_base_patch16_siglip_224", 96, (6, 6)),
        ("vit_so400m_patch14_siglip_378", 70, (5, 5)),
        ("vit_base_patch16_clip_224", 96, (6, 6)),
        ("resnet50_clip", 64, (2, 2)),
        ("vit_small_patch16_dinov3", 96, (6, 6)),
        ("eva02_tiny_patch14_224", 56, (4, 4)),
        ("deit3_small_patch16_224", 96, (6, 6)),
        ("volo_d1_224", 96, (6, 6)),  # its class token is not counted by timm
        ("hiera_tiny_224", 224, (7, 7)),  # merges tokens
        ("swin_tiny_patch4_window7_224", 64, (2, 2)),
        ("mambaout_femto", 64, (2, 2)),
        ("inception_next_atto", 64, (2, 2)),  # cannot be made without pooling
        ("convnextv2_atto", 96, (3, 3)),
        ("naflexvit_base_patch16_gap", 384, (24, 24)),
    ],
)
def test_features_are_the_grid_of_the_image_alone(name, size, grid):
    with torch.device("meta"), torch.inference_mode():
        encoder = ImageEncoder(ModelConfig(backbone=name, image_size=size)).eval()
        features = encoder(torch.zeros(1, size, size, 3))
    assert features.shape == (1, *grid, encoder.channels)


@pytest.mark.parametrize("name", ["coat_tiny", "pit_ti_224", "efficientvim_m1"])
def test_a_backbone_without_a_feature_map_is_one_line(name: str):
    with pytest.raises(InputError, match=name), torch.device("meta"), torch.inference_mode():
        ImageEncoder(ModelConfig(backbone=name, image_size=224)).encode_blank_image()


def test_the_norm_of_a_convnext_is_part_of_its_features():
    torch.manual_seed(0)
    whole = timm.create_model("test_convnext", pretrained=False, num_classes=0, global_pool="")
    encoder = ImageEncoder(ModelConfig(backbone="test_convnext", image_size=64)).eval()
    encoder.load_published_weights(whole.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = whole.eval()(images).permute(0, 2, 3, 1)
        torch.testing.assert_close(encoder.features(images), expected)


def test_a_size_that_patches_do_not_cover_names_two_that_they_do():
    backbone = create_backbone("tiny_dinov2", 60)
    message = r"--image-size 60: tiny_dinov2 .* 14×14 pixels; .*, for example 56 or 70$"
    with pytest.raises(InputError, match=message):
        check_patches(backbone, "tiny_dinov2", 60)
    check_patches(backbone, "tiny_dinov2", 70)
    check_patches(create_backbone("resnet10t", 61), "resnet10t", 61)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_maxvit", r"^--image-size 100: test_maxvit does not take images of this size: .+$"),
        ("nest_tiny", r"^timm cannot make nest_tiny for images of 100×100 pixels: .+$"),
    ],
)
def test_a_size_that_a_backbone_cannot_take_is_one_line(name: str, message: str):
    _skip_where_unknown(name)
    with pytest.raises(InputError, match=message) as caught:
        build_model(dataclasses.replace(TINY, backbone=name, image_size=100), None)
    assert "\n" not in str(caught.value)


def test_a_backbone_without_stages_trains_whole_or_not_at_all():
    encoder = ImageEncoder(ModelConfig(backbone="poolformer_s12", image_size=64))
    assert encoder.frozen
    with pytest.raises(InputError, match=r"^--fine-tune-from 2: poolformer_s12 has no stages"):
        encoder.fine_tune(2)
    encoder.fine_tune(0)
    trained = [each.requires_grad for each in encoder.backbone.parameters()]
    assert sum(trained) > 0.9 * len(trained)


def test_dropping_branches_is_left_to_training():
    backbone = create_backbone("swin_tiny_patch4_window7_224", 64)
    rates = {m.drop_prob for m in backbone.modules() if type(m).__name__ == "DropPath"}
    assert rates == {0.0}


@pytest.mark.parametrize("own_grid", [None, 3])
def test_maps_have_the_height_and_width_of_the_grid(own_grid, vocabulary):
    model = tiny_model(backbone="test_vit", image_size=64, grid=own_grid)
    wide = timm.create_model(
        "test_vit", img_size=64, patch_size=(16, 8), num_classes=0, global_pool=""
    )
    model.encoder.backbone = wide.eval()
    grid = (3, 3) if own_grid else (4, 8)
    bundle = Bundle(model, vocabulary, {}, grid)
    captioner = Captioner(bundle, DecodeConfig(), device="cpu", precision="fp32")
    images = np.random.default_rng(0).integers(256, size=(2, 64, 64, 3), dtype=np.uint8)
    for caption in captioner(images):
        assert caption.attention_THW.shape == (len(caption.tokens), *grid)
        np.testing.assert_allclose(caption.attention_THW.sum((1, 2)), 1, rtol=1e-5)


def test_images_are_resized_as_the_encoder_asks(tmp_path, monkeypatch):
    """Views, features and captions agree on it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    [photo] = write_photos(tmp_path, 1)
    uri = str(photo)
    views = {
        kind: load_view(uri, Preparation(size=64, interpolation=kind), 0)
        for kind in ("bilinear", "bicubic")
    }
    np.testing.assert_array_equal(load_view(uri, 64, 0), views["bilinear"])
    assert not np.array_equal(views["bicubic"], views["bilinear"])
    for kind, pixels in views.items():
        encoder = ImageEncoder(dataclasses.replace(TINY, interpolation=kind)).eval()
        torch.manual_seed(0)
        encoder.backbone.init_weights()
        [features] = compute_features(encoder, [CaptionedImage(uri, ["a"])], image_size=64)
        with torch.no_grad():
            expected = encoder(torch.from_numpy(pixels)[None])[0].numpy()
        np.testing.assert_allclose(features[0], expected, rtol=2e-3, atol=1e-3)
