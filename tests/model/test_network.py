import dataclasses

import pytest
import timm
import torch
from torch.nn import functional as F

from captioner.config import PRESETS, ModelConfig
from captioner.errors import InputError
from captioner.model import layers
from captioner.model.encoder import ImageEncoder
from captioner.model.layers import PackedWords, SelfAttentionCache, pooling_matrix
from captioner.model.network import CaptionModel
from conftest import TINY, tiny_model
from oracle import greedy, oracle_of


def _captions(rows: int, length: int, vocabulary_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with padding at the end of all rows but the first, and a mask of the words."""
    ids = torch.randint(4, vocabulary_size, (rows, length))
    ids[:, 0] = 1
    for row in range(1, rows):
        ids[row, length - row :] = 0
    return ids, ids != 0


@torch.no_grad()
def test_the_notebook_preset_equals_the_reference_structure():
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["notebook"].model, vocabulary_size=1118)
    model = CaptionModel(config).eval()
    encoder, decoder = oracle_of(model)
    images = torch.randn(3, 3, 256, 256)
    features = model.encoder.features(images)
    assert features.shape == (3, 8, 8, 2048)
    memory = encoder(images)
    assert memory.shape == (3, 196, 2048)
    ids, words = _captions(3, 12, 1118)
    logits, attention = model.decoder(ids, features, words)
    expected_logits, expected_attention = decoder(ids, memory, ~words)
    torch.testing.assert_close(logits, expected_logits[words], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(attention, expected_attention[words], atol=1e-4, rtol=1e-4)

    from captioner.config import DecodeConfig
    from captioner.model.generate import generate

    hypotheses = generate(model.decoder, features, DecodeConfig(allow_unknown=True, max_words=16))
    for row, hypothesis in enumerate(hypotheses):
        ids, _, weights = greedy(decoder, memory[row : row + 1], max_words=16)
        assert hypothesis.ids + [2] * hypothesis.ended == ids
        torch.testing.assert_close(
            torch.from_numpy(hypothesis.attention_SP), weights, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("grid", [3, 5, 2])
@torch.no_grad()
def test_projecting_before_pooling_equals_pooling_first(grid):
    model = tiny_model(grid=grid)
    features = torch.rand(2, 4, 4, model.encoder.channels)
    pooled = F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
    ids, words = _captions(2, 6, TINY.vocabulary_size)
    logits, attention = model.decoder(ids, features, words)
    expected_logits, expected_attention = model.decoder(ids, pooled, words)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention, expected_attention, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("height", "width", "grid"), [(8, 8, 14), (9, 7, 4), (3, 3, 3), (5, 5, 1)])
def test_the_pooling_matrix_is_adaptive_average_pooling(height, width, grid):
    matrix = pooling_matrix(height, width, grid, torch.device("cpu"), torch.float32)
    feature_map = torch.randn(1, 6, height, width)
    expected = F.adaptive_avg_pool2d(feature_map, grid).flatten(2)[0].T
    torch.testing.assert_close(matrix @ feature_map.flatten(2)[0].T, expected)
    torch.testing.assert_close(matrix.sum(1), torch.ones(grid * grid))


@pytest.mark.parametrize(
    "changes", [{}, {"pre_norm": True, "tied_embeddings": True, "attention_norms": True}]
)
@torch.no_grad()
def test_a_word_at_a_time_equals_all_words_at_once(changes):
    model = tiny_model(**changes)
    features = torch.rand(2, 2, 2, model.encoder.channels)
    ids, _ = _captions(2, 7, TINY.vocabulary_size)
    ids[ids == 0] = 5
    logits, attention = (each.unflatten(0, (2, 7)) for each in model.decoder(ids, features))
    image_cache = model.decoder.project_image(features)
    word_cache = SelfAttentionCache(model.config, 2, 7, image_cache.keys[0])
    for position in range(7):
        step_logits, step_attention = model.decoder.step(ids[:, position], image_cache, word_cache)
        torch.testing.assert_close(step_logits, logits[:, position], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(step_attention, attention[:, position], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_captions_of_an_image_share_its_keys_and_values():
    model = tiny_model()
    features = torch.rand(2, 2, 2, model.encoder.channels)
    ids, _ = _captions(6, 7, TINY.vocabulary_size)
    shared, shared_attention = model.decoder(ids, features)
    repeated, repeated_attention = model.decoder(ids, features.repeat_interleave(3, 0))
    torch.testing.assert_close(shared, repeated, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared_attention, repeated_attention, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"pre_norm": True, "attention_norms": True}, {"grid": 3}, {"layers": 1}]
)
def test_padding_is_not_computed_and_changes_nothing(changes):
    """Logits, attention and gradients equal those computed with padding."""
    torch.manual_seed(0)
    model = tiny_model(**changes)
    features = torch.rand(3, 2, 2, model.encoder.channels)
    ids, words = _captions(6, 8, TINY.vocabulary_size)
    words[4] = False  # an image has a caption less than the others
    parameters = list(model.decoder.parameters())
    results = []
    for counted in (words, None):
        logits, attention = model.decoder(ids, features, counted)
        if counted is None:
            logits, attention = logits[words.flatten()], attention[words.flatten()]
        assert len(logits) == words.sum() == len(attention)
        targets = torch.arange(len(logits)) % TINY.vocabulary_size
        loss = F.cross_entropy(logits, targets)
        results.append([logits, attention, *torch.autograd.grad(loss, parameters)])
    for alone, among_padding in zip(*results, strict=True):
        torch.testing.assert_close(alone, among_padding, atol=1e-5, rtol=1e-5)


def test_a_batch_of_nothing_but_padding_has_gradients_of_zero():
    model = tiny_model()
    features = torch.rand(1, 2, 2, model.encoder.channels)
    ids = torch.zeros(2, 3, dtype=torch.long)
    logits, _ = model.decoder(ids, features, ids != 0)
    assert logits.shape == (0, TINY.vocabulary_size)
    logits.sum().backward()
    assert all(not each.grad.any() for each in model.decoder.parameters())


@torch.no_grad()
def test_a_map_is_the_last_blocks_or_the_mean_over_all_blocks(monkeypatch):
    of_blocks: list[torch.Tensor] = []
    real = layers.CrossAttention.forward

    def recording(self, *arguments):
        output, weights = real(self, *arguments)
        of_blocks.append(weights.mean(1).flatten(0, 1))
        return output, weights

    monkeypatch.setattr(layers.CrossAttention, "forward", recording)
    features, ids = torch.rand(1, 2, 2, 512), torch.tensor([[1, 5, 6]])
    logits_last, last = tiny_model().decoder(ids, features)
    torch.testing.assert_close(last, of_blocks[1], atol=0, rtol=0)
    of_blocks.clear()
    logits_mean, mean = tiny_model(attention_map="mean").decoder(ids, features)
    torch.testing.assert_close(mean, (of_blocks[0] + of_blocks[1]) / 2)
    assert not torch.allclose(mean, last)
    torch.testing.assert_close(mean.sum(-1), torch.ones(3))
    torch.testing.assert_close(logits_mean, logits_last, atol=0, rtol=0)


@pytest.mark.parametrize("grid", [3, None])  # pooled values, and values as they are
@pytest.mark.parametrize("kind", ["last", "mean"])
@torch.no_grad()
def test_maps_are_weighted_by_the_norms_of_the_values(monkeypatch, kind, grid):
    of_blocks: list[torch.Tensor] = []
    real = layers.CrossAttention.forward

    def recording(self, *arguments):
        output, weights = real(self, *arguments)
        of_blocks.append(weights)
        return output, weights

    monkeypatch.setattr(layers.CrossAttention, "forward", recording)
    model = tiny_model(attention_map=kind, attention_norms=True, grid=grid)
    features, ids = torch.rand(2, 2, 2, 512), torch.tensor([[1, 5, 6], [1, 7, 8]])
    logits, maps = model.decoder(ids, features)
    cells = F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), grid or 2).flatten(2).mT
    width = TINY.width // TINY.heads
    expected = torch.zeros_like(maps).view(2, 3, -1)
    shown = list(zip(model.decoder.blocks, of_blocks, strict=True))
    for block, weights in shown if kind == "mean" else shown[-1:]:
        attention = block.cross_attention
        for head in range(TINY.heads):
            alone = torch.zeros(2, cells.size(1), TINY.width)
            part = slice(head * width, (head + 1) * width)
            alone[..., part] = attention.value(cells)[..., part]
            added = attention.output(alone) - attention.output.bias
            expected += weights[:, head] * added.norm(dim=-1)[:, None]
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(maps, expected.flatten(0, 1), atol=1e-6, rtol=1e-4)
    plain_logits, plain = tiny_model(attention_map=kind, grid=grid).decoder(ids, features)
    torch.testing.assert_close(logits, plain_logits, atol=0, rtol=0)
    assert (maps - plain).abs().max() > 1e-3


@torch.no_grad()
def test_values_of_zero_leave_the_attention_as_it_is():
    maps = []
    for norms in (False, True):
        model = tiny_model(attention_norms=norms)
        model.decoder.blocks[-1].cross_attention.value.weight.zero_()
        torch.manual_seed(0)
        maps.append(model.decoder(torch.tensor([[1, 5, 6]]), torch.rand(1, 2, 2, 512))[1])
    torch.testing.assert_close(maps[1], maps[0])


@pytest.mark.parametrize("norms", [False, True])
@torch.no_grad()
def test_attention_maps_sum_to_one_in_bfloat16_too(norms):
    model = tiny_model(attention_norms=norms).to(torch.bfloat16)
    features = torch.rand(2, 2, 2, model.encoder.channels, dtype=torch.bfloat16)
    _, attention = model.decoder(torch.tensor([[1, 5, 6]] * 2), features)
    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention.sum(-1), torch.ones(6))


@pytest.mark.parametrize("shared", [False, True])
def test_dropout_trains_with_and_without_a_shared_mask(shared):
    dropout = tiny_model(shared_dropout=shared, embedding_dropout=0.5).train().decoder
    counted = torch.rand(40, 9) < 0.7
    for places in (None, counted.flatten().nonzero()[:, 0]):
        words = PackedWords(40, 9, places)
        x = torch.ones(360 if places is None else len(places), 32)
        dropped = dropout.embedding_dropout(x, words)
        zero = dropped == 0
        assert 0.3 < zero.float().mean() < 0.7
        assert set(dropped.unique().tolist()) == {0.0, 2.0}
        rows = torch.arange(40).repeat_interleave(9)[slice(None) if places is None else places]
        same = [(zero[rows == row] == zero[rows == row][:1]).all() for row in range(40)]
        assert all(same) == shared


def test_uint8_images_are_normalised():
    encoder = ImageEncoder(TINY).eval()
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    mean, std = torch.tensor(TINY.mean), torch.tensor(TINY.std)
    normalised = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), encoder.features(normalised))


@pytest.mark.parametrize(
    ("backbone", "size", "shape"),
    [
        ("resnet10t", 64, (2, 2, 512)),
        ("tf_efficientnet_lite0", 64, (2, 2, 1280)),
        ("test_vit", 160, (10, 10, 64)),
        ("swin_tiny_patch4_window7_224", 64, (2, 2, 768)),
    ],
)
@torch.no_grad()
def test_every_kind_of_timm_backbone_gives_a_feature_map(backbone, size, shape):
    encoder = ImageEncoder(ModelConfig(backbone=backbone, image_size=size)).eval()
    features = encoder(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    assert features.shape == (1, *shape)
    assert encoder.channels == shape[-1]


def test_an_unknown_backbone_is_an_input_error():
    with pytest.raises(InputError, match="no_such_net"):
        ImageEncoder(ModelConfig(backbone="no_such_net"))


def test_fine_tuning_from_a_stage_is_the_notebooks():
    encoder = ImageEncoder(ModelConfig())
    assert encoder.frozen
    encoder.fine_tune(2)
    trained = {
        name.split(".")[0] for name, p in encoder.backbone.named_parameters() if p.requires_grad
    }
    assert trained == {"layer2", "layer3", "layer4"}
    encoder.fine_tune(None)
    assert encoder.frozen
    with pytest.raises(InputError, match=r"last stage of resnet50\.tv_in1k is 4"):
        encoder.fine_tune(5)


def test_batch_norm_keeps_its_statistics_in_training():
    encoder = ImageEncoder(TINY)
    encoder.fine_tune(2)
    encoder.train()
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    encoder(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))
    for name, buffer in encoder.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("renamed", [False, True])
def test_published_weights_load_by_name_or_by_order(renamed):
    torch.manual_seed(1)
    published = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    if renamed:
        published = {f"_other.{i}": tensor for i, tensor in enumerate(published.values())}
    encoder = ImageEncoder(ModelConfig(backbone="tf_efficientnet_lite0"))
    encoder.load_published_weights(published)
    loaded = list(encoder.backbone.state_dict().values())
    for tensor, expected in zip(loaded, published.values(), strict=False):
        assert torch.equal(tensor, expected)


def test_weights_of_another_network_are_refused():
    other = timm.create_model("resnet10t", pretrained=False).state_dict()
    encoder = ImageEncoder(ModelConfig(backbone="tf_efficientnet_lite0"))
    with pytest.raises(InputError, match="not those of tf_efficientnet_lite0"):
        encoder.load_published_weights(other)
