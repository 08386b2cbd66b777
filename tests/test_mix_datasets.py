"""The mixed dataset of benchmarks/mix_datasets.py."""

import csv
import runpy
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "mix_datasets.py"))


def _dataset(folder: Path, captions: dict[str, list[str]]) -> str:
    (folder / "Images").mkdir(parents=True)
    with (folder / "captions.txt").open("w", encoding="utf-8", newline="") as file:
        rows = [(name, text) for name, texts in captions.items() for text in texts]
        csv.writer(file).writerows([("image", "caption"), *rows])
    for name in captions:
        (folder / "Images" / name).write_bytes(b"")
    names = folder / "names.txt"
    names.write_text("".join(f"{name}\n" for name in captions), encoding="utf-8")
    return f"{folder}:{names}"


def test_the_nearest_captions_share_rare_words_and_pass_the_threshold():
    texts = ["a zebra eats grass", "a zebra in the snow", "a man eats food", "a man in the rain"]
    found = SCRIPT["NearestCaptions"](texts)
    assert found.find(["A zebra eats grass."], 1, 0.3) == ["a zebra eats grass"]
    assert found.find(["the zebra"], 4, 0.1)[:2] == ["a zebra in the snow", "a zebra eats grass"]
    assert found.find(["a boat"], 4, 0.3) == []


def test_a_mix_links_photos_and_writes_captions_in_one_style(tmp_path):
    sport = _dataset(tmp_path / "sport", {"a.jpg": ["A dog, running!", "One dog"], "b.jpg": ["x"]})
    home = _dataset(tmp_path / "home", {"c.jpg": ["The cat's bed"]})
    yard = _dataset(tmp_path / "yard", {"d.jpg": ["A tree"]})
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat's bed is red\nthe cat's bed is big\na red bus\n", encoding="utf-8")
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    taught = pa.table({"uri": ["/x/a.jpg"], "caption": ["a dog is running ."]})
    pq.write_table(taught, teacher / "part-000000.parquet")
    mix = tmp_path / "mix"
    options = f"--data {sport} --data {home} --validate {yard} --repeat home=2 --texts {texts}"
    options += f" --nearest home=1 --teacher {teacher} --human-captions 1"
    result = CliRunner().invoke(SCRIPT["main"], [str(mix), *options.split()])
    assert result.exit_code == 0, result.output
    with (mix / "captions.txt").open(encoding="utf-8", newline="") as file:
        rows = [tuple(row) for row in csv.reader(file)][1:]
    near = "the cat 's bed is"
    assert rows[:4] == [
        ("a.jpg", "a dog is running ."),
        ("a.jpg", "a dog is running ."),
        ("a.jpg", "a dog running ."),
        ("b.jpg", "x ."),
    ]
    assert [row[0] for row in rows[4:]] == ["c.jpg", "c.jpg", "1_c.jpg", "1_c.jpg", "d.jpg"]
    assert rows[4][1] == "the cat 's bed ."
    assert rows[5][1].startswith(near)
    assert (mix / "train.txt").read_text().split() == ["a.jpg", "b.jpg", "c.jpg", "1_c.jpg"]
    assert (mix / "val.txt").read_text().split() == ["d.jpg"]
    assert (mix / "Images" / "1_c.jpg").resolve() == (tmp_path / "home" / "Images" / "c.jpg")
