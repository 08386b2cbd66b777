"""The directory of a training run: which run it holds, its checkpoint, the models it writes.

::

    OUT/
      model.safetensors …   the bundle of the best validation
      last/                 the bundle of the last epoch
      metrics.jsonl …       the journal; see :mod:`captioner.training.journal`
      tensorboard/, wandb/, mlflow.db   what :mod:`captioner.training.loggers` write here
      training.json         the settings of the run
      epochs.json           the figures of the epochs that are done
      _training/            the initial model, the checkpoint, the lock, Ray Train's files, and the
                            run's ids at the services that log it
"""

import io
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch

from captioner import storage
from captioner.errors import OutputError
from captioner.model import bundle
from captioner.model.bundle import Bundle, SeenImages
from captioner.model.network import CaptionModel
from captioner.model.vocabulary import Vocabulary
from captioner.training.journal import (
    Epoch,
    StepValidation,
    best_of,
    write_journal,
    write_metrics,
)

__all__ = ["TrainingDirectory"]

_PRIVATE = "_training"
_LOCK = "lock"
_SETTINGS, _EPOCHS, _CHECKPOINT, _INITIAL = (
    "training.json",
    "epochs.json",
    "checkpoint.pt",
    "initial",
)
_SHOWN = {  # what is not called as its option
    "initial_model": "--model",
    "captions": "DATA",
    "largest_vocabulary": "--vocabulary-size",
}
# The options that settings of the model come from; the preset brings the others.
_OPTIONS = {
    **dict.fromkeys(("backbone", "mean", "std", "interpolation"), "encoder"),
    **{name: name for name in ("image_size", "tokenizer", "width", "layers", "heads")},
    **{f"{place}_dropout": "dropout" for place in ("embedding", "attention", "residual", "head")},
}
_ADVICE = "use another directory, or --overwrite"

# What a resumed run may change: it changes how training continues, not what was trained on.
_FREE = ("epochs", "early_stopping", "learning_rate", "schedule", "warmup_steps", "clip_norm")
_ALWAYS_FREE = ("scst_epochs", "validate_every")  # also once self-critical training has begun


class TrainingDirectory:
    """A directory, local or in a bucket, that holds one training run."""

    def __init__(self, uri: str):
        self.uri = uri

    def private(self, name: str) -> str:
        """The URI of a file or directory that the run keeps for itself."""
        return storage.join(self.uri, f"{_PRIVATE}/{name}")

    @property
    def name(self) -> str:
        """The last part of its URI: what the run is called."""
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    @property
    def checkpoint(self) -> str:
        """The URI of the checkpoint."""
        return self.private(_CHECKPOINT)

    def locked(self) -> AbstractContextManager[None]:
        """Keeps other processes from training here; in a bucket it keeps nobody out."""
        return storage.locked(self.private(_LOCK))

    # Which run is here.

    def check(self) -> None:
        """Checks that the directory is empty, or a model's.

        Raises:
            OutputError: it is neither, or it is not a directory.
        """
        names = self._names()
        ours = {_SETTINGS, "config.json", _PRIVATE} & set(names)
        if not ours and any(not name.startswith(".") for name in names):
            raise OutputError(f"{self.uri} holds other files and no model: use an empty directory")

    def holds(self, settings: dict[str, Any]) -> bool:
        """Whether the run with these settings has begun here.

        Raises:
            OutputError: the directory holds another run, or a model.
        """
        names = self._names()
        if _SETTINGS not in names:
            if "config.json" in names:
                raise OutputError(f"{self.uri} holds a model already: {_ADVICE}")
            return False
        try:
            earlier = json.loads(storage.read(storage.join(self.uri, _SETTINGS)))
            done = len(self.read_epochs()) if _EPOCHS in names else 0
            differing = _differing(earlier, settings, done)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"cannot read {self.uri}/{_SETTINGS}: {_ADVICE}") from error
        if differing:
            raise OutputError(
                f"{self.uri} holds a run with other settings ({', '.join(differing)}): {_ADVICE}"
            )
        return True

    def begin(self, model: CaptionModel, vocabulary: Vocabulary) -> None:
        """Writes the model that every worker starts from."""
        bundle.save(self.private(_INITIAL), model, vocabulary)

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Records the settings of the run, and what a resumed run changes in them."""
        config = json.loads(storage.read(self.private(f"{_INITIAL}/config.json")))
        size = config["model"]["vocabulary_size"]
        settings = {**settings, "model": {**settings["model"], "vocabulary_size": size}}
        changes = self._changes(json.loads(json.dumps(settings)))
        text = json.dumps(settings | ({"changes": changes} if changes else {}), indent=2) + "\n"
        storage.write(storage.join(self.uri, _SETTINGS), text.encode())

    def _changes(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """What was changed in the settings so far, each with the epochs that were done."""
        if _SETTINGS not in self._names():
            return []
        earlier = json.loads(storage.read(storage.join(self.uri, _SETTINGS)))
        changes: list[dict[str, Any]] = earlier.get("changes", [])
        done = len(self.read_epochs()) if _EPOCHS in self._names() else 0
        for name, value in settings["train"].items():
            if name in earlier["train"] and earlier["train"][name] != value:
                change = {"after_epoch": done, "setting": name}
                changes.append(change | {"from": earlier["train"][name], "to": value})
        return changes

    def read_settings(self) -> dict[str, Any]:
        """The settings of the run, and what was changed in them since it has begun."""
        settings: dict[str, Any] = json.loads(storage.read(storage.join(self.uri, _SETTINGS)))
        return settings

    def read_id(self, service: str) -> str | None:
        """The id that the run has at a service that logs it; None where it has none."""
        try:
            return storage.read(self.private(f"{service}-id")).decode()
        except FileNotFoundError:
            return None

    def write_id(self, service: str, identity: str) -> None:
        """Keeps the id that the run has at a service."""
        storage.write(self.private(f"{service}-id"), identity.encode())

    def delete_models(self) -> None:
        """Deletes the models of the run that is being replaced."""
        for name in ("config.json", "model.safetensors", "tokenizer.json", bundle.IMAGES, "last"):
            storage.delete(storage.join(self.uri, name))

    def clear(self) -> None:
        """Deletes what an earlier run needs to resume."""
        for name in (_SETTINGS, _EPOCHS):
            storage.delete(storage.join(self.uri, name))
        for name in storage.names(storage.join(self.uri, _PRIVATE)):
            if name != _LOCK:  # another process would lock the next file of that name
                storage.delete(self.private(name))

    def _names(self) -> list[str]:
        try:
            return storage.names(self.uri)
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"cannot use {self.uri} for output: {reason}") from error

    # What a run leaves after each epoch.

    def load_initial(self) -> Bundle:
        """The model that every worker starts from."""
        return bundle.load(self.private(_INITIAL))

    def load_checkpoint(self) -> tuple[list[Epoch], dict[str, Any] | None]:
        """The epochs that are done, and the state of the trainer after them; None before any."""
        try:
            data = storage.read(self.checkpoint)
        except FileNotFoundError:
            return [], None
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return _parse_epochs(state.pop("epochs")), state

    def save_checkpoint(self, epochs: Sequence[Epoch], state: dict[str, Any]) -> None:
        """Writes what a resumed run needs: the last thing written after an epoch."""
        text = _format_epochs(epochs)
        storage.write(storage.join(self.uri, _EPOCHS), text.encode())
        sink = io.BytesIO()
        torch.save({"epochs": text, **state}, sink)
        storage.write(self.checkpoint, sink.getvalue())

    def save_models(
        self,
        epochs: Sequence[Epoch],
        model: CaptionModel,
        vocabulary: Vocabulary,
        seen: SeenImages,
        *,
        best: CaptionModel | None = None,
    ) -> None:
        """Writes the model of the last of ``epochs``; at the top too where it is the best.

        Args:
            epochs: all so far.
            model: the model at the end of the last one.
            vocabulary: its words.
            seen: its images.
            best: the model of the best validation within the last epoch, written to the top in
                place of ``model`` where that validation is the best of all.
        """
        models = {storage.join(self.uri, "last"): model}
        last = epochs[-1]
        if best_of(epochs) is last:
            models[self.uri] = model
            if last.best is not last:
                assert best is not None, "the best model within the last epoch is kept"
                models[self.uri] = best
        for directory, each in models.items():
            bundle.save_images(directory, seen)
            bundle.save(directory, each, vocabulary)

    def save_journal(
        self,
        epochs: Sequence[Epoch],
        examples: Sequence[tuple[str, Sequence[str]]],
    ) -> None:
        """Writes the journal, see :func:`captioner.training.journal.write_journal`."""
        write_journal(self.uri, epochs, examples)

    def save_metrics(self, epochs: Sequence[Epoch], begun: Sequence[StepValidation]) -> None:
        """Writes the figures, see :func:`captioner.training.journal.write_metrics`."""
        write_metrics(self.uri, epochs, begun)

    def read_epochs(self) -> list[Epoch]:
        """The figures of the epochs that are done."""
        return _parse_epochs(storage.read(storage.join(self.uri, _EPOCHS)))


def _differing(earlier: dict[str, Any], settings: dict[str, Any], done: int) -> list[str]:
    """The settings in which a run differs from the one that has begun, as options are typed.

    How training continues may change: the number of epochs, the learning rate and its schedule. The
    epochs of cross-entropy may not change once self-critical training has begun, nor the other
    settings of self-critical training.
    """
    now = json.loads(json.dumps(settings))
    self_critical = done > earlier["train"]["epochs"]
    free = {*_ALWAYS_FREE}
    if not self_critical:
        free |= {*_FREE, *(name for name in now["train"] if "scst" in name)}
    differing = {
        name if part == "train" else _OPTIONS.get(name, "preset")
        for part in ("model", "train")
        for name, value in now[part].items()
        if earlier[part].get(name, value) != value
        and name not in free
        and name != "vocabulary_size"  # that of the captions, which are compared
    }
    if "preset" in differing:  # it brings all of these
        differing -= set(_OPTIONS.values())
    differing |= {
        name for name in now.keys() - {"model", "train"} if earlier.get(name) != now[name]
    }
    if "initial_model" in differing:  # it brings the architecture
        differing -= {"preset", *_OPTIONS.values()}
    return sorted(_SHOWN.get(name, "--" + name.replace("_", "-")) for name in differing)


def _format_epochs(epochs: Sequence[Epoch]) -> str:
    return json.dumps([asdict(each) for each in epochs])


def _parse_epochs(text: str | bytes) -> list[Epoch]:
    return [Epoch.from_json(each) for each in json.loads(text)]
