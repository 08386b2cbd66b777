"""What a run of a caption job did, and what its output holds afterwards."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from captioner.caption.timing import Timing

__all__ = ["Done", "Summary"]

_LIMITED_BY = {"model": "the model", "decode": "reading and decoding", "write": "writing"}


@dataclass
class Done:
    """What a run has done so far: its rows by status, and the time that they took."""

    rows: Counter[str] = field(default_factory=Counter)
    timing: Timing = field(default_factory=Timing)

    def add(self, rows: Mapping[str, int], timing: Timing) -> None:
        """Adds a finished shard."""
        self.rows.update(rows)
        self.timing += timing

    @property
    def images(self) -> int:
        """The number of rows."""
        return self.rows.total()


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did, and what the output holds afterwards.

    Attributes:
        output: the output directory.
        images: images ever listed for this output.
        rows: all rows of the output, by status; empty if a signal ended the run, because the
            parts are then not read.
        missing: images without a row.
        unlisted: images that an earlier run listed and this run did not; their rows are kept.
        captioned: rows that this run wrote.
        seconds: from the first shard to the last, the start of the engine included.
        started: when the run started, ISO 8601, UTC.
        ended: when the run ended.
        timing: how the run spent its time.
        error: why the run ended early.
    """

    output: str
    images: int
    rows: dict[str, int]
    missing: int
    unlisted: int
    captioned: int
    seconds: float
    started: str
    ended: str
    timing: Timing
    error: str | None = None

    @property
    def images_per_second(self) -> float:
        """The speed of this run."""
        return self.captioned / self.seconds if self.seconds else 0.0

    def describe(self) -> str:
        """One line for a person."""
        text = f"{self.counts()}; {self.captioned} now, {self.images_per_second:.1f} images/s"
        if self.timing.bottleneck:
            text += f", limited by {_LIMITED_BY[self.timing.bottleneck]}"
        if self.unlisted:
            text += f"; {self.unlisted} images are not listed any more; their rows are kept"
        return text

    def figures(self) -> dict[str, Any]:
        """The contents of summary.json."""
        speed = {"images_per_second": self.images_per_second}
        return asdict(self) | speed | {"timing": self.timing.figures()}

    def counts(self) -> str:
        """The images, by status."""
        counts = ", ".join(f"{count} {status}" for status, count in self.rows.items() if count)
        return f"{self.output}: {self.images} images ({counts})"
