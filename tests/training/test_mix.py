import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from captioner.config import TrainConfig
from captioner.data.mixing import mix
from captioner.data.splits import Portion
from captioner.errors import InputError, OutputError
from captioner.training import run as training
from captioner.training.batches import plan_batches
from conftest import TINY, tiny_model
from tiny_run import write_split


def _config(**changes: object) -> TrainConfig:
    settings = {"batch_size": 4, "minimum_count": 1, "learning_rate": 2e-3, "precision": "fp32"}
    return TrainConfig(**{**settings, "epochs": 2, "fine_tune_from": None, **changes})


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "encoder.pth"
    torch.save(tiny_model().encoder.backbone.state_dict(), path)
    return str(path)


def test_an_epoch_has_each_image_as_often_as_its_weight_says():
    portions = [Portion("a", 1, 10, 0), Portion("b", 2.5, 4, 0), Portion("c", 0.5, 6, 0)]
    plans = [plan_batches([3] * 20, _config(), epoch, portions) for epoch in (1, 2)]
    for plan in plans:
        counts = Counter(image for batch in plan for image in batch)
        assert [counts[i] for i in range(10)] == [1] * 10
        assert sorted(counts[i] for i in range(10, 14)) == [2, 2, 3, 3]
        assert sorted(counts[i] for i in range(14, 20)) == [0, 0, 0, 1, 1, 1]
    assert plans[0] != plans[1]
    assert plans[0] == plan_batches([3] * 20, _config(), 1, portions)


def test_a_dataset_of_weight_one_is_planned_as_without_weights():
    portion = Portion("", 1, 30, 0)
    assert plan_batches([3] * 30, _config(), 2, [portion]) == plan_batches([3] * 30, _config(), 2)


def test_each_dataset_has_its_own_validation_figures(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    one = write_split(tmp_path / "one", caption="a {} square .")
    other = write_split(tmp_path / "other", caption="all of it is {} .")
    run = {"model_config": TINY, "config": _config(), "encoder_weights": weights}
    output = tmp_path / "model"
    mixed = mix([one, other], ["one", "other"], [1, 3])
    epochs = training.train(mixed, str(output), **run)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    shown = capsys.readouterr().out
    for epoch, line in zip(epochs, lines, strict=True):
        figures = epoch.validation_by_data
        for name in ("loss", "cider"):
            first, second = figures["one"][name], figures["other"][name]
            assert line[f"validation_{name}/one"] == first
            assert line[f"validation_{name}/other"] == second
            assert line[f"validation_{name}"] == pytest.approx((first + 3 * second) / 4)
        assert figures["one"]["loss"] != figures["other"]["loss"]
        ciders = [f"{name} {figures[name]['cider']:.1f}" for name in ("one", "other")]
        assert f"CIDEr {epoch.validation_cider:.1f} ({', '.join(ciders)})" in shown
    samples = (output / "samples.md").read_text()
    assert samples.count("all of it is") >= 4
    assert json.loads((output / "training.json").read_text())["data"] == {"one": 1, "other": 3}
    assert training.train(mixed, str(output), **run) == epochs
    with pytest.raises(OutputError, match=r"holds a run with other settings \(--data\)"):
        training.train(mix([one, other], ["one", "other"], [1, 2]), str(output), **run)
    with pytest.raises(OutputError, match=r"DATA"):
        training.train(one, str(output), **run)


def test_a_dataset_without_a_readable_validation_image_is_named(weights: str, tmp_path: Path):
    one = write_split(tmp_path / "one", caption="a {} square .")
    other = write_split(tmp_path / "other", caption="all of it is {} .")
    for image in other.validation:
        Path(image.uri).write_bytes(b"no image")
    mixed = mix([one, other], ["one", "other"], [1, 1])
    with pytest.raises(InputError, match="none of the images of other to validate on"):
        training.train(
            mixed,
            str(tmp_path / "model"),
            model_config=TINY,
            config=_config(),
            encoder_weights=weights,
        )
