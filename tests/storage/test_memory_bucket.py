"""Objects of a bucket: fsspec's file system in memory."""

import os
import re
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from captioner import storage
from captioner.errors import InputError, OutputError
from captioner.storage import Listed
from conftest import ODD_NAMES

IMAGES = (".jpg", ".png")


@pytest.fixture
def memory(memory_bucket: str) -> str:
    """The URI of an empty directory in a bucket of a kind."""
    return f"{memory_bucket}/photos"


def test_objects_are_written_listed_read_and_deleted(memory):
    storage.write(f"{memory}/b.jpg", b"22")
    storage.write(f"{memory}/a/c d%.PNG", b"333")
    storage.write(f"{memory}/notes.txt", b"4")
    storage.write("memory://bucket/elsewhere.jpg", b"5")
    listed = storage.find(memory, IMAGES)
    assert [each.size for each in listed] == [3, 2]
    assert [each.uri.split("bucket/photos/")[1] for each in listed] == ["a/c d%.PNG", "b.jpg"]
    assert [storage.read(each.uri) for each in listed] == [b"333", b"22"]
    assert storage.read(f"{memory}/b.jpg", 0) == b"2"
    assert storage.names(memory) == ["a", "b.jpg", "notes.txt"]
    assert storage.is_directory(memory)
    assert not storage.is_directory(f"{memory}/b.jpg")
    assert storage.version(f"{memory}/b.jpg").startswith("2 ")
    with storage.open_binary(f"{memory}/a/c d%.PNG") as file:
        assert file.read() == b"333"
    storage.delete(f"{memory}/b.jpg")
    storage.delete(f"{memory}/a")
    storage.delete(f"{memory}/none")
    assert storage.names(memory) == ["notes.txt"]


def test_an_object_replaces_an_object(memory):
    storage.write(f"{memory}/a", b"1")
    storage.write(f"{memory}/a", b"22")
    assert storage.read(f"{memory}/a") == b"22"
    assert storage.names(memory) == ["a"]


def test_what_is_to_be_new_takes_no_objects_place(memory, tmp_path):
    storage.write(f"{memory}/a", b"1", new=True)
    with pytest.raises(FileExistsError):
        storage.write(f"{memory}/a", b"22", new=True)
    assert storage.read(f"{memory}/a") == b"1"
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):  # no folder can be made there
        storage.write(f"{tmp_path}/file/a", b"1", new=True)


def test_a_directory_is_deleted_and_not_what_its_name_is_a_pattern_for(memory):
    for name in ("out[1]/a/b", "out[1]/a/c/d", "out1/a/b", "out[1]/e"):
        storage.write(f"{memory}/{name}", b"1")
    storage.delete(f"{memory}/out[1]/a")
    assert storage.find(f"{memory}", ("",)) == [
        (f"memory://bucket/photos/{name}", 1) for name in ("out1/a/b", "out[1]/e")
    ]


class _Hosts(MemoryFileSystem):
    """A file system whose URIs name a host before the path, as those of Azure, SFTP and HDFS."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(re.sub("^hosts://[^/]*", "", path))


@pytest.mark.parametrize(
    ("directory", "uri"),
    [
        ("hosts://photos@account.net/a/b", "hosts://photos@account.net/a/b/c/d.jpg"),
        ("hosts://host/a//b/", "hosts://host/a//b/c/d.jpg"),
        ("hosts://host", "hosts://host/c/d.jpg"),
        ("hosts:///", "hosts:///c/d.jpg"),
        ("memory:///bucket", "memory:///bucket/c/d.jpg"),
        ("memory://", "memory:///c/d.jpg"),
    ],
)
def test_what_is_listed_has_the_name_that_the_directory_was_given_by(memory, directory, uri):
    fsspec.register_implementation("hosts", _Hosts, clobber=True)
    storage.write(uri, b"pixels")
    assert storage.find(directory, IMAGES) == [Listed(uri, 6)]
    assert storage.read(uri) == b"pixels"


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if name != "a::b.jpg"])
def test_an_object_of_any_name_is_written_listed_read_and_deleted(memory, name):
    storage.write(f"{memory}/{name}", b"pixels")
    [listed] = storage.find(memory, IMAGES)
    assert listed.uri.endswith(f"/bucket/photos/{name}")
    assert storage.read(listed.uri) == b"pixels"
    storage.delete(listed.uri)
    assert storage.names(memory) == []


@pytest.mark.parametrize("name", ["a::b.jpg", "zip://a.jpg::memory://bucket/b.zip", "c://d.jpg"])
def test_an_object_with_colons_is_one_object(memory, name):
    storage.write(f"{memory}/{name}", b"pixels")
    assert list(fsspec.filesystem("memory").store) == [f"bucket/photos/{name}"]
    assert storage.read(f"{memory}/{name}") == b"pixels"
    storage.delete(f"{memory}/{name}")
    assert list(fsspec.filesystem("memory").store) == []


def test_a_prefix_with_brackets_is_no_pattern(memory):
    storage.write(f"{memory}[1]/a*.jpg", b"1")
    storage.write(f"{memory}[1]/ab.jpg", b"2")
    storage.write(f"{memory}1/a*.jpg", b"3")
    storage.delete(f"{memory}[1]/a*.jpg")
    assert storage.names(f"{memory}[1]") == ["ab.jpg"]
    assert storage.names(f"{memory}1") == ["a*.jpg"]


def test_what_is_not_in_a_bucket_is_an_error(memory):
    with pytest.raises(InputError, match=r"^memory://bucket/photos does not exist$"):
        storage.find(memory, IMAGES)
    assert storage.names(memory) == []
    assert storage.version(f"{memory}/a") == ""
    with pytest.raises(FileNotFoundError):
        storage.read(f"{memory}/a")
    storage.write(memory, b"")
    with pytest.raises(
        InputError, match=r"^memory://bucket/photos is a file, not a directory of images$"
    ):
        storage.find(memory, IMAGES)
    with pytest.raises(OutputError, match=r"^cannot write memory://bucket/photos/a: "):
        storage.write(f"{memory}/a", b"")


def test_a_file_is_none_of_a_buckets(tmp_path: Path):
    storage.write(f"file://{tmp_path}/a%20b", b"1")
    assert os.listdir(tmp_path) == ["a b"]
