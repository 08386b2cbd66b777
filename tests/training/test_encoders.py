"""Every family of encoders: trained, fine-tuned, cached, bundled, captioning with maps."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner

import tiny_backbones  # noqa: F401  # known to timm from here on
from captioner import storage
from captioner.cli import main
from captioner.model import bundle
from captioner.output import attention
from conftest import tiny_model, write_photos

#: A family, its smallest backbone, an image size, the grid of its maps, the stage to tune from.
FAMILIES = [
    ("DINOv2", "tiny_dinov2", None, (4, 4), 3),
    ("SigLIP", "tiny_siglip", 48, (3, 3), 2),
    ("CLIP", "tiny_clip", 80, (5, 5), 2),
    ("ViT", "test_vit", 96, (6, 6), 6),
    ("ConvNeXt", "test_convnext", 64, (2, 2), 4),
    ("ResNet", "test_resnet", 64, (2, 2), 4),
    ("EfficientNet", "test_efficientnet", 96, (3, 3), 4),
]
TINY_DECODER = ["--width", "32", "--layers", "2", "--heads", "4", "--dropout", "0.1"]
TRAINING = ["--epochs", "1", "--batch-size", "6", "--minimum-count", "1", "--warmup-steps", "1"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fourteen photos, of which two are for validation."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "data"
    names = [path.name for path in write_photos(directory / "Images", 14)]
    lines = [
        f"{name},a photo of {'dogs' if i % 2 else 'two cats'} ." for i, name in enumerate(names)
    ]
    (directory / "captions.txt").write_text("\n".join(["image,caption", *lines]) + "\n")
    (directory / "train.txt").write_text("\n".join(names[:12]))
    (directory / "val.txt").write_text("\n".join(names[12:]))
    return directory


def _train(data: Path, output: Path, *options: str) -> str:
    lists = ["--train-list", str(data / "train.txt"), "--val-list", str(data / "val.txt")]
    arguments = ["train", str(data), str(output), *lists, *TRAINING, "--device", "cpu", *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def _weights(backbone: str, path: Path, **keywords: object) -> str:
    """A file of random weights, as timm publishes them."""
    torch.manual_seed(1)
    whole = timm.create_model(backbone, pretrained=False, **keywords)
    safetensors.torch.save_file(whole.state_dict(), path)
    return str(path)


def _caption(data: Path, model: Path, output: Path, engine: str = "local") -> list[dict]:
    arguments = ["caption", str(data / "Images"), str(output), "--model", str(model)]
    arguments += ["--engine", engine, "--device", "cpu"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return [r for part in sorted(output.glob("part-*")) for r in pq.read_table(part).to_pylist()]


def _features() -> list[Path]:
    return sorted(storage.cache_directory("features").iterdir())


@pytest.mark.parametrize(
    ("backbone", "size", "grid", "stage"),
    [family[1:] for family in FAMILIES],
    ids=[family[0] for family in FAMILIES],
)
def test_a_family_of_encoders_trains_tunes_and_captions(
    backbone: str, size: int | None, grid: tuple[int, int], stage: int, data: Path, tmp_path: Path
):
    weights = _weights(backbone, tmp_path / "encoder.safetensors")
    options = ["--encoder", backbone, "--encoder-weights", weights, *TINY_DECODER]
    options += ["--image-size", str(size)] if size else []
    frozen = tmp_path / "frozen"
    _train(data, frozen, *options, "--views", "1")

    published = safetensors.torch.load_file(weights)
    loaded = bundle.load(str(frozen))
    kept = loaded.model.encoder.backbone.state_dict()
    same = [name for name, value in kept.items() if name in published and "pos_embed" not in name]
    assert len(same) > 0.9 * len(kept)
    assert all(torch.equal(kept[name], published[name]) for name in same)
    cfg = timm.get_pretrained_cfg(backbone)
    assert loaded.config.image_size == (size or cfg.input_size[1])
    assert (loaded.config.mean, loaded.config.std) == (cfg.mean, cfg.std)
    assert loaded.config.interpolation == cfg.interpolation
    assert (loaded.config.width, loaded.config.layers, loaded.config.heads) == (32, 2, 4)
    assert loaded.config.head_dropout == loaded.config.embedding_dropout == 0.1
    assert loaded.grid == grid
    cached = _features()
    assert len(cached) == 2  # of the training and of the validation images
    features = safetensors.torch.load_file(cached[0])["features"]
    assert tuple(features.shape[1:3]) == grid
    assert features.isfinite().all()

    _train(data, tmp_path / "again", *options, "--views", "1", "--seed", "1")
    assert _features() == cached, "a frozen encoder computes the features of an image once"

    tuned = tmp_path / "tuned"
    _train(data, tuned, "--model", str(frozen), "--fine-tune-from", str(stage), "--views", "1")
    before = loaded.model.encoder.state_dict()
    after = bundle.load(str(tuned / "last")).model.encoder.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed, "the last stages are trained"
    assert len(changed) < 0.7 * len(before), "the first stages are frozen"

    rows = _caption(data, tuned, tmp_path / "captions")
    assert len(rows) == 14
    for row in rows:
        assert row["status"] == "ok"
        assert (row["attention_height"], row["attention_width"]) == grid
        maps = attention.decode(row["attention"], row["attention_peak"], grid=grid)
        assert maps.shape == (len(row["tokens"]), *grid)
        np.testing.assert_allclose(maps.sum((1, 2)), 1, atol=0.05)


@pytest.mark.thorough
def test_a_vision_transformer_captions_alike_with_both_engines(
    data: Path, tmp_path: Path, vocabulary, local_ray
):
    model = tiny_model(backbone="test_vit", image_size=96, grid=None, interpolation="bicubic")
    bundle.save(str(tmp_path / "model"), model, vocabulary)
    local = _caption(data, tmp_path / "model", tmp_path / "local")
    on_ray = _caption(data, tmp_path / "model", tmp_path / "ray", engine="ray")
    assert len(local) == len(on_ray) == 14
    assert len({row["caption"] for row in local}) > 1
    for one, other in zip(local, on_ray, strict=True):
        for name in ("uri", "caption", "attention", "attention_height", "attention_width"):
            assert one[name] == other[name]
        assert (one["attention_height"], one["attention_width"]) == (6, 6)


def test_architecture_belongs_to_a_new_model(data: Path, tmp_path: Path):
    for option, value in [("--encoder", "resnet18"), ("--image-size", "64"), ("--dropout", "0")]:
        arguments = ["train", str(data), str(tmp_path / "out"), "--model", "m", option, value]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert f"give --model or {option}, not both: a model keeps its" in result.output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--image-size", "96"], {"--image-size"}),
        (["--width", "16", "--dropout", "0.5"], {"--dropout", "--width"}),
        (["--encoder", "tiny_siglip"], {"--encoder"}),
        (["--preset", "notebook"], {"--preset"}),
    ],
)
def test_another_architecture_in_the_same_place_is_named(
    options: list[str], named: set[str], data: Path, tmp_path: Path
):
    weights = _weights("tiny_clip", tmp_path / "encoder.safetensors")
    lists = ["--train-list", str(data / "train.txt"), "--val-list", str(data / "val.txt")]
    own = ["--encoder", "tiny_clip", "--encoder-weights", weights, *TINY_DECODER, *TRAINING]
    _train(data, tmp_path / "out", *own)
    again = CliRunner().invoke(
        main, ["train", str(data), str(tmp_path / "out"), *lists, *own, *options]
    )
    found = re.search(r"holds a run with other settings \((.*?)\)", again.output)
    assert found is not None, again.output
    architecture = {"--preset", "--encoder", "--image-size", "--width", "--layers", "--dropout"}
    assert set(found[1].split(", ")) & architecture == named
