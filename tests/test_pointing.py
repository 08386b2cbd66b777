"""The pointing game of benchmarks/pointing.py."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from conftest import WORDS, write_photos

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
    game.play(_map(1, 2), [box], (400, 200))
    game.play(_map(1, 1), [box], (400, 200))
    game.play(_map(0, 0), [[0, 0, 10, 10], box], (400, 200))
    assert (game.words, game.hits) == (3, 1)
    assert game.shares()["maps"] == pytest.approx(1 / 3)


def test_the_tolerance_is_15_pixels(pointing):
    # The centre of the cell at row 0, column 0 is 50, 25.
    for box, hit in (([65, 25, 90, 30], 1), ([66, 25, 90, 30], 0), ([40, 40, 60, 60], 1)):
        game = pointing.Game()
        game.play(_map(0, 0), [box], (400, 200))
        assert game.hits == hit


def test_the_centre_and_a_random_cell_play_too(pointing):
    game = pointing.Game()
    game.play(_map(0, 0), [[190, 90, 210, 110]], (400, 200))  # the centre alone
    assert game.shares() == {"maps": 0.0, "centre": 1.0, "random": 0.0}
    game = pointing.Game()
    game.play(_map(0, 0), [[0, 0, 400, 60]], (400, 200))  # the upper row: 8 of 16 cells come near
    assert game.shares() == {"maps": 1.0, "centre": 0.0, "random": 0.5}


def test_the_command_plays_with_both_maps(pointing, tmp_path, model_directory):
    photos = write_photos(tmp_path / "data" / "Images", 3)
    lines = ["image,caption", *(f"{photo.name},a dog" for photo in photos)]
    (tmp_path / "data" / "captions.txt").write_text("\n".join(lines) + "\n")
    everywhere = {"size": [80, 60], "nouns": {word: [[0, 0, 80, 60]] for word in WORDS}}
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({photo.name: everywhere for photo in photos[:2]}))
    arguments = [str(tmp_path / "data"), str(boxes), "--model", str(model_directory)]
    result = CliRunner().invoke(pointing.main, [*arguments, "--map=last", "--map=mean", "--blur=0"])
    assert result.exit_code == 0, result.output
    parsed = json.loads(result.output.splitlines()[-1])
    assert parsed["images"] == 2
    assert parsed["results"]["last, blur 0"] == parsed["results"]["mean, blur 0"]
    assert parsed["results"]["last, blur 0"]["words"] > 0
    assert parsed["results"]["last, blur 0"]["maps"] == 1
    boxes.write_text("{}")
    result = CliRunner().invoke(pointing.main, arguments)
    assert result.exit_code == 1
    assert "has boxes of no image in" in result.output
