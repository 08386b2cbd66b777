import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from captioner import bundle
from captioner.errors import BundleError
from conftest import tiny_model


@pytest.mark.parametrize("tied", [False, True])
def test_a_bundle_comes_back_as_it_was(tied, tmp_path: Path, vocabulary):
    model = tiny_model(tied_embeddings=tied)
    bundle.save(str(tmp_path), model, vocabulary)
    loaded = bundle.load(str(tmp_path))
    assert loaded.config == model.config
    assert loaded.grid == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert loaded.vocabulary.words(range(6)) == vocabulary.words(range(6))
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert ("decoder.head.weight" in stored) is not tied


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", lambda data: data[:-20], "config.json"),
        ("config.json", lambda data: data.replace(b'"heads"', b'"haeds"'), "haeds"),
        ("config.json", lambda data: data.replace(b'"width": 32', b'"width": 64'), "not sound"),
        ("config.json", lambda data: data.replace(b'"layers": 2', b'"layers": true'), "layers"),
        ("config.json", lambda data: b"[" * 100_000, "config.json"),
        ("tokenizer.json", lambda data: b"{}", "tokenizer.json"),
        ("model.safetensors", lambda data: data[:1000], "not sound"),
        ("model.safetensors", lambda data: b"\xff" * 8 + data[8:], "not sound"),
    ],
)
def test_a_damaged_bundle_gets_one_line(name, damage, message, tmp_path, model_directory):
    for path in model_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(BundleError, match=message) as raised:
        bundle.load(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, vocabulary):
    model = tiny_model()
    with torch.no_grad():
        model.decoder.embedding.weight[0, 0] = float("nan")
    bundle.save(str(tmp_path), model, vocabulary)
    with pytest.raises(BundleError, match="not finite"):
        bundle.load(str(tmp_path))


def test_the_writers_version_is_no_part_of_the_fingerprint(tmp_path: Path, model_directory: Path):
    for path in model_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["captioner_version"] = "99"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert bundle.load(str(tmp_path)).digests == bundle.load(str(model_directory)).digests
