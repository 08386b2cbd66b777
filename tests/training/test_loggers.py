import json
import logging
import os
import socket
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from captioner.config.training import LogKind
from captioner.errors import InputError, StoppedError
from captioner.training.directory import TrainingDirectory
from captioner.training.loggers import base
from captioner.training.loggers.base import Loggers, check_packages
from captioner.training.validation import Validation
from tiny_run import TinyRun

SECRETS = {"WANDB_API_KEY": "0123456789" * 4, "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-store"}


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets are there; what the clients keep for a user is elsewhere."""
    for name in (*os.environ,):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What every client that looks for a network would connect to."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        uri = f"http://127.0.0.1:{listening.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, uri)
        yield listening


def _assert_unused(proxy: socket.socket) -> None:
    with pytest.raises(BlockingIOError):
        proxy.accept()


def _interrupted(run: TinyRun, monkeypatch: pytest.MonkeyPatch, kind: LogKind) -> None:
    """Trains the first of two epochs, and a step of the second."""
    calls = iter([Validation.run, Validation.run])
    with monkeypatch.context() as patch:
        patch.setattr(Validation, "run", lambda *arguments: _next(calls)(*arguments))
        with pytest.raises(StoppedError, match="1 of 2 epochs done"):
            run.train(log=(kind,), validate_every=3)


def _next(calls: Iterator[object]) -> object:
    try:
        return next(calls)
    except StopIteration:
        raise KeyboardInterrupt from None


def _files(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


def test_wandb_has_a_run_with_all_figures_that_resumes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: socket.socket
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = TinyRun(tmp_path)
    _interrupted(run, monkeypatch, "wandb")
    epochs = run.train(log=("wandb",), validate_every=3)
    run.train(log=("wandb",), validate_every=3)  # nothing is left to train
    output = tmp_path / "model"
    first, second = sorted((output / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name
    for data, epoch, steps in ((first, epochs[0], (3, 4)), (second, epochs[1], (6, 8))):
        records = data.read_bytes()
        for name in ("train_loss", "validation_cider", "seconds", "step/learning_rate"):
            assert name.encode() in records
        assert repr(epoch.train_loss).encode() in records
        for value in (epoch.validations[0].validation_loss, epoch.validation_loss):
            assert repr(value).encode() in records
        assert b'"minimum_count":1' in records
        assert all(f"\x04step\x82\x01\x01{step}".encode("latin-1") in records for step in steps)
        assert b"model" in records
    everything = _files(output)
    assert not any(secret.encode() in everything for secret in SECRETS.values())
    assert not (output / "tensorboard").exists()
    assert not (tmp_path / "wandb").exists()
    _assert_unused(proxy)


def test_wandb_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", _refuse)
    with pytest.raises(InputError, match=r"^--log wandb: no network; WANDB_MODE=offline logs"):
        TinyRun(tmp_path).train(log=("wandb",))


def _refuse(*_: object, **__: object) -> None:
    raise RuntimeError("no\nnetwork")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*")
def test_mlflow_has_a_run_with_all_figures_that_resumes_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: socket.socket
):
    mlflow = pytest.importorskip("mlflow")
    run = TinyRun(tmp_path)
    _interrupted(run, monkeypatch, "mlflow")
    epochs = run.train(log=("mlflow",), validate_every=3, learning_rate=1e-3)
    output = tmp_path / "model"
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{output}/mlflow.db")
    experiment = client.get_experiment_by_name("captioner")
    assert experiment.artifact_location.startswith(str(output))
    [found] = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("model", "FINISHED")
    assert found.data.params["train/batch_size"] == "2"
    assert found.data.params["model/width"] == "32"
    [change] = json.loads(found.data.tags["changes"])
    assert (change["setting"], change["after_epoch"]) == ("learning_rate", 1)

    def history(name: str) -> dict[int, float]:
        return {m.step: m.value for m in client.get_metric_history(found.info.run_id, name)}

    for name in ("train_loss", "validation_loss", "validation_cider"):
        assert history(name) == {each.epoch: getattr(each, name) for each in epochs}
    expected = {each.step: each.validation_loss for each in epochs}
    expected |= {v.step: v.validation_loss for each in epochs for v in each.validations}
    assert history("step/validation_loss") == expected
    assert [*history("step/value")] == [*range(1, 9)]
    assert not any(secret.encode() in _files(output) for secret in SECRETS.values())
    assert not (tmp_path / "mlruns").exists()
    _assert_unused(proxy)


@pytest.fixture
def begun(tmp_path: Path) -> TrainingDirectory:
    """The directory of a run that has begun."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training.json").write_text('{"train": {"epochs": 2}}')
    return TrainingDirectory(str(tmp_path / "out"))


def test_mlflow_receives_later_what_it_could_not_receive(
    begun: TrainingDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    mlflow = pytest.importorskip("mlflow")
    uri = f"file:{tmp_path}/runs"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "captions")
    with Loggers.open(["mlflow"], begun) as loggers:
        with monkeypatch.context() as patch:
            error = mlflow.exceptions.MlflowException("no answer from http://me:pw@host/api")
            patch.setattr(mlflow.MlflowClient, "log_batch", lambda *_, **__: _raise(error))
            for step in (1, 2):
                loggers.log_step(step, {"value": 1.0})
                loggers.flush()
        loggers.log_epoch(1, {"epoch": 1, "validation_cider/coco (2017)": 3.0}, [])
        loggers.flush()
    [warning] = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert warning == "cannot send figures to MLflow: no answer from http://host/api"
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = begun.read_id("mlflow")
    assert [m.step for m in client.get_metric_history(run, "step/value")] == [1, 2]
    assert client.get_run(run).data.metrics["validation_cider/coco _2017_"] == 3.0
    assert client.get_experiment_by_name("captions") is not None
    client.delete_run(run)
    with pytest.raises(KeyError), Loggers.open(["mlflow"], begun):
        raise KeyError
    assert begun.read_id("mlflow") != run
    assert client.get_run(begun.read_id("mlflow")).info.status == "FAILED"


def _raise(error: Exception) -> None:
    raise error


def test_mlflow_that_cannot_be_reached_is_one_line(
    begun: TrainingDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:password@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match=r"^--log mlflow: .*127\.0\.0\.1") as caught:
        Loggers.open(["tensorboard", "mlflow"], begun)
    assert "password" not in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    bucket = TrainingDirectory("memory://bucket/out")
    with pytest.raises(InputError, match="is in a bucket: set MLFLOW_TRACKING_URI"):
        Loggers.open(["mlflow"], bucket)


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_missing_package_is_one_line_before_anything_is_written(
    kind: LogKind, folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A folder of that name, such as wandb's own files, is not the package."""
    spec = ModuleSpec(kind, None, is_package=True) if folder else None
    monkeypatch.setattr(base, "find_spec", lambda _: spec)
    message = rf"^--log {kind} needs captioner\[{kind}\]: pip install 'captioner\[{kind}\]'$"
    with pytest.raises(InputError, match=message):
        TinyRun(tmp_path).train(log=("tensorboard", kind))
    assert not (tmp_path / "model").exists()
    check_packages(["tensorboard"])
