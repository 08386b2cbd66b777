"""The pointing game of benchmarks/pointing.py."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from conftest import WORDS, tiny_model, write_photos

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "pointing.py"


@pytest.fixture(scope="module")
def pointing():
    spec = importlib.util.spec_from_file_location("pointing", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _map(row: int, column: int) -> np.ndarray:
    map_HW = np.full((4, 4), 0.01)
    map_HW[row, column] = 0.9
    return map_HW


def test_the_largest_value_has_to_fall_into_a_box(pointing):
    # A photo of 400×200: cells of 100×50 pixels. The box holds the cell at row 1, column 2.
    box, game = [205, 55, 295, 95], pointing.Game()
    for cell, mean, boxes in (
        ((1, 2), (1, 2), [box]),
        ((1, 1), (1, 2), [box]),
        ((0, 0), (3, 3), [[0, 0, 10, 10], box]),
    ):
        game.play(_map(*cell), _map(*mean), boxes, (400, 200))
    assert (game.words, game.hits, game.mean) == (3, 1, 2)
    assert game.shares()["maps"] == pytest.approx(1 / 3)
    assert game.shares()["mean map"] == pytest.approx(2 / 3)


def test_the_tolerance_is_15_pixels(pointing):
    # The centre of the cell at row 0, column 0 is 50, 25.
    for box, hit in (([65, 25, 90, 30], 1), ([66, 25, 90, 30], 0), ([40, 40, 60, 60], 1)):
        game = pointing.Game()
        game.play(_map(0, 0), _map(0, 0), [box], (400, 200))
        assert game.hits == hit


def test_the_centre_and_a_random_cell_play_too(pointing):
    game = pointing.Game()
    corner = _map(0, 0)
    game.play(corner, corner, [[190, 90, 210, 110]], (400, 200))  # the centre alone
    assert game.shares() == {"maps": 0.0, "mean map": 0.0, "centre": 1.0, "random": 0.0}
    game = pointing.Game()
    game.play(corner, corner, [[0, 0, 400, 60]], (400, 200))  # the upper row: 8 of 16 cells near
    assert game.shares() == {"maps": 1.0, "mean map": 1.0, "centre": 0.0, "random": 0.5}


def test_maps_are_the_models_own_unless_they_are_asked_for(pointing):
    own = tiny_model(attention_map="mean", attention_norms=True, attention_blur=1.0).config
    assert pointing.Maps().of(own) == own
    changed = pointing.Maps("last", False, 0.0).of(own)
    assert changed == dataclasses.replace(
        own, attention_map="last", attention_norms=False, attention_blur=0.0
    )


def test_the_command_compares_maps(pointing, tmp_path, model_directory):
    photos = write_photos(tmp_path / "data" / "Images", 3)
    lines = ["image,caption", *(f"{photo.name},a dog" for photo in photos)]
    (tmp_path / "data" / "captions.txt").write_text("\n".join(lines) + "\n")
    everywhere = {"size": [80, 60], "nouns": {word: [[0, 0, 80, 60]] for word in WORDS}}
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({photo.name: everywhere for photo in photos[:2]}))
    arguments = [str(tmp_path / "data"), str(boxes), "--model", str(model_directory)]
    options = ["--map=last", "--map=mean", "--norms=no", "--norms=yes", "--blur=0"]
    result = CliRunner().invoke(pointing.main, [*arguments, *options])
    assert result.exit_code == 0, result.output
    parsed = json.loads(result.output.splitlines()[-1])
    assert parsed["images"] == 2
    assert list(parsed["results"]) == [
        "last, blur 0",
        "last, blur 0, norms",
        "mean, blur 0",
        "mean, blur 0, norms",
    ]
    assert parsed["results"]["last, blur 0"] == parsed["results"]["mean, blur 0, norms"]
    assert parsed["results"]["last, blur 0"]["words"] > 0
    assert parsed["results"]["last, blur 0"]["maps"] == 1
    boxes.write_text("{}")
    result = CliRunner().invoke(pointing.main, arguments)
    assert result.exit_code == 1
    assert "has boxes of no image in" in result.output
