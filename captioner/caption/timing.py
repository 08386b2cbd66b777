"""How a caption job spends its time: reading and decoding, the model, or writing."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["RayMetrics", "Timing"]

_METRICS = {
    "decode_seconds": "Seconds of reading and decoding images, over all threads.",
    "model_seconds": "Seconds of captioning, over all actors.",
    "write_seconds": "Seconds of writing parts.",
    "model_waited_for_decode_seconds": "Seconds that actors waited for decoded images.",
    "model_waited_for_write_seconds": "Seconds that actors waited because writing was behind.",
    "batches": "Batches that went through the model.",
    "batch_images": "Images in these batches.",
    "batch_places": "Images that fit in these batches.",
}


@dataclass
class Timing:
    """Seconds spent on some shards, summed over processes and threads.

    Attributes:
        decode: reading and decoding images.
        model: captioning.
        write: writing parts.
        waited_for_decode: the model waited for decoded images.
        waited_for_write: the model waited because writing was behind.
        batches: batches that went through the model.
        images: images in these batches.
        places: images that fit in these batches.
    """

    decode: float = 0.0
    model: float = 0.0
    write: float = 0.0
    waited_for_decode: float = 0.0
    waited_for_write: float = 0.0
    batches: int = 0
    images: int = 0
    places: int = 0

    def __iadd__(self, other: "Timing") -> "Timing":
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def bottleneck(self) -> str | None:
        """Where the model's processes spent most time: ``model``, ``decode`` or ``write``."""
        spent = {
            "model": self.model,
            "decode": self.waited_for_decode,
            "write": self.waited_for_write,
        }
        return max(spent, key=lambda name: spent[name]) if any(spent.values()) else None

    def metrics(self) -> dict[str, float]:
        """The sums, by the names of the metrics."""
        return {
            "decode_seconds": self.decode,
            "model_seconds": self.model,
            "write_seconds": self.write,
            "model_waited_for_decode_seconds": self.waited_for_decode,
            "model_waited_for_write_seconds": self.waited_for_write,
            "batches": self.batches,
            "batch_images": self.images,
            "batch_places": self.places,
        }

    def figures(self) -> dict[str, Any]:
        """The sums and the ratios derived from them, for summary.json."""
        present = self.model + self.waited_for_decode + self.waited_for_write
        return {
            "bottleneck": self.bottleneck,
            "model_busy": self.model / present if present else None,
            "batch_fill": self.images / self.places if self.places else None,
            **self.metrics(),
        }


class RayMetrics:
    """A job's metrics, which Ray exports to Prometheus with the tag ``output``.

    The driver counts them, because a worker's counts are lost with the worker.
    """

    def __init__(self, output: str, remaining: int):
        from ray.util.metrics import Counter, Gauge

        self._tags = {"output": output}
        keys = ("output",)
        self._rows = Counter("captioner_images", "Rows written.", ("output", "status"))
        self._counters = {
            name: Counter(f"captioner_{name}", description, keys)
            for name, description in _METRICS.items()
        }
        self._remaining = Gauge("captioner_images_remaining", "Images to caption.", keys)
        self._left = remaining
        self._remaining.set(remaining, self._tags)

    def add(self, rows: Mapping[str, int], timing: Timing) -> None:
        """Counts a finished shard: its rows by status, and the time that it took."""
        for status, count in rows.items():
            if count:
                self._rows.inc(count, {**self._tags, "status": status})
        for name, value in timing.metrics().items():
            if value:
                self._counters[name].inc(value, self._tags)
        self._left -= sum(rows.values())
        self._remaining.set(self._left, self._tags)
