import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner.data import dataset
from captioner.data.dataset import CaptionedImage, Split, read_dataset
from captioner.errors import InputError
from conftest import write_photos


def _json(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def _karpathy(names: list[tuple[str, str]], **changes: Any) -> dict[str, Any]:
    return {
        "dataset": "flickr8k",
        "images": [
            {"filename": name, "split": split, "sentences": [{"raw": f"A {name} .", "tokens": []}]}
            | changes
            for name, split in names
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
    found = [
        [each.uri[-len("photo-0000.jpg") :] for each in side]
        for side in (split.train, split.validation, split.test)
    ]
    numbers = [[int(name[6:10]) for name in side] for side in found]
    assert numbers == [[0, 2, 4], [1], [3]]
    assert split.test[0].captions == ["A photo-0003.jpg ."]
    assert all("/b/" in each.uri for each in split.train)
    path = _json(tmp_path / "flat.json", _karpathy([("photo-0004.jpg", "val")], filepath=""))
    assert [each.uri for each in read_dataset(path, str(photos)).images] == [
        str(photos / "b" / "photo-0004.jpg")
    ]


def test_karpathys_tokens_come_with_the_captions(photos: Path, tmp_path: Path):
    names = [f"photo-{i:04d}.jpg" for i in range(5)]
    content = _karpathy([(name, "train") for name in names], filepath="b")
    sentences: list[list[dict[str, object]]] = [
        [
            {"raw": "A dog's ball.", "tokens": ["a", "dog", "'s", "ball"]},
            {"raw": " ", "tokens": []},
        ],
        [{"raw": "Two men.", "tokens": ["two", "men"]}, {"raw": "A dog."}],
        [{"raw": "A dog.", "tokens": ["a", 3]}],
        [{"raw": "A cat.", "tokens": "a cat"}],
        [],
    ]
    for image, each in zip(content["images"], sentences, strict=True):
        image["sentences"] = each
    images = read_dataset(_json(tmp_path / "dataset.json", content), str(photos)).images
    assert [image.tokens for image in images] == [[["a", "dog", "'s", "ball"]], None, None, None]
    # Two entries of one image: its tokens are those of both, or of none.
    content["images"] = [content["images"][0]] * 2
    [image] = read_dataset(_json(tmp_path / "twice.json", content), str(photos)).images
    assert image.tokens == [["a", "dog", "'s", "ball"]] * 2
    assert image.captions == ["A dog's ball."] * 2
    content["images"][1] = content["images"][1] | {"sentences": [{"raw": "A dog ."}]}
    [image] = read_dataset(_json(tmp_path / "without.json", content), str(photos)).images
    assert (image.tokens, len(image.captions)) == (None, 2)


def test_cocos_captions(photos: Path, tmp_path: Path):
    names = ["photo-0003.jpg", "a/photo-0000.jpg", "gone.jpg", "photo-0001.jpg"]
    read = read_dataset(_json(tmp_path / "captions.json", _coco(names)), str(photos))
    # The last name is in two folders: nobody can tell which one is meant.
    assert [each.uri for each in read.images] == [
        f"{photos}/b/photo-0003.jpg",
        f"{photos}/a/photo-0000.jpg",
    ]
    assert [each.name for each in read.images] == names[:2]
    assert read.images[1].captions == [f"caption {n} of a/photo-0000.jpg" for n in range(2)]
    assert (read.without_image, read.without_caption, read.empty_captions) == (1, 0, 0)
    assert read.ambiguous == 1
    assert read.describe(Split(read.images, [], [])).endswith(
        "; left out: 1 captioned images that are not there, 1 names that fit several images"
    )


def test_images_stand_beside_the_json_file_by_default(photos: Path):
    path = _json(photos / "b" / "captions.json", _coco(["photo-0001.jpg"]))
    assert read_dataset(path).images[0].uri == f"{photos}/b/photo-0001.jpg"


def test_data_in_a_bucket(photos: Path):
    fs = fsspec.filesystem("memory")
    fs.pipe("/coco/images/x.jpg", (photos / "a" / "photo-0000.jpg").read_bytes())
    fs.pipe("/coco/captions.json", json.dumps(_coco(["x.jpg"])).encode())
    fs.pipe("/coco/images/below/x.jpg", b"another that is called so")
    read = read_dataset("memory://coco/captions.json", "memory://coco/images")
    assert [each.uri for each in read.images] == ["memory://coco/images/x.jpg"]
    read = read_dataset("memory://coco/captions.json", "memory://coco/images/below/")
    assert [each.uri for each in read.images] == ["memory://coco/images/below/x.jpg"]
    fs.pipe("/flickr/Images/y.jpg", b"y")
    fs.pipe("/flickr/captions.txt", b"image,caption\ny.jpg,A y .\n")
    read = read_dataset("memory://flickr")
    assert read.images == [CaptionedImage("memory://flickr/Images/y.jpg", ["A y ."], "y.jpg")]
    names = [("y.jpg", "restval"), ("gone.jpg", "test")]
    fs.pipe("/flickr/Images/dataset.json", json.dumps(_karpathy(names)).encode())
    read = read_dataset("memory://flickr/Images/dataset.json")
    assert (len(read.images), read.splits, read.without_image) == (1, ["train"], 1)


def test_an_image_is_not_taken_from_another_folder(photos: Path, tmp_path: Path):
    """Were only the last part of its name looked at, a cat would be called a dog."""
    content = _coco(["a/photo-0004.jpg", "b/photo-0003.jpg", "b/photo-0000.jpg"])
    path = _json(tmp_path / "captions.json", content)
    read = read_dataset(path, str(photos))
    assert [each.uri[len(str(photos)) :] for each in read.images] == [
        "/b/photo-0003.jpg",
        "/b/photo-0000.jpg",
    ]
    # The folder that the names begin with may be the one that is given, or lie below it.
    assert len(read_dataset(path, str(photos / "b")).images) == 2
    assert len(read_dataset(path, str(tmp_path)).images) == 2


def test_other_data_to_validate_on(photos: Path, tmp_path: Path):
    train = _json(
        tmp_path / "train.json", _coco(["b/photo-0004.jpg", "a/photo-0001.jpg", "no.jpg"])
    )
    other = _json(tmp_path / "val.json", _coco(["b/photo-0000.jpg", "no-more.jpg"]))
    read = read_dataset(train, str(photos)).validated_by(read_dataset(other, str(photos)))
    split = read.split()
    assert [each.uri[len(str(photos)) :] for each in split.train] == [
        "/b/photo-0004.jpg",
        "/a/photo-0001.jpg",
    ]
    assert [each.uri[len(str(photos)) :] for each in split.validation] == ["/b/photo-0000.jpg"]
    assert split.test == []
    assert read.describe(split) == (
        "2 images to train on, 1 to validate on; left out: 2 captioned images that are not there"
    )
    same = _json(tmp_path / "same.json", _coco(["photo-0004.jpg"]))
    both = read_dataset(train, str(photos)).validated_by(read_dataset(same, str(photos)))
    with pytest.raises(InputError, match="1 images are in both train and validation"):
        both.split()
    names = [("b/photo-0001.jpg", "train"), ("b/photo-0002.jpg", "val")]
    own = _json(tmp_path / "own.json", _karpathy(names))
    with pytest.raises(InputError, match="remove --val-data"):
        read_dataset(own, str(photos)).validated_by(read_dataset(other, str(photos)))


def test_lists_of_names(photos: Path, tmp_path: Path):
    names = [f"{folder}/photo-{i:04d}.jpg" for folder, n in (("b", 5), ("a", 3)) for i in range(n)]
    read = read_dataset(_json(tmp_path / "captions.json", _coco(names)), str(photos))
    lists = {
        "train": "\ufeffa/photo-0002.jpg\r\nphoto-0004.jpg \nb/photo-0000.jpg\nnone.jpg\n\n",
        "val": "b/photo-0001.jpg",
        "test": "photos/a/photo-0001.jpg\nphotos/a/photo-0000.jpg\n",
        "leak": "photos/b/photo-0000.jpg",
        "ambiguous": "photo-0000.jpg",
        "foreign": "none.jpg",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    train, val, test, leak, ambiguous, foreign = (str(tmp_path / name) for name in lists)
    split = read.split(train, val, test)
    found = [
        [each.uri[len(str(photos)) + 1 :] for each in side]
        for side in (split.train, split.validation, split.test)
    ]
    assert found == [
        ["b/photo-0000.jpg", "b/photo-0004.jpg", "a/photo-0002.jpg"],
        ["b/photo-0001.jpg"],
        ["a/photo-0000.jpg", "a/photo-0001.jpg"],
    ]
    assert read.split(train, val).test == []
    for arguments, message in {
        (train, leak): "1 images are in both train and validation",
        (train, val, leak): "1 images are in both train and test",
        (train, ambiguous): r"2 images are called photo-0000\.jpg",
        (train, foreign): r"1 of the 1 names in .*/foreign are of no captioned image: none\.jpg$",
        (train,): "need each other",
        (None, val): "need each other",
        (None, None, test): "need each other",
        (train, str(tmp_path / "nowhere")): "cannot read",
    }.items():
        with pytest.raises(InputError, match=message):
            read.split(*arguments)


def test_a_name_is_first_of_all_the_tables(tmp_path: Path):
    """And then the end of a path: ``a.jpg`` is not ``sub/a.jpg`` where there is an ``a.jpg``."""
    write_photos(tmp_path / "Images", 1)[0].rename(tmp_path / "Images" / "a.jpg")
    write_photos(tmp_path / "Images" / "sub", 1)[0].rename(tmp_path / "Images" / "sub" / "a.jpg")
    (tmp_path / "captions.txt").write_text("image,caption\nsub/a.jpg,Below .\na.jpg,Above .\n")
    read = read_dataset(str(tmp_path))
    for name, caption in {
        "a.jpg": "Above .",
        "sub/a.jpg": "Below .",
        "Images/a.jpg": "Above .",
    }.items():
        (tmp_path / "list").write_text(name)
        assert [each.captions for each in read.listed(str(tmp_path / "list"))] == [[caption]]


@pytest.mark.parametrize("row", ["a.jpg,a dog, running", "a.jpg,a dog,"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_comma_that_is_not_quoted_is_one_line(row: str, place: int, tmp_path: Path):
    write_photos(tmp_path / "Images", 1)[0].rename(tmp_path / "Images" / "a.jpg")
    rows = ["a.jpg,a cat", "a.jpg,a cat"]
    rows[place] = row
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *rows]))
    with pytest.raises(InputError, match=rf"captions\.txt, line {place + 2}: 3 fields, but 2 col"):
        read_dataset(str(tmp_path))


def test_names_of_no_image_are_logged_and_more_than_half_are_refused(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    read = read_dataset(_json(tmp_path / "captions.json", _coco(["b/photo-0001.jpg"])), str(photos))
    path = tmp_path / "names.txt"
    known = "b/photo-0001.jpg"
    for names, problem, is_refused in (
        ((known, ""), None, False),
        (("c", known, "c"), "1 of the 2 names in {} are of no captioned image: c", False),
        (("c", known, "a"), "2 of the 3 names in {} are of no captioned image: c, a", True),
        (
            (*"gfedcba", "photo-0001.jpg"),
            "7 of the 8 names in {} are of no captioned image: g, f, e, d, c, …",
            True,
        ),
    ):
        caplog.clear()
        path.write_text("\n".join(names))
        message = problem and problem.format(path)
        if is_refused:
            with pytest.raises(InputError) as error:
                read.listed(str(path))
            assert str(error.value) == f"{message}; to accept this, add --allow-missing"
            assert read.listed(str(path), allow_missing=True) == read.images
        else:
            assert read.listed(str(path)) == read.images
        assert caplog.messages == ([f"left out: {message}"] if message else [])
    path.write_text("\n \n")
    with pytest.raises(InputError, match="is empty: each line must name an image"):
        read.listed(str(path))


def test_flickrs_layout(photos: Path, tmp_path: Path):
    data = tmp_path / "flickr.json"  # a folder may be called so
    data.mkdir()
    lines = ["image,caption", "photo-0002.jpg,One .", "gone.jpg,Two .", "photo-0001.jpg,  "]
    lines += ['photo-0000.jpg,"Three, with a comma ."', "photo-0002.jpg,Four .", "../x.jpg,Five ."]
    (data / "captions.txt").write_text("\n".join(lines) + "\n")
    (photos / "a").rename(data / "Images")
    expected = [
        CaptionedImage(f"{data}/Images/photo-0002.jpg", ["One .", "Four ."], "photo-0002.jpg"),
        CaptionedImage(
            f"{data}/Images/photo-0000.jpg", ["Three, with a comma ."], "photo-0000.jpg"
        ),
    ]
    for read in (read_dataset(str(data)), read_dataset(f"file://{data}", str(data / "Images"))):
        assert read.images == expected
        assert (read.without_image, read.without_caption, read.empty_captions) == (2, 1, 1)
    with pytest.raises(InputError, match="too few"):
        read.split()


def test_a_path_from_the_working_directory(photos: Path, monkeypatch: pytest.MonkeyPatch):
    _json(photos / "b" / "captions.json", _coco(["photo-0001.jpg"]))
    monkeypatch.chdir(photos / "b")
    assert read_dataset("captions.json").images[0].uri == f"{photos}/b/photo-0001.jpg"
    assert read_dataset("captions.json", "../b").images[0].uri == f"{photos}/b/photo-0001.jpg"


def test_images_that_are_elsewhere_are_one_line_with_a_hint(photos: Path, tmp_path: Path):
    path = _json(tmp_path / "captions.json", _coco(["c/photo-0001.jpg"]))
    problem = r"1 of the 1 images that .*captions\.json names are not in .*: c/photo-0001\.jpg"
    with pytest.raises(InputError, match=problem + r" \(--images says where the images are\)$"):
        read_dataset(path)
    with pytest.raises(InputError, match=problem + "$"):
        read_dataset(path, str(photos))


def _flickr(folder: Path, rows: list[str], files: list[str]) -> str:
    """A folder with ``Images/`` and ``captions.txt``."""
    folder.mkdir(exist_ok=True)
    for name in files:
        path = folder / "Images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "AVIF" if name.endswith("avif") else "JPEG")
    text = "".join(f"{row},A dog\n" for row in rows)
    (folder / "captions.txt").write_text("image,caption\n" + text)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a.avif", "a.avif"),
        ("b.jfif", "b.jfif"),
        ("c.unheard-of", "c.unheard-of"),
        ("./a.jpg", "a.jpg"),
        ("x/../a.jpg", "a.jpg"),
        ("a.jpg ", "a.jpg"),
        ("x\\a.jpg", "x/a.jpg"),
        ("Images/a.jpg", "a.jpg"),
        ("cafe\u0301.jpg", "caf\u00e9.jpg"),
        ("caf\u00e9.jpg", "x/cafe\u0301.jpg"),
        ("{}/Images/a.jpg", "a.jpg"),
        ("file://{}/Images/x/a%2E.jpg", "x/a..jpg"),
    ],
)
def test_a_name_may_be_spelled_otherwise(name: str, file: str, tmp_path: Path):
    [image] = read_dataset(_flickr(tmp_path, [name.format(tmp_path)], [file])).images
    assert image.uri == f"{tmp_path}/Images/{file}"


def test_images_in_linked_folders_are_found_and_copies_by_other_programs_are_not(tmp_path: Path):
    copies = [".thumbnails/x/a.jpg", "@eaDir/x/a.jpg", "._a.jpg"]
    source = _flickr(tmp_path, ["a.jpg", "disk/b.jpg"], copies)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg")
    (tmp_path / "Images" / "x").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "Images" / "x" / "a.jpg")
    (tmp_path / "disk").mkdir()
    (tmp_path / "b.jpg").rename(tmp_path / "disk" / "b.jpg")
    (tmp_path / "Images" / "disk").symlink_to(tmp_path / "disk")
    read = read_dataset(source)
    assert [image.uri for image in read.images] == [
        f"{tmp_path}/Images/x/a.jpg",
        f"{tmp_path}/Images/disk/b.jpg",
    ]
    assert (read.without_caption, read.ambiguous) == (0, 0)


def test_the_exact_name_comes_first(tmp_path: Path):
    names = ["a.jpg", " a.jpg", "x\\a.jpg", "x/a.jpg"]
    read = read_dataset(_flickr(tmp_path, names, names))
    assert [image.uri for image in read.images] == [f"{tmp_path}/Images/{name}" for name in names]


@pytest.mark.parametrize(
    "name", ["../captions.txt", "{}/captions.txt", "x/../../captions.txt", ".", "/"]
)
def test_a_name_never_leads_out_of_the_images(name: str, tmp_path: Path):
    source = _flickr(tmp_path, [name.format(tmp_path)], ["a.jpg"])
    with pytest.raises(InputError, match=r"1 of the 1 images that .* names are not in"):
        read_dataset(source)


@pytest.mark.parametrize(
    ("image_id", "file_name"), [("1", "a.jpg"), (1, "./a.jpg"), (1, "{}/a.jpg"), ("1", "{}/a.jpg")]
)
def test_coco_ids_and_names_may_be_spelled_otherwise(
    image_id: object, file_name: str, tmp_path: Path
):
    write_photos(tmp_path, 1)[0].rename(tmp_path / "a.jpg")
    content = {
        "images": [{"id": 1, "file_name": file_name.format(tmp_path)}],
        "annotations": [{"image_id": image_id, "caption": "A dog"}],
    }
    read = read_dataset(_json(tmp_path / "captions.json", content))
    assert [(image.uri, image.captions) for image in read.images] == [
        (f"{tmp_path}/a.jpg", ["A dog"])
    ]


def test_each_cause_has_its_own_message(tmp_path: Path):
    instances = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}],
    }
    missing = _coco(["a.jpg"])
    flat = tmp_path / "json"
    flat.mkdir()
    for source, message in {
        _flickr(tmp_path / "empty", ["a.jpg"], []): r"Images does not exist \(--images says",
        _flickr(tmp_path / "rows", [], ["a.jpg"]): r"captions\.txt lists no images$",
        _flickr(tmp_path / "two", ["a.jpg"], ["x/a.jpg", "y/a.jpg"]): (
            "1 of the 1 names in .* fit several images: "
            r"a\.jpg is .*/x/a\.jpg or .*/y/a\.jpg; name the folder too$"
        ),
        _flickr(tmp_path / "case", ["A.jpg"], ["a.JPG"]): r"is A\.jpg the file a\.JPG\?",
        _flickr(tmp_path / "ending", ["a"], ["x/a.jpg"]): r"is a the file x/a\.jpg\?",
        _json(flat / "instances.json", instances): r"give captions_\*\.json, not instances",
        _json(flat / "none.json", instances | {"annotations": []}): (
            "none of its 1 images has a caption"
        ),
        _json(flat / "gone.json", missing): r"not in .*/json: a\.jpg \(--images says",
    }.items():
        with pytest.raises(InputError, match=message):
            read_dataset(source)
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"bare holds no files, but .* names 1 images"):
        read_dataset(str(flat / "gone.json"), str(tmp_path / "bare"))
    (tmp_path / "rows" / "captions.txt").write_text("image,caption\na.jpg,\na.jpg, \n")
    with pytest.raises(InputError, match=r"captions\.txt: all 2 captions are empty or not text"):
        read_dataset(str(tmp_path / "rows"))


def test_more_than_half_of_the_images_missing_is_refused_unless_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    names = [f"{number}.jpg" for number in range(10)]
    half = read_dataset(_flickr(tmp_path / "half", names, names[:5]))
    assert (len(half.images), half.without_image) == (5, 5)
    assert caplog.messages == [
        f"left out: 5 of the 10 images that {tmp_path}/half/captions.txt names are not in "
        f"{tmp_path}/half/Images: 5.jpg, 6.jpg, 7.jpg, 8.jpg, 9.jpg "
        "(--images says where the images are)"
    ]
    most = _flickr(tmp_path / "most", names, names[:4])
    with pytest.raises(InputError, match=r"6 of the 10 .*; to accept this, add --allow-missing$"):
        read_dataset(most)
    assert len(read_dataset(most, allow_missing=True).images) == 4


def test_repeated_captions_are_kept_and_counted(tmp_path: Path):
    read = read_dataset(_flickr(tmp_path, ["a.jpg", "b.jpg", "a.jpg"], ["a.jpg", "b.jpg"]))
    assert [len(image.captions) for image in read.images] == [2, 1]
    assert read.repeated_captions == 1
    assert read.describe(Split(read.images, [], [])) == (
        "2 images to train on, 0 to validate on; 1 captions repeat one of the same image"
    )


def test_what_to_evaluate_on(tmp_path: Path, photos: Path):
    images = [CaptionedImage(str(i), ["a"]) for i in range(1000)]
    flickr = dataset.Dataset(images)
    assert flickr.default_split == "test"
    found = [flickr.choose(split) for split in ("train", "val", "test", "all")]
    assert found == [images[:700], images[700:900], images[900:], images]
    few = dataset.Dataset(images[:300])
    assert few.choose("all") == images[:300]
    with pytest.raises(InputError, match="300 images are too few to split: use --split all"):
        few.choose("test")
    own = dataset.Dataset(images[:2], splits=["train", "val"])
    assert own.choose("val") == images[1:2]
    with pytest.raises(InputError, match="the dataset has no split test: use another --split"):
        own.choose("test")
    # Each of COCO's files is one split of COCO; Karpathy's file says which images are for testing.
    coco = _json(tmp_path / "captions_val2017.json", _coco(["b/photo-0004.jpg"]))
    assert read_dataset(coco, str(photos)).default_split == "all"
    karpathy = _json(tmp_path / "dataset.json", _karpathy([("photo-0004.jpg", "test")]))
    assert read_dataset(karpathy, str(photos)).default_split == "test"


def test_only_the_splits_that_are_needed_may_not_be_missing(photos: Path, tmp_path: Path):
    names = [("photo-0004.jpg", "test"), ("photo-0003.jpg", "val")]
    names += [(f"gone-{number}.jpg", "train") for number in range(5)]
    path = _json(tmp_path / "dataset.json", _karpathy(names))
    read = read_dataset(path, str(photos), needed=("test",))
    assert (len(read.images), read.without_image) == (2, 5)
    for needed in (None, ("train",), ("train", "val")):
        with pytest.raises(
            InputError, match=r"5 of the 7 images .*; to accept this, add --allow-missing$"
        ):
            read_dataset(path, str(photos), needed=needed)


def test_a_single_image_to_validate_on_is_worth_a_warning(caplog: pytest.LogCaptureFixture):
    images = [CaptionedImage(str(i), ["a"]) for i in range(4)]
    dataset.Dataset(images, splits=["train", "train", "val", "val"]).split()
    assert caplog.messages == []
    dataset.Dataset(images[:3], splits=["train", "train", "val"]).split()
    assert caplog.messages == [
        "only 1 image to validate on: its CIDEr is always 0; give more images"
    ]


def test_captions_that_are_not_text_are_counted(photos: Path, tmp_path: Path):
    content = _coco(["a/photo-0000.jpg"])
    odd = (None, 3, "", " \n", ["a"], "half a pair \ud800")
    content["annotations"] += [{"image_id": 0, "caption": c} for c in odd]
    content["annotations"] += [{"image_id": 0}]
    read = read_dataset(_json(tmp_path / "captions.json", content), str(photos))
    assert read.empty_captions == 7
    assert len(read.images[0].captions) == 2


def test_captions_without_an_image_and_images_without_a_caption_are_counted(
    photos: Path, tmp_path: Path
):
    content = _coco(["a/photo-0000.jpg", "gone.jpg", "b/photo-0001.jpg", "b/photo-0002.jpg"])
    for each in content["annotations"]:
        if each["image_id"] == 14:
            each["caption"] = ""
        if each["image_id"] == 21:
            each["image_id"] = 99
    path = _json(tmp_path / "captions.json", content)
    read = read_dataset(path, str(photos), allow_missing=True)
    assert [each.uri for each in read.images] == [f"{photos}/a/photo-0000.jpg"]
    assert (read.without_image, read.without_caption, read.empty_captions) == (2, 2, 2)
    line = read.describe(Split(read.images, [], []))
    assert line == (
        "1 images to train on, 0 to validate on; left out: 2 images without a caption, "
        "2 captioned images that are not there, 2 empty captions"
    )


def test_the_captions_of_an_image_that_is_listed_twice_are_put_together(
    photos: Path, tmp_path: Path
):
    content = _coco(["b/photo-0003.jpg", "a/photo-0000.jpg", "photo-0003.jpg"])
    read = read_dataset(_json(tmp_path / "captions.json", content), str(photos))
    assert [each.uri[len(str(photos)) :] for each in read.images] == [
        "/b/photo-0003.jpg",
        "/a/photo-0000.jpg",
    ]
    assert len(read.images[0].captions) == 4
    content["images"][2]["id"] = 0
    content["images"][2]["file_name"] = "b/photo-0004.jpg"
    with pytest.raises(InputError, match="two images have the id 0"):
        read_dataset(_json(tmp_path / "captions.json", content), str(photos))


def test_an_image_in_two_splits_is_refused(photos: Path, tmp_path: Path):
    names = [("photo-0000.jpg", "train"), ("photo-0000.jpg", "val")]
    content = _karpathy(names, filepath="a")
    with pytest.raises(InputError, match="is in two splits"):
        read_dataset(_json(tmp_path / "dataset.json", content), str(photos))
    # Two ways to name one image are no way around it.
    names = [("b/photo-0004.jpg", "train"), ("photo-0004.jpg", "test")]
    with pytest.raises(InputError, match="is in two splits"):
        read_dataset(_json(tmp_path / "dataset.json", _karpathy(names)), str(photos))
    image = CaptionedImage("x", ["a"])
    for split in ([image], [image], []), ([image], [], [image]), ([], [image], [image]):
        with pytest.raises(InputError, match="1 images are in both"):
            Split(*split)


def test_a_name_does_not_lead_out_of_the_images(photos: Path, tmp_path: Path):
    outside = write_photos(tmp_path / "outside", 1)[0].rename(tmp_path / "outside" / "secret.jpg")
    names = ["../outside/secret.jpg", str(outside), "a/photo-0000.jpg"]
    path = _json(tmp_path / "captions.json", _coco(names))
    read = read_dataset(path, str(photos), allow_missing=True)
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
        '{"images": [{"filename": "x.jpg", "split": "dev", "sentences": []}]}',
        '{"images": [{"filename": "x.jpg", "filepath": 3, "split": "val", "sentences": []}]}',
        '{"images": [{"id": [], "file_name": "x.jpg"}], "annotations": []}',
        '{"images": [{"id": 1}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": [{"image_id": {}}]}',
        "[" * 100_000,
        '{"images":' * 100_000,
        "9" * 5000,
        "\ufeff{",
        '{"images": []}',
        '{"images": [], "images": []}',
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


_ANY = st.none() | st.booleans() | st.integers(0, 3) | st.floats() | st.just([]) | st.just({})
_NAMES = st.sampled_from(
    ["photo-0000.jpg", "a/photo-0001.jpg", "../photo-0000.jpg", "", "/", "\ud800"]
)
_TEXTS = st.text(max_size=3) | _ANY
_COCO = st.fixed_dictionaries(
    {
        "images": st.lists(
            st.fixed_dictionaries({"id": st.integers(0, 3), "file_name": _NAMES | _ANY}), max_size=4
        ),
        "annotations": st.lists(
            st.fixed_dictionaries({"image_id": st.integers(0, 4), "caption": _TEXTS}), max_size=6
        ),
    }
)
_KARPATHY = st.fixed_dictionaries(
    {
        "images": st.lists(
            st.fixed_dictionaries(
                {
                    "filename": _NAMES,
                    "split": st.sampled_from(["train", "restval", "val", "test"]) | _ANY,
                    "sentences": st.lists(st.fixed_dictionaries({"raw": _TEXTS}), max_size=3),
                },
                optional={"filepath": _NAMES | _ANY},
            ),
            max_size=4,
        )
    }
)


@given(content=_COCO | _KARPATHY)
def test_what_is_read_is_text_and_of_images_that_are_there(
    content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
):
    directory = tmp_path_factory.getbasetemp() / "nearly-right" / "photos"
    if not directory.exists():
        write_photos(directory, 2)
        write_photos(directory / "a", 2, seed=1)
        write_photos(directory.parent, 1, seed=2)
    try:
        read = read_dataset(_json(directory / "data.json", content))
    except InputError:
        return
    uris = [each.uri for each in read.images]
    assert len(set(uris)) == len(uris)
    assert set(uris) <= {str(path) for path in directory.rglob("*.jpg")}
    assert all(text.strip() and text.encode() for each in read.images for text in each.captions)
    if "annotations" in content:
        total = len(content["annotations"])
    else:
        total = sum(len(each["sentences"]) for each in content["images"])
    assert 0 < sum(len(each.captions) for each in read.images) + read.empty_captions <= total


def test_a_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.json does not exist$"):
        read_dataset(str(tmp_path / "none.json"))
    with pytest.raises(InputError, match=r"has no captions\.txt"):
        read_dataset(str(tmp_path))


def test_the_notebooks_split_holds_out_the_last_300():
    images = [CaptionedImage(str(i), ["a"]) for i in range(1000)]
    split = dataset.Dataset(images, 0, 0, 0).split()
    assert split == Split(images[:700], images[700:900], images[900:])
    with pytest.raises(InputError, match="too few"):
        dataset.Dataset(images[:300], 0, 0, 0).split()
