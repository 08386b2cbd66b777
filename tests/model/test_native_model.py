"""A model of ours that is found on one machine and loaded on another."""

import pickle
import shutil
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from captioner import storage
from captioner.config import DecodeConfig
from captioner.errors import BundleError
from captioner.model import bundle
from captioner.model.base import Caption, Model
from captioner.model.loading import load_model
from captioner.model.native import Blur
from captioner.model.vocabulary import Vocabulary
from conftest import tiny_model


def _caption(model: Model) -> list[Caption]:
    size = model.preparation.most_bytes
    side = int((size // 3) ** 0.5)
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    loaded = model.load(model.resolve(DecodeConfig()), device="cpu", precision="fp32")
    return loaded.caption([image])


def _texts(model: Model) -> list[tuple[str, float]]:
    return [(caption.text, caption.score) for caption in _caption(model)]


def test_a_pickled_model_is_small_and_captions_alike(model_directory: Path) -> None:
    found = load_model(str(model_directory))
    data = pickle.dumps(found)
    assert len(data) < 10_000
    other = pickle.loads(data)
    assert other.identity == found.identity
    assert other.preparation == found.preparation
    assert _texts(other) == _texts(found)
    assert _texts(found) == _texts(other), "a model can be loaded twice"


def test_the_bundled_model_is_found_wherever_captioner_is_installed(
    monkeypatch: pytest.MonkeyPatch, model_directory: Path
) -> None:
    data = pickle.dumps(load_model(bundle.DEFAULT))
    monkeypatch.setattr(bundle, "DEFAULT", str(model_directory))
    assert pickle.loads(data).uri == str(model_directory)


def test_a_model_that_is_not_on_the_machine_is_refused(
    model_directory: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_directory, tmp_path / "model")
    data = pickle.dumps(load_model(str(tmp_path / "model")))
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(BundleError, match="is not on this machine; put it in a bucket"):
        _caption(pickle.loads(data))


def test_a_model_that_changes_during_the_job_is_refused(
    model_directory: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_directory, tmp_path / "model")
    data = pickle.dumps(load_model(str(tmp_path / "model")))
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="has changed since the job began"):
        _caption(pickle.loads(data))


def test_a_model_of_a_bucket_is_fetched_once_to_a_machine(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = fsspec.filesystem("memory")
    for name in bundle.FILES:
        bucket.pipe(f"/once/{name}", (model_directory / name).read_bytes())
    data = pickle.dumps(load_model("memory://once"))
    expected = _texts(load_model(str(model_directory)))
    assert _texts(pickle.loads(data)) == expected
    bucket.rm("/once", recursive=True)
    assert _texts(pickle.loads(data)) == expected


def test_a_second_process_waits_while_a_model_is_fetched(tmp_path: Path) -> None:
    place, held = str(tmp_path / "model.lock"), threading.Event()

    def fetch() -> None:
        with storage.locked(place):
            held.set()
            time.sleep(0.3)
            (tmp_path / "model").touch()

    thread = threading.Thread(target=fetch)
    thread.start()
    held.wait(10)
    with storage.locked(place, wait=True):
        assert (tmp_path / "model").exists()
    thread.join()


def test_maps_are_smoothed_as_the_models_settings_say(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    for name, deviation in (("plain", 0.0), ("blurred", 0.8)):
        bundle.save(str(tmp_path / name), tiny_model(attention_blur=deviation), vocabulary)
    [plain] = _caption(load_model(str(tmp_path / "plain")))
    [blurred] = _caption(load_model(str(tmp_path / "blurred")))
    assert (blurred.tokens, blurred.score) == (plain.tokens, plain.score)
    assert plain.attention_THW is not None
    assert blurred.attention_THW is not None
    expected = np.zeros_like(plain.attention_THW)
    for row, column, i, j in np.ndindex(3, 3, 3, 3):
        weight = np.exp(-((row - i) ** 2 + (column - j) ** 2) / (2 * 0.8**2))
        expected[:, row, column] += weight * plain.attention_THW[:, i, j]
    expected /= expected.sum((1, 2), keepdims=True)
    np.testing.assert_allclose(blurred.attention_THW, expected, rtol=1e-4)
    np.testing.assert_allclose(plain.attention_THW.sum((1, 2)), 1, rtol=1e-4)


def test_a_peak_at_the_edge_counts_less_than_one_inside() -> None:
    maps_THW = np.zeros((1, 5, 7), np.float32)
    maps_THW[0, 0, 0], maps_THW[0, 2, 4], maps_THW[0, 2, 3] = 0.4, 0.3, 0.3
    blurred = Blur(1.0, (5, 7))(maps_THW)
    assert blurred[0, 2, 3] == pytest.approx(blurred[0, 2, 4], rel=1e-2)
    assert blurred[0, 0, 0] < 0.9 * blurred[0, 2, 4]
    assert blurred.sum() == pytest.approx(1)
