"""The scores' calibration of benchmarks/calibration.py."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "calibration.py"


@pytest.fixture(scope="module")
def calibration():
    spec = importlib.util.spec_from_file_location("calibration", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write(path: Path, **columns: object) -> None:
    """A file such as ``captioner evaluate --per-image`` writes."""
    words = {"tokens": ["a", "dog", "."], "token_logprobs": [0.0, -0.7, 0.0]}
    frame = pd.DataFrame(columns)
    for name, value in (words | {"references": ["A dog."]}).items():
        if name not in frame:
            frame[name] = [value] * len(frame)
    frame.to_parquet(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, "cannot be read"),
        ({"text": ["a dog"]}, "has no column score"),
        ({"score": [-0.1, None], "cider": [0.5, 0.6]}, "lacks the score or the CIDEr"),
        ({"score": ["low"], "cider": [0.5]}, "lacks the score or the CIDEr"),
        ({"score": pd.Series([], dtype=float), "cider": pd.Series([], dtype=float)}, "no images"),
    ],
)
def test_a_file_that_evaluate_has_not_written_is_one_clear_line(
    calibration, tmp_path, columns, message
):
    path = tmp_path / "images.parquet"
    if columns is None:
        path.write_text("image,score\n")
    else:
        _write(path, **columns)
    result = CliRunner().invoke(calibration.main, [str(path)])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {path}")
    assert message in result.output
    assert "--per-image" in result.output
    assert result.output.count("\n") == 1


def test_captions_below_the_low_score_have_half_of_the_cider(calibration, tmp_path):
    scores = [round(-0.01 * (1 + place), 2) for place in range(100)]
    path = tmp_path / "images.parquet"
    ciders = [1.0] * 80 + [0.1] * 20
    _write(path, score=scores, cider=ciders)
    result = CliRunner().invoke(calibration.main, [str(path)])
    assert result.exit_code == 0, result.output
    # Half of the mean, 0.82, is 0.41: 20 captions of 0.1 and 10 of 1 have 0.4.
    assert json.loads(result.output.splitlines()[-1])["low_score"] == pytest.approx(-0.7)


def test_the_low_score_is_not_written_where_no_model_is(calibration, tmp_path):
    path = tmp_path / "images.parquet"
    _write(path, score=[-0.1], cider=[0.5])
    result = CliRunner().invoke(calibration.main, [str(path), "--write", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("Error: ")


def test_the_words_probabilities_are_compared_with_the_references(calibration, tmp_path):
    path = tmp_path / "images.parquet"
    sure, unsure = [0.0, -0.1, 0.0], [-2.3, -2.4, -0.1]
    _write(
        path,
        score=[-0.1, -0.1],
        cider=[0.5, 0.5],
        tokens=[["a", "dog", "."], ["two", "cats", "."]],
        token_logprobs=[sure, unsure],
        references=[["The dog.", "A brown dog."], ["A cat."]],
    )
    words = calibration.read_words(calibration.read(path))
    assert words["probability"].tolist() == pytest.approx([0.0907, 0.1003, 0.9048, 1], abs=1e-3)
    assert words["in_a_reference"].tolist() == [0, 0, 1, 1], "punctuation is no word"
    result = CliRunner().invoke(calibration.main, [str(path)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output.splitlines()[-1])["datasets"]["images"]
    assert found["calibration_error"] == pytest.approx(0.0716, abs=1e-3)
