"""How URIs are spelled: any name, absolute paths, joins."""

import json
import os
import subprocess
import sys
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
        ("file:///a%20b.jpg", "/c", "/a b.jpg"),
        ("file:/a/b.jpg", None, "/a/b.jpg"),
        ("file://localhost/a/b.jpg", None, "/a/b.jpg"),
        ("FILE://LocalHost/a/b.jpg", None, "/a/b.jpg"),
        ("file:///a/%2E%2e/b%2Ejpg", None, "/b.jpg"),
        ("file:///a//./b.jpg", None, "/a/b.jpg"),
        ("file:///caf%C3%A9.jpg", None, "/café.jpg"),
        ("file:///caf%c3%a9.jpg", None, "/café.jpg"),
        ("file:///café.jpg", None, "/café.jpg"),
        ("file:///caf%e9.jpg", None, "file:///caf%E9.jpg"),
        ("/caf\udce9.jpg", None, "file:///caf%E9.jpg"),
        ("//a/b.jpg", None, "/a/b.jpg"),
        ("b.jpg", "file:///a%20c", "/a c/b.jpg"),
        ("file:b.jpg", "/a", "/a/file:b.jpg"),
        ("S3://bucket/B.jpg", None, "s3://bucket/B.jpg"),
        ("s3a://bucket/b.jpg", None, "s3://bucket/b.jpg"),
        ("s3://bucket/a/../%2E//b?c#d.jpg", None, "s3://bucket/a/../%2E//b?c#d.jpg"),
        ("gcs://bucket/b.jpg", None, "gs://bucket/b.jpg"),
        ("abfss://c@a.dfs.core.windows.net/b", None, "abfs://c@a.dfs.core.windows.net/b"),
        ("HTTPS://Host.Example:443/A.jpg", None, "https://host.example/A.jpg"),
        ("http://host:80", None, "http://host/"),
        ("http://host:8080?Q", None, "http://host:8080/?Q"),
        ("http://host/%7euser/./a/../b%2ejpg#part", None, "http://host/~user/b.jpg"),
        ("http://host/a/..", None, "http://host/"),
        ("http://host/a//b/.", None, "http://host/a//b/"),
        ("http://host/caf\u00e9 1.jpg", None, "http://host/caf%C3%A9%201.jpg"),
        ("http://host/caf%c3%a9%201.jpg", None, "http://host/caf%C3%A9%201.jpg"),
        ("http://host/100%.jpg?a=%2f%2D", None, "http://host/100%25.jpg?a=%2F-"),
        ("memory://b", None, "memory://b"),
        ("no scheme://b.jpg", "/a", "/a/no scheme:/b.jpg"),
        ("a::b.jpg", "/a", "/a/a::b.jpg"),
    ],
)
def test_a_file_has_one_spelling(uri, base, expected):
    assert storage.absolute(uri, base) == expected
    assert storage.absolute(expected) == expected


def test_a_file_of_another_host_is_an_error():
    with pytest.raises(InputError, match=r"^file://server/a\.jpg: a file of the host server; use"):
        storage.absolute("file://server/a.jpg")


def test_what_is_not_unicode_is_an_error():
    with pytest.raises(InputError, match=r"^'/\\ud800\.jpg' is not valid Unicode$"):
        storage.absolute("/\ud800.jpg")


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C.UTF-8"},
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_file_has_one_spelling_in_every_locale(tmp_path, environment):
    names = [b"caf\xc3\xa9.jpg", b"caf\xe9.jpg", b"plain.jpg"]
    for name in names:
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(name)
    code = """
import json, sys
from captioner import storage
folder = storage.absolute(storage.from_operating_system(sys.argv[1]))
listed = [each.uri for each in storage.find(folder, (".jpg",))]
given = storage.absolute(folder + "/caf\\u00e9.jpg")
storage.write(folder + "/out/\\u00e9", b"")
read = [storage.read(uri).hex() for uri in listed]
print(json.dumps([listed, given, read, storage.names(folder + "/out"), storage.names(folder)]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, **environment},
        capture_output=True,
        check=True,
    )
    listed, given, read, written, everything = json.loads(ran.stdout)
    assert listed == [
        f"{tmp_path}/café.jpg",
        f"{tmp_path}/plain.jpg",
        f"file://{tmp_path}/caf%E9.jpg",
    ]
    assert given == f"{tmp_path}/café.jpg"
    assert read == [name.hex() for name in (names[0], names[2], names[1])]
    assert written == ["é"]
    assert everything == sorted([*(n.decode("utf-8", "surrogateescape") for n in names), "out"])
    assert os.listdir(os.fsencode(tmp_path) + b"/out") == [b"\xc3\xa9"]


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


@pytest.mark.parametrize("scheme", ["zip", "dir", "reference", "data", "simplecache"])
def test_a_file_within_another_is_refused(scheme):
    with pytest.raises(InputError, match=f"^cannot open {scheme}:// URIs, which lead to files"):
        storage.read(f"{scheme}://a.jpg::b.zip")
