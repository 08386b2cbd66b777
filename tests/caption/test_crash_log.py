"""Deaths of processes: which count against an image, which against a device."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from captioner.caption import suspects
from captioner.caption.batches import BatchCaptioner
from captioner.caption.crash_log import Crashes, CrashLog
from captioner.caption.job import caption_images
from captioner.caption.steps import CaptionJob
from captioner.caption.suspects import caption_suspects
from captioner.config import DecodeConfig, RunConfig
from captioner.data.preparation import Preparation
from captioner.data.source import list_files
from captioner.errors import DeviceError
from captioner.model.base import Caption
from captioner.model.native import Captioner
from captioner.output.manifest import Shard
from captioner.schema import CaptionRow
from captioner.storage import Listed
from conftest import write_photos

JOB = CaptionJob(
    output="",
    preparation=Preparation(size=8),
    decode=DecodeConfig(attention="none"),
    run=RunConfig(),
)


_A = Caption(text="a", tokens=["a"], token_logprobs=[0.0], score=0.0, attention_THW=None)


class _Killed(BaseException):
    """Ends a process's work without a chance to clean up."""


class _Model:
    """Captions everything; its process dies with some calls, counted from 0, the probe's."""

    def __init__(self, *deadly: int, raises: BaseException | None = None):
        self.deadly, self.calls = deadly, 0
        self.raises = raises or _Killed()

    def __call__(self, images):
        self.calls += 1
        if self.calls - 1 in self.deadly or -1 in self.deadly:
            raise self.raises
        return [_A] * len(images)


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    paths = write_photos(tmp_path / "photos", 3)
    return Shard(7, list_files(Listed(str(path), path.stat().st_size) for path in paths))


@pytest.fixture
def log(tmp_path: Path) -> CrashLog:
    log = CrashLog(str(tmp_path))
    log.begin(7)
    return log


def _alone(log: CrashLog, shard: Shard, model: _Model, device: str = "GPU 1") -> list[CaptionRow]:
    captioner = BatchCaptioner(model, DecodeConfig(), 4, device=device)
    return caption_suspects(JOB, captioner, shard, log)


def test_an_image_with_which_two_processes_died_alone_is_set_aside(shard, log):
    deadly = shard.uris[1]
    for deaths in ({}, {deadly: 1}):
        assert log.shards() == {7}
        with pytest.raises(_Killed):
            _alone(log, shard, _Model(2))
        assert log.crashes(7) == Crashes(deaths, [(deadly, "GPU 1")])
    rows = _alone(log, shard, _Model())
    assert [row.status for row in rows] == ["ok", "failed", "ok"]
    assert rows[1].error == "the process that captioned this image died more than once"
    assert log.shards() == set()
    assert log.crashes(7) is None


def test_a_device_that_breaks_sets_no_image_aside_and_stops_the_job(shard, log):
    with pytest.raises(_Killed):
        _alone(log, shard, _Model(1))  # the first image is in hand when the device breaks
    for _ in range(3):
        with pytest.raises(_Killed):
            _alone(log, shard, _Model(-1))
    assert log.crashes(7) == Crashes({}, [(shard.uris[0], "GPU 1")])
    with pytest.raises(DeviceError, match=r"^GPU 1 seems to be broken: 3 processes in a row died"):
        _alone(log, shard, _Model(-1))
    # Repaired, or on another device, every image is captioned.
    assert [row.status for row in _alone(log, shard, _Model())] == ["ok"] * 3


def test_a_death_counts_only_where_an_image_has_gone_through_on_the_same_device_since(shard, log):
    for _ in range(2):
        with pytest.raises(_Killed):
            _alone(log, shard, _Model(1), "GPU 1")
        with pytest.raises(_Killed):
            _alone(log, shard, _Model(-1), "GPU 1")  # it is broken
    assert log.crashes(7).deaths == {shard.uris[0]: 1}  # the probe went through in between
    rows = _alone(log, shard, _Model(), "GPU 2")
    assert [row.status for row in rows] == ["ok"] * 3


def test_an_image_that_kills_on_a_third_device_is_set_aside(shard, log):
    """A job whose every process gets another machine comes to its end."""
    for device in ("GPU 1", "GPU 2", "GPU 3"):
        assert not log.crashes(7).sets_aside(shard.uris[0])
        with pytest.raises(_Killed):
            _alone(log, shard, _Model(1), device)
    rows = _alone(log, shard, _Model(), "GPU 4")
    assert [row.status for row in rows] == ["failed", "ok", "ok"]


def test_a_probe_that_goes_through_forgets_earlier_deaths_with_it(shard, log):
    for _ in range(2):
        for _ in range(2):
            with pytest.raises(_Killed):
                _alone(log, shard, _Model(-1))
        with pytest.raises(_Killed):
            _alone(log, shard, _Model(3))
    assert log.crashes(7) == Crashes({shard.uris[2]: 1}, [(shard.uris[2], "GPU 1")])


def test_a_model_that_cannot_caption_a_grey_image_fails_no_image(shard, log):
    with pytest.raises(DeviceError, match="cannot caption even a plain grey image: no memory left"):
        _alone(log, shard, _Model(-1, raises=ValueError("no memory\nleft")))
    with pytest.raises(torch.AcceleratorError):
        _alone(log, shard, _Model(-1, raises=torch.AcceleratorError("CUDA error")))
    assert log.crashes(7) == Crashes()


def test_two_lost_machines_set_no_image_aside(shard, log):
    """Once with the shard in hand, once with one image of it."""
    log.begin(7, log.crashes(7), alone=(shard.uris[0], "GPU 1"))
    assert [row.status for row in _alone(log, shard, _Model())] == ["ok"] * 3


def test_an_orderly_end_leaves_only_what_crashes_have_left(tmp_path):
    log = CrashLog(str(tmp_path))
    log.begin(1)
    log.begin(2, Crashes({"a.jpg": 1}), alone=("b.jpg", "GPU 1"))
    log.begin(3, Crashes({}, [("c.jpg", "GPU 2")]))
    log.begin(4, batch=["d.jpg", "e.jpg"])
    log.begin(5, Crashes({"f.jpg": 1}), batch=["f.jpg", "g.jpg"])
    log.begin_probe("GPU 1")
    log.clear_after_orderly_end()
    assert log.shards() == {2, 3, 5}
    assert log.crashes(2) == Crashes({"a.jpg": 1}, [])
    assert log.crashes(3) == Crashes({}, [("c.jpg", "GPU 2")])
    assert log.crashes(5) == Crashes({"f.jpg": 1})
    folder = tmp_path / "__captioner" / "attempts"
    left = {path.name for path in folder.iterdir()}
    assert left == {"000002.json", "000003.json", "000005.json"}
    log.delete()
    assert log.shards() == set()
    log.delete()


@pytest.mark.parametrize("data", [b"", b'{"alone": "b.j', b"\0", b"[]", b'{"alone": 1}', b"null"])
def test_a_damaged_file_tells_that_the_shard_was_in_hand(tmp_path, data):
    """A power cut leaves such files; macOS leaves others beside them on a share."""
    log = CrashLog(str(tmp_path))
    folder = tmp_path / "__captioner" / "attempts"
    folder.mkdir(parents=True)
    (folder / "000001.json").write_bytes(data)
    (folder / "._000001.json").write_bytes(b"\0\5\x16\7")
    (folder / "000001 2.json").write_bytes(data)
    assert log.shards() == {1}
    assert log.crashes(1) == Crashes()
    log.clear_after_orderly_end()
    assert log.shards() == set()
    assert log.crashes(1) is None


def test_an_image_that_loses_the_device_is_set_aside_after_some_runs(
    tmp_path, model_directory, monkeypatch
):
    """In this process, where only another run can use the device again."""
    photos = write_photos(tmp_path / "photos", 5)
    Image.new("RGB", (64, 64), (255, 0, 255)).save(photos[2], format="png")
    caption = Captioner.__call__

    def lose(self, images_BHW3):
        if (images_BHW3 == (255, 0, 255)).all((1, 2, 3)).any():
            raise torch.AcceleratorError("CUDA error: device-side assert triggered\nmore")
        return caption(self, images_BHW3)

    monkeypatch.setattr(Captioner, "__call__", lose)
    arguments = str(tmp_path / "photos"), str(tmp_path / "out"), str(model_directory)
    run = RunConfig(engine="local", device="cpu", max_error_rate=1)
    for _ in range(3):
        with pytest.raises(DeviceError, match=r" stopped working: CUDA error: device-side ass"):
            caption_images(*arguments, run=run)
    assert caption_images(*arguments, run=run).rows == {"ok": 4, "failed": 1}


@pytest.fixture
def large(tmp_path: Path) -> Shard:
    paths = write_photos(tmp_path / "photos", 12)
    return Shard(7, list_files(Listed(str(path), path.stat().st_size) for path in paths))


def _sizes(model: _Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each call that the model gets from here on, the probe's first."""
    sizes, call = [], type(model).__call__

    def count(self, images):
        sizes.append(len(images))
        return call(self, images)

    monkeypatch.setattr(type(model), "__call__", count)
    return sizes


def test_after_a_kill_from_outside_a_shard_is_captioned_in_batches(large, log, monkeypatch):
    model = _Model()
    sizes = _sizes(model, monkeypatch)
    assert [row.status for row in _alone(log, large, model)] == ["ok"] * 12
    assert sizes == [1, 4, 4, 4]


def test_only_the_batch_that_a_process_died_with_is_captioned_image_by_image(
    large, log, monkeypatch
):
    with pytest.raises(_Killed):
        _alone(log, large, _Model(2))  # the second batch
    assert log.crashes(7) == Crashes(singles=large.uris[4:8])  # counts against no image
    model = _Model()
    sizes = _sizes(model, monkeypatch)
    rows = _alone(log, large, model)
    assert [row.uri for row in rows] == large.uris
    assert sizes == [1, 4, 1, 1, 1, 1, 4]


def test_an_image_that_kills_its_batch_is_set_aside_after_two_deaths_alone(large, log):
    with pytest.raises(_Killed):
        _alone(log, large, _Model(2))
    for _ in range(2):  # the probe, a batch, then the batch's second image
        with pytest.raises(_Killed):
            _alone(log, large, _Model(3))
    rows = _alone(log, large, _Model())
    assert [number for number, row in enumerate(rows) if row.status == "failed"] == [5]


def test_an_image_that_kills_its_decoder_is_the_only_one_at_fault(large, log, monkeypatch):
    load = suspects.load_images

    def die(job, listed):
        if listed["uri"][0].as_py() == large.uris[5]:
            raise _Killed
        return load(job, listed)

    monkeypatch.setattr(suspects, "load_images", die)
    for _ in range(2):
        with pytest.raises(_Killed):
            _alone(log, large, _Model())
        assert log.crashes(7).singles == []
    rows = _alone(log, large, _Model())
    assert [number for number, row in enumerate(rows) if row.status == "failed"] == [5]
