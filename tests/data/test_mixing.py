from pathlib import Path

import pytest

from captioner.data.mixing import DataPlace, data_places, mix, read_split
from captioner.data.splits import CaptionedImage, Portion, Split
from captioner.errors import InputError
from conftest import write_photos


def _dataset(directory: Path, count: int) -> Path:
    paths = write_photos(directory / "Images", count)
    lines = ["image,caption", *(f"{path.name},a dog runs" for path in paths)]
    (directory / "captions.txt").write_text("\n".join(lines) + "\n")
    for name, chosen in (("train.txt", paths[:-2]), ("val.txt", paths[-2:])):
        (directory / name).write_text("\n".join(path.name for path in chosen))
    return directory


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("photos", "photos", 1),
        ("photos:2", "photos", 2),
        ("photos:0.5", "photos", 0.5),
        ("photos:.5", "photos", 0.5),
        ("s3://bucket/photos", "s3://bucket/photos", 1),
        ("s3://bucket/photos:1.5", "s3://bucket/photos", 1.5),
        ("photos:2:1", "photos:2", 1),
        ("photos:two", "photos:two", 1),
    ],
)
def test_a_weight_follows_the_last_colon(text: str, source: str, weight: float):
    assert data_places("first", [text])[1] == DataPlace(source=source, weight=weight)


def test_a_weight_of_zero_is_refused():
    with pytest.raises(InputError, match=r"--data photos:0: the weight must be above 0; use .*:2"):
        data_places("first", ["photos:0"])


def test_options_are_given_once_for_each_dataset():
    places = data_places(
        "first", ["second:2"], train_list=["none", "t.txt"], validation_list=["none", "v.txt"]
    )
    assert places[0] == DataPlace(source="first")
    assert places[1] == DataPlace(
        source="second", weight=2, train_list="t.txt", validation_list="v.txt"
    )
    with pytest.raises(InputError, match="--images is given 1 times for 2 datasets"):
        data_places("first", ["second"], images=["folder"])
    with pytest.raises(InputError, match="or --val-data, not both"):
        data_places("first", [], validation=["other.json"], train_list=["t.txt"])


def test_datasets_are_read_into_one_split(tmp_path: Path):
    places = [
        DataPlace(
            source=str(folder),
            weight=weight,
            train_list=str(folder / "train.txt"),
            validation_list=str(folder / "val.txt"),
        )
        for folder, weight in (
            (_dataset(tmp_path / "one" / "photos", 5), 1.0),
            (_dataset(tmp_path / "other" / "photos", 6), 2.5),
        )
    ]
    split, described = read_split(places)
    assert split.portions == (Portion("photos", 1, 3, 2), Portion("photos-2", 2.5, 4, 2))
    assert [len(split.train), len(split.validation)] == [7, 4]
    assert [each.images_per_epoch for each in split.portions] == [3, 10]
    assert described.splitlines() == [
        "photos, weight 1: 3 images to train on, 2 to validate on",
        "photos-2, weight 2.5: 4 images to train on, 2 to validate on",
    ]


def test_an_image_is_not_trained_on_in_one_dataset_and_validated_on_in_another():
    one, other = (CaptionedImage(name, ["a dog"]) for name in ("one.jpg", "other.jpg"))
    with pytest.raises(InputError, match="2 images are in both train and validation"):
        mix([Split([one], [other], []), Split([other], [one], [])], ["a", "b"], [1, 2])
