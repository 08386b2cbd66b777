"""How URIs are spelled: any name, absolute paths, joins."""

import os
import urllib.parse

import pytest

from captioner import storage
from captioner.errors import InputError
from captioner.storage import Listed
from conftest import ODD_NAMES

IMAGES = (".jpg", ".png")


def _uris(directory: object) -> list[str]:
    return [listed.uri for listed in storage.find(str(directory), IMAGES)]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_file_of_any_name_is_written_listed_read_and_deleted(tmp_path, name):
    uri = storage.join(str(tmp_path), name)
    storage.write(uri, b"pixels")
    assert os.listdir(tmp_path) == [name]
    assert storage.find(str(tmp_path), IMAGES) == [Listed(str(tmp_path / name), 6)]
    assert storage.read(str(tmp_path / name)) == b"pixels"
    assert storage.names(str(tmp_path)) == [name]
    storage.delete(uri)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("folder", ["s3:", "https:", "a::b", "file:", "100%", "~", "[1]"])
def test_a_folder_of_any_name_is_listed(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "a.jpg").write_bytes(b"1")
    assert _uris(tmp_path) == [f"{tmp_path}/{folder}/a.jpg"]
    assert storage.read(f"{tmp_path}/{folder}/a.jpg") == b"1"
    monkeypatch.chdir(tmp_path)
    assert _uris(storage.absolute(folder)) == [f"{tmp_path}/{folder}/a.jpg"]


@pytest.mark.parametrize(
    ("name", "encoded"),
    [(b"\xff\xfe.jpg", "%FF%FE.jpg"), (b"a b%\xe9::\n.jpg", "a%20b%25%E9%3A%3A%0A.jpg")],
)
def test_a_name_that_is_not_utf8_is_listed_as_a_file_uri(tmp_path, name, encoded):
    with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
        file.write(b"pixels")
    [listed] = storage.find(str(tmp_path), IMAGES)
    assert listed == Listed(f"file://{urllib.parse.quote(str(tmp_path))}/{encoded}", 6)
    assert storage.read(listed.uri) == b"pixels"
    assert storage.version(listed.uri).startswith("6 ")
    assert storage.absolute(listed.uri) == listed.uri
    storage.delete(listed.uri)
    assert os.listdir(tmp_path) == []


def test_a_file_uri_is_percent_encoded_and_a_path_is_not(tmp_path):
    (tmp_path / "a b.jpg").write_bytes(b"space")
    (tmp_path / "a%20b.jpg").write_bytes(b"percent")
    assert storage.read(f"file://{tmp_path}/a%20b.jpg") == b"space"
    assert storage.read(f"{tmp_path}/a%20b.jpg") == b"percent"
    assert _uris(f"file://{tmp_path}") == [f"{tmp_path}/a b.jpg", f"{tmp_path}/a%20b.jpg"]


@pytest.mark.parametrize(
    ("uri", "base", "expected"),
    [
        ("/a/b.jpg", None, "/a/b.jpg"),
        ("/a/../b.jpg", None, "/b.jpg"),
        ("b.jpg", "/a", "/a/b.jpg"),
        ("../b.jpg", "/a/c", "/a/b.jpg"),
        ("/b.jpg", "/a", "/b.jpg"),
        ("s3://bucket/b.jpg", "/a", "s3://bucket/b.jpg"),
        ("file:///a%20b.jpg", "/c", "file:///a%20b.jpg"),
        ("memory://b", None, "memory://b"),
        ("no scheme://b.jpg", "/a", "/a/no scheme:/b.jpg"),
        ("a::b.jpg", "/a", "/a/a::b.jpg"),
    ],
)
def test_paths_are_made_absolute_and_uris_are_left(uri, base, expected):
    assert storage.absolute(uri, base) == expected


def test_a_relative_path_starts_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a.jpg") == str(tmp_path / "a.jpg")


def test_a_working_directory_that_is_deleted_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(InputError, match=r"^out starts from the working directory, which is del"):
        storage.absolute("out")
    assert storage.absolute("/out") == "/out"


@pytest.mark.parametrize("directory", ["s3://bucket/a", "s3://bucket/a/"])
def test_a_name_is_joined_with_one_slash(directory):
    assert storage.join(directory, "b.jpg") == "s3://bucket/a/b.jpg"
