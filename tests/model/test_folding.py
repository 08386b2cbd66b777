import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from captioner.model import native as captioning
from captioner.model.bundle import Bundle
from captioner.model.encoder import ImageEncoder
from captioner.model.folding import fold_batch_norm
from captioner.model.native import Captioner
from conftest import TINY, tiny_model


def _encoder(backbone: str) -> ImageEncoder:
    torch.manual_seed(0)
    encoder = ImageEncoder(replace(TINY, backbone=backbone)).eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if it had been trained
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return encoder


def _norms(encoder: ImageEncoder) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())


@pytest.mark.parametrize(
    ("backbone", "left"),
    [
        ("resnet10t", 0),
        ("tf_efficientnet_lite0", 0),
        ("mobilenetv3_small_050", 0),
        ("convnext_atto", 0),  # has none
        ("densenet121", 62),  # normalises before it convolves: a sum of several outputs
    ],
)
def test_features_stay_and_norms_after_convolutions_go(backbone: str, left: int):
    encoder = _encoder(backbone)
    images = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        before = encoder(images)
        fold_batch_norm(encoder, 64)
        after = encoder(images)
    assert _norms(encoder) == left
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


class _Twice(nn.Module):
    """A backbone that also uses the convolution's output before the norm."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        nn.init.uniform_(self.norm.running_mean, 1, 2)

    def forward_features(self, images):
        convolved = self.convolution(images)
        return self.norm(convolved) + convolved


class _Shared(nn.Module):
    """A backbone whose convolution feeds two norms."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    def forward_features(self, images):
        for norm in self.norms:
            images = norm(self.convolution(images))
        return images


@pytest.mark.parametrize("network", [_Twice, _Shared])
def test_a_backbone_that_does_more_is_left_alone(network: type[nn.Module]):
    encoder = _encoder("resnet10t")
    encoder.backbone = network().eval()
    images = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    state = copy.deepcopy(encoder.state_dict())
    with torch.inference_mode():
        before = encoder(images)
        fold_batch_norm(encoder, 64)
        assert torch.equal(encoder(images), before)
    assert encoder.state_dict().keys() == state.keys()


def _images(count: int) -> np.ndarray:
    shape = (count, TINY.image_size, TINY.image_size, 3)
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("in_parts", [True, False], ids=["parts", "whole batches, as on a GPU"])
def test_a_compiled_encoder_writes_the_same_captions(vocabulary, tmp_path, monkeypatch, in_parts):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(Captioner, "_encodes_in_parts", in_parts)
    options = {"device": "cpu", "precision": "fp32"}
    plain = Captioner(Bundle(tiny_model(), vocabulary, {}, (3, 3)), **options)
    compiled = Captioner(Bundle(tiny_model(), vocabulary, {}, (3, 3)), compiled=True, **options)
    for count in (17, 9, 1):  # parts that are full, and that are not
        stance = "default" if count == 17 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            captions = compiled(_images(count))
        for one, other in zip(plain(_images(count)), captions, strict=True):
            assert one.tokens == other.tokens
            np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=1e-4)
            np.testing.assert_allclose(one.attention_THW, other.attention_THW, atol=1e-4)
    assert compiled._compiled_for == ([4 * torch.get_num_threads()] if in_parts else [17])
    assert list((tmp_path / "captioner" / "compiled").iterdir())


def test_batches_that_were_halved_are_not_filled_up_again(vocabulary, monkeypatch):
    """A batch that was halved because RAM ran out must not be padded again."""
    monkeypatch.setattr(Captioner, "_encodes_in_parts", False)
    encoded = []

    def compiled(images: torch.Tensor) -> torch.Tensor:
        encoded.append(len(images))
        return captioner.model.encoder(images)

    monkeypatch.setattr(captioning.torch, "compile", lambda *_, **__: compiled)
    captioner = Captioner(Bundle(tiny_model(), vocabulary, {}, (3, 3)), device="cpu", compiled=True)
    for count in (8, 7, 4, 16, 9, 8, 5, 4):
        assert len(captioner(_images(count))) == count
    # 8 and 16 are encoded once more when they are compiled; 4 goes through the plain encoder.
    assert encoded == [8, 8, 8, 16, 16, 16, 8, 8]


def test_an_encoder_that_cannot_be_compiled_is_used_as_it_is(vocabulary, monkeypatch, caplog):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(captioning.torch, "compile", fail)
    captioner = Captioner(Bundle(tiny_model(), vocabulary, {}, (3, 3)), device="cpu", compiled=True)
    assert len(captioner(_images(3))) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "cannot compile the encoder, which runs uncompiled: no C++ compiler"
    ]
