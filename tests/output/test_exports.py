"""Exports: each format read back by the tool it is for; reruns, foreign files, conditions."""

import csv
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from captioner import storage
from captioner.caption.job import caption_images
from captioner.cli import main
from captioner.config import ExportConfig, RunConfig
from captioner.errors import InputError, OutputError
from captioner.evaluation import metrics
from captioner.output import exports
from captioner.output.decisions import Journal
from captioner.output.exports import ExportSummary
from conftest import write_photos

IMAGES = 7


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos in two folders, and a file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "a", 3)
    write_photos(folder / "b.c", 3, seed=1)
    (folder / "a" / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def output(photos: Path, model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("captions") / "out")
    run = RunConfig(engine="local", shard_size=2, max_error_rate=1)
    caption_images(str(photos), uri, str(model_directory), run=run)
    return uri


@pytest.fixture
def own_output(output: str, tmp_path: Path) -> str:
    """A copy whose ledger no other test writes to."""
    return shutil.copytree(output, tmp_path / "own-output").as_posix()


def _rows(output: str) -> pd.DataFrame:
    table = pd.read_parquet(output)
    return table[table.status == "ok"].reset_index(drop=True)


def _export(
    output: str, destination: str | None, form: exports.Format, **settings: object
) -> ExportSummary:
    return exports.export(output, destination, form=form, config=ExportConfig(**settings))


def test_json_lines_hold_each_caption_once(own_output, place):
    summary = _export(own_output, f"{place}/captions.jsonl", "jsonl", prefix="sks, ", suffix=".")

    assert (summary.written, summary.not_ok, summary.filtered) == (6, 1, 0)
    lines = [json.loads(line) for line in storage.read(f"{place}/captions.jsonl").splitlines()]
    expected = _rows(own_output)
    assert [line["uri"] for line in lines] == list(expected.uri)
    assert [line["caption"] for line in lines] == [f"sks, {text}." for text in expected.caption]
    assert [line["width"] for line in lines] == [80] * 6


def test_csv_is_what_pandas_and_the_csv_module_read(own_output, tmp_path):
    target = tmp_path / "captions.csv"
    _export(own_output, str(target), "csv", columns="uri,caption,tokens", prefix='a "quote", and\n')

    read = pd.read_csv(target)
    expected = _rows(own_output)
    assert list(read.columns) == ["uri", "caption", "tokens"]
    assert list(read.caption) == [f'a "quote", and\n{text}' for text in expected.caption]
    assert [json.loads(cell) for cell in read.tokens] == [list(each) for each in expected.tokens]
    with target.open(newline="") as file:
        assert len(list(csv.reader(file))) == 7


def test_cocos_results_are_read_by_its_own_tool(own_output, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    target = tmp_path / "results.json"
    only_a = "uri LIKE '%/a/%'"
    summary = _export(own_output, str(target), "coco", where=only_a)

    assert summary.filtered == 3
    results = json.loads(target.read_text())
    assert [each["image_id"] for each in results] == [0, 1, 2]
    truth = {"images": [{"id": number} for number in range(3)], "annotations": [], "info": {}}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    loaded = coco.COCO(str(tmp_path / "truth.json")).loadRes(str(target))
    assert [each["caption"] for each in loaded.loadAnns(loaded.getAnnIds())] == list(
        _rows(own_output).caption[:3]
    )


class _Tokenizer:
    """In place of PTBTokenizer, which needs Java."""

    def tokenize(self, captions: dict[int, list[dict[str, str]]]) -> dict[int, list[str]]:
        return {
            image: metrics.tokenize([each["caption"] for each in some], "simple")
            for image, some in captions.items()
        }


class _LeftOut:
    """In place of METEOR and SPICE, which need Java."""

    def method(self) -> str:
        return "nothing"

    def compute_score(self, truth: dict, results: dict) -> tuple[float, list[float]]:
        return 0.0, [0.0] * len(results)


def test_cocos_evaluation_of_an_export_is_ours(own_output, photos, tmp_path, monkeypatch, capsys):
    coco = pytest.importorskip("pycocotools.coco")
    theirs = pytest.importorskip("pycocoevalcap.eval")
    for name, substitute in (("PTBTokenizer", _Tokenizer), ("Meteor", _LeftOut)):
        monkeypatch.setattr(theirs, name, substitute)
    monkeypatch.setattr(theirs, "Spice", _LeftOut)
    captions = list(_rows(own_output).caption[:3])
    results, truth = tmp_path / "results.json", tmp_path / "truth.json"
    _export(own_output, str(results), "coco", where="uri LIKE '%/a/%'")
    references = [(n, text) for n in range(3) for text in (captions[n][3:], captions[n - 1])]
    named = [{"id": n, "file_name": f"photo-{n:04d}.jpg"} for n in range(3)]
    annotations = [
        {"id": n, "image_id": image, "caption": text}
        for n, (image, text) in enumerate([*references, (1, "A dog runs, on grass.")])
    ]
    truth.write_text(json.dumps({"images": named, "annotations": annotations, "info": {}}))

    loaded = coco.COCO(str(truth))
    evaluation = theirs.COCOEvalCap(loaded, loaded.loadRes(str(results)))
    evaluation.evaluate()

    capsys.readouterr()
    arguments = ["evaluate", own_output, "--references", str(truth), "--images", f"{photos}/a"]
    ran = CliRunner().invoke(main, [*arguments, "--tokenizer", "simple", "--json", "-"])
    assert ran.exit_code == 0, ran.output
    scores = json.loads(ran.stdout)["scores"]
    names = {"bleu_1": "Bleu_1", "bleu_4": "Bleu_4", "rouge_l": "ROUGE_L", "cider": "CIDEr"}
    assert {ours: scores[ours] for ours in names} == pytest.approx(
        {ours: evaluation.eval[name] for ours, name in names.items()}, abs=1e-4
    )
    assert 0.2 < scores["bleu_1"] < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "another image has the id 0 too; use --id"),
        ({"id": "licence"}, "--id licence: unknown column"),
    ],
)
def test_an_image_without_an_id_of_its_own_writes_no_results(
    own_output, tmp_path, settings, message
):
    with pytest.raises(InputError, match=message):
        _export(own_output, str(tmp_path / "results.json"), "coco", **settings)

    assert not (tmp_path / "results.json").exists()


def test_a_column_can_be_the_id(own_output, tmp_path):
    _export(own_output, str(tmp_path / "results.json"), "coco", id="uri")

    results = json.loads((tmp_path / "results.json").read_text())
    assert [each["image_id"] for each in results] == list(_rows(own_output).uri)


def test_webdataset_reads_the_tars(own_output, tmp_path):
    pytest.importorskip("webdataset")
    _export(own_output, str(tmp_path / "tars"), "webdataset", shard_images=4)

    assert sorted(path.name for path in (tmp_path / "tars").iterdir()) == ["00000.tar", "00001.tar"]
    expected = _rows(own_output)
    # In a process of its own: the library leaves files open, which is an error to our tests.
    code = """
import json, sys, webdataset
samples = webdataset.WebDataset(sys.argv[1:], shardshuffle=False)
fields = [[s["__key__"], s["txt"].decode(), s["jpg"].hex(), s["json"].decode()] for s in samples]
print(json.dumps(fields))
"""
    tars = [str(tmp_path / "tars" / name) for name in ("00000.tar", "00001.tar")]
    command = [sys.executable, "-W", "ignore", "-c", code, *tars]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    keys, texts, images, columns = zip(*json.loads(ran.stdout), strict=True)
    assert list(keys) == [f"{number:09d}" for number in range(6)]
    assert list(texts) == list(expected.caption)
    assert list(images) == [Path(uri).read_bytes().hex() for uri in expected.uri]
    assert [json.loads(each)["uri"] for each in columns] == list(expected.uri)


def test_tars_are_the_same_bytes_wherever_they_are_written(own_output, place, tmp_path):
    _export(own_output, f"{place}/tars", "webdataset")
    _export(own_output, str(tmp_path / "others"), "webdataset")

    assert storage.read(f"{place}/tars/00000.tar") == (tmp_path / "others/00000.tar").read_bytes()


def test_datasets_reads_the_image_folder(own_output, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _export(own_output, str(tmp_path / "folder"), "hf", columns="uri,score")

    loaded = datasets.load_dataset(
        "imagefolder",
        data_dir=str(tmp_path / "folder"),
        cache_dir=str(tmp_path / "cache"),
        split="train",
    )
    expected = _rows(own_output)
    assert loaded["text"] == list(expected.caption)
    assert loaded["uri"] == list(expected.uri)
    assert loaded[0]["image"].size == (80, 60)


def test_sidecars_take_the_shape_of_the_images_folder(own_output, photos, place):
    summary = _export(own_output, f"{place}/texts", "sidecar")

    assert summary.written == 6
    for uri, caption in zip(_rows(own_output).uri, _rows(own_output).caption, strict=True):
        below = Path(uri).relative_to(photos).with_suffix(".txt")
        assert storage.read(f"{place}/texts/{below}").decode() == caption


def test_sidecars_stand_beside_the_images_without_a_destination(photos, model_directory, tmp_path):
    mine = shutil.copytree(photos, tmp_path / "photos")
    run = RunConfig(engine="local", max_error_rate=1)
    caption_images(str(mine), str(tmp_path / "out"), str(model_directory), run=run)

    summary = _export(str(tmp_path / "out"), None, "sidecar", extension="caption")
    assert summary.describe().startswith("beside the images: ")

    written = sorted(path.relative_to(mine).as_posix() for path in mine.rglob("*.caption"))
    assert written[0] == "a/photo-0000.caption"
    assert len(written) == 6


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("sidecar", "x"),
        ("jsonl", "x.jsonl"),
        ("csv", "x.csv"),
        ("webdataset", "x"),
        ("hf", "x"),
    ],
)
def test_a_second_run_changes_nothing(own_output, tmp_path, form, name):
    target = tmp_path / name
    _export(own_output, str(target), form)
    files = sorted(target.rglob("*")) if target.is_dir() else [target]
    before = [(path, path.read_bytes()) for path in files if path.is_file()]

    summary = _export(own_output, str(target), form)

    assert summary.kept == 0
    assert summary.written + summary.unchanged == 6
    assert [(path, path.read_bytes()) for path in files if path.is_file()] == before


def test_a_second_run_writes_no_sidecar_and_no_tar_again(own_output, tmp_path):
    for form in ("sidecar", "webdataset"):
        _export(own_output, str(tmp_path / form), form)
        files = [path for path in (tmp_path / form).rglob("*") if path.is_file()]
        times = [path.stat().st_mtime_ns for path in files]

        summary = _export(own_output, str(tmp_path / form), form)

        assert (summary.written, summary.unchanged) == (0, 6)
        assert [path.stat().st_mtime_ns for path in files] == times


@pytest.mark.parametrize("form", ["jsonl", "csv", "webdataset", "hf"])
def test_a_file_of_others_is_kept_unless_it_may_be_overwritten(own_output, tmp_path, form):
    name = {"webdataset": "x/00000.tar", "hf": "x/metadata.jsonl"}.get(form, "x")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")

    with pytest.raises(InputError, match="--existing"):
        _export(own_output, str(tmp_path / "x"), form)
    assert (tmp_path / name).read_bytes() == b"mine"

    _export(own_output, str(tmp_path / "x"), form, existing="overwrite")
    assert (tmp_path / name).read_bytes() != b"mine"


@pytest.mark.parametrize(
    ("existing", "expected"),
    [("overwrite", "{}"), ("append", "tags, by hand {}"), ("prepend", "{} tags, by hand")],
)
def test_what_becomes_of_a_sidecar_of_others(own_output, tmp_path, existing, expected):
    target = tmp_path / "texts/a/photo-0000.txt"
    target.parent.mkdir(parents=True)
    target.write_text("tags, by hand")
    with pytest.raises(InputError, match=r"5 images written.*1 not exported.*photo-0000\.txt"):
        _export(own_output, str(tmp_path / "texts"), "sidecar")
    assert target.read_text() == "tags, by hand"
    caption = _rows(own_output).caption[0]

    for _ in range(2):
        _export(own_output, str(tmp_path / "texts"), "sidecar", existing=existing)
        assert target.read_text() == expected.format(caption)

    # Another text takes the place of the one that was added, and the rest stays.
    _export(own_output, str(tmp_path / "texts"), "sidecar", existing=existing, prefix="new ")
    assert target.read_text() == expected.format(f"new {caption}")


def test_a_sidecar_that_somebody_edited_is_kept(own_output, tmp_path):
    _export(own_output, str(tmp_path), "sidecar")
    (tmp_path / "a/photo-0001.txt").write_text("edited by hand")

    with pytest.raises(InputError, match=r"5 unchanged, .*1 not exported.*photo-0001\.txt"):
        _export(own_output, str(tmp_path), "sidecar")
    assert (tmp_path / "a/photo-0001.txt").read_text() == "edited by hand"


def test_images_that_differ_in_their_extension_alone_have_one_sidecar(model_directory, tmp_path):
    [photo] = write_photos(tmp_path / "photos", 1)
    Image.open(photo).save(photo.with_suffix(".png"))
    run = RunConfig(engine="local")
    caption_images(str(tmp_path / "photos"), str(tmp_path / "out"), str(model_directory), run=run)

    for existing in ("keep", "overwrite"):
        with pytest.raises(InputError, match=r"1 not exported because another image .* jsonl"):
            _export(str(tmp_path / "out"), str(tmp_path / "texts"), "sidecar", existing=existing)


def test_an_export_that_is_stopped_is_finished_by_the_next(own_output, tmp_path, monkeypatch):
    write = storage.write
    left = iter(range(2))

    def stop(uri: str, data: bytes, **options: object) -> None:
        if uri.endswith(".txt") and next(left, None) is None:
            raise OutputError("no space left")
        write(uri, data, **options)

    monkeypatch.setattr(storage, "write", stop)
    with pytest.raises(OutputError, match="no space"):
        _export(own_output, str(tmp_path / "texts"), "sidecar")
    monkeypatch.undo()

    summary = _export(own_output, str(tmp_path / "texts"), "sidecar")
    assert (summary.written, summary.unchanged) == (4, 2)


def test_an_image_that_is_gone_is_counted_and_tried_again(model_directory, tmp_path):
    photos = write_photos(tmp_path / "photos", 3)
    run = RunConfig(engine="local")
    caption_images(str(tmp_path / "photos"), str(tmp_path / "out"), str(model_directory), run=run)
    data = photos[1].read_bytes()
    photos[1].unlink()
    targets = {form: str(tmp_path / form) for form in ("webdataset", "hf")}

    for form, target in targets.items():
        summary = _export(str(tmp_path / "out"), target, form)
        assert (summary.written, summary.unreadable) == (2, 1)
    photos[1].write_bytes(data)
    for form, target in targets.items():
        summary = _export(str(tmp_path / "out"), target, form)
        assert (summary.written + summary.unchanged, summary.unreadable) == (3, 0)
    with tarfile.open(tmp_path / "webdataset/00000.tar") as tar:
        assert len(tar.getnames()) == 9
    assert len((tmp_path / "hf/metadata.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("reviewed", "expected"),
    [
        ("accepted", [(0, None), (2, "a cat")]),
        ("edited", [(2, "a cat")]),
        ("all", [(0, None), (2, "a cat"), (3, None), (4, None), (5, None)]),
    ],
)
def test_a_reviewed_output_gives_what_the_reviewer_wrote(own_output, tmp_path, reviewed, expected):
    captions, uris = _rows(own_output).caption, _rows(own_output).uri
    journal = Journal(own_output)
    journal.decide(uris[0], "accepted", None, seen=0)
    journal.decide(uris[1], "rejected", None, seen=0)
    journal.decide(uris[2], "edited", "a cat", seen=0)

    summary = _export(own_output, str(tmp_path / "x.jsonl"), "jsonl", reviewed=reviewed)

    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [(line["uri"], line["caption"]) for line in lines] == [
        (uris[number], caption or captions[number]) for number, caption in expected
    ]
    assert summary.not_reviewed == 6 - len(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"where": "speed > 3"}, r"--where speed > 3: .*speed"),
        ({"where": "score >"}, "--where score >: "),
        ({"where": "count(*) > 1"}, "not a condition on single rows"),
        ({"where": "row_number() OVER (ORDER BY score) < 3"}, "window functions"),
        ({"where": "score > (SELECT max(a) FROM read_csv('/etc/passwd') t(a))"}, "--where"),
        ({"where": " "}, "--where is empty"),
        ({"where": "true; DROP TABLE captions"}, "more than one statement|a single SELECT"),
        ({"where": "true) OR (true"}, "--where"),
        ({"where": "true); SELECT (true"}, "--where"),
        ({"where": "true, false"}, "--where"),
        ({"columns": ","}, "--columns must be names"),
        ({"id": "uri"}, "--id is for --format coco"),
        ({"extension": "caption"}, "--extension is for --format sidecar"),
        ({"root": "/"}, "--root is for --format sidecar"),
        ({"shard_images": 5}, "--shard-images is for --format webdataset"),
        ({"columns": "uri,licence"}, "--columns licence: unknown column"),
        ({"existing": "append"}, "--existing append is for --format sidecar"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(own_output, tmp_path, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        _export(own_output, str(tmp_path / "x"), "jsonl", **settings)

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_a_condition_may_end_in_a_comment(own_output, tmp_path):
    summary = _export(own_output, str(tmp_path / "x"), "jsonl", where="width = 80 -- all of them")
    assert summary.written == 6


@pytest.mark.parametrize("extension", ["", ".", "a/b", "../txt", "jpg", ".PNG", "x.webp"])
def test_a_sidecar_replaces_no_image_and_stays_in_its_folder(extension):
    with pytest.raises(InputError, match="extension must"):
        ExportConfig(extension=extension)


@pytest.mark.parametrize("name", ["part-000000.parquet", "__captioner/run.json", "__captioner"])
def test_the_files_of_the_caption_job_are_not_replaced(own_output, tmp_path, name):
    (tmp_path / "link").symlink_to(own_output)
    for output in (own_output, str(tmp_path / "link")):
        with pytest.raises(OutputError, match="belongs to the caption job"):
            _export(own_output, f"{output}/{name}", "csv", existing="overwrite")
    assert len(_rows(own_output)) == 6


@pytest.mark.parametrize(
    ("form", "message"),
    [("csv", "is a folder; name a file"), ("hf", "is a file: name a folder for --format hf")],
)
def test_a_file_is_no_folder_and_the_reverse(own_output, tmp_path, form, message):
    target = tmp_path if form == "csv" else tmp_path / "file"
    (tmp_path / "file").write_text("mine")
    with pytest.raises((InputError, OutputError), match=message):
        _export(own_output, str(target), form, existing="overwrite")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_command_exports_and_says_what_it_did(own_output, tmp_path):
    arguments = ["export", own_output, str(tmp_path / "x.jsonl"), "--format", "jsonl"]
    result = CliRunner().invoke(main, [*arguments, "--where", "caption IS NOT NULL AND width = 80"])

    assert result.exit_code == 0, result.output
    assert "x.jsonl: 6 images written, 1 left out because their status is not ok" in result.output


@pytest.mark.parametrize("arguments", [["--format", "csv"], ["x.csv"], ["x", "--format", "xlsx"]])
def test_the_command_refuses_what_it_cannot_do(own_output, arguments):
    result = CliRunner().invoke(main, ["export", own_output, *arguments])

    assert result.exit_code == 2, result.output


def test_what_is_no_output_is_refused(tmp_path):
    with pytest.raises(OutputError):
        _export(str(tmp_path), str(tmp_path / "x"), "csv")
