"""Tar files as sources: odd names, columns that differ, lists, what is refused."""

import io
import json
import os
import tarfile

import fsspec
import pytest

from captioner import storage
from captioner.config import ListingConfig
from captioner.data.listing import list_source
from captioner.data.reading import groups, read_images
from captioner.errors import InputError
from captioner.schema import KEPT
from conftest import ODD_NAMES


def make(uri: object, members: list[tuple[str, bytes]]) -> bytes:
    """Writes a tar file at a URI; returns its bytes."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    storage.write(str(uri), sink.getvalue())
    return sink.getvalue()


def listed(source: object, **listing: object) -> list[dict]:
    rows: list[dict] = list_source(str(source), ListingConfig(**listing)).to_pylist()
    return rows


def kept(source: object, keep: str) -> list[dict]:
    return [row[KEPT] for row in listed(source, keep=keep)]


def read(source: object) -> list[bytes | Exception]:
    images = list_source(str(source), ListingConfig())
    found: list[bytes | Exception] = []
    for group in groups(images):
        found += read_images(images.slice(group.start, len(group)), 1 << 20, 0)
    return found


# Names.


def test_an_image_of_any_name_is_read_and_has_a_uri_of_its_own(tmp_path):
    names = [*ODD_NAMES, "./dot.jpg", "x" * 300 + ".jpg", os.fsdecode(b"\xff.jpg"), "%FF.jpg"]
    make(tmp_path / "a.tar", [(name, str(n).encode()) for n, name in enumerate(names)])
    rows = listed(tmp_path / "a.tar")
    assert len({row["uri"] for row in rows}) == len(names)
    assert all(row["uri"].count("::") == 1 for row in rows)
    assert read(tmp_path / "a.tar") == [str(n).encode() for n in range(len(names))]


def test_names_that_differ_only_where_a_uri_does_not_are_images_of_their_own(tmp_path, caplog):
    names = [
        "/a.jpg",
        "a.jpg",
        "//a.jpg",
        "b.jpg",
        "a.jpg#offset=512.jpg",
        os.fsdecode(b"\xff.jpg"),
    ]
    names += ["%FF.jpg"]
    make(tmp_path / "a.tar", [(name, str(n).encode()) for n, name in enumerate(names)])
    rows = listed(tmp_path / "a.tar")
    assert len({row["uri"] for row in rows}) == len(names)
    assert rows[1]["uri"] == f"tar://a.jpg#offset={rows[1]['position']}::file://{tmp_path}/a.tar"
    assert rows[3]["uri"] == f"tar://b.jpg::file://{tmp_path}/a.tar"
    assert "whose URIs get an offset: 3" in caplog.text


def test_a_tar_file_may_have_the_name_of_a_pattern(tmp_path):
    for name in ("a[1].tar", "{x}.tar", "b{1,2}.tar"):
        make(tmp_path / name, [("a.jpg", b"1")])
        [row] = listed(tmp_path / name)
        assert row["container"] == f"{tmp_path}/{name}"


def test_an_at_sign_in_a_path_is_no_credential(tmp_path):
    make(tmp_path / "me@home" / "a.tar", [("x@y.jpg", b"1")])
    [row] = listed(tmp_path / "me@home")
    assert storage.absolute(row["uri"]) == row["uri"]
    with fsspec.open(row["uri"]) as file:
        assert file.read() == b"1"
    with pytest.raises(InputError, match=r"^s3://…@b/a.tar contains credentials"):
        storage.absolute("tar://a.jpg::s3://key:secret@b/a.tar")


# Columns.


def test_a_tar_file_without_a_column_of_another_has_nulls(place):
    fields: list[dict] = [{"id": 7, "note": None}, {}, {"id": 8, "licence": "CC0"}]
    for number, each in enumerate(fields):
        data = json.dumps(each).encode()
        make(f"{place}/t/{number}.tar", [("a.jpg", b"1"), ("a.json", data)])
    assert kept(f"{place}/t", "id,licence=under") == [
        {"id": 7, "under": None},
        {"id": None, "under": None},
        {"id": 8, "under": "CC0"},
    ]
    everything = kept(f"{place}/t", "all")
    assert everything[0] == {"id": 7, "note": None, "licence": None, "key": "a"}
    with pytest.raises(
        InputError,
        match=r"^--keep title: no column 'title' in .*/0\.tar and 2 others; "
        "the columns are id, note, key, licence$",
    ):
        kept(f"{place}/t", "title")


def test_a_column_of_two_types_is_refused(tmp_path):
    for number, value in enumerate((1, "one")):
        data = json.dumps({"id": value, "good": number}).encode()
        make(tmp_path / f"{number}.tar", [("a.jpg", b"1"), ("a.json", data)])
    with pytest.raises(InputError, match=r"0\.tar and 1 other: a column's type differs"):
        kept(tmp_path, "id")
    assert kept(tmp_path, "good") == [{"good": 0}, {"good": 1}]


@pytest.mark.parametrize("text", [b"{not json", b"[" * 100_000, b" " * (1 << 20) + b"{}"])
def test_columns_that_cannot_be_parsed_are_empty_and_told(tmp_path, text, caplog):
    members = [("a.jpg", b"1"), ("a.json", text), ("b.jpg", b"1"), ("b.json", b'{"id": 2}')]
    make(tmp_path / "a.tar", members)
    assert kept(tmp_path / "a.tar", "id") == [{"id": None}, {"id": 2}]
    assert "not valid JSON or too long, whose columns stay empty: 1: a.json" in caplog.text
    caplog.clear()
    listed(tmp_path / "a.tar")
    assert "JSON" not in caplog.text, "columns that nobody keeps are not parsed"


# What is refused.


def test_a_source_of_which_nothing_is_a_tar_file_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>" * 1000)
    with pytest.raises(InputError, match=r"^no images in \S+a\.tar: it is damaged: "):
        listed(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"^no images in \S+a\.tar: it is empty$"):
        listed(tmp_path)
    make(tmp_path / "b.tar", [("b.jpg", b"1")])
    assert [row["problem"] is None for row in listed(tmp_path)] == [False, True]


def test_one_image_without_an_end_mark_is_an_image(tmp_path):
    data = make(tmp_path / "a.tar", [("a.jpg", b"1")])
    (tmp_path / "a.tar").write_bytes(data[:1024])
    assert [row["problem"] for row in listed(tmp_path)] == [None]


def test_compressed_tar_files_in_a_folder_or_list_are_refused(place):
    storage.write(f"{place}/t/a.tar.gz", b"1")
    with pytest.raises(
        InputError, match=r"t holds no images .*, but compressed tar files, 1: decomp"
    ):
        listed(f"{place}/t")
    storage.write(f"{place}/list.txt", b"t/a.tar.gz\n")
    with pytest.raises(InputError, match=r"a\.tar\.gz is a compressed tar file"):
        listed(f"{place}/list.txt")


def test_a_list_of_tar_files_and_images_is_refused(place):
    storage.write(f"{place}/list.txt", b"a.tar\nb.jpg\nc.tar\n")
    with pytest.raises(
        InputError, match=r"list\.txt lists both tar files \(2\) and other files \(1\): make a list"
    ):
        listed(f"{place}/list.txt")


def test_a_list_may_have_patterns(place):
    for number in range(3):
        make(f"{place}/{number}.tar", [("a.jpg", b"1")])
    storage.write(f"{place}/list.txt", b"2.tar\n{0..1}.tar\n")
    names = [row["container"].rsplit("/", 1)[1] for row in listed(f"{place}/list.txt")]
    assert names == ["2.tar", "0.tar", "1.tar"]


# Changes and faults.


def test_a_tar_file_that_is_replaced_while_it_is_read_is_not_trusted(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    make(path, [("a.jpg", b"first"), ("b.jpg", b"second")])
    images = list_source(str(path), ListingConfig())
    read_range = storage.read_range

    def replace_and_read(uri: str, begin: int, end: int, **settings: object) -> bytes:
        make(path, [("b.jpg", b"other"), ("c.jpg", bytes(5000))])
        return read_range(uri, begin, end, **settings)

    monkeypatch.setattr(storage, "read_range", replace_and_read)
    found = [*read_images(images, 1 << 20, 0)]
    assert [str(each) for each in found] == ["the tar file has changed since it was listed"] * 2


def test_a_tar_file_that_cannot_be_examined_is_not_taken_for_changed(place, monkeypatch):
    make(f"{place}/a.tar", [("a.jpg", b"1")])
    images = list_source(f"{place}/a.tar", ListingConfig())

    def fail(*arguments: object, **settings: object) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(storage, "identify", fail)
    assert [str(each) for each in read_images(images, 1 << 20, 0)] == ["no answer"]
    with pytest.raises(InputError, match=r"^cannot list .*a\.tar: no answer$"):
        listed(f"{place}/a.tar")
