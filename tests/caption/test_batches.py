import time

import numpy as np
import pytest
import torch

from captioner.caption.batches import BatchCaptioner
from captioner.caption.steps import CaptionJob, Loaded
from captioner.caption.timing import Timing
from captioner.config import DecodeConfig, RunConfig
from captioner.data.preparation import Preparation
from captioner.model.base import Caption
from captioner.schema import CaptionRow

JOB = CaptionJob(
    output="",
    preparation=Preparation(size=8),
    decode=DecodeConfig(attention="none"),
    run=RunConfig(),
)


def _images(count: int, unreadable: tuple[int, ...] = ()) -> list[Loaded]:
    """Images whose pixels all have their number as value."""
    return [
        Loaded(CaptionRow(uri=str(number), status="unreadable"), None)
        if number in unreadable
        else Loaded(
            CaptionRow(uri=str(number), status="ok"), np.full((8, 8, 3), number, dtype=np.uint8)
        )
        for number in range(count)
    ]


class _Model:
    """Captions an image with its number; raises for some numbers, or for too many at once."""

    def __init__(self, raises=None, bad: tuple[int, ...] = (), most: int = 1000):
        self.raises, self.bad, self.most = raises, bad, most
        self.sizes: list[int] = []

    def __call__(self, images: list[np.ndarray]) -> list[Caption]:
        numbers = [int(image[0, 0, 0]) for image in images]
        self.sizes.append(len(numbers))
        if len(numbers) > self.most or set(numbers) & set(self.bad):
            self.raises()
        return [_caption(str(number)) for number in numbers]


def _caption(word: str) -> Caption:
    return Caption(text=word, tokens=[word], token_logprobs=[0.0], score=0.0, attention_THW=None)


def _captioned(images: list[Loaded]) -> list[str | None]:
    return [image.row.caption for image in images]


def _raise_error() -> None:
    raise ValueError("no such\nthing")


def _run_out_of_host_memory() -> None:
    torch.empty(10**15)


def _run_out_of_device_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _run_out_of_pythons_memory() -> None:
    bytearray(2**62)


def test_images_on_which_the_model_raises_are_found_and_the_others_captioned():
    images = _images(20, unreadable=(4,))
    captioner = BatchCaptioner(_Model(_raise_error, bad=(3, 11, 12)), DecodeConfig(), 8)
    captioner(images)
    for number, image in enumerate(images):
        assert image.pixels_HW3 is None
        if number in (3, 11, 12):
            assert (image.row.status, image.row.caption) == ("failed", None)
            assert image.row.error == "ValueError: no such thing"
        elif number == 4:
            assert (image.row.status, image.row.caption) == ("unreadable", None)
        else:
            assert (image.row.status, image.row.caption) == ("ok", str(number))
    assert captioner.batch_size == 8


@pytest.mark.parametrize(
    "raises", [_run_out_of_host_memory, _run_out_of_device_memory, _run_out_of_pythons_memory]
)
def test_the_batch_size_stays_reduced_after_memory_ran_out(raises):
    model = _Model(raises, most=3)
    captioner = BatchCaptioner(model, DecodeConfig(), 16)
    images = _images(32)
    captioner(images)
    assert _captioned(images) == [str(number) for number in range(32)]
    assert captioner.batch_size == 2
    before = len(model.sizes)
    captioner(_images(8))
    assert model.sizes[before:] == [2, 2, 2, 2]


class _Timed(_Model):
    """A model for which a batch takes as long as it says, by a clock that the test holds."""

    def __init__(self, seconds, **settings):
        super().__init__(**settings)
        self.seconds, self.now = seconds, 0.0

    def __call__(self, images_BHW3: np.ndarray) -> list[Caption]:
        self.now += self.seconds(len(images_BHW3))
        return super().__call__(images_BHW3)


def _found(model: _Timed, monkeypatch: pytest.MonkeyPatch) -> BatchCaptioner:
    """After shards of a hundred images, with the size of batches to be found."""
    monkeypatch.setattr(time, "perf_counter", lambda: model.now)
    captioner = BatchCaptioner(model, DecodeConfig(), "auto")
    for _ in range(20):
        images = _images(100)
        captioner(images)
        assert _captioned(images) == [str(number) for number in range(100)]
    return captioner


def test_batches_grow_until_the_device_is_busy(monkeypatch):
    """It does up to 16 images at once in the time of one."""
    model = _Timed(lambda count: max(1.0, count / 16))
    assert _found(model, monkeypatch).batch_size == 16
    assert model.sizes[:10] == [8, 8, 8, 16, 16, 16, 28, 32, 32, 32]
    assert set(model.sizes[13:]) == {16, 4}


def test_batches_grow_no_larger_than_a_shard(monkeypatch):
    model = _Timed(lambda _: 1.0)
    monkeypatch.setattr(time, "perf_counter", lambda: model.now)
    captioner = BatchCaptioner(model, DecodeConfig(), "auto", most=64)
    for _ in range(20):
        captioner(_images(64))
    assert captioner.batch_size == 64
    captioner.take_timing()
    captioner(_images(64))
    timing = captioner.take_timing()
    assert (timing.batches, timing.images, timing.places) == (1, 64, 64)


def test_batches_stop_growing_where_memory_ends(monkeypatch):
    model = _Timed(lambda _: 1.0, raises=_run_out_of_device_memory, most=50)
    assert _found(model, monkeypatch).batch_size == 32
    assert set(model.sizes[-8:]) == {32, 4}


def test_the_timing_tells_what_limits_the_speed():
    assert Timing().bottleneck is None
    assert Timing().figures()["model_busy"] is None
    assert Timing(model=3, waited_for_decode=1, waited_for_write=2).bottleneck == "model"
    assert (
        Timing(decode=9, write=9, model=1, waited_for_decode=2, waited_for_write=1).bottleneck
        == "decode"
    )
    assert Timing(model=1, waited_for_write=2).bottleneck == "write"
    timing = Timing(model=3, waited_for_decode=1, images=9, places=12, batches=3)
    assert (timing.figures()["model_busy"], timing.figures()["batch_fill"]) == (0.75, 0.75)
    captioner = BatchCaptioner(_Model(), DecodeConfig(), 8)
    captioner(_images(20, unreadable=(4,)))
    timing = captioner.take_timing()
    assert (timing.images, timing.batches, timing.places) == (19, 3, 24)
    assert timing.model > 0
    assert captioner.take_timing() == Timing()


def test_an_image_that_does_not_fit_into_memory_alone_is_failed():
    captioner = BatchCaptioner(_Model(_run_out_of_device_memory, bad=(2,)), DecodeConfig(), 4)
    images = _images(4)
    captioner(images)
    assert _captioned(images) == ["0", "1", None, "3"]
    assert images[2].row.error.startswith("OutOfMemoryError: CUDA out of memory")
    assert captioner.batch_size == 1


def test_a_lost_device_fails_no_image():
    def lose() -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    images = _images(4)
    with pytest.raises(torch.AcceleratorError):
        BatchCaptioner(_Model(lose, bad=(2,)), DecodeConfig(), 4)(images)
    assert [image.row.status for image in images] == ["ok"] * 4
