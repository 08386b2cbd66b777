"""Reading files: whole, the first bytes, parts, versions."""

import os
import tracemalloc
from pathlib import Path

import pytest

from captioner import storage


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
    monkeypatch.setattr(storage.reading, "_SMALLEST_READ", 7)
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


def test_a_range_of_a_file_is_read(place):
    uri = f"{place}/a"
    storage.write(uri, b"0123456789")
    assert storage.read_range(uri, 3, 7) == b"3456"
    assert storage.read_range(uri, 0, 10) == b"0123456789"
    assert storage.read_range(uri, 4, 4) == b""
    with pytest.raises(OSError, match=r"^2 bytes came instead of 3$"):
        storage.read_range(uri, 8, 11)
    with pytest.raises(FileNotFoundError):
        storage.read_range(f"{place}/b", 0, 1)


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
