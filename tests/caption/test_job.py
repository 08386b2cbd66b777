import dataclasses
import json
from pathlib import Path

import datasets
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from captioner.caption import job, plan
from captioner.caption.job import caption_images, plan_captioning
from captioner.caption.plan import choose_engine
from captioner.cli import main
from captioner.config import DecodeConfig, ListingConfig, RunConfig
from captioner.errors import ErrorRateError, FingerprintError, InputError, OutputError
from captioner.model import bundle
from captioner.output import attention
from captioner.output.compaction import compact
from captioner.output.directory import OutputDirectory
from captioner.review.report import summarise
from captioner.runtime.device import resolve_precision
from captioner.runtime.progress import Progress
from captioner.schema import COLUMNS
from conftest import tiny_model, write_photos

RUN = RunConfig(
    engine="local",
    shard_size=4,
    batch_size=3,
    precision="fp32",
    device="cpu",
    max_error_rate=1,
)


def _rows(output: Path) -> list[dict]:
    return [
        row for part in sorted(output.glob("part-*")) for row in pq.read_table(part).to_pylist()
    ]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten sound photos and the usual broken ones."""
    directory = tmp_path / "photos"
    good = write_photos(directory, 10)
    (directory / "empty.jpg").touch()
    (directory / "text.jpg").write_text("this is no image")
    (directory / "truncated.jpg").write_bytes(good[0].read_bytes()[:-200])
    return directory


def _engine(name: str, request: pytest.FixtureRequest) -> RunConfig:
    if name == "ray":
        request.getfixturevalue("local_ray")
    return RunConfig(**{**vars(RUN), "engine": name})


ENGINES = ["local", pytest.param("ray", marks=pytest.mark.thorough)]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_listed_image_has_its_row_in_order(
    engine, photos, model_directory, tmp_path, request
):
    output = tmp_path / "out"
    summary = caption_images(
        str(photos), str(output), str(model_directory), run=_engine(engine, request)
    )
    rows = _rows(output)
    assert [row["uri"] for row in rows] == sorted(str(path) for path in photos.iterdir())
    assert summary.rows == {"ok": 10, "undecodable": 3}
    assert summary.captioned == 13
    for row in rows:
        if row["status"] == "ok":
            assert row["caption"] == " ".join(row["tokens"])
            assert len(row["tokens"]) == len(row["token_logprobs"]) == len(row["attention_peak"])
            maps = attention.decode(row["attention"], row["attention_peak"], grid=3)
            np.testing.assert_allclose(maps.sum((1, 2)), 1, atol=0.05)
            assert (row["width"], row["height"]) == (80, 60)
            assert row["bytes"] == Path(row["uri"]).stat().st_size
            assert row["error"] is None
        else:
            assert row["caption"] is row["tokens"] is row["attention"] is None
            assert row["error"]


def test_progress_is_seen_within_a_shard(photos, model_directory, tmp_path, monkeypatch):
    counted = []

    class Counted(Progress):
        def update(self, count: int = 1) -> None:
            counted.append(count)

    monkeypatch.setattr(job, "progress_bar", lambda *_, **__: Counted())
    run = dataclasses.replace(RUN, shard_size=256, batch_size=3)
    caption_images(str(photos), str(tmp_path / "out"), str(model_directory), run=run)
    assert counted == [3, 3, 3, 3, 1]


def test_both_engines_write_the_same_rows(photos, model_directory, tmp_path, request):
    for engine in ("local", "ray"):
        caption_images(
            str(photos),
            str(tmp_path / engine),
            str(model_directory),
            decode=DecodeConfig(beam=2),
            run=_engine(engine, request),
        )
    local, ray = _rows(tmp_path / "local"), _rows(tmp_path / "ray")
    for ours, theirs in zip(local, ray, strict=True):
        for name, value in ours.items():
            if name in ("score", "token_logprobs", "attention_peak") and value is not None:
                np.testing.assert_allclose(value, theirs[name], atol=1e-5)
            elif name != "attention":
                assert value == theirs[name], name


@pytest.mark.parametrize("engine", ENGINES)
def test_columns_of_the_source_come_along(engine, photos, model_directory, tmp_path, request):
    paths = sorted(photos.iterdir(), reverse=True)
    source = tmp_path / "list.parquet"
    table = pa.table(
        {
            "url": [f"photos/{path.name}" for path in paths],
            "id": pa.array(range(len(paths)), pa.int16()),
            "caption": [path.name for path in paths],
        }
    )
    listing = ListingConfig(keep="caption=name,id", id="id")
    arguments = str(source), str(tmp_path / "out"), str(model_directory)
    run = _engine(engine, request)
    pq.write_table(table.slice(0, 7), source)
    caption_images(*arguments, run=run, listing=listing)
    (tmp_path / "out/part-000001.parquet").unlink()
    assert any(f" 4 ({photos}/" in line for line in summarise(arguments[1]).lines())
    assert f", for example 0 ({paths[0]}): " in "".join(summarise(arguments[1]).lines())
    pq.write_table(table, source)
    (photos / "empty.jpg").write_bytes(paths[4].read_bytes())
    again = dataclasses.replace(run, retry_failed=True)
    caption_images(*arguments, run=again, listing=listing)
    compact(str(tmp_path / "out"), 1 << 30)
    [part] = (tmp_path / "out").glob("part-*")
    captioned = pq.read_table(part)
    assert captioned.column_names == [*COLUMNS.names, "name", "id"]
    assert captioned["id"].type == pa.int16()
    assert captioned["id"].to_pylist() == [*range(len(paths))]
    assert captioned["name"].to_pylist() == [path.name for path in paths]
    assert captioned["uri"].to_pylist() == [str(path) for path in paths]
    assert captioned["status"].to_pylist().count("ok") == 11
    with pytest.raises(FingerprintError, match="--keep was name: string, id: int16, is nothing"):
        caption_images(*arguments, run=run, listing=ListingConfig())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_summary_says_what_the_time_went_to(engine, photos, model_directory, tmp_path, request):
    output = tmp_path / "out"
    run = _engine(engine, request)
    summary = caption_images(str(photos), str(output), str(model_directory), run=run)
    written = json.loads((output / "__captioner/summary.json").read_text())["timing"]
    # 13 images in shards of 4, the three broken ones in different places of them
    assert (written["batch_images"], written["batches"]) == (10, summary.timing.batches)
    assert written["batch_fill"] == 10 / (3 * written["batches"])
    for name in ("decode_seconds", "model_seconds", "write_seconds"):
        assert 0 < written[name] < 4 * summary.seconds, name
    busy = written["model_seconds"] + written["model_waited_for_decode_seconds"]
    busy += written["model_waited_for_write_seconds"]
    assert written["model_busy"] == pytest.approx(written["model_seconds"] / busy)
    assert busy < summary.seconds
    assert written["bottleneck"] in ("model", "decode", "write")
    assert ", limited by " in summary.describe()


def test_the_usual_readers_read_the_output(photos, model_directory, tmp_path):
    output = tmp_path / "out"
    caption_images(str(photos), str(output), str(model_directory), run=RUN)
    assert len(pd.read_parquet(output)) == 13
    [[count]] = duckdb.sql(f"SELECT count(*) FROM '{output}/*.parquet'").fetchall()
    assert count == 13
    table = pyarrow.dataset.dataset(output).to_table()
    assert table.num_rows == 13
    for side in ("attention_height", "attention_width"):
        assert set(table[side].to_pylist()) <= {3, None}
    assert table.schema.metadata[b"captioner.attention.levels"] == b"127"
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(output), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["uri"] == table["uri"].to_pylist()
    assert loaded["caption"] == table["caption"].to_pylist()


def test_a_resume_touches_no_finished_shard(photos, model_directory, tmp_path):
    output = tmp_path / "out"
    caption_images(str(photos), str(output), str(model_directory), run=RUN)
    (output / "part-000001.parquet").unlink()
    before = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
    write_photos(photos / "more", 2, seed=5)
    summary = caption_images(str(photos), str(output), str(model_directory), run=RUN)
    assert summary.captioned == 4 + 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    uris = [row["uri"] for row in _rows(output)]
    assert len(uris) == len(set(uris)) == 15
    again = caption_images(str(photos), str(output), str(model_directory), run=RUN)
    assert again.captioned == 0
    assert again.rows == summary.rows


def test_another_model_on_the_same_output_is_refused(photos, model_directory, tmp_path, vocabulary):
    output = tmp_path / "out"
    caption_images(str(photos), str(output), str(model_directory), run=RUN)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    bundle.save(str(tmp_path / "other"), tiny_model(seed=9), vocabulary)
    with pytest.raises(FingerprintError, match="another model"):
        caption_images(str(photos), str(output), str(tmp_path / "other"), run=RUN)
    with pytest.raises(FingerprintError, match="--beam was 1, is 2"):
        caption_images(
            str(photos), str(output), str(model_directory), decode=DecodeConfig(beam=2), run=RUN
        )
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
    caption_images(str(photos), str(output), str(tmp_path / "other"), run=RUN, overwrite=True)
    assert len(_rows(output)) == 13


def test_the_default_beam_width_is_the_models(photos, tmp_path, vocabulary):
    model, output, greedy = (str(tmp_path / name) for name in ("model", "out", "greedy"))
    bundle.save(model, tiny_model(beam=3), vocabulary)
    caption_images(str(photos), output, model, run=RUN)
    # Asked for, it is the same job; greedy captions are another's.
    again = caption_images(str(photos), output, model, decode=DecodeConfig(beam=3), run=RUN)
    assert again.captioned == 0
    with pytest.raises(FingerprintError, match="--beam was 3, is 1"):
        caption_images(str(photos), output, model, decode=DecodeConfig(beam=1), run=RUN)
    caption_images(str(photos), greedy, model, decode=DecodeConfig(beam=1), run=RUN)
    scores, others = ([row["score"] for row in _rows(Path(each))] for each in (output, greedy))
    assert scores != others


@pytest.mark.parametrize(("mode", "maps"), [("mean", 1), ("none", 0)])
def test_fewer_maps_may_be_kept(mode, maps, photos, model_directory, tmp_path):
    output = tmp_path / "out"
    decode = DecodeConfig(attention=mode)
    caption_images(str(photos), str(output), str(model_directory), decode=decode, run=RUN)
    for row in _rows(output):
        if row["status"] == "ok":
            assert len(row["attention_peak"] or []) == maps
            assert len(row["attention"] or b"") == maps * 9


def test_large_files_and_images_are_rejected_and_vanished_ones_unreadable(
    photos, model_directory, tmp_path
):
    listing = tmp_path / "list.txt"
    names = [*sorted(path.name for path in photos.iterdir()), "gone.jpg"]
    listing.write_text("\n".join(f"photos/{name}" for name in names))
    run = RunConfig(**{**vars(RUN), "max_pixels": 4000})
    summary = caption_images(str(listing), str(tmp_path / "out"), str(model_directory), run=run)
    assert summary.rows == {"rejected": 11, "undecodable": 2, "unreadable": 1}
    run = RunConfig(**{**vars(RUN), "max_bytes": 100})
    caption_images(str(listing), str(tmp_path / "small"), str(model_directory), run=run)
    rejected = [row for row in _rows(tmp_path / "small") if row["status"] == "rejected"]
    assert len(rejected) == 11
    for row in rejected:
        assert row["error"] == "more than 100 bytes"
        assert row["bytes"] == Path(row["uri"]).stat().st_size


@pytest.mark.thorough
def test_a_device_that_an_actor_lacks_is_one_line(photos, model_directory, tmp_path, local_ray):
    command = ["caption", str(photos), str(tmp_path / "out"), "--model", str(model_directory)]
    result = CliRunner().invoke(main, [*command, "--engine", "ray", "--device", "mps"])
    assert result.exit_code == 2, result.output
    assert result.output.splitlines()[-1].startswith("captioner: no device 'mps' here; use ")
    lines = [line for line in result.output.splitlines() if not line.startswith("captioning: ")]
    assert len(lines) == 2, result.output  # the plan, and that


def test_the_engine_is_ray_only_where_there_is_a_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert choose_engine(RunConfig()) == "local"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert choose_engine(RunConfig()) == "ray"
    assert choose_engine(RunConfig(engine="local")) == "local"
    assert choose_engine(RunConfig(device="cuda:1")) == "local"
    with pytest.raises(InputError, match=r"^--device cuda:1 needs --engine local: Ray chooses"):
        choose_engine(RunConfig(device="cuda:1", engine="ray"))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_rate_above_the_limit_is_an_error_after_all_is_written(
    engine, photos, model_directory, tmp_path, request
):
    output = tmp_path / "out"
    run = RunConfig(**{**vars(_engine(engine, request)), "max_error_rate": 0.2})
    allowed = RunConfig(**{**vars(run), "max_error_rate": 3 / 13})
    caption_images(str(photos), str(output), str(model_directory), run=allowed)
    for _ in range(2):  # the rows of earlier runs count too
        with pytest.raises(ErrorRateError) as caught:
            caption_images(str(photos), str(output), str(model_directory), run=run)
        assert str(caught.value) == (
            f"{output}: 13 images (10 ok, 3 undecodable): 23.1% of the listed images are not ok, "
            "more than --max-error-rate 20.0%; captioner report shows why"
        )
        assert len(_rows(output)) == 13
        summary = json.loads((output / "__captioner/summary.json").read_text())
        assert summary["rows"] == {"ok": 10, "undecodable": 3}
        assert summary["error"] is None


@pytest.mark.parametrize("engine", ENGINES)
def test_retry_failed_replaces_rows_in_place(engine, photos, model_directory, tmp_path, request):
    output, run = tmp_path / "out", _engine(engine, request)
    (photos / "truncated.jpg").write_bytes(bytes(100_000))  # and so larger than what mends it
    run = RunConfig(**{**vars(run), "max_bytes": 50_000})
    caption_images(str(photos), str(output), str(model_directory), run=run)
    before = _rows(output)
    mended = ["empty.jpg", "truncated.jpg"]
    for name in mended:
        (photos / name).write_bytes((photos / "photo-0000.jpg").read_bytes())
    sound = output / "part-000001.parquet"
    written = sound.stat().st_mtime_ns
    run = RunConfig(**{**vars(run), "retry_failed": True})
    summary = caption_images(str(photos), str(output), str(model_directory), run=run)
    assert summary.captioned == 3
    assert summary.rows == {"ok": 12, "undecodable": 1}
    after = _rows(output)
    assert [row["uri"] for row in after] == [row["uri"] for row in before]
    for old, new in zip(before, after, strict=True):
        if Path(new["uri"]).name in mended:
            expected = "rejected" if Path(new["uri"]).name == "truncated.jpg" else "undecodable"
            assert (old["status"], new["status"]) == (expected, "ok")
            assert new["caption"] == " ".join(new["tokens"])
        else:
            assert new == old
    assert sound.stat().st_mtime_ns == written


def test_images_that_are_not_listed_any_more_keep_their_rows(photos, model_directory, tmp_path):
    output = tmp_path / "out"
    caption_images(str(photos), str(output), str(model_directory), run=RUN)
    before = _rows(output)
    for name in ("photo-0000.jpg", "photo-0005.jpg"):
        (photos / name).unlink()
    summary = caption_images(str(photos), str(output), str(model_directory), run=RUN)
    assert summary.unlisted == 2
    assert summary.describe().endswith("; 2 images are not listed any more; their rows are kept")
    assert _rows(output) == before
    limited = ListingConfig(limit=3)
    summary = caption_images(
        str(photos), str(output), str(model_directory), run=RUN, listing=limited
    )
    assert summary.unlisted == 0


def test_a_second_job_on_one_output_is_refused(photos, model_directory, tmp_path):
    directory = OutputDirectory(str(tmp_path / "out"))
    with directory.locked(), pytest.raises(OutputError, match=r"^another job is using"):
        caption_images(str(photos), directory.uri, str(model_directory), run=RUN)
    assert not _rows(tmp_path / "out")
    caption_images(str(photos), directory.uri, str(model_directory), run=RUN)
    assert len(_rows(tmp_path / "out")) == 13


def test_the_error_rate_counts_only_images_that_are_listed(photos, model_directory, tmp_path):
    output, run = tmp_path / "out", RunConfig(**{**vars(RUN), "max_error_rate": 0.1})
    with pytest.raises(ErrorRateError, match=r"23\.1% of the listed images are not ok"):
        caption_images(str(photos), str(output), str(model_directory), run=run)
    for name in ("empty.jpg", "text.jpg"):
        (photos / name).unlink()
    summary = caption_images(str(photos), str(output), str(model_directory), run=run)
    assert (summary.rows, summary.unlisted) == ({"ok": 10, "undecodable": 3}, 2)
    for path in photos.glob("photo-*"):
        path.unlink()
    with pytest.raises(ErrorRateError, match=r"100\.0% of the listed images are not ok"):
        caption_images(str(photos), str(output), str(model_directory), run=run)


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"precision": "bf16"}, "--precision was fp32, is bf16"),
        ({"max_pixels": 10_000}, "--max-pixels was 256000000, is 10000"),
        ({"max_bytes": 10_000}, "--max-bytes was 256000000, is 10000"),
    ],
)
def test_a_resume_that_would_mix_rows_is_refused_with_what_differs(
    changed, difference, photos, model_directory, tmp_path
):
    arguments = str(photos), str(tmp_path / "out"), str(model_directory)
    caption_images(*arguments, run=RUN)
    run = RunConfig(**{**vars(RUN), **changed})
    for refused in (caption_images, plan_captioning):
        with pytest.raises(FingerprintError, match=difference) as caught:
            refused(*arguments, run=run)
        assert "\n" not in str(caught.value)


def test_the_fingerprint_holds_the_resolved_precision_and_no_setting_of_a_run(
    photos, model_directory, tmp_path, monkeypatch
):
    arguments = str(photos), str(tmp_path / "out"), str(model_directory)
    caption_images(*arguments, run=RunConfig(**{**vars(RUN), "precision": "auto"}))
    settings = json.loads((tmp_path / "out/__captioner/run.json").read_text())["settings"]
    assert settings["precision"] == resolve_precision("auto", torch.device("cpu"))
    changed = {"batch_size": 2, "shard_size": 9, "retries": 0, "decoders": 1, "compile": "off"}
    changed |= {"precision": settings["precision"], "stop_after_failures": None}
    assert caption_images(*arguments, run=RunConfig(**{**vars(RUN), **changed})).captioned == 0
    # On a machine whose hardware resolves it otherwise, the resume is refused.
    other = {"fp32": "bf16", "bf16": "fp32"}[settings["precision"]]
    monkeypatch.setattr(plan, "resolve_precision", lambda *_: other)
    with pytest.raises(FingerprintError, match=rf"--precision was \w+, is {other}"):
        caption_images(*arguments, run=RunConfig(**{**vars(RUN), "precision": "auto"}))
