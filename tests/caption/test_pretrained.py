"""A pretrained model through the whole job: the guarantees are those of a model of ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from captioner.caption.job import caption_images
from captioner.config import DecodeConfig, RunConfig
from captioner.errors import FingerprintError, InputError
from captioner.model.huggingface.captioner import PretrainedCaptioner
from captioner.model.loading import load_model
from captioner.output import attention
from captioner.review.gallery import make_gallery
from conftest import write_photos

RUN = RunConfig(engine="local", device="cpu", precision="fp32", shard_size=4, batch_size=3)
DECODE = DecodeConfig(max_new_tokens=6, attention="tokens")


def rows(output: Path) -> list[dict[str, Any]]:
    return pyarrow.dataset.dataset(output).to_table().to_pylist()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", 10)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"not a photo")
    return tmp_path / "photos"


@pytest.fixture
def blip(directory_of: Callable[[str], Path]) -> str:
    return str(directory_of("blip"))


def test_every_image_has_its_row_with_maps_and_finish(
    blip: str, photos: Path, tmp_path: Path
) -> None:
    caption_images(str(photos), str(tmp_path / "out"), blip, decode=DECODE, run=RUN)
    written = rows(tmp_path / "out")
    assert [row["status"] for row in written] == ["undecodable"] + ["ok"] * 10
    for row in written[1:]:
        grid = row["attention_height"], row["attention_width"]
        assert grid == (4, 4)
        maps = attention.decode(row["attention"], row["attention_peak"], grid=grid)
        assert len(maps) == len(row["tokens"]) == len(row["token_logprobs"])
        np.testing.assert_allclose(maps.sum((1, 2)), 1, atol=0.05)
        assert row["finish"] in ("stop", "length")


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.thorough)])
def test_each_image_has_the_prompt_that_its_columns_give(
    blip: str, photos: Path, tmp_path: Path, engine: str, request: pytest.FixtureRequest
) -> None:
    if engine == "ray":
        request.getfixturevalue("local_ray")
    names = sorted(path.name for path in photos.glob("photo-*"))
    titles = [None, "a", "a red car", "the {braces} of a car", "a"] * 2
    table = pa.table({"url": [f"photos/{name}" for name in names], "title": titles})
    pq.write_table(table, tmp_path / "list.parquet")
    run = RunConfig(**{**vars(RUN), "engine": engine})
    decode = DecodeConfig(max_new_tokens=6, prompt="see {title} {{x}}", beam=1)
    output = tmp_path / "out"
    caption_images(f"{tmp_path}/list.parquet", str(output), blip, decode=decode, run=run)
    written = rows(output)
    assert [row["title"] for row in written] == titles
    for row in written[:5]:
        prompt = f"see {row['title'] or ''} {{{{x}}}}".replace("{braces}", "{{braces}}")
        alone = tmp_path / "alone" / Path(row["uri"]).name
        fixed = DecodeConfig(max_new_tokens=6, prompt=prompt, beam=1)
        (tmp_path / "one.txt").write_text(row["uri"])
        caption_images(f"{tmp_path}/one.txt", str(alone), blip, decode=fixed, run=RUN)
        [expected] = rows(alone)
        assert (row["caption"], row["status"]) == (expected["caption"], "ok")
    assert len({row["caption"] for row in written[:5]}) > 1


def test_a_prompt_that_names_no_column_of_the_source_is_refused(
    blip: str, photos: Path, tmp_path: Path
) -> None:
    decode = DecodeConfig(prompt="see {titel}")
    (tmp_path / "list.csv").write_text("url,title\nphotos/photo-0000.jpg,a car\n")
    for source, known in (
        (photos, "it has no columns"),
        (tmp_path / "list.csv", "its columns are url, title"),
    ):
        with pytest.raises(InputError, match=f"the source has no column 'titel'; {known};"):
            caption_images(str(source), f"{tmp_path}/out", blip, decode=decode, run=RUN)


def test_an_image_of_another_grid_has_its_own(
    directory_of: Callable[[str], Path], photos: Path, tmp_path: Path
) -> None:
    from PIL import Image

    Image.open(photos / "photo-0000.jpg").resize((40, 90)).save(photos / "tall.jpg")
    model, output = str(directory_of("qwen2_5_vl")), tmp_path / "out"
    caption_images(str(photos), str(output), model, decode=DECODE, run=RUN)
    grids = {
        Path(row["uri"]).name: (row["attention_height"], row["attention_width"])
        for row in rows(output)
    }
    assert grids["tall.jpg"][0] > grids["tall.jpg"][1]
    assert grids["photo-0000.jpg"][0] < grids["photo-0000.jpg"][1]
    assert "tall.jpg" in make_gallery(str(output))


def test_a_resumed_job_captions_what_is_left_and_no_more(
    blip: str, photos: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    caption_images(str(photos), str(whole), blip, decode=DECODE, run=RUN)
    caption_images(str(photos), str(output), blip, decode=DECODE, run=RUN)
    (output / "part-000001.parquet").unlink()
    summary = caption_images(str(photos), str(output), blip, decode=DECODE, run=RUN)
    assert summary.captioned == 4
    assert rows(output) == rows(whole)


def test_an_image_that_the_model_fails_on_costs_its_row_alone(
    blip: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caption, seen = PretrainedCaptioner.caption, []

    def fail(self: Any, images: Any, prompts: Any = None) -> Any:
        seen.append(len(images))
        if any(image.mean() == bad for image in images):
            raise ValueError("no such thing")
        return caption(self, images, prompts)

    from captioner.data import images

    bad = images.decode((photos / "photo-0004.jpg").read_bytes(), load_model(blip).preparation)
    bad = bad.pixels_HW3.mean()
    monkeypatch.setattr(PretrainedCaptioner, "caption", fail)
    output = tmp_path / "out"
    run = RunConfig(**{**vars(RUN), "max_error_rate": 0.5})
    caption_images(str(photos), str(output), blip, decode=DECODE, run=run)
    failed = [row for row in rows(output) if row["status"] == "failed"]
    assert [Path(row["uri"]).name for row in failed] == ["photo-0004.jpg"]
    assert failed[0]["error"] == "ValueError: no such thing"
    monkeypatch.setattr(PretrainedCaptioner, "caption", caption)
    again = RunConfig(**{**vars(run), "retry_failed": True})
    caption_images(str(photos), str(output), blip, decode=DECODE, run=again)
    assert [row["status"] for row in rows(output)].count("ok") == 10


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"prompt": "a photo of"}, "prompt"), ({"max_new_tokens": 7}, "--max-new-tokens was 6, is 7")],
)
def test_a_resume_with_other_settings_is_refused(
    changes: dict[str, Any], named: str, blip: str, photos: Path, tmp_path: Path
) -> None:
    caption_images(str(photos), str(tmp_path / "out"), blip, decode=DECODE, run=RUN)
    other = DecodeConfig(**{**vars(DECODE), **changes})
    with pytest.raises(FingerprintError, match=named):
        caption_images(str(photos), str(tmp_path / "out"), blip, decode=other, run=RUN)


def test_sampled_captions_do_not_depend_on_the_batch_and_stand_in_the_row(
    blip: str, photos: Path, tmp_path: Path
) -> None:
    decode = DecodeConfig(max_new_tokens=6, temperature=1.0, seed=3, captions=3)
    captions = []
    for size in (1, 4):
        run = RunConfig(**{**vars(RUN), "batch_size": size})
        output = tmp_path / f"out-{size}"
        caption_images(str(photos), str(output), blip, decode=decode, run=run)
        captions.append([row["captions"] for row in rows(output)])
        assert all(row["captions"][0] == row["caption"] for row in rows(output) if row["captions"])
    assert captions[0] == captions[1]
    assert [len(each) for each in captions[0] if each] == [3] * 10


@pytest.mark.slow
def test_both_engines_write_the_same_rows(
    blip: str, photos: Path, tmp_path: Path, local_ray: None
) -> None:
    written = []
    for engine in ("local", "ray"):
        run = RunConfig(**{**vars(RUN), "engine": engine})
        caption_images(str(photos), str(tmp_path / engine), blip, decode=DECODE, run=run)
        written.append(rows(tmp_path / engine))
    exact = ("uri", "caption", "tokens", "status", "finish", "attention_height", "width")
    for one, other in zip(*written, strict=True):  # the engines' threads differ in number
        assert [one[name] for name in exact] == [other[name] for name in exact]
        for name in ("token_logprobs", "attention_peak"):
            np.testing.assert_allclose(one[name] or [], other[name] or [], atol=1e-5)


def test_run_json_names_the_model_and_the_prompt(blip: str, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    caption_images(str(photos), str(output), blip, decode=DECODE, run=RUN)
    text = json.dumps(json.loads((output / "__captioner" / "run.json").read_text()))
    assert "BLIP" in text
    assert "max_new_tokens" in text


def test_a_pretrained_model_is_not_trained(blip: str, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from captioner.cli import main

    data = tmp_path / "data"
    write_photos(data / "Images", 12)
    lines = ["image,caption"] + [f"photo-{n:04d}.jpg,a dog runs" for n in range(12)]
    (data / "captions.txt").write_text("\n".join(lines))
    names = [line.split(",")[0] for line in lines[1:]]
    (data / "train").write_text("\n".join(names[:8]))
    (data / "val").write_text("\n".join(names[8:]))
    lists = ["--train-list", str(data / "train"), "--val-list", str(data / "val")]
    command = ["train", str(data), str(tmp_path / "m"), "--model", blip, "--batch-size", "4"]
    result = CliRunner().invoke(main, command + lists)
    assert result.exit_code == 2
    assert "captioner does not train pretrained models" in result.output
