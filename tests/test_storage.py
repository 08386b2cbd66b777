import errno
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import tracemalloc
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from captioner import storage
from captioner.errors import InputError, OutputError
from captioner.storage import Listed

IMAGES = (".jpg", ".png")


@pytest.fixture
def memory(memory_bucket: str) -> str:
    """The URI of an empty directory in a bucket of a kind."""
    return f"{memory_bucket}/photos"


def _uris(directory: object) -> list[str]:
    return [listed.uri for listed in storage.find(str(directory), IMAGES)]


# Names.

NAMES = [
    "plain.jpg",
    "two words.jpg",
    " space around .jpg",
    "line\nbreak.jpg",
    "tab\there.jpg",
    "quotes ' and \".jpg",
    "100%.jpg",
    "%41%zz.jpg",
    "🐕 ça.jpg",
    "composed \u00e9.jpg",
    "decomposed e\u0301.jpg",
    "line\u2028separator.jpg",
    "a::b.jpg",
    "s3:c.jpg",
    "star*[1]?.jpg",
    "#hash&and=.jpg",
    "back\\slash.jpg",
    "~home.jpg",
    "$HOME.jpg",
    "-dash.jpg",
    ".hidden.jpg",
    "two.dots.jpg",
]


@pytest.mark.parametrize("name", NAMES)
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


# Listing.


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


def test_links_to_files_are_listed_and_links_to_folders_are_not_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1234").write_bytes(b"12345")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").symlink_to("../blobs/1234")
    (photos / "folder").symlink_to(tmp_path / "blobs")
    (photos / "folder.jpg").symlink_to(tmp_path / "blobs")
    (tmp_path / "blobs" / "b.jpg").touch()
    assert storage.find(str(photos), IMAGES) == [Listed(f"{photos}/a.jpg", 5)]
    (tmp_path / "link").symlink_to(photos)
    assert _uris(tmp_path / "link") == [f"{tmp_path}/link/a.jpg"], "the directory itself may be one"


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
        InputError, match=rf"^{tmp_path}/a\.jpg is one file, and no directory of images$"
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


# Reading.


@pytest.mark.parametrize(
    ("limit", "length"), [(None, 100), (0, 1), (98, 99), (99, 100), (100, 100), (101, 100)]
)
def test_at_most_one_byte_over_the_limit_is_read(tmp_path, limit, length):
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert storage.read(f"{tmp_path}/a", limit) == b"x" * length


@pytest.mark.parametrize("limit", [10**8, 10**12])
def test_memory_follows_the_file_and_not_the_limit(tmp_path, limit):
    (tmp_path / "a").write_bytes(b"x" * 100)
    tracemalloc.start()
    try:
        assert storage.read(f"{tmp_path}/a", limit) == b"x" * 100
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_a_file_that_is_longer_than_its_size_says_is_read_to_its_end_or_the_limit(monkeypatch):
    """As one that grows is; the kernel says 0 of those in /proc."""
    monkeypatch.setattr(storage, "_LEAST_READ", 7)
    environment = Path("/proc/self/environ").read_bytes()
    assert len(environment) > 100
    assert storage.read("/proc/self/environ", 10**6) == environment
    for limit in (0, 5, 6, 7, 90):
        assert storage.read("/proc/self/environ", limit) == environment[: limit + 1]


def test_what_cannot_be_read_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.read(f"{tmp_path}/none.jpg")
    with pytest.raises(IsADirectoryError):
        storage.read(str(tmp_path))
    for uri in (f"{tmp_path}/zero\0byte.jpg", f"file://{tmp_path}/zero%00byte.jpg"):
        with pytest.raises(OSError, match="null byte"):
            storage.read(uri)


def test_parts_of_a_file_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    with storage.open_binary(f"{tmp_path}/a") as file:
        file.seek(7)
        assert file.read(2) == b"78"


def test_the_version_of_a_file_changes_with_it(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    os.utime(path, (1000, 1000))
    first = storage.version(str(path))
    assert storage.version(str(path)) == first
    os.utime(path, (2000, 2000))
    second = storage.version(str(path))
    path.write_bytes(b"22")
    os.utime(path, (2000, 2000))
    third = storage.version(str(path))
    assert len({first, second, third, ""}) == 4
    path.unlink()
    assert storage.version(str(path)) == ""


# Writing.


def test_a_file_is_written_into_new_folders(tmp_path):
    storage.write(f"{tmp_path}/a/b/c.bin", b"1")
    storage.write(f"{tmp_path}/a/b/c.bin", b"22")
    assert (tmp_path / "a" / "b" / "c.bin").read_bytes() == b"22"
    assert os.listdir(tmp_path / "a" / "b") == ["c.bin"]


def test_a_name_without_a_folder_is_written_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage.write("c.bin", b"1")
    assert (tmp_path / "c.bin").read_bytes() == b"1"


def test_others_may_read_what_is_written(tmp_path):
    mask = os.umask(0o022)
    try:
        storage.write(f"{tmp_path}/a", b"")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


@contextmanager
def _small_files() -> Iterator[None]:
    """Writing more than 10,000 bytes to a file fails half-way, as on a full disk.

    Only around the write: pytest's own output may go to a file that is longer.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    message = rf"^cannot write {tmp_path}/a: File too large$"
    with _small_files(), pytest.raises(OutputError, match=message):
        storage.write(f"{tmp_path}/a", bytes(20_000))
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path):
    (tmp_path / "a").write_bytes(b"before")
    with _small_files(), pytest.raises(OutputError):
        storage.write(f"{tmp_path}/a", bytes(20_000))
    assert (tmp_path / "a").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a"]


def test_a_directory_is_not_overwritten(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError, match=rf"^cannot write {tmp_path}/a: Is a directory$"):
        storage.write(f"{tmp_path}/a", b"1")
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_is_no_folder_to_write_to(tmp_path):
    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(OutputError, match=rf"^cannot write {tmp_path}/a/b: "):
        storage.write(f"{tmp_path}/a/b", b"1")
    assert (tmp_path / "a").read_bytes() == b"before"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_need_not_flush_directories(tmp_path, monkeypatch, number):
    flush = os.fsync

    def fail_for_directories(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_directories)
    if number == errno.EIO:
        with pytest.raises(OutputError, match=rf"^cannot write {tmp_path}/a: Input/output error$"):
            storage.write(f"{tmp_path}/a", b"1")
    else:
        storage.write(f"{tmp_path}/a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"
    assert os.listdir(tmp_path) == ["a"]


def test_what_is_not_bytes_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        storage.write(f"{tmp_path}/a", "text")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    uri, contents = f"{tmp_path}/a", [b"0" * 500_000, b"1" * 700_000]
    storage.write(uri, contents[0])
    done = threading.Event()

    def rewrite() -> None:
        for turn in range(1, 20):
            storage.write(uri, contents[turn % 2])
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    while not done.is_set():
        assert storage.read(uri) in contents
    writer.join()
    assert storage.read(uri) == contents[1]


def test_a_writer_that_is_killed_leaves_a_temporary_file_that_is_found(tmp_path):
    (tmp_path / "part-1").write_bytes(b"before")
    code = """
import resource, signal, sys
from captioner import storage
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # what Python ignores kills it now
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
storage.write(sys.argv[1], bytes(20_000))
"""
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "part-1")], check=False)
    assert ran.returncode == -signal.SIGXFSZ
    assert (tmp_path / "part-1").read_bytes() == b"before"
    [temporary] = set(os.listdir(tmp_path)) - {"part-1"}
    assert (tmp_path / temporary).stat().st_size == 10_000
    assert storage.is_temporary(temporary)


def test_only_temporary_files_are_leftovers():
    temporary = [".a.parquet.tmp-0123abcd", ".run.json.tmp-ffffffff"]
    others = ["a.tmp-0123abcd", ".a.tmp-0123abc", ".a.tmp-0123abcde", ".a.tmp-0123ABCD", ".hidden"]
    assert [name for name in temporary + others if storage.is_temporary(name)] == temporary


# Deleting.


def test_files_and_directories_are_deleted(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").touch()
    (tmp_path / "d").touch()
    storage.delete(f"{tmp_path}/d")
    assert os.listdir(tmp_path) == ["a"]
    storage.delete(f"{tmp_path}/a")
    assert os.listdir(tmp_path) == []
    storage.delete(f"{tmp_path}/a")


def test_a_pattern_deletes_nothing_but_the_file_of_that_name(tmp_path):
    for name in ("part[1]", "part1", "part*"):
        (tmp_path / name).touch()
    storage.delete(f"{tmp_path}/part[1]")
    storage.delete(f"{tmp_path}/part*")
    assert os.listdir(tmp_path) == ["part1"]


def test_what_cannot_be_deleted_is_an_error(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(OutputError, match=rf"^cannot delete {tmp_path}/a/b: Not a directory$"):
        storage.delete(f"{tmp_path}/a/b")


# In a bucket.


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


@pytest.mark.parametrize("name", [name for name in NAMES if name != "a::b.jpg"])
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
        InputError, match=r"^memory://bucket/photos is one file, and no directory of images$"
    ):
        storage.find(memory, IMAGES)
    with pytest.raises(OutputError, match=r"^cannot write memory://bucket/photos/a: "):
        storage.write(f"{memory}/a", b"")


def test_a_file_is_none_of_a_buckets(tmp_path: Path):
    storage.write(f"file://{tmp_path}/a%20b", b"1")
    assert os.listdir(tmp_path) == ["a b"]
