"""Images in files of many go through the whole job as images in a folder do."""

import dataclasses
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pytest

from captioner.caption.job import caption_images
from captioner.config import ExportConfig, ListingConfig, RunConfig
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


@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("kind", list(MAKERS))
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
