import csv
import gzip
import io
import json
import os
import random
import tempfile
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from captioner import storage
from captioner.cli import main
from captioner.config import ListingConfig
from captioner.data.listing import list_source
from captioner.data.source import list_files
from captioner.errors import InputError
from captioner.storage import Listed
from conftest import break_bucket


def _uris(source: object, **listing: object) -> list[str]:
    uris: list[str] = list_source(str(source), ListingConfig(**listing))["uri"].to_pylist()
    return uris


def test_a_directory_is_listed_recursively_in_order(place):
    for name in ("b.jpg", "a/c.PNG", "a.txt", "d.raw"):
        storage.write(f"{place}/{name}", b"123")
    listed = list_source(place, ListingConfig()).to_pylist()
    root = place.rsplit("/", 1)[1]
    assert [each["uri"].split(f"/{root}/")[1] for each in listed] == ["a/c.PNG", "b.jpg"]
    assert [each["size"] for each in listed] == [3, 3]
    assert [uri.split(f"/{root}/")[1] for uri in _uris(place, extensions="raw")] == ["d.raw"]
    assert _uris(place, limit=1) == [listed[0]["uri"]]


def test_a_directory_without_images_is_refused(place):
    storage.write(f"{place}/notes.md", b"")
    with pytest.raises(InputError, match=r" holds no images \(jpg,png\)$"):
        list_source(place, ListingConfig(extensions="jpg,png"))


@pytest.mark.parametrize("name", ["none", "none.txt", "none.csv", "none.parquet"])
def test_a_source_that_is_not_there_is_refused(place, name):
    with pytest.raises(InputError, match=rf"/{name} does not exist$"):
        list_source(f"{place}/{name}", ListingConfig())


def test_a_source_of_another_kind_is_refused(place):
    storage.write(f"{place}/photo.jpg", b"")
    with pytest.raises(InputError, match=r"/photo\.jpg is a file, not a directory of images$"):
        list_source(f"{place}/photo.jpg", ListingConfig())


def test_files_of_other_endings_are_counted(place, caplog):
    for name in (
        "a.jpg",
        "b.HEIC",
        "c/d.heic",
        "e.txt",
        "README",
        "f/LICENSE",
        "Makefile",
        ".hidden",
    ):
        storage.write(f"{place}/photos/{name}", b"")
    with caplog.at_level("INFO"):
        assert _uris(f"{place}/photos") == [f"{place}/photos/a.jpg"]
    assert [record.getMessage() for record in caplog.records] == [
        "files of other endings passed over: 3 without one, 2 .heic, 1 .txt"
    ]


@pytest.mark.parametrize("name", ["photos.txt", "photos.csv", "photos.parquet"])
def test_a_directory_may_be_called_like_a_list(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.jpg").touch()
    assert _uris(tmp_path / name) == [f"{tmp_path}/{name}/a.jpg"]


def _as_txt(uris: list[str]) -> bytes:
    return "".join(f"{uri}\n" for uri in uris).encode()


def _as_csv(uris: list[str]) -> bytes:
    sink = io.StringIO()
    csv.writer(sink).writerows([["label", "uri"], *([i, uri] for i, uri in enumerate(uris))])
    return sink.getvalue().encode()


def _as_parquet(uris: list[str], **columns: list) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({**columns, "uri": uris}), sink)
    return sink.getvalue()


def _as_tsv(uris: list[str]) -> bytes:
    sink = io.StringIO()
    rows = [["label", "uri"], *([i, uri] for i, uri in enumerate(uris))]
    csv.writer(sink, delimiter="\t").writerows(rows)
    return sink.getvalue().encode()


def _as_json_lines(uris: list[str]) -> bytes:
    return "".join(json.dumps({"n": i, "uri": uri}) + "\n" for i, uri in enumerate(uris)).encode()


LISTS = {
    "txt": _as_txt,
    "csv": _as_csv,
    "tsv": _as_tsv,
    "jsonl": _as_json_lines,
    "parquet": _as_parquet,
    "txt.gz": lambda uris: gzip.compress(_as_txt(uris)),
    "csv.gz": lambda uris: gzip.compress(_as_csv(uris)),
    "TSV.GZ": lambda uris: gzip.compress(_as_tsv(uris)),
    "ndjson.gz": lambda uris: gzip.compress(_as_json_lines(uris)),
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_is_taken_in_its_order_and_each_image_once(place, kind):
    uris = ["z.jpg", "/abs/a.jpg", "s3://bucket/k%20.png", "sub/b.gif", "z.jpg", "/abs/a.jpg"]
    storage.write(f"{place}/lists/my.{kind}", LISTS[kind](uris))
    base = f"{place}/lists"
    expected = [f"{base}/z.jpg", "/abs/a.jpg", "s3://bucket/k%20.png", f"{base}/sub/b.gif"]
    listed = list_source(f"{place}/lists/my.{kind}", ListingConfig())
    assert listed.equals(list_files(Listed(uri, None) for uri in expected))
    assert _uris(f"{place}/lists/my.{kind}", limit=2) == expected[:2]


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize(
    "name",
    ["two words.jpg", "100%.jpg", "a,b.jpg", 'quote".jpg', "🐕.jpg", "a::b.jpg", "\u2028.jpg"],
)
def test_a_list_names_any_file(tmp_path, kind, name):
    (tmp_path / name).write_bytes(b"pixels")
    (tmp_path / f"list.{kind}").write_bytes(LISTS[kind]([name]))
    [uri] = _uris(tmp_path / f"list.{kind}")
    assert uri == f"{tmp_path}/{name}"
    assert storage.read(uri) == b"pixels"


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_names_files_with_line_breaks(tmp_path, kind):
    (tmp_path / f"list.{kind}").write_bytes(LISTS[kind](["line\nbreak.jpg"]))
    assert _uris(tmp_path / f"list.{kind}") == [f"{tmp_path}/line\nbreak.jpg"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_column_may_be_named(tmp_path, kind):
    columns = {"uri": ["x.jpg", "y.jpg"], "Where": ["a.jpg", "b.jpg"]}
    path = tmp_path / f"list.{kind}"
    frame = pd.DataFrame(columns)
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    assert _uris(path) == [f"{tmp_path}/x.jpg", f"{tmp_path}/y.jpg"]
    assert _uris(path, column="Where") == [f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg"]
    with pytest.raises(
        InputError, match=r"^--column where: .* has no column where; its columns are uri, W"
    ):
        _uris(path, column="where")


def test_a_column_is_of_a_table(tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg\n")
    with pytest.raises(InputError, match=r"list\.txt has no columns; remove --column"):
        _uris(tmp_path / "list.txt", column="uri")
    with pytest.raises(
        InputError, match=r"--column is for a list, and .* is not one by its ending"
    ):
        _uris(tmp_path, column="uri")


def test_tabs_without_quoting(tmp_path):
    """Many programs write tab-separated text whose quotes are characters as others are."""
    rows = ['"Stop" says a sign', '"open', "plain", 'closed"', '"']
    text = "".join(f"{caption}\t{number}.jpg\n" for number, caption in enumerate(rows))
    (tmp_path / "list.tsv").write_text("caption\turl\n" + text)
    assert _uris(tmp_path / "list.tsv") == [f"{tmp_path}/{number}.jpg" for number in range(5)]
    (tmp_path / "list.tsv").write_text("caption\turl\n" + text + '"open\n')
    with pytest.raises(InputError, match=r"list\.tsv, line 2: text follows a closing quote"):
        _uris(tmp_path / "list.tsv")


def test_json_lines(tmp_path, caplog):
    path = tmp_path / "list.jsonl"
    path.write_text('{"n": 1}\n\n{"url": "a.jpg", "n": 2}\r\n{"url": null}\n{"url": "b.jpg"}\n')
    assert _uris(path) == [f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg"]
    assert caplog.messages == [f"rows of {path} without a URI, left out: 2"]
    for line, problem in {
        '{"url": ': "line 2: not valid JSON: ",
        '{"url": "a", "url": "b"}': "line 2: not valid JSON: 'url' occurs twice",
        "[]": "line 2: not an object, as ",
        '{"url": 3}': "line 2: url is 3, not text$",
        '{"url": "a", "image": "b"}': "each of the columns url and image may be the column of URIs",
    }.items():
        path.write_text('{"url": "a.jpg"}\n' + line + "\n")
        with pytest.raises(InputError, match=problem) as error:
            _uris(path)
        assert str(error.value).startswith(str(path))
        assert str(error.value).isprintable()
    path.write_text("\n")
    with pytest.raises(InputError, match="lists no images"):
        _uris(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"uri\na.jpg\n", gzip.compress(b"uri\na.jpg\n")[:-9]],
    ids=["empty", "not compressed", "cut off"],  # compressed data have the time in them
)
def test_a_damaged_compressed_list_is_refused(tmp_path, data):
    (tmp_path / "list.csv.gz").write_bytes(data)
    with pytest.raises(InputError, match=r"list\.csv\.gz"):
        _uris(tmp_path / "list.csv.gz")


def test_a_compressed_list_without_the_ending_is_refused(tmp_path):
    (tmp_path / "list.csv").write_bytes(gzip.compress(b"uri\na.jpg\n"))
    with pytest.raises(InputError, match=r"list\.csv is compressed by gzip: add \.gz to its name"):
        _uris(tmp_path / "list.csv")


def test_a_long_table_names_files_with_line_breaks(tmp_path):
    names = [f"line\nbreak {number}.jpg" for number in range(100_000)]
    (tmp_path / "list.csv").write_bytes(_as_csv(names))
    assert (tmp_path / "list.csv").stat().st_size > 2**21, "more than it is read in at a time"
    assert _uris(tmp_path / "list.csv") == [f"{tmp_path}/{name}" for name in names]


def test_a_relative_list_starts_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("a.jpg\n../b.jpg\n")
    monkeypatch.chdir(tmp_path)
    assert _uris("list.txt") == [f"{tmp_path}/a.jpg", f"{tmp_path.parent}/b.jpg"]
    assert _uris("./list.txt") == _uris("list.txt")


def test_a_list_at_the_root_starts_from_there():
    storage.write("memory://list.txt", b"a.jpg\n")
    try:
        assert _uris("memory://list.txt") == ["memory://a.jpg"]
    finally:
        storage.delete("memory://list.txt")


@pytest.mark.parametrize(
    "text",
    [
        b"a.jpg\nb.jpg",
        b"a.jpg\r\nb.jpg\r\n",
        b"\n  a.jpg\t\n\n \n b.jpg\n",
        b"\xef\xbb\xbfa.jpg\nb.jpg\n",
    ],
)
def test_lines_may_end_and_begin_as_any_editor_has_it(tmp_path, text):
    (tmp_path / "list.txt").write_bytes(text)
    assert _uris(tmp_path / "list.txt") == [f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg"]


def test_what_looks_like_a_number_is_a_name(tmp_path):
    names = ["0001", "1e3", "1.50", "true", "2020-01-01", "NULL", "nan"]
    (tmp_path / "list.csv").write_text("uri\n" + "\n".join(names))
    assert _uris(tmp_path / "list.csv") == [f"{tmp_path}/{name}" for name in names]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"path\na.jpg\n", None),
        (b"\xef\xbb\xbfpath\na.jpg\n", None),
        (b"uri,uri2\na.jpg,b.jpg\n", None),
        (b"path,label\na.jpg,1\n", None),
        (b"n,Image_URL\n1,a.jpg\n", None),
        (
            b"id,label\na.jpg,1\n",
            "no column with a usual name for URIs; its columns are id, label. Name",
        ),
        (
            b"path,URL,n\na.jpg,b,1\n",
            "each of the columns path and URL may be the column of URIs; choose one",
        ),
        (b"url,url,n\na.jpg,b,1\n", "has several columns called url: rename one"),
        (
            b"uri;label\na.jpg;1\n",
            "must separate columns by commas, but its first line is 'uri;label': conv",
        ),
        (
            b"uri\tlabel\na.jpg\t1\n",
            r"must separate columns by commas, but its first line is 'uri\\tlabel'",
        ),
        (b"uri\n", "lists no images"),
        (b'uri\n""\n', "lists no images"),
        (b"", r"list\.csv is empty: its first line must name the columns"),
        (b"uri,n\na.jpg,1\nb.jpg\n", r"list\.csv, line 3: 1 field, but 2 columns"),
        (b"uri\n\xff.jpg\n", r"list\.csv, line 2: not UTF-8 text \(byte 0xff\)"),
        (b"uri,uri\na.jpg,b.jpg\n", "has several columns called uri: rename one"),
        (b"a.JPG\nb.jpg\n", "begins with an image, a.JPG, not with the name"),
        (b"s3://bucket/a\ns3://bucket/b\n", "begins with an image, s3://bucket/a, not"),
        (b"a.avif\nb.avif\n", r"begins with an image, a\.avif, not"),
        (b"IMG_1\nIMG_2\n", "begins with an image, IMG_1, not"),
        (b"IMG_0\na.jpg\n", None),  # no image that there is
        (b"folder\na.jpg\n", None),
        (b"zero\0byte\na.jpg\n", "line 1: a zero byte"),
    ],
)
def test_the_column_uri_or_the_only_one_counts(tmp_path, data, problem):
    (tmp_path / "list.csv").write_bytes(data)
    (tmp_path / "IMG_1").touch()
    (tmp_path / "folder").mkdir()
    if problem is None:
        assert _uris(tmp_path / "list.csv") == [f"{tmp_path}/a.jpg"]
    else:
        with pytest.raises(InputError, match=problem) as caught:
            list_source(f"{tmp_path}/list.csv", ListingConfig())
        assert str(caught.value).isprintable()


def test_what_a_list_has_twice_or_leaves_empty_is_told(place, caplog):
    storage.write(f"{place}/list.csv", b'uri,n\na.jpg,1\n"",2\na.jpg,3\nb.jpg,4\n"",5\n./a.jpg,6\n')
    assert _uris(f"{place}/list.csv") == [f"{place}/a.jpg", f"{place}/b.jpg"]
    assert [record.getMessage() for record in caplog.records] == [
        f"rows of {place}/list.csv without a URI, left out: 2",
        f"repeated URIs in {place}/list.csv, left out: 2",
    ]


def test_the_only_column_of_a_parquet_file_is_not_called_like_an_image(place):
    sink = io.BytesIO()
    pq.write_table(pa.table({"a.heic": ["b.heic"]}), sink)
    storage.write(f"{place}/list.parquet", sink.getvalue())
    with pytest.raises(InputError, match=r"begins with an image, a\.heic, not"):
        _uris(f"{place}/list.parquet")


def test_only_the_column_uri_of_a_parquet_file_is_read(tmp_path):
    """Shown by another one, whose data are damaged."""
    path = tmp_path / "list.parquet"
    path.write_bytes(_as_parquet(["a.jpg"], pixels=[b"pixels" * 1000]))
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    with path.open("r+b") as file:
        file.seek(column.dictionary_page_offset)
        file.write(b"\xff" * column.total_compressed_size)
    with pytest.raises(OSError, match=r"."):
        pq.read_table(path)
    assert _uris(path) == [f"{tmp_path}/a.jpg"]


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_in_a_bucket_may_name_its_own_folder_and_those_above(memory_bucket, kind):
    uris = ["./a.jpg", "../b.jpg", "x/./../../lists/c//d.jpg", "..jpg", "e/.."]
    storage.write(f"{memory_bucket}/lists/my.{kind}", LISTS[kind](uris))
    names = ["lists/a.jpg", "b.jpg", "lists/c//d.jpg", "lists/..jpg", "lists"]
    assert _uris(f"{memory_bucket}/lists/my.{kind}") == [f"{memory_bucket}/{n}" for n in names]


@pytest.mark.parametrize("name", ["../../a.jpg", "x/../../../bucket/a.jpg"])
def test_a_list_in_a_bucket_names_nothing_outside_of_it(memory_bucket, name):
    storage.write(f"{memory_bucket}/lists/my.txt", _as_txt([name]))
    message = rf"^{memory_bucket}/lists/my\.txt lists an image outside of the bucket: {name}$"
    with pytest.raises(InputError, match=message):
        _uris(f"{memory_bucket}/lists/my.txt")


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_given_as_a_file_uri_is_the_one_at_its_path(tmp_path, kind):
    """Names in it are names, also where they have percent signs."""
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "50%25 off.jpg").write_bytes(b"pixels")
    (folder / f"list.{kind}").write_bytes(LISTS[kind](["50%25 off.jpg", "../b.jpg"]))
    uris = _uris(f"file://{tmp_path}/a%20b/list.{kind}")
    assert (
        uris == _uris(folder / f"list.{kind}") == [f"{folder}/50%25 off.jpg", f"{tmp_path}/b.jpg"]
    )
    assert storage.read(uris[0]) == b"pixels"


def test_a_list_in_a_folder_whose_name_is_no_text(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    with open(folder + b"/list.txt", "w") as file:
        file.write("a b.jpg\n")
    [listed] = list_source(os.fsdecode(folder + b"/list.txt"), ListingConfig()).to_pylist()
    assert listed["uri"] == f"file://{tmp_path}/%FF/a%20b.jpg"
    assert storage.is_local(listed["uri"])


@pytest.mark.parametrize("name", ["photos", "photos.txt"])
def test_a_source_that_cannot_be_asked_for_is_refused(memory_bucket, name, monkeypatch):
    break_bucket(monkeypatch, "isdir", "find", "cat_file")
    with pytest.raises(InputError, match=rf"^cannot \w+ {memory_bucket}/{name}: no connection$"):
        list_source(f"{memory_bucket}/{name}", ListingConfig())


def test_columns_of_a_table_that_are_no_text(tmp_path):
    for name, column, problem in (
        ("n", pa.array([1, None]), r"/list\.parquet: the column n holds int64, neither "),
        ("n", pa.array([[1]]), r"the column n holds list<element: int64>, neither "),
        ("uri", pa.array([b"\xff"]), "invalid UTF8|Invalid UTF8"),
    ):
        pq.write_table(pa.table({name: column}), tmp_path / "list.parquet")
        with pytest.raises(InputError, match=problem):
            _uris(tmp_path / "list.parquet")
    pq.write_table(
        pa.table({"dictionary": pa.array(["a"] * 3).dictionary_encode()}), tmp_path / "d.parquet"
    )
    assert _uris(tmp_path / "d.parquet") == [f"{tmp_path}/a"]


def test_an_empty_list_is_refused(place):
    storage.write(f"{place}/list.txt", b"\n \n")
    with pytest.raises(InputError, match=r"/list\.txt lists no images$"):
        list_source(f"{place}/list.txt", ListingConfig())


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a.jpg\n\xff.jpg\n")
    with pytest.raises(InputError, match=r"/list\.txt, line 2: not UTF-8 text \(byte 0xff\)"):
        list_source(f"{tmp_path}/list.txt", ListingConfig())


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('i/2.jpg,"A sign says hello', "line 4: the quote that opens here is never closed"),
        ('"i/2.jpg,A dog', "line 4: the quote that opens here is never closed"),
        ('i/2.jpg,"A sign\ni/3.jpg,"says hello"', "line 4: text follows a closing quote on line 5"),
        ('i/2.jpg,"A sign\ni/3.jpg,says hello"', "line 4: .* closed on line 5, with other rows"),
    ],
)
def test_an_open_quote_loses_no_image(tmp_path, row, problem):
    rows = [f"i/{number}.jpg,A dog" for number in range(6)]
    (tmp_path / "list.csv").write_text("\n".join(["uri,caption", *rows]))
    assert len(_uris(tmp_path / "list.csv")) == 6
    rows[2] = row
    (tmp_path / "list.csv").write_text("\n".join(["uri,caption", *rows]))
    with pytest.raises(InputError, match=rf"list\.csv, {problem}"):
        _uris(tmp_path / "list.csv")


def test_a_damaged_table_is_refused(tmp_path):
    """Damage may also go unnoticed, but it is never a crash."""
    path = tmp_path / "list.parquet"
    sound = _as_parquet([f"{number}.jpg" for number in range(50)])
    generator = random.Random(0)
    damaged = [sound[: len(sound) * step // 20] for step in range(20)]
    for _ in range(200):
        flipped = bytearray(sound)
        flipped[generator.randrange(len(sound))] ^= 1 << generator.randrange(8)
        damaged.append(bytes(flipped))
    problems = []
    for data in damaged:
        path.write_bytes(data)
        try:
            list_source(str(path), ListingConfig())
        except InputError as error:
            problems.append(str(error))
    assert len(problems) > 100
    expected = (f"cannot read {path}: ", f"{path} lists no images")
    assert all(problem.startswith(expected) for problem in problems)
    assert not any("\n" in problem for problem in problems)


# What a folder holds and is not listed.


def test_files_of_other_programs_are_passed_over_and_counted(place, caplog):
    for name in (
        "a.jpg",
        "._a.jpg",
        "x/._b.jpg",
        "x/b.jpg",
        ".ipynb_checkpoints/a-checkpoint.jpg",
        ".ipynb_checkpoints/b-checkpoint.jpg",
        "__MACOSX/x/._b.jpg",
        "x/@eaDir/b.jpg/SYNOPHOTO_THUMB_M.jpg",
        ".hidden.jpg",
    ):
        storage.write(f"{place}/photos/{name}", b"")
    with caplog.at_level("INFO"):
        found = [uri.removeprefix(f"{place}/photos/") for uri in _uris(f"{place}/photos")]
    assert found == [".hidden.jpg", "a.jpg", "x/b.jpg"]
    assert caplog.messages == [
        "files of other programs passed over: 2 ._*, 1 __MACOSX, 1 .ipynb_checkpoints, 1 @eaDir"
    ]
    # The folder that is asked for may be called so.
    assert len(_uris(f"{place}/photos/.ipynb_checkpoints")) == 2


def test_excluded_files_and_folders_are_counted(place, caplog):
    for name in ("a.jpg", "a-draft.jpg", "old/b.jpg", "old/c.jpg", "x/old/d.jpg", "x/raw/e.jpg"):
        storage.write(f"{place}/photos/{name}", b"")
    with caplog.at_level("INFO"):
        uris = _uris(f"{place}/photos", exclude=("*-draft.*", "old", "x/ra*", "none of them"))
    assert uris == [f"{place}/photos/a.jpg"]
    assert caplog.messages == [
        "--exclude '*-draft.*' leaves out 1",
        "--exclude old leaves out 2",
        "--exclude 'x/ra*' leaves out 1",
        "--exclude 'none of them' matches nothing",
    ]
    with pytest.raises(InputError, match="holds no images"):
        _uris(f"{place}/photos", exclude=("*.jpg",))
    storage.write(f"{place}/list.txt", b"a.jpg\n")
    with pytest.raises(InputError, match=r"--exclude is for a folder, and .*/list\.txt is a list"):
        _uris(f"{place}/list.txt", exclude=("a.jpg",))


def test_linked_folders_are_followed_and_each_folder_is_listed_once(tmp_path, caplog):
    disk, photos = tmp_path / "disk", tmp_path / "photos"
    for path in (disk / "2023" / "a.jpg", disk / "b.jpg", photos / "x" / "c.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (photos / "2023").symlink_to(disk / "2023")
    (photos / "again").symlink_to(disk)  # with 2023, which the link before it has listed
    (photos / "same").symlink_to(photos / "x")
    (photos / "x" / "up").symlink_to("..")
    (photos / "x" / "root").symlink_to("/")
    (disk / "2023" / "home").symlink_to(photos)
    (disk / "2023" / "above").symlink_to(disk)
    expected = ["2023/a.jpg", "again/b.jpg", "x/c.jpg"]
    assert _uris(photos) == [f"{photos}/{name}" for name in expected]
    passed_over = ["again/2023", "same", "x/root", "x/up", "2023/above"]
    [message] = caplog.messages
    assert message.startswith("links passed over, to folders that are listed already: 6: ")
    assert all(f"{photos}/{link}" in message for link in passed_over), message
    caplog.clear()
    assert _uris(photos, exclude=("2023", "again", "same", "up", "root")) == [f"{photos}/x/c.jpg"]
    assert not any("links" in message for message in caplog.messages)


def test_a_folder_of_nothing_but_a_linked_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.jpg").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "linked.jpg").symlink_to("../disk")
    assert _uris(tmp_path / "photos") == [f"{tmp_path}/photos/linked.jpg/a.jpg"]
    (tmp_path / "link").symlink_to("photos")
    assert _uris(tmp_path / "link") == [f"{tmp_path}/link/linked.jpg/a.jpg"]


def test_a_folder_that_may_not_be_listed_stops_the_job_and_may_be_excluded():
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as directory:
        secret = Path(directory, "a secret")
        secret.mkdir(mode=0)
        Path(directory, "lost+found").mkdir(mode=0)
        Path(directory, "a.jpg").touch()
        os.chmod(directory, 0o755)
        if user == 0:
            os.seteuid(65534)  # root may list everything
        try:
            with pytest.raises(InputError) as error:
                _uris(directory)
            assert str(error.value) == (
                f"cannot list {secret}: Permission denied; "
                "leave the folder out with --exclude 'a secret'"
            )
            assert _uris(directory, exclude=("a secret",)) == [f"{directory}/a.jpg"]
        finally:
            os.seteuid(user)
            secret.chmod(0o700)


def test_exclude_is_repeated_on_the_command_line(tmp_path, model_directory):
    for name in ("a.jpg", "b.jpg", "old/c.jpg"):
        storage.write(f"{tmp_path}/photos/{name}", b"")
    arguments = ["caption", f"{tmp_path}/photos", f"{tmp_path}/out", "--engine", "local"]
    arguments += ["--model", str(model_directory), "--dry-run"]
    result = CliRunner().invoke(main, [*arguments, "--exclude", "old", "--exclude=b.*"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[:2] == [
        "--exclude old leaves out 1",
        "--exclude 'b.*' leaves out 1",
    ]
    assert "1 image" in result.output


def test_a_sample_is_chosen_by_the_seed_and_keeps_the_order_of_the_listing(tmp_path):
    names = [f"{number:03d}.jpg" for number in range(200)]
    path = tmp_path / "list.txt"
    path.write_text("\n".join(reversed(names)))
    sample = ListingConfig(sample=20)
    first, again, other = (
        list_source(str(path), sample, seed=seed)["uri"].to_pylist() for seed in (1, 1, 2)
    )
    assert first == again == sorted(set(first), reverse=True)
    assert len(first) == len(other) == 20
    assert first != other
    everything = list_source(str(path), ListingConfig(sample=1000), seed=1)
    assert len(everything) == 200
    # One more image in the source changes at most one image of the sample.
    path.write_text("\n".join([*reversed(names), "new.jpg"]))
    grown = list_source(str(path), sample, seed=1)["uri"].to_pylist()
    assert len(set(grown) & set(first)) >= 19


def test_every_image_is_as_likely_in_a_sample(tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(f"{number}.jpg" for number in range(10)))
    counts = Counter(
        uri
        for seed in range(300)
        for uri in list_source(f"{tmp_path}/list.txt", ListingConfig(sample=3), seed=seed)[
            "uri"
        ].to_pylist()
    )
    assert len(counts) == 10
    assert min(counts.values()) > 60  # 90 are expected, with a deviation of 8
    assert max(counts.values()) < 120
