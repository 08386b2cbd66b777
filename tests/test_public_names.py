"""The public names of the package."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import captioner
from conftest import write_photos

ROOT = Path(__file__).parents[1]


def test_the_names_are_sorted_as_ruff_sorts_them():
    constants = [name for name in captioner.__all__ if name.isupper()]
    classes = [name for name in captioner.__all__ if name[0].isupper() and not name.isupper()]
    functions = [name for name in captioner.__all__ if name.islower()]
    assert captioner.__all__ == sorted(constants) + sorted(classes) + sorted(functions)


@pytest.mark.parametrize("name", captioner.__all__)
def test_every_public_name_exists_and_is_documented(name: str):
    value = getattr(captioner, name)
    assert name in dir(captioner)
    if callable(value):
        assert inspect.getdoc(value)
    assert f"`{name}" in (ROOT / "docs" / "reference" / "python.md").read_text()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'captioner' has no attribute 'colour'$"):
        captioner.colour  # noqa: B018


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, captioner\n"
        "captioner.PRESETS, captioner.RunConfig\n"
        "assert not {'torch', 'ray', 'numpy', 'pyarrow', 'pandas', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_functions_stay_functions_after_their_rooms_are_imported():
    code = (
        "import captioner, captioner.training.run, captioner.evaluation.evaluation\n"
        "assert callable(captioner.train) and callable(captioner.evaluate)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_how_to_captions_images_in_memory(tmp_path: Path, monkeypatch, capsys):
    first, second = write_photos(tmp_path, 2)
    first.rename(tmp_path / "first.jpg")
    second.rename(tmp_path / "second.jpg")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "how-to" / "caption-in-python.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("map of '")
    with Image.open("first.jpg") as photo, Image.open("map.png") as drawn:
        assert drawn.size == photo.size


def test_captions_and_their_maps_by_the_public_names(tmp_path: Path, model_directory: Path):
    write_photos(tmp_path / "photos", 2)
    arguments = (str(tmp_path / "photos"), str(tmp_path / "out"), str(model_directory))
    run = captioner.RunConfig(engine="local", device="cpu")
    assert "2 images, all to caption" in captioner.plan_captioning(*arguments, run=run).describe()
    assert not (tmp_path / "out").exists()
    captioner.caption_images(*arguments, run=run)
    table = pq.read_table(tmp_path / "out")
    for row in table.to_pylist():
        maps = captioner.decode_attention(row["attention"], row["attention_peak"])
        assert len(maps) == len(row["tokens"])
        np.testing.assert_allclose(maps.sum(axis=(1, 2)), 1, atol=0.3)
