"""Captions of a low score are marked wherever they are shown."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from test_web import Page

from captioner.cli import main
from captioner.model import bundle
from captioner.model.averaging import average_models
from conftest import write_photos

MARK = "low: probably wrong"


def _set_low_score(model: Path, score: float | None) -> None:
    config = json.loads((model / "config.json").read_text())
    config["model"]["low_score"] = score
    (model / "config.json").write_text(json.dumps(config))


@pytest.fixture
def model(model_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_directory, tmp_path / "model"))


def test_low_scores_are_marked_in_the_report_the_gallery_and_the_review(model, tmp_path):
    write_photos(tmp_path / "photos", 4)

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(each) for each in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    def marked(output: Path) -> tuple[int, int, int]:
        run("gallery", output, "-o", tmp_path / "gallery.html")
        page = Page(str(output))
        grid = page.get("/").text
        rows = sum(MARK in page.get(f"/row/{number}").text for number in range(4))
        page.close()
        return (tmp_path / "gallery.html").read_text().count(MARK), grid.count(MARK), rows

    command = ["caption", tmp_path / "photos", "--model", model, "--engine", "local"]
    run(*command[:2], tmp_path / "unmeasured", *command[2:])
    assert "probably wrong" not in run("report", tmp_path / "unmeasured")
    assert marked(tmp_path / "unmeasured") == (0, 0, 0)

    scores = sorted(pd.read_parquet(tmp_path / "unmeasured")["score"])
    _set_low_score(model, (scores[0] + scores[1]) / 2)
    run(*command[:2], tmp_path / "measured", *command[2:])
    assert "where this model is probably wrong: 1 of 4" in run("report", tmp_path / "measured")
    assert marked(tmp_path / "measured") == (1, 1, 1)
    # The captions are the same: a job that was begun before goes on.
    assert "4 images (4 ok); 0 now" in run(*command[:2], tmp_path / "unmeasured", *command[2:])


def test_a_low_score_is_not_that_of_an_average(model, tmp_path):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    _set_low_score(model, -1.5)
    assert bundle.load(str(model)).config.low_score == -1.5
    average_models([str(model), str(other)], str(tmp_path / "average"))
    assert bundle.load(str(tmp_path / "average")).config.low_score is None
