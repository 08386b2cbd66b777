"""Captions a shard that a process died on, and finds the image at fault.

Each image is recorded before it is read. The model still captions batches, because captioning image
by image is many times slower. A batch is recorded too, and only the images of a batch that a
process died with are captioned image by image later.
"""

from collections.abc import Iterator

from captioner.caption.batches import BatchCaptioner
from captioner.caption.crash_log import Crashes, CrashLog
from captioner.caption.steps import CaptionJob, Loaded, load_images
from captioner.output.manifest import Shard
from captioner.schema import CaptionRow

__all__ = ["caption_suspects"]

_FEW = 8  # images of a shard that is captioned image by image at once: one death less


def caption_suspects(
    job: CaptionJob, captioner: BatchCaptioner, shard: Shard, crash_log: CrashLog
) -> list[CaptionRow]:
    """Captions a shard that a process died on; sets aside images that processes die on.

    Raises:
        DeviceError: the device seems to be broken.
    """
    crashes = crash_log.crashes(shard.number) or Crashes()
    crash_log.begin(shard.number, crashes)  # names no image while the device is probed
    crash_log.begin_probe(captioner.device)
    captioner.probe(job.preparation)
    crash_log.end_probe(captioner.device)
    crashes.count_deaths_on(captioner.device)
    images: dict[int, Loaded] = {}
    for numbers in _batches(shard, crashes, captioner.batch_size):
        for number in numbers:
            images[number] = _load(job, captioner, shard, crashes, crash_log, number)
        if len(numbers) > 1:
            uris = [shard.uris[number] for number in numbers]
            crash_log.begin(shard.number, crashes, batch=uris)
        captioner([images[number] for number in numbers])
    crash_log.end(shard.number)
    return [images[number].row for number in range(len(shard))]


def _batches(shard: Shard, crashes: Crashes, size: int) -> Iterator[list[int]]:
    """The places in the shard of the images that are captioned at once."""
    together: list[int] = []
    for number, uri in enumerate(shard.uris):
        if len(shard) <= _FEW or crashes.names(uri):
            yield [number]
            continue
        together.append(number)
        if len(together) >= size:
            yield together
            together = []
    if together:
        yield together


def _load(
    job: CaptionJob,
    captioner: BatchCaptioner,
    shard: Shard,
    crashes: Crashes,
    crash_log: CrashLog,
    number: int,
) -> Loaded:
    """Reads and decodes an image, recorded as the only one in progress, unless it is set aside."""
    uri, listed = shard.uris[number], shard.images.slice(number, 1)
    if crashes.sets_aside(uri):
        error = "the process that captioned this image died more than once"
        size = listed["size"][0].as_py()
        return Loaded(CaptionRow(uri=uri, bytes=size, status="failed", error=error), None)
    crash_log.begin(shard.number, crashes, alone=(uri, captioner.device))
    [image] = load_images(job, listed)
    return image
