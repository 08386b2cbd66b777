"""Writing files atomically, and deleting them."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from captioner import storage
from captioner.errors import OutputError


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


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127])
def test_the_longest_name_is_written(tmp_path, name):
    storage.write(f"{tmp_path}/{name}", b"1")
    assert os.listdir(tmp_path) == [name]


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    storage.check_target(f"{tmp_path}/file")
    storage.check_target(f"{tmp_path}/new/folder/file")
    for name, problem in (("", "is a folder"), ("file/below", "file is not a folder")):
        with pytest.raises(OutputError, match=problem):
            storage.check_target(f"{tmp_path}/{name}")
    assert os.listdir(tmp_path) == ["file"]
