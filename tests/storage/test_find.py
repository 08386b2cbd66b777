"""Listing directories: recursively, and one level."""

import os
import tempfile
from pathlib import Path

import fsspec
import pytest

from captioner import storage
from captioner.errors import InputError
from captioner.storage import Listed, PassedOver

IMAGES = (".jpg", ".png")


@pytest.fixture
def memory(memory_bucket: str) -> str:
    """The URI of an empty directory in a bucket of a kind."""
    return f"{memory_bucket}/photos"


def _uris(directory: object) -> list[str]:
    return [listed.uri for listed in storage.find(str(directory), IMAGES)]


def test_files_are_listed_below_a_directory_in_order_with_their_sizes(tmp_path):
    for name in (
        "b.jpg",
        "a/c.png",
        "a/b/A.JPG",
        "a.jpg",
        "B.PnG",
        "notes.txt",
        "jpg",
        "c.jpg.part",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(name))
    names = ["B.PnG", "a.jpg", "a/b/A.JPG", "a/c.png", "b.jpg"]
    expected = [Listed(str(tmp_path / name), len(name)) for name in names]
    assert storage.find(str(tmp_path), IMAGES) == expected
    assert storage.find(f"{tmp_path}/", IMAGES) == expected
    assert storage.find(str(tmp_path), (".gif",)) == []


def test_a_directory_that_is_called_like_an_image_is_not_listed(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    assert _uris(tmp_path) == []
    (tmp_path / "x.jpg" / "y.jpg").touch()
    assert _uris(tmp_path) == [f"{tmp_path}/x.jpg/y.jpg"]


def test_what_is_no_file_is_not_listed(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "null.jpg").symlink_to("/dev/null")
    assert _uris(tmp_path) == []


def test_links_to_files_and_folders_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1234").write_bytes(b"12345")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").symlink_to("../blobs/1234")
    (photos / "folder").symlink_to(tmp_path / "blobs")
    (photos / "folder.jpg").symlink_to(tmp_path / "blobs")
    (tmp_path / "blobs" / "b.jpg").touch()
    # Both links to folders lead to one, which is listed by the first of them.
    expected = ["a.jpg", "folder/b.jpg"]
    passed_over = PassedOver()
    found = storage.find(str(photos), IMAGES, passed_over=passed_over)
    assert found == [Listed(f"{photos}/a.jpg", 5), Listed(f"{photos}/folder/b.jpg", 0)]
    assert passed_over.links == [f"{photos}/folder.jpg"]
    (tmp_path / "link").symlink_to(photos)
    # The directory itself may be a link.
    assert _uris(tmp_path / "link") == [f"{tmp_path}/link/{name}" for name in expected]


def test_a_link_whose_file_is_gone_is_listed_to_be_accounted_for(tmp_path):
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    expected = [Listed(f"{tmp_path}/{name}.jpg", None) for name in ("gone", "self")]
    assert storage.find(str(tmp_path), IMAGES) == expected
    for listed in expected:
        with pytest.raises(OSError, match=r"No such file|Too many levels"):
            storage.read(listed.uri)


def test_links_in_a_circle_come_to_an_end(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "x.jpg").touch()
    (inner / "up").symlink_to(tmp_path)
    (inner / "here").symlink_to(".")
    (tmp_path / "down").symlink_to(inner)
    assert _uris(tmp_path) == [f"{inner}/x.jpg"]


def test_a_folder_that_cannot_be_listed_is_an_error():
    """Its images would be missing without a word otherwise."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as directory:
        secret = Path(directory, "secret")
        secret.mkdir(mode=0)
        Path(directory, "a.jpg").touch()
        os.chmod(directory, 0o755)
        if user == 0:
            os.seteuid(65534)  # root may list everything
        try:
            with pytest.raises(InputError, match=rf"^cannot list {secret}: Permission denied$"):
                storage.find(directory, IMAGES)
        finally:
            os.seteuid(user)
            secret.chmod(0o700)


def test_a_directory_that_is_none_is_an_error(tmp_path):
    with pytest.raises(InputError, match=rf"^{tmp_path}/none does not exist$"):
        storage.find(f"{tmp_path}/none", IMAGES)
    (tmp_path / "a.jpg").touch()
    with pytest.raises(
        InputError, match=rf"^{tmp_path}/a\.jpg is a file, not a directory of images$"
    ):
        storage.find(f"{tmp_path}/a.jpg", IMAGES)


@pytest.mark.parametrize(
    "use",
    [
        lambda uri: storage.find(uri, IMAGES),
        storage.read,
        storage.names,
        storage.is_directory,
        storage.version,
        storage.delete,
        storage.open_binary,
        lambda uri: storage.write(uri, b""),
    ],
)
def test_an_unknown_scheme_is_an_error(use):
    message = r"^cannot open nonsense:// URIs: Protocol not known: nonsense$"
    with pytest.raises(InputError, match=message):
        use("nonsense://bucket/a.jpg")


def test_a_directory_that_comes_while_it_is_asked_for_is_a_directory(memory, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.pipe(f"{memory}/part", b"")
    monkeypatch.setattr(type(fs), "isdir", lambda self, path: False)
    assert storage.names(memory) == ["part"]


def test_names_are_sorted_and_of_everything(tmp_path):
    for name in ("b", ".a", "c.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "directory").mkdir()
    assert storage.names(str(tmp_path)) == [".a", "b", "c.jpg", "directory"]
    assert storage.names(f"{tmp_path}/none") == []
    with pytest.raises(NotADirectoryError):
        storage.names(f"{tmp_path}/b")


def test_a_directory_is_told_from_a_file(tmp_path):
    (tmp_path / "a").touch()
    assert storage.is_directory(str(tmp_path))
    assert not storage.is_directory(f"{tmp_path}/a")
    assert not storage.is_directory(f"{tmp_path}/none")
