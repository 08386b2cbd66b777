import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from captioner.cli import main
from captioner.config import DecodeConfig
from captioner.data.views import load_view
from captioner.evaluation import metrics
from captioner.model import bundle
from captioner.model.native import Captioner
from captioner.output.decisions import Journal
from conftest import write_photos


def _run(*arguments: object):
    return CliRunner().invoke(main, ["evaluate", *(str(each) for each in arguments)])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight photos with two captions each, in Flickr8k's layout."""
    directory = tmp_path / "data"
    paths = write_photos(directory / "Images", 8)
    lines = ["image,caption"]
    for path in paths:
        lines += [f"{path.name},A dog runs on the grass .", f"{path.name},Two men in red water ."]
    (directory / "captions.txt").write_text("\n".join(lines) + "\n")
    (directory / "list.txt").write_text("\n".join(path.name for path in paths[2:]) + "\n")
    return directory


def _captions(data: Path, model_directory: Path, **decode: object) -> dict[str, str]:
    captioner = Captioner(
        bundle.load(str(model_directory)),
        DecodeConfig(**decode),
        device="cpu",
        precision="fp32",
    )
    paths = sorted(str(path) for path in (data / "Images").iterdir())
    pixels = [load_view(path, captioner.image_size, 0) for path in paths]
    texts = [caption.text for caption in captioner(np.stack(pixels))]
    return dict(zip(paths, texts, strict=True))


def test_a_model_on_a_list_of_a_dataset(data: Path, tmp_path: Path, model_directory: Path):
    arguments = ("--model", model_directory, "--list", data / "list.txt", "--beam=2")
    arguments += ("--tokenizer=simple", "--device=cpu", "--precision=fp32", "--batch-size=4")
    files = ("--json", tmp_path / "scores.json", "--per-image", tmp_path / "images.parquet")
    result = _run(data, *arguments, *files)
    assert result.exit_code == 0, result.output
    parsed = json.loads((tmp_path / "scores.json").read_text())
    captions = dict(list(_captions(data, model_directory, beam=2).items())[2:])
    references = ["A dog runs on the grass .", "Two men in red water ."]
    expected = metrics.score(list(captions.values()), [references] * 6, tokenizer="simple")
    assert parsed["scores"] == expected.corpus
    assert (parsed["images"], parsed["tokenizer"]) == (6, "simple")
    assert parsed["settings"]["beam"] == 2
    assert parsed["settings"]["precision"] == "float32"
    assert parsed["left_out"] == {}
    lines = result.stdout.splitlines()
    assert len(set(map(len, lines))) == 1, "the table is aligned"
    table = dict(re.split(" {2,}", line) for line in lines)
    shown = {metrics.NAMES[name]: f"{100 * v:.1f}" for name, v in expected.corpus.items()}
    assert {name: table.pop(name) for name in shown} == shown
    assert table == {
        "images": "6",
        "tokenizer": "simple",
        "beam": "2",
        "length penalty": "1.0",
        "max words": "none",
        "allow unknown": "False",
    }
    assert result.stderr.splitlines() == ["left out: METEOR: it needs Java and --tokenizer ptb"]
    rows = pq.read_table(tmp_path / "images.parquet")
    names = ["uri", "caption", "score", "tokens", "token_logprobs", "references"]
    assert rows.column_names == [*names, "bleu_4", "rouge_l", "cider"]
    for row in rows.to_pylist():
        assert " ".join(row["tokens"]) == row["caption"]
        assert len(row["token_logprobs"]) == len(row["tokens"])
    assert all(score < 0 for score in rows["score"].to_pylist())
    assert rows["cider"].to_pylist() == sorted(expected.images["cider"])
    assert dict(zip(rows["uri"].to_pylist(), rows["caption"].to_pylist(), strict=True)) == captions
    assert rows["references"].to_pylist() == [references] * 6


def _trained_on(model_directory: Path, copy: Path, trained: list[str], validated: list[str]):
    shutil.copytree(model_directory, copy)
    seen = bundle.SeenImages(frozenset(trained), frozenset(validated))
    bundle.save_images(str(copy), seen)
    return copy


def test_images_that_the_model_has_seen_are_told(data: Path, tmp_path: Path, model_directory: Path):
    names = [path.name for path in sorted((data / "Images").iterdir())]
    model = _trained_on(model_directory, tmp_path / "model", [*names[:4], "gone.jpg"], names[3:6])
    arguments = ("--model", model, "--tokenizer=simple", "--list", data / "list.txt")
    for listed, known in {
        (2, 8): "trained on 2 and validated on 2 of these 6",
        (3, 4): "trained on 1 of these 1",
        (5, 7): "validated on 1 of these 2",
        (6, 8): None,
    }.items():
        (data / "list.txt").write_text("\n".join(names[slice(*listed)]))
        result = _run(data, *arguments)
        assert result.exit_code == 0, result.output
        told = [line for line in result.stderr.splitlines() if "METEOR" not in line]
        if listed == (3, 4):
            assert told.pop(0) == "only 1 image to score: its CIDEr is always 0; give more images"
        assert told == ([f"{model} was {known} images, by their names"] if known else [])


def test_a_split_with_images_that_the_model_was_trained_on_is_refused(
    data: Path, tmp_path: Path, model_directory: Path
):
    names = [path.name for path in sorted((data / "Images").iterdir())]
    sides = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    images = [
        {"filename": name, "split": side, "sentences": [{"raw": "A dog ."}]}
        for name, side in zip(names, sides, strict=True)
    ]
    (data / "dataset.json").write_text(json.dumps({"images": images}))
    karpathy = (data / "dataset.json", "--images", data / "Images", "--tokenizer=simple")
    own = _trained_on(model_directory, tmp_path / "own", names[:4], names[4:6])
    other = _trained_on(model_directory, tmp_path / "other", names[1:5] + names[7:], [])
    for model, split, count in (
        (other, (), "1 of these 2"),
        (other, ("--split=test",), "1 of these 2"),
        (other, ("--split=val",), "1 of these 2"),
        (other, ("--split=train",), None),
        (own, (), None),
        (own, ("--split=val",), None),
        (own, ("--split=train",), None),
        (model_directory, (), None),
    ):
        result = _run(*karpathy, "--model", model, *split)
        assert result.exit_code == (2 if count else 0), (model, split, result.output)
        if count:
            assert result.output == (
                f"captioner: {model} was trained on {count} images, by their names: "
                "the model was trained on another split; name the images with --list\n"
            )


def test_the_test_images_of_a_split_may_be_there_alone(data: Path, model_directory: Path):
    names = [path.name for path in sorted((data / "Images").iterdir())]
    images = [
        {"filename": name, "split": side, "sentences": [{"raw": "A dog ."}]}
        for name, side in [("gone.jpg", "train"), ("gone too.jpg", "val"), (names[0], "test")]
    ]
    (data / "dataset.json").write_text(json.dumps({"images": images}))
    karpathy = (data / "dataset.json", "--images", data / "Images", "--tokenizer=simple")
    result = _run(*karpathy, "--model", model_directory, "--split=test")
    assert result.exit_code == 0, result.output
    result = _run(*karpathy, "--model", model_directory, "--split=val")
    assert result.exit_code == 2, result.output
    assert "gone.jpg, gone too.jpg; to accept this, add --allow-missing" in result.output
    result = _run(*karpathy, "--model", model_directory, "--split=val", "--allow-missing")
    assert result.exit_code == 2, result.output
    assert "the dataset has no split val: use another --split, or --list\n" in result.output


def test_cocos_captions_are_scored_as_a_whole_unless_a_split_is_named(
    data: Path, model_directory: Path
):
    names = [path.name for path in sorted((data / "Images").iterdir())]
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": i, "caption": "A dog ."} for i in range(len(names))],
    }
    (data / "captions.json").write_text(json.dumps(content))
    options = ("--images", data / "Images", "--tokenizer=simple", "--json=-")
    coco = (data / "captions.json", "--model", model_directory, *options)
    folder = (data, "--model", model_directory, *options)
    for arguments in (coco, (*coco, "--split=all"), (*folder, "--split=all")):
        result = _run(*arguments)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["images"] == len(names)
    for arguments in ((*coco, "--split=test"), folder):
        result = _run(*arguments)
        assert result.exit_code == 2, result.output
        assert f"{len(names)} images are too few to split: use --split all" in result.output


def test_an_image_of_another_folder_is_not_one_that_was_trained_on(
    data: Path, tmp_path: Path, model_directory: Path
):
    names = [path.name for path in sorted((data / "Images").iterdir())]
    (data / "Images" / "sub").mkdir()
    shutil.copy(data / "Images" / names[0], data / "Images" / "sub" / names[0])
    with (data / "captions.txt").open("a") as captions:
        captions.write(f"sub/{names[0]},A cat .\n")
    model = _trained_on(model_directory, tmp_path / "model", names[:4], [])
    (data / "list.txt").write_text(f"sub/{names[0]}")
    result = _run(data, "--model", model, "--tokenizer=simple", "--list", data / "list.txt")
    assert result.exit_code == 0, result.output
    assert "trained on" not in result.stderr


def test_an_image_that_cannot_be_decoded_is_left_out(data: Path, model_directory: Path):
    broken = data / "Images" / "photo-0003.jpg"
    broken.write_bytes(b"no image")
    arguments = ("--model", model_directory, "--list", data / "list.txt", "--tokenizer=simple")
    result = _run(data, *arguments, "--json=-")
    assert result.exit_code == 0, result.output
    parsed = json.loads(result.stdout)
    assert parsed["images"] == 5
    assert parsed["left_out"] == {"images that cannot be read or decoded": [str(broken)]}
    assert f"left out: 1 images that cannot be read or decoded: {broken}" in result.stderr
    (data / "list.txt").write_text(broken.name)
    result = _run(data, *arguments)
    assert result.exit_code == 2
    assert "no image has both a caption and references" in result.stderr


@pytest.fixture
def output(data: Path, tmp_path: Path, model_directory: Path) -> Path:
    """A caption job's output for copies of the photos and one more."""
    photos = write_photos(tmp_path / "photos", 9)
    photos[0].write_bytes(b"no image")
    arguments = ("caption", photos[0].parent, tmp_path / "out", "--model", model_directory)
    arguments += ("--engine=local", "--device=cpu", "--precision=fp32", "--max-words=5")
    arguments += ("--max-error-rate=0.2",)
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return tmp_path / "out"


def test_an_output_against_references(data: Path, output: Path, tmp_path: Path, model_directory):
    parquet = tmp_path / "images.parquet"
    result = _run(
        output, "--references", data, "--tokenizer=simple", "--json=-", "--per-image", parquet
    )
    assert result.exit_code == 0, result.output
    parsed = json.loads(result.stdout)
    assert parsed["images"] == 7
    assert parsed["settings"]["max_words"] == 5
    assert parsed["left_out"] == {
        "images without a caption": [str(data / "Images" / "photo-0000.jpg")],
        "captions without references": [str(tmp_path / "photos" / "photo-0008.jpg")],
    }
    captions = _captions(data, model_directory, max_words=5)
    rows = pd.read_parquet(io.BytesIO(parquet.read_bytes()))
    assert len(rows) == 7
    for uri, caption in zip(rows["uri"], rows["caption"], strict=True):
        assert captions[uri] == caption
    written = {Path(row.uri).name: row for row in pd.read_parquet(output).itertuples()}
    for row in rows.itertuples():
        expected = written[Path(row.uri).name]
        assert row.score == expected.score
        assert list(row.tokens) == list(expected.tokens)
        assert list(row.token_logprobs) == list(expected.token_logprobs)
    result = _run(output, "--references", data, "--tokenizer=simple", "--list", data / "list.txt")
    assert result.exit_code == 0, result.output
    assert "left out: 2 captions without references" in result.stderr
    assert re.search(r"^images +6$", result.stdout, re.MULTILINE)


def test_an_output_without_the_wanted_images_is_one_line(data: Path, output: Path, tmp_path: Path):
    (tmp_path / "list.txt").write_text("photo-0000.jpg\n")  # it cannot be decoded
    result = _run(output, "--references", data, "--list", tmp_path / "list.txt")
    assert result.exit_code == 2, result.output
    assert "no image has both a caption and references" in result.stderr


def test_a_file_name_that_several_share_joins_nothing(data: Path, output: Path, model_directory):
    table = pq.read_table(output / "part-000000.parquet")
    uris = table["uri"].to_pylist()
    uris[2] = "/elsewhere/photo-0001.jpg"  # as its neighbour is called
    uris[3] = str(data / "Images" / "photo-0003.jpg")  # by its URI
    column = table.schema.get_field_index("uri")
    changed = table.set_column(column, table.schema.field("uri"), [uris])
    pq.write_table(changed, output / "part-000000.parquet")
    result = _run(output, "--references", data, "--tokenizer=simple", "--json=-")
    assert result.exit_code == 0, result.output
    left_out = json.loads(result.stdout)["left_out"]
    names = [Path(uri).name for uri in left_out["images without a caption"]]
    assert names == ["photo-0000.jpg", "photo-0001.jpg", "photo-0002.jpg"]
    assert len(left_out["captions without references"]) == 3


def test_mistakes_get_one_line_and_exit_code_2(data: Path, output: Path, model_directory: Path):
    listed = ("--list", data / "list.txt")
    cases = {
        "add --model MODEL to caption the images of": (data,),
        "give --model or --references, not both": (
            data,
            "--model",
            model_directory,
            "--references",
            data,
        ),
        "give --split or --list, not both": (
            data,
            "--model",
            model_directory,
            "--split=val",
            *listed,
        ),
        "--beam needs --model: the captions in": (output, "--references", data, "--beam=3"),
        "too few": (data, "--model", model_directory),
        "has no run.json": (data, "--references", data),
        "has no captions.txt": (output, "--references", output.parent / "photos"),
        "has no accepted captions": (output, "--references", output),
        "--images needs a dataset": (output, "--references", output, "--images", data),
        "--split needs a dataset": (output, "--references", output, "--split=val"),
        "has no config.json": (data, "--model", data, *listed),
        "no device 'gpu'": (data, "--model", model_directory, *listed, "--device=gpu"),
    }
    for message, arguments in cases.items():
        result = _run(*arguments, "--tokenizer=simple")
        assert result.exit_code == 2, (message, result.output)
        assert message in result.output
        assert len(result.output.splitlines()) == 1, result.output


def test_an_output_against_the_accepted_captions_of_another(output: Path, tmp_path: Path):
    reviewed = Path(shutil.copytree(output, tmp_path / "reviewed"))
    rows = pd.read_parquet(output / "part-000000.parquet").set_index("uri")["caption"]
    journal = Journal(str(reviewed))
    photos = [str(tmp_path / "photos" / f"photo-{number:04}.jpg") for number in range(5)]
    journal.decide(photos[0], "accepted", None, seen=0)  # has no caption
    journal.decide(photos[1], "accepted", None, seen=0)
    journal.decide(photos[2], "edited", "Two men in red water .", seen=0)
    journal.decide(photos[3], "rejected", None, seen=0)
    made = journal.decide(photos[4], "accepted", None, seen=0)
    journal.decide(photos[4], None, None, seen=made.revision)

    parquet = tmp_path / "images.parquet"
    result = _run(
        output, "--references", reviewed, "--tokenizer=simple", "--per-image", parquet, "--json=-"
    )

    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["images"] == 2
    scored = pd.read_parquet(io.BytesIO(parquet.read_bytes())).set_index("uri")
    assert list(scored.loc[photos[1], "references"]) == [rows[photos[1]]]
    assert list(scored.loc[photos[2], "references"]) == ["Two men in red water ."]
    assert scored.loc[photos[2], "caption"] == rows[photos[2]]
