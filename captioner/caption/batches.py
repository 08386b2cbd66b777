"""Captions batches and contains the model's faults: a bad image costs only its own row.

An image on which the model raises is found by halving its batch. An image that kills its process
cannot be caught: :mod:`captioner.caption.crash_log` records it, and
:mod:`captioner.caption.suspects` then finds it.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from captioner.caption.steps import CaptionJob, Loaded
from captioner.caption.timing import Timing
from captioner.config import DecodeConfig
from captioner.data.preparation import Preparation
from captioner.errors import DeviceError, one_line
from captioner.model.base import Caption, Model
from captioner.output import attention
from captioner.runtime.device import identify

__all__ = ["BatchCaptioner"]

_FIRST_BATCH_SIZE = 8  # images, for --batch-size auto
_TRIALS = 3  # batches of each size
_SPEEDUP = 1.05  # least speedup for which the batch size is doubled again
_PROBE_GREY, _PROBE_PIXELS = 128, 256  # the value, and the height and width, of the probe
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")

_logger = logging.getLogger(__name__)


class BatchCaptioner:
    """Captions any number of images in batches that fit the device; contains faults.

    Attributes:
        batch_size: images per batch; halved permanently when memory runs out. Given as ``auto``, it
            is doubled while larger batches caption more images per second, up to ``most``.
        device: the piece of hardware, by name.
        timing: the time since :meth:`take_timing` was called last.
    """

    def __init__(
        self,
        captioner: Callable[..., Sequence[Caption]],
        decode: DecodeConfig,
        batch_size: int | Literal["auto"],
        most: int = 1 << 20,
        device: str = "cpu",
    ):
        self._captioner = captioner
        self._most = most
        self._decode = decode
        self.batch_size = _FIRST_BATCH_SIZE if batch_size == "auto" else batch_size
        self._grows = batch_size == "auto"
        self._slower = 0.0  # images a second in batches of half the size
        self._speeds: list[float] = []  # of batches of this size
        self.device = device
        self.timing = Timing()

    @classmethod
    def load(cls, job: CaptionJob, model: Model) -> "BatchCaptioner":
        """Loads a model onto the device that the job names."""
        run = job.run
        loaded = model.load(
            job.decode,
            device=run.device,
            precision=run.precision,
            compiled=run.compile == "on",
        )
        device = identify(loaded.device)
        return cls(loaded.caption, job.decode, run.batch_size, most=run.shard_size, device=device)

    def take_timing(self) -> Timing:
        """The timing since this was called last."""
        timing, self.timing = self.timing, Timing()
        return timing

    def probe(self, preparation: Preparation) -> None:
        """Captions a plain grey image, which shows that the device works.

        Raises:
            DeviceError: the model cannot caption it.
            torch.AcceleratorError: the device is lost.
        """
        try:
            width, height = preparation.target(_PROBE_PIXELS, _PROBE_PIXELS)
            self._captioner([np.full((height, width, 3), _PROBE_GREY, np.uint8)])
        except torch.AcceleratorError:
            raise
        except Exception as error:
            raise DeviceError(
                f"{self.device} cannot caption even a plain grey image: {one_line(error)}"
            ) from error

    def __call__(self, images: Sequence[Loaded]) -> None:
        """Captions the images that are ok: fills their rows and drops their pixels.

        Raises:
            torch.AcceleratorError: the device is lost: only a new process can use it again.
        """
        self.timing.decode += sum(each.seconds for each in images)
        ready = [each for each in images if each.pixels_HW3 is not None]
        while ready:
            size = self.batch_size
            batch, ready = ready[:size], ready[size:]
            begin = time.perf_counter()
            self._contain(batch)
            seconds = time.perf_counter() - begin
            self.timing += Timing(model=seconds, batches=1, images=len(batch), places=size)
            if self._grows and len(batch) == self.batch_size:
                self._grow(len(batch) / seconds)

    def _grow(self, speed: float) -> None:
        """Records a full batch's images a second; doubles the batch size while that pays."""
        self._speeds.append(speed)
        if len(self._speeds) < _TRIALS:
            return
        speed = max(self._speeds[1:])  # the first batch allocates memory and selects kernels
        self._speeds = []
        if speed <= _SPEEDUP * self._slower:
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
            _logger.warning("out of memory; batch size reduced to %d images", half)
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
        prompts = [image.prompt for image in batch if image.prompt is not None]
        captions = self._captioner(pixels, prompts) if prompts else self._captioner(pixels)
        maps = [
            (None, None)
            if caption.attention_THW is None
            else attention.encode(caption.attention_THW, self._decode.attention_levels)
            for caption in captions
        ]
        for image, caption, (attention_bytes, peaks) in zip(batch, captions, maps, strict=True):
            row, image.pixels_HW3 = image.row, None
            row.caption, row.tokens = caption.text, caption.tokens
            row.token_logprobs, row.score = caption.token_logprobs, caption.score
            row.attention, row.attention_peak = attention_bytes, peaks
            if caption.attention_THW is not None:
                row.attention_height, row.attention_width = caption.attention_THW.shape[1:]
            row.finish, row.captions = caption.finish, caption.captions or None


def _is_out_of_memory(problem: Exception) -> bool:
    """Whether the memory of the host or a device ran out; torch reports it in several ways."""
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
        return True
    message = str(problem).lower()
    return isinstance(problem, RuntimeError) and any(each in message for each in _OUT_OF_MEMORY)
