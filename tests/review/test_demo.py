"""The model that comes with captioner, by the commands that use it when none is named."""

import json
import re
from pathlib import Path

import pyarrow.dataset
import safetensors
from click.testing import CliRunner
from PIL import Image

from captioner.cli import main
from captioner.model import bundle
from captioner.review.demo import PHOTOS

MODEL = Path(bundle.DEFAULT)


def test_the_model_in_the_box_is_small_and_in_half_precision():
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert files.keys() == {"config.json", "tokenizer.json", "model.safetensors", "README.md"}
    assert sum(files.values()) <= 32 * 2**20
    with safetensors.safe_open(MODEL / "model.safetensors", "pt") as weights:
        kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert kinds <= {"F16", "I64"}
    loaded = bundle.load(bundle.DEFAULT)
    assert {"dog", "grass", "red", "."} <= {loaded.vocabulary.words([i])[0] for i in range(4, 2000)}


def test_the_demo_captions_scikit_images_photos_and_draws_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 0, result.output
    rows = pyarrow.dataset.dataset("captioner-demo/captions").to_table().to_pylist()
    assert [Path(row["uri"]).name for row in rows] == sorted(PHOTOS)
    for row in rows:
        assert len(row["tokens"]) == len(row["attention_peak"]) > 4
        assert row["caption"] in result.output
        drawing = Path("captioner-demo/overlays", Path(row["uri"]).stem + ".png")
        assert str(drawing) in result.output
        with Image.open(drawing) as image:
            assert image.width > 400
    captions = {Path(row["uri"]).stem: row["caption"] for row in rows}
    assert len(set(captions.values())) == len(captions), "a caption is of its image"
    assert re.search(r"\b(man|woman|person|girl|boy)\b", captions["astronaut"])
    again = CliRunner().invoke(main, ["demo"])
    assert (again.exit_code, again.output) == (0, result.output)


def test_caption_takes_the_model_in_the_box_by_default(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (60, 40), "green").save(photos / "a.png")
    result = CliRunner().invoke(
        main, ["caption", str(photos), str(tmp_path / "out"), "--engine", "local"]
    )
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "out/__captioner/run.json").read_text())["settings"]
    assert settings["model"] == bundle.load(bundle.DEFAULT).digests["model.safetensors"]


def test_without_scikit_image_the_demo_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "skimage", None)
    result = CliRunner().invoke(main, ["demo", str(tmp_path)])
    assert result.exit_code == 2
    assert "pip install -e '.[demo]'" in result.output
