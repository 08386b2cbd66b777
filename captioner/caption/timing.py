"""What the time of a caption job went to: reading and decoding, the model, or writing."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["RayMetrics", "Work"]

_COUNTED = {
    "decode_seconds": "Seconds of reading and decoding, over all threads.",
    "model_seconds": "Seconds of captioning, over all actors.",
    "write_seconds": "Seconds of writing parts.",
    "model_waited_for_decode_seconds": "Seconds that actors waited for images.",
    "model_waited_for_write_seconds": "Seconds that actors waited to be rid of captioned images.",
    "batches": "Batches that went through the model.",
    "batch_images": "Images in them.",
    "batch_places": "Images that there was room for in them.",
}


@dataclass
class Work:
    """What some shards took, in seconds, added up over processes and threads.

    ``decode`` is reading and decoding, ``model`` captioning, ``write`` writing parts. Processes
    with a model had nothing to do for ``starved``, while images were read and decoded, and for
    ``held``, until what they had captioned was taken from them. ``images`` went through the model
    in ``batches`` with room for ``places``.
    """

    decode: float = 0.0
    model: float = 0.0
    write: float = 0.0
    starved: float = 0.0
    held: float = 0.0
    batches: int = 0
    images: int = 0
    places: int = 0

    def __iadd__(self, other: "Work") -> "Work":
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def bottleneck(self) -> str | None:
        """What the processes with a model spent most time on or waiting for."""
        spent = {"model": self.model, "decode": self.starved, "write": self.held}
        return max(spent, key=lambda name: spent[name]) if any(spent.values()) else None

    def counted(self) -> dict[str, float]:
        """What was added up, under the names of the metrics."""
        return {
            "decode_seconds": self.decode,
            "model_seconds": self.model,
            "write_seconds": self.write,
            "model_waited_for_decode_seconds": self.starved,
            "model_waited_for_write_seconds": self.held,
            "batches": self.batches,
            "batch_images": self.images,
            "batch_places": self.places,
        }

    def figures(self) -> dict[str, Any]:
        """For summary.json: what was added up, and what follows from it."""
        present = self.model + self.starved + self.held
        return {
            "bottleneck": self.bottleneck,
            "model_busy": self.model / present if present else None,
            "batch_fill": self.images / self.places if self.places else None,
            **self.counted(),
        }


class RayMetrics:
    """A job's figures as Ray hands them to Prometheus, each with the tag ``output``.

    The job's own process counts, as what a worker counted would be lost with it.
    """

    def __init__(self, output: str, remaining: int):
        from ray.util.metrics import Counter, Gauge

        self._tags = {"output": output}
        keys = ("output",)
        self._rows = Counter("captioner_images", "Rows written.", ("output", "status"))
        self._work = {
            name: Counter(f"captioner_{name}", description, keys)
            for name, description in _COUNTED.items()
        }
        self._remaining = Gauge("captioner_images_remaining", "Images to caption.", keys)
        self._left = remaining
        self._remaining.set(remaining, self._tags)

    def add(self, rows: Mapping[str, int], work: Work) -> None:
        """Counts a shard that is written: its rows by status, and what it took."""
        for status, count in rows.items():
            if count:
                self._rows.inc(count, {**self._tags, "status": status})
        for name, value in work.counted().items():
            if value:
                self._work[name].inc(value, self._tags)
        self._left -= sum(rows.values())
        self._remaining.set(self._left, self._tags)
