"""Training on several workers: but for dropout and samples the same steps, and no run lost."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from torch import distributed, multiprocessing

from captioner.cli import main
from captioner.config import LaunchConfig, TrainConfig
from captioner.data import dataset
from captioner.data.dataset import Split
from captioner.model import bundle
from captioner.model.network import CaptionModel
from captioner.model.vocabulary import EOS, PAD, START, Vocabulary
from captioner.training import run as training
from captioner.training import self_critical
from captioner.training.batches import TrainingImages
from captioner.training.trainer import Trainer
from captioner.training.validation import Validation
from conftest import TINY, tiny_model, write_photos

NO_DROPOUT = dataclasses.replace(
    TINY, embedding_dropout=0, attention_dropout=0, residual_dropout=0, head_dropout=0
)
CONFIG = TrainConfig(
    epochs=2,
    batch_size=31,  # an epoch is one step; it does not divide into two equal shares
    captions="all",
    views=2,
    sort_batches=2,
    minimum_count=1,
    learning_rate=1e-3,
    clip_norm=1.0,
    label_smoothing=0.1,
    average=0.9,
    fine_tune_from=3,
    precision="fp32",
)


def write_data(directory: Path, images: int) -> Path:
    """Photos whose captions differ in number and length."""
    paths = write_photos(directory / "Images", images)
    words = ["a", "red", "dog", "runs", "over", "the", "green", "grass", "with", "two", "men"]
    lines = ["image,caption"]
    for index, path in enumerate(paths):
        lengths = [2 + (index + n) % 9 for n in range(1 + index % 3)]
        lines += [f"{path.name},{' '.join(words[:length])}" for length in lengths]
    (directory / "captions.txt").write_text("\n".join(lines) + "\n")
    names = [path.name for path in paths]
    (directory / "train.txt").write_text("\n".join(names[: images * 3 // 4]))
    (directory / "val.txt").write_text("\n".join(names[images * 3 // 4 :]))
    return directory


def read_split(directory: Path) -> Split:
    lists = str(directory / "train.txt"), str(directory / "val.txt")
    return dataset.read_dataset(str(directory)).split(*lists)


def _samples(_: object, features_BhwC: torch.Tensor, samples: int, longest: int) -> torch.Tensor:
    """For each image the same: one word, two, …"""
    words = range(4, 4 + samples)
    rows = [[START, *words[: n + 1], EOS, *[PAD] * samples][: samples + 2] for n in range(samples)]
    return torch.tensor(rows * len(features_BhwC))


def _take_steps(rank: int, workers: int, port: int, data: Path, result: Path) -> None:
    """Three steps, one of them in parts, one self-critical; leaves what came of them."""
    torch.set_num_threads(1)
    if workers > 1:
        distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers
        )
    split = read_split(data)
    texts = [text for each in split.train for text in each.captions]
    vocabulary = Vocabulary.from_captions(texts, minimum_count=1)
    model_config = dataclasses.replace(NO_DROPOUT, vocabulary_size=len(vocabulary))
    model = tiny_model(**dataclasses.asdict(model_config))
    trainer = Trainer(model, vocabulary, CONFIG, device="cpu", rank=rank, workers=workers)
    training_source = TrainingImages(split.train, None, model_config, vocabulary)
    losses, gradients = [], []
    critical = self_critical.SelfCriticalTraining(trainer, split.train)
    for epoch, accumulate in ((1, 1), (2, 3), (3, 1)):
        trainer.config = dataclasses.replace(CONFIG, accumulate=accumulate)
        step = None
        if epoch == 3:
            critical.begin()
            step = critical.step
        with mock.patch.object(self_critical, "sample", _samples):  # each worker draws others
            losses.append(trainer.train_epoch(training_source, epoch, lambda *_: None, step=step))
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        gradients.append([p.grad.clone() for p in trained])
    validation = TrainingImages(split.validation, None, model_config, vocabulary)
    [loss], captions = Validation(trainer, validation).run(lambda _: None)
    torch.save(
        {
            "gradients": gradients,
            "kept": list(trainer.result.parameters()),
            "losses": [*losses, loss],
            "captions": captions,
        },
        result / f"{workers}-{rank}.pt",
    )
    if workers > 1:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_take_the_same_steps_as_one(tmp_path: Path):
    data = write_data(tmp_path / "data", 42)
    for index in (3, 35):  # one to train on, one to validate on
        (data / "Images" / f"photo-{index:04d}.jpg").write_bytes(b"no image")
    _take_steps(0, 1, 0, data, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_take_steps, (2, port, data, tmp_path), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for alone, together in zip(one["gradients"], first["gradients"], strict=True):
        assert sum(float(gradient.abs().sum()) for gradient in alone) > 0.1
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(first["kept"], second["kept"], rtol=0, atol=0)
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert {**first["captions"], **second["captions"]} == one["captions"]
    assert len(one["captions"]) == 10


def _save_model_without_dropout(data: Path, directory: Path) -> None:
    """A new model for these data, to go on with."""
    texts = [text for each in read_split(data).train for text in each.captions]
    vocabulary = Vocabulary.from_captions(texts, minimum_count=1)
    model = CaptionModel(dataclasses.replace(NO_DROPOUT, vocabulary_size=len(vocabulary)))
    bundle.save(str(directory), model, vocabulary)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Begun in this process and killed, ended by two workers, then made longer by two and none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write_data(tmp_path / "data", 30)
    _save_model_without_dropout(data, tmp_path / "model")

    steps = {"batch_size": 12, "validate_every": 3}  # an epoch is two steps

    def run(name: str, workers: int, scst_epochs: int = 0) -> list[dict[str, object]]:
        epochs = training.train(
            read_split(data),
            str(tmp_path / name),
            model_config=NO_DROPOUT,
            config=dataclasses.replace(CONFIG, **steps, epochs=3, scst_epochs=scst_epochs),
            launch=LaunchConfig(workers=workers, device="cpu"),
            initial_model=str(tmp_path / "model"),
        )
        return [dataclasses.asdict(each) for each in epochs]

    whole = run("whole", 0)
    real = Validation.run
    calls = iter([real])
    with monkeypatch.context() as patch:
        patch.setattr(Validation, "run", lambda *arguments: next(calls)(*arguments))
        with pytest.raises(StopIteration):
            run("killed", 0)
    begun = json.loads((tmp_path / "killed" / "epochs.json").read_text())
    ended = run("killed", 2)
    assert ended[:1] == begun  # its seconds, too: it was not computed again
    for figure in ("train_loss", "validation_loss", "validation_cider"):
        expected = [each[figure] for each in whole]
        assert [each[figure] for each in ended] == pytest.approx(expected, rel=1e-5)
    for one, other in zip(whole, ended, strict=True):
        assert len(one["validations"]) == (one["epoch"] == 2)
        for expected, validation in zip(one["validations"], other["validations"], strict=True):
            for figure in ("step", "validation_loss", "validation_cider"):
                assert validation[figure] == pytest.approx(expected[figure], rel=1e-5)
    private = tmp_path / "killed/_training"
    pointers = sorted((private / "ray/run").glob("epoch-*/checkpoint.json"))
    assert [path.parent.name for path in pointers] == ["epoch-0002", "epoch-0003"]
    assert json.loads(pointers[-1].read_text()) == {"uri": str(private / "checkpoint.pt")}
    longer = run("killed", 2, scst_epochs=1)
    assert longer[:3] == ended
    assert len(longer) == 4
    longest = run("killed", 0, scst_epochs=2)
    assert longest[:4] == longer
    assert len(longest) == 5


def _wait_until(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def _pids(command: str, below: str) -> list[int]:
    """Processes of that command, with that in their environment: only those that we started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            ours = below in (path / "environ").read_bytes().decode()
        except OSError:
            continue
        if line.startswith(command) and ours:
            found.append(int(path.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "number"),
    [
        (0, signal.SIGTERM),
        (0, signal.SIGINT),
        (2, signal.SIGTERM),
        pytest.param(2, signal.SIGINT, marks=pytest.mark.thorough),
    ],
)
def test_a_killed_worker_and_a_stopped_training_are_a_line_each(
    workers: int, number: signal.Signals, tmp_path: Path
):
    data = write_data(tmp_path / "data", 30)
    _save_model_without_dropout(data, tmp_path / "model")
    output, cache = tmp_path / "out", str(tmp_path / "cache")
    command = [sys.executable, "-m", "captioner.cli", "train", str(data), str(output)]
    command += ["--train-list", str(data / "train.txt"), "--val-list", str(data / "val.txt")]
    command += ["--model", str(tmp_path / "model"), "--warmup-steps", "2", "--epochs", "1000"]
    command += ["--views", "1", "--batch-size", "8", "--device", "cpu", "--workers", str(workers)]
    environment = {**os.environ, "XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    errors = tmp_path / "stderr"

    def done() -> int:
        path = output / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    with errors.open("w") as stderr:
        train = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            _wait_until(lambda: done() >= 1 or train.poll() is not None, seconds=200)
            if workers:
                os.kill(_pids("ray::RayTrainWorker", cache)[0], signal.SIGKILL)
                _wait_until(lambda: "failure 1 of at most 3" in errors.read_text(), seconds=100)
            train.send_signal(number)
            assert train.wait(timeout=25) == 128 + number, errors.read_text()
        finally:
            train.kill()
    printed = errors.read_text()
    stopped = f"captioner: stopped by {number.name}: "
    assert [line.startswith(stopped) for line in printed.splitlines()].count(True) == 1, printed
    # Ray's own processes may complain that the others are gone; ours do not.
    ours = [line for line in printed.splitlines() if "(PlacementGroupCleaner" not in line]
    assert not any("Traceback" in line for line in ours)
    assert printed.count("training resumes from the last epoch") == (1 if workers else 0)


@pytest.mark.slow
@pytest.mark.thorough
def test_submitted_jobs_outlive_a_node_and_a_driver(tmp_path: Path):
    """A raylet is killed in each job, and the driver of the training, which is submitted again.

    The training is compared with one in this process: without dropout, two workers take the same
    steps.
    """
    write_photos(tmp_path / "photos", 96)
    data = write_data(tmp_path / "data", 30)
    _save_model_without_dropout(data, tmp_path / "model")
    options = ["--train-list", str(data / "train.txt"), "--val-list", str(data / "val.txt")]
    options += ["--model", str(tmp_path / "model"), "--warmup-steps", "2", "--epochs", "10"]
    options += ["--views", "1", "--batch-size", "8", "--precision", "fp32"]
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "benchmarks" / "cluster_jobs.py")]
    command += [str(tmp_path / "photos"), str(data), "--", *options]
    soon = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}
    environment = {**os.environ, **soon, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=root, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    results = json.loads(ran.stdout.splitlines()[-1])
    caption, train = results["caption"], results["train"]
    assert (caption["status"], caption["exit_code"]) == ("SUCCEEDED", 0)
    assert (caption["images"], caption["rows"], caption["missing"]) == (96, {"ok": 96}, 0)
    assert 2 <= caption["parts_before_the_kill"] < 6
    assert train["status_of_the_killed"] == "FAILED"
    assert (train["status"], train["exit_code"]) == ("SUCCEEDED", 0)
    node, driver = train["epochs_before_the_kills"]
    assert 1 <= node < node + 2 <= driver < 10
    resumed = ran.stdout[ran.stdout.index("log of train-2:") :]
    assert "epoch 1/10" not in resumed
    assert "epoch 10/10" in resumed
    whole = tmp_path / "whole"
    alone = CliRunner().invoke(main, ["train", str(data), str(whole), "--device", "cpu", *options])
    assert alone.exit_code == 0, alone.output
    expected = json.loads((whole / "epochs.json").read_text())
    for figure in ("train_loss", "validation_loss", "validation_cider"):
        figures = [each[figure] for each in train["epochs"]]
        assert figures == pytest.approx([each[figure] for each in expected], rel=1e-5)
