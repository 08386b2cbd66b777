import itertools

import numpy as np
import pytest
import torch

from captioner.config import DecodeConfig
from captioner.model.generate import _draw, generate, sample
from captioner.model.layers import SelfAttentionCache
from captioner.model.vocabulary import EOS, PAD, START, UNKNOWN
from conftest import tiny_model
from oracle import greedy, oracle_of

IMAGES = 7


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3)


@pytest.fixture(scope="module")
def features(model):
    torch.manual_seed(7)
    return torch.rand(IMAGES, 2, 2, model.encoder.channels) * 4


def _pooled(features, grid):
    pooled = torch.nn.functional.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), grid)
    return pooled.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("allow_unknown", "forbidden"), [(True, []), (False, [0, 1, 3])])
def test_greedy_equals_the_uncached_loop(model, features, allow_unknown, forbidden):
    _, decoder = oracle_of(model)
    memory = _pooled(features, 3)
    hypotheses = generate(model.decoder, features, DecodeConfig(allow_unknown=allow_unknown))
    lengths = set()
    for row, hypothesis in enumerate(hypotheses):
        ids, logprobs, attention = greedy(decoder, memory[row : row + 1], forbidden)
        assert hypothesis.ids + [2] * hypothesis.ended == ids
        assert hypothesis.ended == (ids[-1] == 2)
        np.testing.assert_allclose(hypothesis.logprobs, logprobs, atol=1e-5)
        np.testing.assert_allclose(hypothesis.attention_SP, attention.numpy(), atol=1e-5)
        lengths.add(len(ids))
    assert len(lengths) > 1, "captions of one length do not show that done rows leave"


@pytest.mark.parametrize("beam", [1, 3])
def test_a_caption_does_not_depend_on_its_neighbours(model, features, beam):
    config = DecodeConfig(beam=beam)
    together = generate(model.decoder, features, config)
    order = [4, 2, 6, 0, 1, 5, 3]
    shuffled = generate(model.decoder, features[order], config)
    for row, image in enumerate(order):
        assert shuffled[row].ids == together[image].ids
    for size in (1, 2, 3):
        for begin in range(0, IMAGES, size):
            for offset, alone in enumerate(
                generate(model.decoder, features[begin : begin + size], config)
            ):
                assert alone.ids == together[begin + offset].ids
                np.testing.assert_allclose(
                    alone.attention_SP, together[begin + offset].attention_SP, atol=1e-5
                )


def _logprobs(model, features, prefix):
    """Log-probabilities of the word after a prefix, computed from scratch."""
    logits, attention = model.decoder(torch.tensor([[1, *prefix]]), features)
    last = logits[-1].clone()
    last[[0, 1, 3]] = -torch.inf
    return last.log_softmax(-1), attention[-1]


@torch.no_grad()
def _brute_force(model, features, max_words, length_penalty):
    """The best of all captions of at most ``max_words`` words, including the end."""
    words = range(4, model.config.vocabulary_size)
    best = (-np.inf, None)
    for length in range(1, max_words + 1):
        for body in itertools.product(words, repeat=length - 1):
            endings = [2] if length < max_words else [2, *words]
            total, prefix = 0.0, []
            for word in body:
                total += _logprobs(model, features, prefix)[0][word].item()
                prefix.append(word)
            final, _ = _logprobs(model, features, prefix)
            for ending in endings:
                score = (total + final[ending].item()) / length**length_penalty
                best = max(best, (score, (*body, ending)))
    return best


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 2.0])
def test_a_wide_beam_finds_what_brute_force_finds(length_penalty):
    model = tiny_model(seed=11, vocabulary_size=8, max_length=4, pre_norm=True)
    features = torch.rand(3, 2, 2, model.encoder.channels) * 3
    config = DecodeConfig(beam=100, length_penalty=length_penalty)  # holds all 85 prefixes
    for row, hypothesis in enumerate(generate(model.decoder, features, config)):
        score, ids = _brute_force(model, features[row : row + 1], 4, length_penalty)
        found = tuple(hypothesis.ids + [2] * hypothesis.ended)
        assert found == ids
        total = sum(hypothesis.logprobs) / len(hypothesis.logprobs) ** length_penalty
        assert total == pytest.approx(score, abs=1e-5)


@torch.no_grad()
def _reference_beam(model, features, K, length_penalty, max_words):
    """Beam search for one image in plain lists, without caches."""
    live, done = [(0.0, ())], []
    for step in range(max_words):
        candidates = []
        for total, prefix in live:
            logprobs, _ = _logprobs(model, features, list(prefix))
            candidates += [(total + p, (*prefix, w)) for w, p in enumerate(logprobs.tolist())]
        best = sorted(candidates, reverse=True)[: K - len(done)]
        for total, prefix in best:
            if prefix[-1] == 2 or step == max_words - 1:
                done.append((total / len(prefix) ** length_penalty, prefix))
        live = [each for each in best if each[1][-1] != 2]
        if not live:
            break
    return max(done)[1]


@pytest.mark.parametrize("beam", [2, 3, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_batched_beam_search_equals_one_in_plain_lists(model, features, beam, length_penalty):
    config = DecodeConfig(beam=beam, length_penalty=length_penalty, max_words=8)
    for row, hypothesis in enumerate(generate(model.decoder, features, config)):
        expected = _reference_beam(model, features[row : row + 1], beam, length_penalty, 8)
        assert tuple(hypothesis.ids + [2] * hypothesis.ended) == expected


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("norms", [False, True])
@torch.no_grad()
def test_what_is_carried_along_belongs_to_the_words(features, beam, norms):
    model = tiny_model(seed=3, attention_norms=norms)
    for row, hypothesis in enumerate(generate(model.decoder, features, DecodeConfig(beam=beam))):
        prefix = []
        chosen = hypothesis.ids + [2] * hypothesis.ended
        assert len(chosen) == len(hypothesis.logprobs) == len(hypothesis.attention_SP)
        for word, logprob, attention in zip(
            chosen, hypothesis.logprobs, hypothesis.attention_SP, strict=True
        ):
            expected, expected_attention = _logprobs(model, features[row : row + 1], prefix)
            assert logprob == pytest.approx(expected[word].item(), abs=1e-5)
            np.testing.assert_allclose(attention, expected_attention.numpy(), atol=1e-5)
            prefix.append(word)


def test_unknown_words_are_chosen_only_when_allowed(model, features):
    biased = tiny_model(seed=3, pre_norm=True)
    with torch.no_grad():
        biased.decoder.final_norm.bias.copy_(biased.decoder.head.weight[3] * 5)
    [allowed] = generate(
        biased.decoder, features[:1], DecodeConfig(allow_unknown=True, max_words=3)
    )
    [suppressed] = generate(biased.decoder, features[:1], DecodeConfig(max_words=3))
    assert 3 in allowed.ids
    assert not {0, 1, 3} & set(suppressed.ids)


def test_the_length_limit_counts_the_end(model, features):
    for limit in (1, 3):
        for hypothesis in generate(model.decoder, features, DecodeConfig(max_words=limit, beam=2)):
            assert len(hypothesis.logprobs) <= limit
            assert len(hypothesis.ids) == len(hypothesis.logprobs) - hypothesis.ended


def test_a_caption_may_be_empty(features):
    model = tiny_model(seed=3, pre_norm=True)
    with torch.no_grad():
        model.decoder.final_norm.bias.copy_(model.decoder.head.weight[2] * 50)
    for hypothesis in generate(model.decoder, features, DecodeConfig()):
        assert hypothesis.ids == []
        assert hypothesis.ended
        assert hypothesis.attention_SP.shape == (1, 9)


def test_attention_is_not_kept_when_it_is_not_asked_for(model, features):
    for hypothesis in generate(model.decoder, features, DecodeConfig(attention="none")):
        assert hypothesis.attention_SP is None


def test_the_cache_selects_rows_in_any_order(model):
    like = torch.zeros(1)
    cache = SelfAttentionCache(model.config, 3, 4, like)
    cache.keys.copy_(torch.arange(3.0)[None, :, None, None, None].expand_as(cache.keys))
    cache.length = 2
    cache.select(torch.tensor([2, 2, 0]))
    assert cache.keys[0, :, 0, 0, 0].tolist() == [2.0, 2.0, 0.0]
    cache.select(torch.tensor([1]))
    assert cache.keys[:, :, :, :2].unique().tolist() == [2.0]


@torch.no_grad()
def test_samples_are_drawn_from_the_models_probabilities():
    model = tiny_model(seed=5, vocabulary_size=12)
    model.decoder.head.weight *= 8  # probabilities from near 0 to a half
    features = torch.rand(2, 2, 2, model.encoder.channels)
    count = 20_000
    torch.manual_seed(0)
    ids = sample(model.decoder, features, count, longest=3).view(2, count, 3)
    assert (ids[..., 0] == START).all()
    second = ids[ids[..., 1] == EOS][:, 2]
    assert (second == PAD).all()
    for image in range(2):
        expected = _logprobs(model, features[image : image + 1], [])[0].exp()
        drawn = torch.bincount(ids[image, :, 1], minlength=12) / count
        assert drawn[[PAD, START, UNKNOWN]].tolist() == [0, 0, 0]
        assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


@pytest.mark.parametrize(("number", "drawn"), [(0.0, [2, 1]), (1 - 2**-24, [0, 1])])
def test_the_least_and_largest_random_number_draw_what_can_be_drawn(number, drawn, monkeypatch):
    logits = torch.tensor([[0.0, 1.0, 2.0], [-torch.inf, 1.0, -torch.inf]])
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, number))
    assert _draw(logits).tolist() == drawn
