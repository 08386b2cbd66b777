import csv
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from captioner import __version__, storage
from captioner.caption.crash_log import Attempts
from captioner.config import ListingConfig
from captioner.data.listing import list_source
from captioner.errors import FingerprintError, InputError, OutputError
from captioner.output.directory import OutputDirectory
from captioner.output.manifest import Accounts, Shard
from captioner.output.parts import part_name
from captioner.schema import COLUMNS, MANIFEST, CaptionRow, rows_to_table
from captioner.storage import Listed

SETTINGS = {"model": "0" * 64, "vocabulary": "1" * 64, "beam": 1, "length_penalty": 1.0}


@pytest.fixture
def output(place: str) -> OutputDirectory:
    """A directory that a job has begun."""
    directory = OutputDirectory(f"{place}/out [1]")
    directory.begin(SETTINGS)
    return directory


def _uris(source: object, **listing: object) -> list[str]:
    return [listed.uri for listed in list_source(str(source), ListingConfig(**listing))]


def _listed(*numbers: int) -> list[Listed]:
    return [Listed(f"/photos/{number}.jpg", number * 100) for number in numbers]


def _write_part(output: OutputDirectory, number: int, statuses: list[str]) -> None:
    """A part with the shard's images, as many as there are statuses; others where it has fewer."""
    manifest = output.manifest()
    uris = manifest.filter(pc.equal(manifest["shard"], number))["uri"].to_pylist()
    uris += [f"{number}/{row}" for row in range(len(uris), len(statuses))]
    rows = [CaptionRow(uri=uri, status=status) for uri, status in zip(uris, statuses, strict=False)]
    sink = io.BytesIO()
    pq.write_table(rows_to_table(rows), sink)
    storage.write(f"{output.uri}/{part_name(number)}", sink.getvalue())


def _contents(directory: str) -> dict[str, bytes]:
    """Every file below a directory, by name."""
    found = {}
    for listed in storage.find(directory, ("",)):
        name = listed.uri.split("/out [1]/")[1]
        found[name] = storage.read(listed.uri)
    return found


# Sources.


def test_a_directory_is_listed_recursively_in_order(place):
    for name in ("b.jpg", "a/c.PNG", "a.txt", "d.avif"):
        storage.write(f"{place}/{name}", b"123")
    listed = list_source(place, ListingConfig())
    root = place.rsplit("/", 1)[1]
    assert [each.uri.split(f"/{root}/")[1] for each in listed] == ["a/c.PNG", "b.jpg"]
    assert [each.size for each in listed] == [3, 3]
    assert [uri.split(f"/{root}/")[1] for uri in _uris(place, extensions="avif")] == ["d.avif"]
    assert _uris(place, limit=1) == [listed[0].uri]


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
    with pytest.raises(InputError, match=r"/photo\.jpg is one file, and no directory of images$"):
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


LISTS = {"txt": _as_txt, "csv": _as_csv, "parquet": _as_parquet}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_is_taken_in_its_order_and_each_image_once(place, kind):
    uris = ["z.jpg", "/abs/a.jpg", "s3://bucket/k%20.png", "sub/b.gif", "z.jpg", "/abs/a.jpg"]
    storage.write(f"{place}/lists/my.{kind}", LISTS[kind](uris))
    base = f"{place}/lists"
    expected = [f"{base}/z.jpg", "/abs/a.jpg", "s3://bucket/k%20.png", f"{base}/sub/b.gif"]
    listed = list_source(f"{place}/lists/my.{kind}", ListingConfig())
    assert listed == [Listed(uri, None) for uri in expected]
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


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_names_files_with_line_breaks(tmp_path, kind):
    (tmp_path / f"list.{kind}").write_bytes(LISTS[kind](["line\nbreak.jpg"]))
    assert _uris(tmp_path / f"list.{kind}") == [f"{tmp_path}/line\nbreak.jpg"]


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
        (b"path,label\na.jpg,1\n", "must have one column uri, not path, label$"),
        (b"uri;label\na.jpg;1\n", "must have commas between its columns, not 'uri;label'$"),
        (b"uri\tlabel\na.jpg\t1\n", r"must have commas between its columns, not 'uri\\tlabel'$"),
        (b"uri\n", "lists no images"),
        (b'uri\n""\n', "lists no images"),
        (b"", "Empty CSV file"),
        (b"uri,n\na.jpg,1\nb.jpg\n", "Expected 2 columns, got 1"),
        (b"uri\n\xff.jpg\n", "invalid UTF8 data"),
        (b"uri,uri\na.jpg,b.jpg\n", "must have one column uri, not uri, uri$"),
        (b"a.JPG\nb.jpg\n", "begins with an image, a.JPG, and not with the column's name"),
        (b"s3://bucket/a\ns3://bucket/b\n", "begins with an image, s3://bucket/a, and not"),
        (b"a.avif\nb.avif\n", r"begins with an image, a\.avif, and not"),
        (b"IMG_1\nIMG_2\n", "begins with an image, IMG_1, and not"),
        (b"IMG_0\na.jpg\n", None),  # no image that there is
        (b"folder\na.jpg\n", None),
        (b"zero\0byte\na.jpg\n", None),
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
        f"left out: 2 rows of {place}/list.csv without a URI",
        f"left out: 2 URIs of {place}/list.csv that stand there before",
    ]


def test_the_only_column_of_a_parquet_file_is_not_called_like_an_image(place):
    sink = io.BytesIO()
    pq.write_table(pa.table({"a.heic": ["b.heic"]}), sink)
    storage.write(f"{place}/list.parquet", sink.getvalue())
    with pytest.raises(InputError, match=r"begins with an image, a\.heic, and not"):
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
    message = rf"^{memory_bucket}/lists/my\.txt lists {name}, which is outside of the bucket$"
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
    [listed] = list_source(os.fsdecode(folder + b"/list.txt"), ListingConfig())
    assert listed.uri == f"file://{tmp_path}/%FF/a%20b.jpg"
    assert storage.is_local(listed.uri)


@pytest.mark.parametrize("name", ["photos", "photos.txt"])
def test_a_source_that_cannot_be_asked_for_is_refused(memory_bucket, name, monkeypatch):
    _break(monkeypatch, "isdir", "find", "cat_file")
    with pytest.raises(InputError, match=rf"^cannot \w+ {memory_bucket}/{name}: no connection$"):
        list_source(f"{memory_bucket}/{name}", ListingConfig())


def _break(monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
    """Takes the network away from a bucket of a kind."""

    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError("no connection")

    for method in methods:
        monkeypatch.setattr(type(fsspec.filesystem("memory")), method, fail)


def test_columns_of_a_table_that_are_no_text(tmp_path):
    for column, problem in (
        (pa.array([1, None]), r"/list\.parquet are not text, but int64$"),
        (pa.array([[1]]), "Unsupported cast from list"),
        (pa.array([b"\xff"]), "invalid UTF8|Invalid UTF8"),
    ):
        pq.write_table(pa.table({"n": column}), tmp_path / "list.parquet")
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
    with pytest.raises(InputError, match=r"^cannot read .+/list\.txt: 'utf-8' codec"):
        list_source(f"{tmp_path}/list.txt", ListingConfig())


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
    assert all(problem.startswith(f"cannot read {path}: ") for problem in problems)
    assert not any("\n" in problem for problem in problems)


# Beginning a job.


def test_a_new_directory_becomes_the_jobs(output):
    run = output.read_json("run.json")
    created = run.pop("created")
    assert created.endswith("+00:00")
    assert run == {
        "schema_version": 1,
        "fingerprint": hashlib.sha256(json.dumps(SETTINGS, sort_keys=True).encode()).hexdigest(),
        "settings": SETTINGS,
        "captioner_version": __version__,
    }
    assert list(_contents(output.uri)) == ["__captioner/run.json"]


def test_the_same_settings_go_on(output):
    before = _contents(output.uri)
    output.begin(dict(reversed(SETTINGS.items())))
    output.begin({**SETTINGS, "length_penalty": 1})
    assert _contents(output.uri) == before


def test_a_tuple_is_the_list_that_it_becomes(place):
    output = OutputDirectory(f"{place}/out [1]")
    output.begin({"sizes": (1, 2)})
    output.begin({"sizes": (1, 2)})
    with pytest.raises(FingerprintError, match=r"settings: beam was None, is 2\. "):
        output.begin({"sizes": (1, 2), "beam": 2})


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"beam": 3}, "beam was 1, is 3"),
        ({"model": "f" * 64}, "another model"),
        ({"attention": "mean"}, "attention was None, is mean"),
        (
            {"vocabulary": "f" * 64, "model": "f" * 64, "length_penalty": 0.5},
            "length_penalty was 1.0, is 0.5; another model; another vocabulary",
        ),
    ],
)
def test_other_settings_are_refused_with_what_differs(output, changes, difference):
    before = _contents(output.uri)
    with pytest.raises(FingerprintError) as caught:
        output.begin({**SETTINGS, **changes})
    assert str(caught.value) == (
        f"{output.uri} was begun with other settings: {difference}. "
        "Use another directory, or --overwrite"
    )
    assert _contents(output.uri) == before


def test_a_missing_setting_is_a_difference(output):
    fewer = {name: value for name, value in SETTINGS.items() if name != "beam"}
    with pytest.raises(FingerprintError, match=r"other settings: beam was 1, is None\. "):
        output.begin(fewer)


@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_elses_directory_is_refused(place, overwrite):
    storage.write(f"{place}/out [1]/thesis.tex", b"years of work")
    output = OutputDirectory(f"{place}/out [1]")
    with pytest.raises(OutputError, match=r"out \[1\] is not empty, and no caption job's output$"):
        output.begin(SETTINGS, overwrite=overwrite)
    assert _contents(output.uri) == {"thesis.tex": b"years of work"}


def test_hidden_files_and_an_interrupted_beginning_do_not_matter(tmp_path):
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "__captioner").mkdir()
    (tmp_path / "__captioner" / ".run.json.tmp-0123abcd").write_bytes(b"{")
    OutputDirectory(str(tmp_path)).begin(SETTINGS)
    assert os.listdir(tmp_path / "__captioner") == ["run.json"]
    assert (tmp_path / ".DS_Store").exists()


@pytest.mark.parametrize("name", ["out", "out/__captioner"])
def test_a_file_is_no_directory(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"1")
    with pytest.raises(OutputError, match=r"^cannot use .+/out for output: Not a directory$"):
        OutputDirectory(f"{tmp_path}/out").begin(SETTINGS)
    assert path.read_bytes() == b"1"


def test_overwriting_deletes_what_is_ours_and_nothing_else(output):
    output.extend(_listed(1, 2, 3), shard_size=2)
    output.extend(_listed(4), shard_size=2)
    output.write_summary({"images": 4})
    for number in range(3):
        _write_part(output, number, ["ok"])
    foreign = {"notes.txt": b"mine", "part-1.parquet": b"mine", "best/part-000000.parquet": b"mine"}
    for name, data in foreign.items():
        storage.write(f"{output.uri}/{name}", data)
    output.begin({"beam": 9}, overwrite=True)
    after = _contents(output.uri)
    assert json.loads(after.pop("__captioner/run.json"))["settings"] == {"beam": 9}
    assert after == foreign
    assert output.manifest().num_rows == 0


def test_overwriting_deletes_what_makes_it_ours_last(tmp_path):
    output = OutputDirectory(f"{tmp_path}/out")
    output.begin(SETTINGS)
    output.extend(_listed(1), shard_size=1)
    output.extend(_listed(2), shard_size=1)
    output.write_summary({})
    _write_part(output, 0, ["ok"])
    code = """
import os, sys
from captioner.output.directory import OutputDirectory
sys.addaudithook(lambda event, args: event == "os.remove" and print(os.path.basename(args[0])))
OutputDirectory(sys.argv[1]).begin({}, overwrite=True)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, output.uri], capture_output=True, text=True, check=True
    )
    manifests = ["manifest-0001.parquet", "manifest-0000.parquet"]
    assert ran.stdout.split() == ["part-000000.parquet", *manifests, "summary.json", "run.json"]


def test_an_interrupted_deletion_can_be_gone_on_with(output):
    for number in (1, 2, 3):
        output.extend(_listed(number), shard_size=2)
    # The order of deletion, seen from where it may end: the last manifest goes first.
    storage.delete(f"{output.uri}/__captioner/manifest-0002.parquet")
    output.begin(SETTINGS)
    manifest = output.extend(_listed(1, 2, 3), shard_size=2)
    assert manifest["uri"].to_pylist() == [listed.uri for listed in _listed(1, 2, 3)]
    assert output.manifest().equals(manifest)


def test_temporary_files_of_killed_writers_are_deleted(tmp_path):
    output = OutputDirectory(f"{tmp_path}/out [1]")
    output.begin(SETTINGS)
    for name in (".part-000000.parquet.tmp-0123abcd", "__captioner/.run.json.tmp-0123abcd"):
        storage.write(f"{output.uri}/{name}", b"half")
    storage.write(f"{output.uri}/.keep.tmp", b"")
    output.begin(SETTINGS)
    assert set(_contents(output.uri)) == {".keep.tmp", "__captioner/run.json"}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "cannot read"),
        (b"{", "cannot read"),
        (b"\xff", "cannot read"),
        (b"[]", "is not a JSON"),
        (b"[" * 100_000, "cannot read"),
        (b"{}", "has no settings"),
        (b'{"settings": ["a list"]}', "has no settings"),
    ],
)
def test_broken_books_are_refused(output, data, problem):
    storage.write(f"{output.uri}/__captioner/run.json", data)
    with pytest.raises(OutputError, match=problem):
        output.begin(SETTINGS)


def test_a_directory_without_books_is_no_jobs_output(place):
    with pytest.raises(OutputError, match=r"none is no caption job's output: it has no run\.json$"):
        OutputDirectory(f"{place}/none").read_json("run.json")


def test_the_summary_is_read_back(output):
    assert output.read_summary() == {}
    output.write_summary({"images": 3, "rows": {"ok": 3}})
    assert output.read_summary() == {"images": 3, "rows": {"ok": 3}}


# Shards.


def test_a_listing_becomes_shards(output):
    manifest = output.extend([*_listed(5, 3, 1, 4), Listed("s3://b/k", None)], shard_size=2)
    assert manifest.schema.equals(MANIFEST)
    assert manifest.to_pydict() == {
        "uri": [*(f"/photos/{number}.jpg" for number in (5, 3, 1, 4)), "s3://b/k"],
        "size": [500, 300, 100, 400, None],
        "shard": [0, 0, 1, 1, 2],
        "row": [0, 1, 0, 1, 0],
    }
    assert output.manifest().equals(manifest)
    assert list(output.remaining(manifest)) == [
        Shard(0, ["/photos/5.jpg", "/photos/3.jpg"], [500, 300]),
        Shard(1, ["/photos/1.jpg", "/photos/4.jpg"], [100, 400]),
        Shard(2, ["s3://b/k"], [None]),
    ]


def test_sizes_that_nobody_told_are_null(output):
    output.extend([Listed("a.jpg", None), Listed("b.jpg", None)], shard_size=256)
    assert output.manifest().schema.equals(MANIFEST)
    assert output.manifest()["size"].to_pylist() == [None, None]


def test_nothing_new_changes_nothing(output):
    manifest = output.extend(_listed(1, 2), shard_size=1)
    before = _contents(output.uri)
    assert output.extend(_listed(2, 1), shard_size=7).equals(manifest)
    assert output.extend([], shard_size=1).equals(manifest)
    assert _contents(output.uri) == before


def test_new_images_become_new_shards_and_old_manifests_stay(output):
    output.extend(_listed(1, 2, 3), shard_size=2)
    before = _contents(output.uri)
    manifest = output.extend(_listed(0, 1, 2, 2, 3, 9), shard_size=5)
    after = _contents(output.uri)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"__captioner/manifest-0001.parquet"}
    assert manifest["uri"].to_pylist() == [f"/photos/{number}.jpg" for number in (1, 2, 3, 0, 9)]
    assert manifest["shard"].to_pylist() == [0, 0, 1, 2, 2]
    assert manifest["row"].to_pylist() == [0, 1, 0, 0, 1]
    assert output.manifest().equals(manifest)


def test_images_that_left_the_source_stay_in_the_manifest(output):
    output.extend(_listed(1, 2), shard_size=2)
    manifest = output.extend(_listed(3), shard_size=2)
    assert len(manifest) == 3


def test_additions_are_in_the_order_of_their_numbers(output):
    for number in range(3):
        output.extend(_listed(number), shard_size=4)
    private = f"{output.uri}/__captioner"
    for new, old in ((10000, 2), (9999, 1)):
        data = storage.read(f"{private}/manifest-{old:04d}.parquet")
        storage.write(f"{private}/manifest-{new}.parquet", data)
        storage.delete(f"{private}/manifest-{old:04d}.parquet")
    assert output.manifest()["shard"].to_pylist() == [0, 1, 2]


def test_jobs_that_begin_at_once_in_a_bucket_share_their_books(memory_bucket, monkeypatch):
    """One reads the directory, then the other does its part, then the first goes on."""
    one, other = (OutputDirectory(f"{memory_bucket}/out") for _ in range(2))
    write = storage.write
    meanwhile: list[Callable[[], object]] = []

    def overtaken(path: str, data: bytes, **keywords: bool) -> None:
        if meanwhile:
            meanwhile.pop()()
        write(path, data, **keywords)

    monkeypatch.setattr(storage, "write", overtaken)
    meanwhile.append(lambda: other.begin({"beam": 2}))
    with pytest.raises(FingerprintError, match="beam was 2, is 1"):
        one.begin({"beam": 1})
    meanwhile.append(lambda: other.extend(_listed(0, 1), shard_size=4))
    manifest = one.extend(_listed(0, 8, 9), shard_size=4)
    assert manifest.equals(other.manifest())
    assert manifest["uri"].to_pylist() == [f"/photos/{n}.jpg" for n in (0, 1, 8, 9)]
    assert manifest["shard"].to_pylist() == [0, 0, 1, 1]


def test_books_that_cannot_be_reached_are_an_output_error(memory_bucket, monkeypatch):
    output = OutputDirectory(f"{memory_bucket}/out")
    output.begin({})
    attempts = Attempts(output.uri)
    attempts.begin(3)
    _break(monkeypatch, "ls", "cat_file")
    asked = (output.manifest, output.parts, output.delete_held, output.accounts)
    for ask in (*asked, attempts.suspects, attempts.forgive, lambda: attempts.deaths(3)):
        with pytest.raises(OutputError, match=r"^cannot .* memory://bucket/out.*no connection"):
            ask()


def test_many_additions_keep_their_order(output):
    for number in range(12):
        manifest = output.extend(_listed(number), shard_size=4)
    assert manifest["shard"].to_pylist() == list(range(12))
    assert output.manifest().equals(manifest)
    assert [shard.number for shard in output.remaining(manifest)] == list(range(12))


def test_what_has_its_part_does_not_remain(output):
    manifest = output.extend(_listed(*range(7)), shard_size=2)
    _write_part(output, 2, ["ok", "ok"])
    _write_part(output, 0, ["ok", "ok"])
    storage.write(f"{output.uri}/.part-000001.parquet.tmp-0123abcd", b"half")
    storage.write(f"{output.uri}/part-000003.parquet.bak", b"")
    assert output.done() == {0, 2}
    assert [shard.number for shard in output.remaining(manifest)] == [1, 3]


def test_nothing_remains_of_nothing(output):
    assert output.manifest().equals(MANIFEST.empty_table())
    assert list(output.remaining(output.manifest())) == []
    assert output.accounts() == Accounts(0, {}, [])


def test_part_names_sort_as_their_numbers():
    assert part_name(0) == "part-000000.parquet"
    assert part_name(999_999) == "part-999999.parquet"
    assert part_name(1_234_567) == "part-1234567.parquet"


def test_a_part_after_the_millionth_is_found(output):
    storage.write(f"{output.uri}/{part_name(1_234_567)}", b"")
    assert output.done() == {1_234_567}


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"x" + data[1:] + b"x"]
)
def test_a_damaged_manifest_is_refused(output, damage):
    output.extend(_listed(1), shard_size=1)
    uri = f"{output.uri}/__captioner/manifest-0000.parquet"
    storage.write(uri, damage(storage.read(uri)))
    with pytest.raises(OutputError, match=r"^the manifest of .+ cannot be read: ") as caught:
        output.manifest()
    assert "\n" not in str(caught.value)


def test_a_table_that_is_no_manifest_is_refused(output):
    uri = f"{output.uri}/__captioner/manifest-0000.parquet"
    for table in (pa.table({"uri": ["a"]}), pa.table({name: ["a"] for name in MANIFEST.names})):
        sink = io.BytesIO()
        pq.write_table(table, sink)
        storage.write(uri, sink.getvalue())
        with pytest.raises(OutputError, match=r"^the manifest of .+ cannot be read: "):
            output.manifest()


# Accounts.


def test_every_row_is_counted_and_what_is_missing_is_named(output):
    output.extend(_listed(*range(5)), shard_size=2)
    _write_part(output, 0, ["ok", "rejected"])
    missing = ["/photos/2.jpg", "/photos/3.jpg", "/photos/4.jpg"]
    assert output.accounts() == Accounts(5, {"ok": 1, "rejected": 1}, missing)
    _write_part(output, 2, ["ok"])
    assert output.accounts() == Accounts(5, {"ok": 2, "rejected": 1}, missing[:2])
    _write_part(output, 1, ["failed", "unreadable"])
    rows = {"ok": 2, "rejected": 1, "failed": 1, "unreadable": 1}
    assert output.accounts() == Accounts(5, rows, [])


@pytest.mark.parametrize("statuses", [["ok"], ["ok"] * 3, []])
def test_a_part_with_another_number_of_rows_is_an_error(output, statuses):
    output.extend(_listed(0, 1, 2), shard_size=2)
    _write_part(output, 0, statuses)
    with pytest.raises(
        OutputError, match=rf"^part-000000\.parquet has {len(statuses)} rows, its shard 2$"
    ):
        output.accounts()


def test_a_part_with_other_images_is_an_error(output):
    output.extend(_listed(0, 1), shard_size=2)
    for uris in (["/photos/1.jpg", "/photos/0.jpg"], ["/photos/0.jpg"] * 2):
        rows = [CaptionRow(uri=uri, status="ok") for uri in uris]
        sink = io.BytesIO()
        pq.write_table(rows_to_table(rows), sink)
        storage.write(f"{output.uri}/{part_name(0)}", sink.getvalue())
        with pytest.raises(
            OutputError, match=r"^part-000000\.parquet holds other images than its shard$"
        ):
            output.accounts()


def test_what_is_not_ok_is_found_in_its_place(output):
    manifest = output.extend(_listed(*range(6)), shard_size=3)
    _write_part(output, 0, ["failed", "ok", "unreadable"])
    assert list(output.not_ok(manifest)) == [
        Shard(0, ["/photos/0.jpg", "/photos/2.jpg"], [None, None], [0, 2])
    ]


# The lock.


def test_a_second_job_on_the_same_directory_is_told_so(tmp_path):
    first, second = OutputDirectory(f"{tmp_path}/out"), OutputDirectory(f"{tmp_path}/out")
    with first.locked():
        with (
            pytest.raises(
                OutputError,
                match=rf"^another job is at work: .+ is locked by process {os.getpid()} on ",
            ),
            second.locked(),
        ):
            pass
        first.begin(SETTINGS)
        first.begin({"beam": 9}, overwrite=True)  # which must not delete the lock
        with pytest.raises(OutputError, match=r"^another job is at work"), second.locked():
            pass
    with second.locked():
        second.begin({"beam": 9})


def test_somebody_elses_directory_is_not_locked(tmp_path):
    (tmp_path / "thesis.tex").write_bytes(b"years of work")
    with pytest.raises(OutputError, match="is not empty"), OutputDirectory(str(tmp_path)).locked():
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_part_of_no_shard_is_an_error(output):
    output.extend(_listed(0, 1), shard_size=2)
    _write_part(output, 0, ["ok", "ok"])
    _write_part(output, 7, ["ok"])
    with pytest.raises(OutputError, match=r"^part-000007\.parquet is no shard's of the manifest$"):
        output.accounts()


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-9], lambda data: data[:99]]
)
def test_a_damaged_part_is_an_error(output, damage):
    output.extend(_listed(0, 1), shard_size=2)
    _write_part(output, 0, ["ok", "ok"])
    uri = f"{output.uri}/{part_name(0)}"
    storage.write(uri, damage(storage.read(uri)))
    with pytest.raises(OutputError, match=r"^cannot read .+/part-000000\.parquet: ") as caught:
        output.accounts()
    assert "\n" not in str(caught.value)


def test_a_part_is_read_by_its_columns(output):
    _write_part(output, 0, ["ok", "failed"])
    assert output.read_part(0, ["status"]).to_pydict() == {"status": ["ok", "failed"]}
    assert output.read_part(0).column_names == COLUMNS.names
    with pytest.raises(OutputError, match=r"^cannot read .+/part-000001\.parquet: "):
        output.read_part(1)
