"""What a training run leaves for people to look at: metrics, curves, sample captions.

The files are rewritten after each epoch, ``metrics.jsonl`` also after each validation within
one: a run that was killed and resumed looks like one that was not.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from captioner import storage
from captioner.runtime.plotting import prepare_matplotlib

__all__ = [
    "Epoch",
    "StepValidation",
    "best_of",
    "describe_best",
    "escape_markdown",
    "rank_of",
    "write_journal",
    "write_metrics",
]


@dataclass(frozen=True)
class StepValidation:
    """The figures of a validation within an epoch, after ``step`` steps of the whole run.

    The others are called as those of :class:`Epoch`.
    """

    step: int
    validation_loss: float
    validation_cider: float
    validation_by_data: dict[str, dict[str, float]] = field(default_factory=dict)

    def describe(self) -> str:
        """The figures in a line, for a person."""
        return _describe_validation(self)

    def figures(self) -> dict[str, float]:
        """All figures by name; see :meth:`Epoch.figures`."""
        return _figures(self)


@dataclass(frozen=True)
class Epoch:
    """The figures of an epoch.

    CIDEr is as pycocoevalcap computes it, times 100.

    Attributes:
        epoch: the number of the epoch.
        train_loss: mean loss on the images to train on, in nats a word; None for a self-critical
            epoch.
        train_cider: mean CIDEr of a self-critical epoch's samples; None for other epochs.
        validation_loss: mean loss on the validation images, in nats a word; with several data sets,
            the mean by their weights.
        validation_cider: CIDEr of the captions of the validation images; with several data sets,
            the mean by their weights.
        seconds: how long the epoch took.
        images_per_second: the speed of training.
        samples: captions of the first validation images; empty for an image that cannot be read.
        validation_by_data: ``loss`` and ``cider`` of each data set, if there are several.
        step: steps of the whole run at the end of the epoch.
        validations: the validations within the epoch.
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
    step: int | None = None
    validations: list[StepValidation] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Epoch":
        """An epoch from what ``dataclasses.asdict`` made of it."""
        validations = [StepValidation(**each) for each in values.get("validations", [])]
        return cls(**{**values, "validations": validations})

    @property
    def best(self) -> "StepValidation | Epoch":
        """The best of the epoch's validations; the epoch itself is the validation at its end."""
        validations: list[StepValidation | Epoch] = [*self.validations, self]
        return max(validations, key=rank_of)

    def describe(self) -> str:
        """The figures in a line, for a person."""
        trained = (
            f"loss {self.train_loss:.3f}"
            if self.train_loss is not None
            else f"CIDEr of samples {self.train_cider:.1f}"
        )
        return f"{trained}; {_describe_validation(self)}; {self.images_per_second:.1f} images/s"

    def figures(self) -> dict[str, float]:
        """All figures by name, those that this epoch has not left out.

        Those of a data set are called ``validation_cider/NAME``.
        """
        return _figures(self)


def _describe_validation(validated: "StepValidation | Epoch") -> str:
    each = ", ".join(
        f"{name} {figures['cider']:.1f}" for name, figures in validated.validation_by_data.items()
    )
    return (
        f"validation loss {validated.validation_loss:.3f}, "
        f"CIDEr {validated.validation_cider:.1f}{f' ({each})' if each else ''}"
    )


def _figures(source: "StepValidation | Epoch") -> dict[str, float]:
    figures = {
        name: value for name, value in vars(source).items() if isinstance(value, (int, float))
    }
    for data, values in source.validation_by_data.items():
        figures |= {f"validation_{name}/{data}": value for name, value in values.items()}
    return figures


def rank_of(validated: "StepValidation | Epoch") -> tuple[float, float]:
    """What decides which model is the best: the highest CIDEr, and the lowest loss among equals.

    Of several data sets, both are the means by their weights.
    """
    return validated.validation_cider, -validated.validation_loss


def best_of(epochs: Sequence[Epoch]) -> Epoch:
    """The epoch whose best validation is the best of all: its model is saved."""
    return max(epochs, key=lambda each: rank_of(each.best))


def describe_best(epochs: Sequence[Epoch]) -> str:
    """The highest validation CIDEr and where in the run it was reached, in one line."""
    epoch = best_of(epochs)
    best = epoch.best
    place = f"epoch {epoch.epoch}" if best is epoch else f"step {best.step}, in epoch {epoch.epoch}"
    return f"CIDEr {best.validation_cider:.1f} on the validation images after {place}"


def write_metrics(
    output: str, epochs: Sequence[Epoch], begun: Sequence[StepValidation] = ()
) -> None:
    """Writes ``metrics.jsonl``: a line for each validation within an epoch, and for each epoch.

    Args:
        output: a directory, local or in a bucket.
        epochs: all so far.
        begun: the validations so far of the epoch that has begun.

    Raises:
        OutputError: it cannot be written.
    """
    rows: list[StepValidation | Epoch] = []
    for each in epochs:
        rows += [*each.validations, each]
    lines = "".join(json.dumps(row.figures()) + "\n" for row in [*rows, *begun])
    storage.write(storage.join(output, "metrics.jsonl"), lines.encode())


def write_journal(
    output: str, epochs: Sequence[Epoch], examples: Sequence[tuple[str, Sequence[str]]]
) -> None:
    """Writes ``metrics.jsonl``, ``curves.png`` and ``samples.md`` to ``output``.

    Args:
        output: a directory, local or in a bucket.
        epochs: all so far.
        examples: the name and the references of each image whose captions are the epochs'
            ``samples``.

    Raises:
        OutputError: they cannot be written.
    """
    write_metrics(output, epochs)
    storage.write(storage.join(output, "curves.png"), _curves(epochs))
    storage.write(storage.join(output, "samples.md"), _samples(epochs, examples).encode())


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
            (place, value)
            for epoch in epochs
            for place, each in _places(epoch)
            if (value := getattr(each, name, None)) is not None
        ]
        axes.plot([n for n, _ in points], [value for _, value in points], marker="o", label=label)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=120)
    return sink.getvalue()


def _places(epoch: Epoch) -> list[tuple[float, "StepValidation | Epoch"]]:
    """Where on an axis of epochs an epoch's figures belong, and those of the steps within it."""
    within = [
        (each.step * epoch.epoch / epoch.step, each) for each in epoch.validations if epoch.step
    ]
    return [*within, (epoch.epoch, epoch)]


def _samples(epochs: Sequence[Epoch], examples: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Markdown: for each image its references, and its caption after each epoch."""
    blocks = []
    for index, (name, references) in enumerate(examples):
        shown = [f"- {escape_markdown(reference)}" for reference in references]
        lines = [f"{each.epoch}. {escape_markdown(each.samples[index])}" for each in epochs]
        text = ["People wrote:", "", *shown, "", "The model, after each epoch:", "", *lines, ""]
        blocks.append("\n".join([f"## {escape_markdown(name)}", "", *text]))
    return "\n".join(["# Validation images, captioned after each epoch", "", *blocks])


def escape_markdown(text: str) -> str:
    """Text that Markdown shows unchanged."""
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>()#+-.!|&" else c for c in printable)
