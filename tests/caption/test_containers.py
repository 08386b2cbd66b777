"""Images in files of many go through the whole job as images in a folder do."""

import dataclasses
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from captioner.caption.job import caption_images, plan_captioning
from captioner.config import ExportConfig, ListingConfig, RunConfig
from captioner.errors import OutputError
from captioner.output.exports import export
from captioner.review.gallery import make_gallery
from captioner.review.rows import draw, find_row
from conftest import write_photos
from containers import MAKERS

RUN = RunConfig(
    engine="local",
    device="cpu",
    precision="fp32",
    shard_size=4,
    batch_size=3,
    max_error_rate=1,
)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten sound photos and two broken ones."""
    write_photos(tmp_path / "photos", 10)
    (tmp_path / "photos" / "empty.jpg").touch()
    (tmp_path / "photos" / "text.jpg").write_text("this is no image")
    return tmp_path / "photos"


def rows(output: Path) -> list[dict[str, Any]]:
    table: pa.Table = pyarrow.dataset.dataset(output).to_table()
    return table.to_pylist()


def _same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    names = ("caption", "tokens", "status", "width", "height", "bytes", "error")
    return all(ours[name] == theirs[name] for name in names)


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        *((kind, "local") for kind in MAKERS),
        ("tar", "ray"),
        pytest.param("parquet", "ray", marks=pytest.mark.thorough),
    ],
)
def test_the_rows_are_those_of_a_folder(
    kind: str,
    engine: str,
    photos: Path,
    model_directory: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if engine == "ray":
        request.getfixturevalue("local_ray")
    run = dataclasses.replace(RUN, engine=engine)
    caption_images(str(photos), f"{tmp_path}/folder", str(model_directory), run=RUN)
    source, output = MAKERS[kind](photos, tmp_path / "in"), tmp_path / "out"
    listing = ListingConfig(keep="number")
    arguments: dict[str, Any] = {"run": run, "listing": listing}
    caption_images(source, str(output), str(model_directory), **arguments)
    expected, found = rows(tmp_path / "folder"), rows(output)
    assert [row["number"] for row in found] == [*range(12)]
    assert all(map(_same, found, expected))
    # Resume: what is there stays, and what is missing comes back equal.
    parts = sorted(output.glob("part-*"))
    assert len(parts) == 4  # of 4, 3, 4 and 1 images: no shard crosses a container
    before = parts[0].stat().st_mtime_ns
    parts[1].unlink()
    summary = caption_images(source, str(output), str(model_directory), **arguments)
    assert summary.captioned == 3
    assert all(map(_same, rows(output), expected))
    assert parts[0].stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", list(MAKERS))
def test_what_shows_and_exports_photos_finds_them(
    kind: str, photos: Path, model_directory: Path, tmp_path: Path
) -> None:
    source, output = MAKERS[kind](photos, tmp_path / "in"), str(tmp_path / "out")
    caption_images(source, output, str(model_directory), run=RUN)
    ok = [row for row in rows(tmp_path / "out") if row["status"] == "ok"]
    page = make_gallery(output)
    assert page.count("data:image/jpeg") == len(ok) == 10
    assert draw(output, find_row(output, ok[3]["uri"])).startswith(b"\x89PNG")
    assert export(output, f"{tmp_path}/wds", form="webdataset").written == 10
    with tarfile.open(tmp_path / "wds/00000.tar") as tar:
        images = [name for name in tar.getnames() if name.endswith(".jpg")]
        data = [tar.extractfile(name).read() for name in images]  # type: ignore[union-attr]
    sound = [
        path for path in sorted(photos.iterdir()) if path.name not in ("empty.jpg", "text.jpg")
    ]
    assert data == [path.read_bytes() for path in sound]
    summary = export(output, f"{tmp_path}/text", form="sidecar", config=ExportConfig())
    assert summary.written == 10
    assert len([*(tmp_path / "text").rglob("*.txt")]) == 10


def _rewrite(tar: Path, names: list[str], numbers: dict[str, int], photos: Path) -> None:
    """Writes some photos into a tar file anew, in this order."""
    with tarfile.open(tar, "w") as written:
        for name in names:
            text = json.dumps({"number": numbers[name]}).encode()
            info = tarfile.TarInfo(f"{Path(name).stem}.json")
            info.size = len(text)
            written.addfile(info, io.BytesIO(text))
            written.add(photos / name, name)


def test_a_tar_file_that_changed_is_read_as_it_is_where_rows_are_missing(
    photos: Path, model_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tars, output = Path(MAKERS["tar"](photos, tmp_path / "in")), tmp_path / "out"
    arguments = (str(tars), str(output), str(model_directory))
    settings: dict[str, Any] = {"run": RUN, "listing": ListingConfig(keep="number")}
    caption_images(*arguments, **settings)
    before = rows(output)
    parts = sorted(output.glob("part-*"))
    assert [pq.read_metadata(part).num_rows for part in parts] == [4, 3, 4, 1]
    for part in parts[:2]:
        part.unlink()  # the rows of the first tar file
    names = [row["uri"].removeprefix("tar://").split("::")[0] for row in before[:7]]
    numbers = {name: 100 + number for number, name in enumerate(names)}
    write_photos(tmp_path / "more", 11)
    (tmp_path / "more" / "photo-0010.jpg").rename(photos / "new.jpg")
    renewed = [*reversed(names[1:]), "new.jpg"]
    _rewrite(tars / "00000.tar", renewed, numbers | {"new.jpg": 7}, photos)

    caption_images(*arguments, **settings)
    found = rows(output)
    assert len(found) == 13
    gone, *others = found[:7]
    assert (gone["status"], gone["uri"], gone["number"]) == ("unreadable", before[0]["uri"], 0)
    assert gone["error"] == "the tar file has changed since it was listed"
    assert [row["number"] for row in others] == [*range(101, 107)]
    assert [row["uri"] for row in others] == [row["uri"] for row in before[1:7]]
    assert all(map(_same, others, before[1:7]))
    assert found[7:12] == before[7:]
    assert (found[12]["status"], found[12]["number"]) == ("ok", 7)
    assert "changed since they were listed: 1: " in caplog.text
    assert "they still contain 6 of the 7 images to caption" in caplog.text
    # What shows photos finds them where they are now, and the next run has nothing to do.
    ok = [row for row in others if row["status"] == "ok"]
    assert draw(str(output), find_row(str(output), ok[0]["uri"])).startswith(b"\x89PNG")
    caplog.clear()
    assert caption_images(*arguments, **settings).captioned == 0
    assert "changed" not in caplog.text
    # The image comes back, and what failed is captioned again.
    _rewrite(tars / "00000.tar", [*renewed, names[0]], numbers | {"new.jpg": 7}, photos)
    settings["run"] = dataclasses.replace(RUN, retry_failed=True)
    caption_images(*arguments, **settings)
    assert _same(rows(output)[0], before[0])
    assert rows(output)[0]["number"] == 100


def test_a_parquet_file_that_changed_stops_the_job_where_rows_are_missing(
    photos: Path, model_directory: Path, tmp_path: Path
) -> None:
    folder, output = Path(MAKERS["parquet"](photos, tmp_path / "in")), tmp_path / "out"
    arguments = (str(folder), str(output), str(model_directory))
    caption_images(*arguments, run=RUN)
    first, *_, last = sorted(output.glob("part-*"))
    file = folder / "train-00000.parquet"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000_000))
    assert caption_images(*arguments, run=RUN).captioned == 0
    last.unlink()
    assert caption_images(*arguments, run=RUN).captioned == 1
    first.unlink()
    for do in (caption_images, plan_captioning):
        with pytest.raises(OutputError, match=r"00000\.parquet has changed .*, and 4 of its"):
            do(*arguments, run=RUN)
    assert caption_images(*arguments, run=RUN, overwrite=True).captioned == 12
