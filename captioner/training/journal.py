"""What a training run leaves for people to look at: metrics, curves, sample captions, TensorBoard.

The files are written anew after each epoch: a run that was killed and resumed looks like one that
was not. Only TensorBoard's event file is appended to, which an open TensorBoard follows.
"""

import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import storage
from captioner.errors import OutputError
from captioner.runtime.plotting import prepare_matplotlib

if TYPE_CHECKING:
    from captioner.training.trainer import StepFigures

__all__ = ["Epoch", "StepLog", "best_of", "write_journal"]

_EVENTS = "tensorboard/events.out.tfevents.1.captioner"


@dataclass(frozen=True)
class Epoch:
    """An epoch's figures.

    ``train_loss`` and ``validation_loss`` are nats a word; a self-critical epoch has
    ``train_cider``, the mean of its samples, in place of the first. CIDEr is as pycocoevalcap
    computes it, times 100. ``samples`` are the captions of the first validation images, empty for
    one that could not be read. Of several data sets, ``validation_loss`` and ``validation_cider``
    are means by the weights of the data sets, and ``validation_by_data`` has the ``loss`` and the
    ``cider`` of each.
    """

    epoch: int
    train_loss: float | None
    train_cider: float | None
    validation_loss: float
    validation_cider: float
    seconds: float
    images_per_second: float
    samples: list[str]
    validation_by_data: dict[str, dict[str, float]] = field(default_factory=dict)

    def describe(self) -> str:
        """The figures in a line, for a person."""
        trained = (
            f"loss {self.train_loss:.3f}"
            if self.train_loss is not None
            else f"CIDEr of samples {self.train_cider:.1f}"
        )
        each = ", ".join(
            f"{name} {figures['cider']:.1f}" for name, figures in self.validation_by_data.items()
        )
        return (
            f"{trained}; validation loss {self.validation_loss:.3f}, "
            f"CIDEr {self.validation_cider:.1f}{f' ({each})' if each else ''}; "
            f"{self.images_per_second:.1f} images/s"
        )

    def figures(self) -> dict[str, float]:
        """All figures by name, those that this epoch has not left out.

        Those of a data set are called ``validation_cider/NAME``.
        """
        figures = {
            name: value
            for name, value in vars(self).items()
            if name not in ("samples", "validation_by_data") and value is not None
        }
        for data, values in self.validation_by_data.items():
            figures |= {f"validation_{name}/{data}": value for name, value in values.items()}
        return figures


@dataclass(frozen=True)
class StepLog:
    """The figures of the steps of one epoch, for TensorBoard."""

    steps: "Sequence[StepFigures]"


def best_of(epochs: Sequence[Epoch]) -> Epoch:
    """The epoch whose model is saved: the highest CIDEr, and the lowest loss among equals.

    Of several data sets, both are the means by their weights.
    """
    return max(epochs, key=lambda each: (each.validation_cider, -each.validation_loss))


def write_journal(
    output: str,
    epochs: Sequence[Epoch],
    examples: Sequence[tuple[str, Sequence[str]]],
    log: StepLog,
) -> None:
    """Writes ``metrics.jsonl``, ``curves.png``, ``samples.md`` and ``tensorboard/`` to ``output``.

    Args:
        output: a directory, local or in a bucket.
        epochs: all so far.
        examples: the name and the references of each image whose captions are the epochs'
            ``samples``.
        log: the steps of the last epoch.

    Raises:
        OutputError: they cannot be written.
    """
    lines = "".join(json.dumps(each.figures()) + "\n" for each in epochs)
    files = {
        "metrics.jsonl": lines.encode(),
        "curves.png": _curves(epochs),
        "samples.md": _samples(epochs, examples).encode(),
    }
    for name, data in files.items():
        storage.write(storage.join(output, name), data)
    _append_events(f"{output}/{_EVENTS}", epochs[-1], examples, log)


def _curves(epochs: Sequence[Epoch]) -> bytes:
    """A PNG: loss and CIDEr over the epochs."""
    prepare_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, cider = figure.subplots(1, 2)
    panels: list[tuple[Any, str, str, str]] = [
        (loss, "train_loss", "training", "cross-entropy of a word (nats)"),
        (loss, "validation_loss", "validation", "cross-entropy of a word (nats)"),
        (cider, "train_cider", "training, sampled", "CIDEr × 100"),
        (cider, "validation_cider", "validation, greedy", "CIDEr × 100"),
    ]
    for axes, name, label, unit in panels:
        points = [
            (each.epoch, value) for each in epochs if (value := getattr(each, name)) is not None
        ]
        axes.plot([n for n, _ in points], [value for _, value in points], marker="o", label=label)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=120)
    return sink.getvalue()


def _samples(epochs: Sequence[Epoch], examples: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Markdown: for each image its references, and its caption after each epoch."""
    blocks = []
    for index, (name, references) in enumerate(examples):
        shown = [f"- {_escaped(reference)}" for reference in references]
        lines = [f"{each.epoch}. {_escaped(each.samples[index])}" for each in epochs]
        text = ["People wrote:", "", *shown, "", "The model, after each epoch:", "", *lines, ""]
        blocks.append("\n".join([f"## {_escaped(name)}", "", *text]))
    return "\n".join(["# Validation images, captioned after each epoch", "", *blocks])


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>()#+-.!|&" else c for c in printable)


def _append_events(
    uri: str, epoch: Epoch, examples: Sequence[tuple[str, Sequence[str]]], log: StepLog
) -> None:
    """Appends an epoch to TensorBoard's event file; in a bucket the file is written anew.

    Where a run was killed before its checkpoint, the epoch's records come twice, and TensorBoard
    shows the later ones.
    """
    records = _events(epoch, examples, log)
    try:
        if storage.is_local(uri):
            path = Path(storage.as_path(uri))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(records)
            return
        before = storage.read(uri)
    except FileNotFoundError:
        before = b""
    except OSError as error:
        raise OutputError(f"cannot write {uri}: {error.strerror or error}") from error
    storage.write(uri, before + records)


def _events(epoch: Epoch, examples: Sequence[tuple[str, Sequence[str]]], log: StepLog) -> bytes:
    """An epoch's records: its figures, its steps' figures, and the sample captions."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        for name, value in epoch.figures().items():
            if name != "epoch":
                writer.add_scalar(name, value, epoch.epoch)
        for step in log.steps:
            writer.add_scalar("step/value", step.value, step.step)
            writer.add_scalar("step/gradient_norm", step.gradient_norm, step.step)
            writer.add_scalar("step/learning_rate", step.learning_rate, step.step)
        text = "\n".join(
            f"- {_escaped(name)}: {_escaped(caption)}"
            for (name, _), caption in zip(examples, epoch.samples, strict=True)
        )
        writer.add_text("captions", text, epoch.epoch)
        writer.close()
        [path] = Path(folder).iterdir()
        return path.read_bytes()
