import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner import dataset
from captioner.dataset import CaptionedImage, Split, read_dataset
from captioner.errors import InputError
from conftest import write_photos


def _json(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def _karpathy(names: list[tuple[str, str]], **changes: Any) -> dict[str, Any]:
    return {
        "dataset": "flickr8k",
        "images": [
            {"filename": name, "split": side, "sentences": [{"raw": f"A {name} .", "tokens": []}]}
            | changes
            for name, side in names
        ],
    }


def _coco(names: list[str]) -> dict[str, Any]:
    return {
        "images": [{"id": 7 * i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": 7 * i, "id": i, "caption": f"caption {n} of {name}"}
            for n in range(2)
            for i, name in enumerate(names)
        ],
    }


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos" / "a", 3)
    write_photos(tmp_path / "photos" / "b", 5, seed=1)
    return tmp_path / "photos"


def test_karpathys_split(photos: Path, tmp_path: Path):
    sides = ["train", "val", "restval", "test", "train"]
    names = [(f"photo-{i:04d}.jpg", side) for i, side in enumerate(sides)]
    path = _json(tmp_path / "dataset.json", _karpathy(names, filepath="b"))
    split = read_dataset(path, str(photos)).split()
    found = [[each.uri[-len("photo-0000.jpg") :] for each in side] for side in vars(split).values()]
    numbers = [[int(name[6:10]) for name in side] for side in found]
    assert numbers == [[0, 2, 4], [1], [3]]
    assert split.test[0].captions == ["A photo-0003.jpg ."]
    assert all("/b/" in each.uri for each in split.train)


def test_cocos_captions(photos: Path, tmp_path: Path):
    names = ["photo-0003.jpg", "a/photo-0000.jpg", "gone.jpg", "photo-0001.jpg"]
    read = read_dataset(_json(tmp_path / "captions.json", _coco(names)), str(photos))
    # The last name is in two folders: which of them is meant, nobody can tell.
    assert [each.uri for each in read.images] == [
        f"{photos}/b/photo-0003.jpg",
        f"{photos}/a/photo-0000.jpg",
    ]
    assert read.images[1].captions == [f"caption {n} of a/photo-0000.jpg" for n in range(2)]
    assert (read.without_image, read.without_caption, read.empty_captions) == (2, 6, 0)


def test_images_stand_beside_the_json_file_by_default(photos: Path):
    path = _json(photos / "b" / "captions.json", _coco(["photo-0001.jpg"]))
    assert read_dataset(path).images[0].uri == f"{photos}/b/photo-0001.jpg"


def test_data_in_a_bucket(photos: Path):
    fs = fsspec.filesystem("memory")
    fs.pipe("/coco/images/x.jpg", (photos / "a" / "photo-0000.jpg").read_bytes())
    fs.pipe("/coco/captions.json", json.dumps(_coco(["x.jpg"])).encode())
    read = read_dataset("memory://coco/captions.json", "memory://coco/images")
    assert [each.uri for each in read.images] == ["memory:///coco/images/x.jpg"]


def test_captions_that_are_not_text_are_counted(photos: Path, tmp_path: Path):
    content = _coco(["a/photo-0000.jpg"])
    content["annotations"] += [{"image_id": 0, "caption": c} for c in (None, 3, "", " \n")]
    content["annotations"] += [{"image_id": 99, "caption": "of no image"}]
    read = read_dataset(_json(tmp_path / "captions.json", content), str(photos))
    assert read.empty_captions == 4
    assert len(read.images[0].captions) == 2


def test_an_image_on_two_sides_is_refused(photos: Path, tmp_path: Path):
    names = [("photo-0000.jpg", "train"), ("photo-0000.jpg", "val")]
    path = _json(tmp_path / "dataset.json", _karpathy(names, filepath="a"))
    with pytest.raises(InputError, match="two sides"):
        read_dataset(path, str(photos))
    image = CaptionedImage("x", ["a"])
    for split in ([image], [image], []), ([image], [], [image]), ([], [image], [image]):
        with pytest.raises(InputError, match="1 images are in both"):
            Split(*split)


def test_a_name_does_not_lead_out_of_the_images(photos: Path, tmp_path: Path):
    outside = write_photos(tmp_path / "outside", 1)[0].rename(tmp_path / "outside" / "secret.jpg")
    names = ["../outside/secret.jpg", str(outside), "a/photo-0000.jpg"]
    read = read_dataset(_json(tmp_path / "captions.json", _coco(names)), str(photos))
    assert [each.uri for each in read.images] == [f"{photos}/a/photo-0000.jpg"]
    assert read.without_image == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "7",
        '"annotations"',
        "{}",
        '{"images": 3}',
        '{"annotations": 3, "images": []}',
        '{"annotations": [{}], "images": []}',
        '{"images": [{"filename": 3, "split": "train", "sentences": []}]}',
        '{"images": [{"filename": "x.jpg", "split": ["train"], "sentences": []}]}',
        '{"images": [{"filename": "x.jpg", "split": "train", "sentences": [{}]}]}',
        "[" * 100_000,
        '{"images": []}',
        '{"images": [], "annotations": []}',
    ],
)
def test_another_json_file_is_one_line(text: str, photos: Path, tmp_path: Path):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(InputError) as error:
        read_dataset(str(tmp_path / "data.json"), str(photos)).split()
    assert "\n" not in str(error.value)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "images",
                    "annotations",
                    "id",
                    "image_id",
                    "file_name",
                    "filename",
                    "caption",
                    "split",
                    "sentences",
                ]
            ),
            children,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(content=_JSON)
def test_any_json_is_read_or_refused(content: object, tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.getbasetemp() / "any-json"
    if not directory.exists():
        write_photos(directory, 1)
    path = _json(directory / "data.json", content)
    with pytest.raises(InputError):
        read_dataset(path, str(directory)).split()


def test_a_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(InputError, match="cannot read"):
        read_dataset(str(tmp_path / "none.json"))
    with pytest.raises(InputError, match=r"has no captions\.txt"):
        read_dataset(str(tmp_path))


def test_the_notebooks_split_holds_out_the_last_300():
    images = [CaptionedImage(str(i), ["a"]) for i in range(1000)]
    split = dataset.Dataset(images, 0, 0, 0).split()
    assert split == Split(images[:700], images[700:900], images[900:])
    with pytest.raises(InputError, match="too few"):
        dataset.Dataset(images[:300], 0, 0, 0).split()
