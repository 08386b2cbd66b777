"""What a training run leaves for people to look at: metrics, curves, sample captions, TensorBoard.

Everything is written anew from the metrics so far after each epoch, so that a run that was killed
and resumed looks like one that was not.
"""

import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner import storage

__all__ = ["Epoch", "write_journal"]


@dataclass(frozen=True)
class Epoch:
    """An epoch's figures.

    ``train_loss`` and ``validation_loss`` are nats a word; a self-critical epoch has
    ``train_cider``, the mean of its samples, in place of the first. CIDEr is as pycocoevalcap
    computes it, times 100. ``samples`` are the captions of the first validation images, empty for
    one that could not be read.
    """

    epoch: int
    train_loss: float | None
    train_cider: float | None
    validation_loss: float
    validation_cider: float
    seconds: float
    images_per_second: float
    samples: list[str]

    def describe(self) -> str:
        """The figures in a line, for a person."""
        trained = (
            f"loss {self.train_loss:.3f}"
            if self.train_loss is not None
            else f"CIDEr of samples {self.train_cider:.1f}"
        )
        return (
            f"{trained}; validation loss {self.validation_loss:.3f}, "
            f"CIDEr {self.validation_cider:.1f}; {self.images_per_second:.1f} images/s"
        )

    def figures(self) -> dict[str, float]:
        """All figures by name, those that this epoch has not left out."""
        return {
            name: value
            for name, value in vars(self).items()
            if name != "samples" and value is not None
        }


def write_journal(output: str, epochs: Sequence[Epoch], names: Sequence[str]) -> None:
    """Writes ``metrics.jsonl``, ``curves.png``, ``samples.md`` and ``tensorboard/`` to ``output``.

    Args:
        output: a directory, local or in a bucket.
        epochs: all so far.
        names: of the images whose captions are the epochs' ``samples``.

    Raises:
        OutputError: they cannot be written.
    """
    lines = "".join(json.dumps(each.figures()) + "\n" for each in epochs)
    files = {
        "metrics.jsonl": lines.encode(),
        "curves.png": _curves(epochs),
        "samples.md": _samples(epochs, names).encode(),
        "tensorboard/events.out.tfevents.1.captioner": _events(epochs, names),
    }
    for name, data in files.items():
        storage.write(storage.join(output, name), data)


def _curves(epochs: Sequence[Epoch]) -> bytes:
    """A PNG: loss and CIDEr over the epochs."""
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


def _samples(epochs: Sequence[Epoch], names: Sequence[str]) -> str:
    """Markdown: for each image its caption after each epoch."""
    blocks = []
    for index, name in enumerate(names):
        lines = [f"{each.epoch}. {_escaped(each.samples[index])}" for each in epochs]
        blocks.append("\n".join([f"## {_escaped(name)}", "", *lines, ""]))
    return "\n".join(["# Validation images, captioned after each epoch", "", *blocks])


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>()#+-.!|&" else c for c in printable)


def _events(epochs: Sequence[Epoch], names: Sequence[str]) -> bytes:
    """TensorBoard's event file of the scalars and the sample captions."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        for each in epochs:
            for name, value in each.figures().items():
                if name != "epoch":
                    writer.add_scalar(name, value, each.epoch)
            text = "\n".join(
                f"- {_escaped(name)}: {_escaped(caption)}"
                for name, caption in zip(names, each.samples, strict=True)
            )
            writer.add_text("captions", text, each.epoch)
        writer.close()
        [path] = Path(folder).iterdir()
        return path.read_bytes()
