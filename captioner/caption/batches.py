"""One bad image costs one row: what the model cannot do, and what kills a process.

An image on which the model raises is found by halving its batch. One that kills its process cannot
be caught; :mod:`captioner.caption.crash_log` tells that it did. An image that was alone
in its process when that died, twice, is not touched again and becomes a row that says so.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from captioner.caption.crash_log import Attempts
from captioner.caption.steps import CaptionJob, Loaded, load_image, one_line
from captioner.caption.timing import Work
from captioner.config import DecodeConfig
from captioner.model.bundle import Bundle
from captioner.model.native import Caption, Captioner
from captioner.output import attention
from captioner.output.manifest import Shard
from captioner.schema import CaptionRow

__all__ = ["BatchCaptioner", "caption_alone"]

_SMALLEST = 8  # images of the first batches where their size is to be found
_TRIED = 3  # batches of each size
_FASTER = 1.05  # times the speed that twice the size has to bring
_DEATHS = 2  # of a process with one image alone in it, until the image is left alone
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")

_logger = logging.getLogger(__name__)


class BatchCaptioner:
    """Captions batches of any size, whatever they hold, with no more images at once than fit.

    ``batch_size`` is halved for good when memory runs out. Where it is given as ``auto`` it is
    doubled before that for as long as larger batches caption more images a second, up to ``most``:
    no batch is larger than a shard. ``work`` is what was done since it was taken last.
    """

    def __init__(
        self,
        captioner: Callable[[np.ndarray], Sequence[Caption]],
        decode: DecodeConfig,
        batch_size: int | Literal["auto"],
        most: int = 1 << 20,
    ):
        self._captioner = captioner
        self._most = most
        self._decode = decode
        self.batch_size = _SMALLEST if batch_size == "auto" else batch_size
        self._grows = batch_size == "auto"
        self._slower = 0.0  # images a second in batches of half the size
        self._speeds: list[float] = []  # of batches of this size
        self.work = Work()

    @classmethod
    def load(cls, job: CaptionJob, bundle: Bundle) -> "BatchCaptioner":
        """With a bundle's model, on the device that the job names."""
        run = job.run
        captioner = Captioner(
            bundle,
            job.decode,
            device=run.device,
            precision=run.precision,
            compiled=run.compile == "on",
        )
        return cls(captioner, job.decode, run.batch_size, most=run.shard_size)

    def take_work(self) -> Work:
        """What was done since this was called last."""
        work, self.work = self.work, Work()
        return work

    def __call__(self, images: Sequence[Loaded]) -> None:
        """Captions those of the images that are ok: fills their rows and drops their pixels.

        Raises:
            torch.AcceleratorError: the device is in a state that only a new process gets out of.
        """
        self.work.decode += sum(each.seconds for each in images)
        ready = [each for each in images if each.pixels_HW3 is not None]
        while ready:
            size = self.batch_size
            batch, ready = ready[:size], ready[size:]
            begin = time.perf_counter()
            self._contain(batch)
            seconds = time.perf_counter() - begin
            self.work += Work(model=seconds, batches=1, images=len(batch), places=size)
            if self._grows and len(batch) == self.batch_size:
                self._grow(len(batch) / seconds)

    def _grow(self, speed: float) -> None:
        """Takes note of a full batch's images a second; doubles the batches while that pays."""
        self._speeds.append(speed)
        if len(self._speeds) < _TRIED:
            return
        speed = max(self._speeds[1:])  # the first has its memory and its kernels to find
        self._speeds = []
        if speed <= _FASTER * self._slower:
            self._grows = False
            self.batch_size //= 2
        elif 2 * self.batch_size > self._most:
            self._grows = False
        else:
            self._slower = speed
            self.batch_size *= 2

    def _contain(self, batch: Sequence[Loaded]) -> None:
        if (problem := self._try(batch)) is None:
            return
        exhausted = _is_out_of_memory(problem)
        if isinstance(problem, torch.AcceleratorError) and not exhausted:
            raise problem
        if len(batch) == 1:
            [image] = batch
            image.row.status, image.pixels_HW3 = "failed", None
            image.row.error = f"{type(problem).__name__}: {one_line(problem)}"
            return
        half = math.ceil(len(batch) / 2)
        if exhausted and half < self.batch_size:
            self.batch_size, self._grows = half, False
            _logger.warning("out of memory: batches of %d images from now on", half)
        self._contain(batch[:half])
        self._contain(batch[half:])

    def _try(self, batch: Sequence[Loaded]) -> Exception | None:
        """Captions a batch; returns what went wrong, without the frames that hold on to memory."""
        try:
            self._caption(batch)
        except Exception as problem:
            return problem.with_traceback(None)
        return None

    def _caption(self, batch: Sequence[Loaded]) -> None:
        pixels = [image.pixels_HW3 for image in batch if image.pixels_HW3 is not None]
        captions = self._captioner(np.stack(pixels))
        maps = [
            (None, None)
            if caption.attention_TGG is None
            else attention.encode(caption.attention_TGG, self._decode.attention_levels)
            for caption in captions
        ]
        for image, caption, (attention_bytes, peaks) in zip(batch, captions, maps, strict=True):
            row, image.pixels_HW3 = image.row, None
            row.caption, row.tokens = caption.text, caption.tokens
            row.token_logprobs, row.score = caption.token_logprobs, caption.score
            row.attention, row.attention_peak = attention_bytes, peaks


def _is_out_of_memory(problem: Exception) -> bool:
    """Whether the host's or a device's memory ran out; torch has several words for it."""
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
        return True
    message = str(problem).lower()
    return isinstance(problem, RuntimeError) and any(each in message for each in _OUT_OF_MEMORY)


def caption_alone(
    job: CaptionJob, captioner: BatchCaptioner, shard: Shard, attempts: Attempts
) -> list[CaptionRow]:
    """A shard with which a process died, image by image, so that the one that kills is known."""
    deaths = attempts.deaths(shard.number) or {}
    rows = []
    for uri, size in zip(shard.uris, shard.sizes, strict=True):
        if deaths.get(uri, 0) >= _DEATHS:
            error = "it killed the process that captioned it twice"
            rows.append(CaptionRow(uri=uri, bytes=size, status="failed", error=error))
            continue
        attempts.begin(shard.number, alone=uri, deaths=deaths)
        image = load_image(job, uri, size)
        captioner([image])
        rows.append(image.row)
    attempts.end(shard.number)
    return rows
