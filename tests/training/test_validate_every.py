import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from captioner.data.mixing import mix
from captioner.errors import OutputError, StoppedError
from captioner.model import bundle
from captioner.training.validation import Validation
from tiny_run import TinyRun, write_split


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _without_times(value: dict[str, object]) -> dict[str, object]:
    return {k: v for k, v in value.items() if k not in ("seconds", "images_per_second")}


def _scalars(output: Path, name: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(output / "tensorboard"))
    reader.Reload()
    return [(each.step, each.value) for each in reader.Scalars(name)]


def _fake_ciders(monkeypatch: pytest.MonkeyPatch, ciders: list[float]) -> list[dict[str, object]]:
    """Makes the validations have these CIDEr figures; the weights that each has seen."""
    left, seen, real = iter(ciders), [], Validation.figures

    def figures(self: Validation, *given: object) -> object:
        model = self._trainer.result
        seen.append({name: each.clone() for name, each in model.state_dict().items()})
        return dataclasses.replace(real(self, *given), cider=next(left))

    monkeypatch.setattr(Validation, "figures", figures)
    return seen


def test_validations_within_epochs_are_recorded_and_change_nothing_of_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    one = write_split(tmp_path / "one")
    other = write_split(tmp_path / "other", "all of it is {} .")
    mixed = mix([one, other], ["one", "other"], [1, 1])
    run = TinyRun(tmp_path, mixed)
    settings = {"batch_size": 4, "epochs": 1, "scst_epochs": 1}
    plain = run.train("plain", **settings)
    shown = capsys.readouterr().out
    epochs = run.train("often", validate_every=3, **settings)
    lines = _lines(tmp_path / "often")
    assert [each["step"] for each in lines] == [3, 4, 6, 8]
    assert [each.get("epoch") for each in lines] == [None, 1, None, 2]
    for line in lines:
        for name in ("loss", "cider"):
            both = [line[f"validation_{name}/{data}"] for data in ("one", "other")]
            assert line[f"validation_{name}"] == pytest.approx(sum(both) / 2)
    assert lines[0]["validation_loss"] != lines[1]["validation_loss"]
    assert [_without_times(line) for line in lines if "epoch" in line] == [
        _without_times(line) for line in _lines(tmp_path / "plain")
    ]
    assert [dataclasses.replace(e, validations=[]).figures().keys() for e in epochs] == [
        each.figures().keys() for each in plain
    ]
    often = capsys.readouterr().out
    assert "epoch 1/2, step 3: validation loss" in often
    assert len(often.splitlines()) == len(shown.splitlines()) + 2
    for name in ("validation_cider", "validation_loss/other"):
        expected = [(each["step"], pytest.approx(each[name])) for each in lines]
        assert _scalars(tmp_path / "often", f"step/{name}") == expected
    by_epoch = [value for _, value in _scalars(tmp_path / "often", "validation_cider")]
    assert by_epoch == pytest.approx([each.validation_cider for each in epochs])


def test_the_best_model_may_come_from_within_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    ciders = [10.0, 20.0, 50.0, 40.0, 49.0, 3.0, 1.0, 2.0]  # of steps 2, 4 and so on
    seen = _fake_ciders(monkeypatch, ciders)
    run = TinyRun(tmp_path)
    caplog.set_level("INFO")
    epochs = run.train(epochs=6, validate_every=2, early_stopping=2, average=0.9)
    assert [each.best.validation_cider for each in epochs] == [20, 50, 49, 2]
    assert "stopped early after epoch 4 of 6; the best epoch is 2" in caplog.text
    assert epochs[1].best.step == 6
    for place, expected in (("", seen[2]), ("last", seen[7])):
        model = bundle.load(str(tmp_path / "model" / place)).model
        torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)


def test_a_run_killed_within_an_epoch_leaves_the_same_books(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The best validation is in the epoch that is trained twice."""
    ciders = [10.0, 20.0, 60.0, 30.0]
    run = TinyRun(tmp_path)
    with monkeypatch.context() as patch:
        _fake_ciders(patch, ciders)
        whole = run.train("whole", validate_every=3)
    real = Validation.run
    with monkeypatch.context() as patch:
        _fake_ciders(patch, ciders)
        calls = iter([real, real, real, _interrupt])
        patch.setattr(Validation, "run", lambda *arguments: next(calls)(*arguments))
        with pytest.raises(StoppedError, match="1 of 2 epochs done"):
            run.train("killed", validate_every=3)
    killed = tmp_path / "killed"
    assert [line["step"] for line in _lines(killed)] == [3, 4, 6]
    before = (killed / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        _fake_ciders(patch, ciders[2:])
        resumed = run.train("killed", validate_every=3)
    assert [each.best.step for each in resumed] == [4, 6]
    assert (killed / "model.safetensors").read_bytes() != before
    for name in ("model.safetensors", "last/model.safetensors", "samples.md"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [_without_times(vars(each)) for each in resumed] == [
        _without_times(vars(each)) for each in whole
    ]
    assert [*map(_without_times, _lines(killed))] == [
        *map(_without_times, _lines(tmp_path / "whole"))
    ]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_resumed_run_may_validate_at_other_steps(tmp_path: Path):
    run = TinyRun(tmp_path)
    run.train(epochs=0, scst_epochs=1, scst_samples=2)
    run.train(epochs=0, scst_epochs=2, scst_samples=2, validate_every=2)
    output = tmp_path / "model"
    assert [each["step"] for each in _lines(output)] == [4, 6, 8]
    changes = json.loads((output / "training.json").read_text())["changes"]
    change = {"after_epoch": 1, "setting": "validate_every", "from": None, "to": 2}
    assert change in changes
    with pytest.raises(OutputError, match=r"other settings \(--batch-size\)"):
        run.train(epochs=0, scst_epochs=2, scst_samples=2, validate_every=2, batch_size=4)
