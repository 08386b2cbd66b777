"""Images are read from the cells of Parquet files, and from damaged ones with a reason."""

import os
import random
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner import storage
from captioner.config import ListingConfig
from captioner.data.listing import list_source
from captioner.data.parquet import cells, chunks
from captioner.data.parquet.shared import SharedCache
from captioner.data.reading import groups, is_in_container, read_images
from captioner.errors import StorageError
from conftest import skips_what_pyarrow_cannot_write

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LIMIT = 1_000_000
WAYS = {
    "default": {},
    "plain": {"use_dictionary": False},
    "small row groups": {"row_group_size": 7},
    "small pages": {"use_dictionary": False, "write_batch_size": 4, "data_page_size": 1000},
    "second version": {"data_page_version": "2.0", "write_batch_size": 4, "data_page_size": 1000},
    "zstd": {"compression": "zstd", "row_group_size": 50},
    "no compression": {"compression": "none", "write_batch_size": 9, "data_page_size": 1000},
    "page index": {"write_page_index": True, "use_content_defined_chunking": True},
    "lengths apart": {
        "use_dictionary": False,
        "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"},
    },
    "shared begins": {
        "use_dictionary": False,
        "column_encoding": {"image.bytes": "DELTA_BYTE_ARRAY"},
    },
}


@pytest.fixture(autouse=True)
def _empty_caches() -> Iterator[None]:
    yield
    for cache in (cells._footers, cells._chunks, chunks._pages):
        cache.clear()


def _blobs(count: int, most: int = 3000) -> list[bytes]:
    generator = random.Random(count)
    blobs = [generator.randbytes(generator.randint(1, most)) for _ in range(count)]
    blobs[count // 2] = blobs[0]
    return blobs


def _write(path: object, blobs: list[bytes | None], **options: object) -> str:
    cells_of = pa.array([{"bytes": blob, "path": None} for blob in blobs], IMAGE)
    table = pa.table({"id": list(range(len(blobs))), "image": cells_of})
    sink = pa.BufferOutputStream()
    with skips_what_pyarrow_cannot_write():
        pq.write_table(table, sink, **options)
    storage.write(str(path), sink.getvalue().to_pybytes())
    return str(path)


def _list(path: object) -> pa.Table:
    return list_source(str(path), ListingConfig())


def _read(images: pa.Table, limit: int = LIMIT) -> list[bytes | Exception]:
    """All images, by the groups of a job."""
    pieces = (images.slice(group.start, len(group)) for group in groups(images))
    return [data for piece in pieces for data in read_images(piece, limit, 0)]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_is_read(way, place):
    blobs = _blobs(150)
    images = _list(_write(f"{place}/a.parquet", blobs, **WAYS[way]))
    assert images["uri"].to_pylist() == [f"{place}/a.parquet#image={n}" for n in range(150)]
    assert all(map(is_in_container, images["uri"].to_pylist()))
    assert _read(images) == blobs
    for number in (149, 0, 75, 76, 33):
        assert list(read_images(images.slice(number, 1), LIMIT, 0)) == [blobs[number]]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_a_binary_column_is_read(kind, tmp_path):
    blobs = [*_blobs(20), None]
    with skips_what_pyarrow_cannot_write():
        pq.write_table(pa.table({"jpg": pa.array(blobs, kind)}), tmp_path / "a.parquet")
    *read, nothing = _read(_list(tmp_path / "a.parquet"))
    assert read == blobs[:-1]
    assert str(nothing) == "the column jpg is empty in this row"


def test_only_the_begin_of_an_image_over_the_limit_is_returned(tmp_path):
    blobs = [b"1234567890", b"12345", b"123456"]
    assert _read(_list(_write(tmp_path / "a.parquet", blobs)), 5) == [
        b"123456",
        b"12345",
        b"123456",
    ]


def test_an_image_far_over_the_limit_is_not_decompressed(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.parquet", [bytes(70_000_000)], compression="zstd")
    images = _list(path)
    monkeypatch.setattr(chunks.Chunk, "_decode_now", None)
    assert _read(images, 1000) == [bytes(1001)]


def test_a_cell_without_bytes_is_the_file_at_its_path(tmp_path, memory_bucket):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.jpg").write_bytes(b"of the folder")
    storage.write(f"{memory_bucket}/y.jpg", b"of a bucket")
    values = [
        {"bytes": b"own", "path": "b/x.jpg"},
        {"bytes": None, "path": "b/x.jpg"},
        {"bytes": None, "path": f"{memory_bucket}/y.jpg"},
        {"bytes": None, "path": "none.jpg"},
        {"bytes": None, "path": None},
        {"bytes": None, "path": "unknown://x"},
        None,
    ]
    table = pa.table({"image": pa.array(values, IMAGE)})
    pq.write_table(table, tmp_path / "a.parquet")
    *found, missing, empty, unknown, null = _read(_list(tmp_path / "a.parquet"))
    assert found == [b"own", b"of the folder", b"of a bucket"]
    assert "its path 'none.jpg': [Errno 2] No such file or directory" in str(missing)
    assert str(empty) == str(null) == "the column image is empty in this row"
    assert "cannot open unknown:// URIs" in str(unknown)


@pytest.mark.parametrize("change", ["other bytes", "gone"])
def test_a_file_that_changed_since_it_was_listed_is_unreadable(change, tmp_path):
    path = _write(tmp_path / "a.parquet", _blobs(50))
    images = _list(path)
    if change == "gone":
        Path(path).unlink()
    else:
        _write(path, _blobs(51))
    for problem in _read(images):
        assert isinstance(problem, OSError)
        assert change == "gone" or "changed since it was listed" in str(problem)


def test_a_file_that_changes_while_it_is_read_is_unreadable(tmp_path):
    path = _write(tmp_path / "a.parquet", _blobs(200), row_group_size=100)
    images = _list(path)
    assert list(read_images(images.slice(0, 10), LIMIT, 0)) == _blobs(200)[:10]
    _write(path, _blobs(200)[::-1], row_group_size=100)
    [problem] = read_images(images.slice(150, 1), LIMIT, 0)
    assert "changed since it was listed" in str(problem)


def test_a_page_is_decoded_once_whatever_threads_ask_for_it(tmp_path, monkeypatch):
    blobs = _blobs(600)
    images = _list(_write(tmp_path / "a.parquet", blobs, use_dictionary=False))
    decoded = []
    decode = chunks.Chunk._decode_now

    def count(chunk, pages, span):
        decoded.append(pages[-1].begin)
        return decode(chunk, pages, span)

    monkeypatch.setattr(chunks.Chunk, "_decode_now", count)
    pieces = [images.slice(begin, 10) for begin in range(0, 600, 10)]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda piece: list(read_images(piece, LIMIT, 0)), pieces))
    assert [data for piece in read for data in piece] == blobs
    assert len(decoded) == len(set(decoded)) >= 1


def test_images_at_the_end_of_a_row_group_are_read_without_what_is_before(tmp_path, monkeypatch):
    blobs = _blobs(4000, 5000)
    options = {"use_dictionary": False, "write_batch_size": 10, "data_page_size": 30_000}
    images = _list(_write(tmp_path / "a.parquet", blobs, **options))
    read = []
    read_range = storage.read_range

    def count(uri, begin, end, **keywords):
        data = read_range(uri, begin, end, **keywords)
        read.append(len(data))
        return data

    monkeypatch.setattr(storage, "read_range", count)
    assert list(read_images(images.slice(3980, 20), LIMIT, 0)) == blobs[3980:]
    assert sum(read) < sum(map(len, blobs)) / 2  # the headers of pages, and one or two pages


def test_neighbours_in_a_bucket_come_with_few_requests(memory_bucket, monkeypatch):
    blobs = _blobs(60, 2000)
    path = _write(f"{memory_bucket}/a.parquet", blobs, write_batch_size=4, data_page_size=1000)
    images = _list(path)
    requests = []
    read_range = storage.read_range

    def count(uri, begin, end, **keywords):
        requests.append(end - begin)
        return read_range(uri, begin, end, **keywords)

    monkeypatch.setattr(storage, "read_range", count)
    assert _read(images) == blobs
    assert len(requests) == 1  # a small row group is read at once
    cells._chunks.clear()
    chunks._pages.clear()
    monkeypatch.setattr(chunks, "_HELD", 0)
    monkeypatch.setattr(chunks, "_HEADER", 100)
    requests.clear()
    assert _read(images) == blobs
    assert len([size for size in requests if size > 100]) <= 4  # a group each, and its first page


def test_memory_stays_bounded(tmp_path, monkeypatch):
    """A row group of 160 MB is read with a few pages in memory."""
    blobs = [os.urandom(1_000_000), os.urandom(1_000_000)]
    table = pa.table({"image": [blobs[n % 2] for n in range(160)]})
    options = {"use_dictionary": False, "write_batch_size": 4}
    pq.write_table(table, tmp_path / "a.parquet", **options)
    del table
    images = _list(tmp_path / "a.parquet")
    monkeypatch.setattr(chunks._pages, "_capacity", 1 << 24)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    seen, most = 0, 0
    for group in groups(images):
        for data in read_images(images.slice(group.start, len(group)), 2_000_000, 0):
            assert data in blobs
            seen += 1
            most = max(most, pa.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 160
    assert most < 100_000_000
    assert peak < 50_000_000


# Damaged files, and files that lie.


def _damage(path: str, begin: int, data: bytes) -> None:
    """Overwrites bytes of a file, which keeps its size and time."""
    status = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(begin)
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _pages(path: str) -> list[tuple[int, int]]:
    """Where the data pages of the images of a file begin and end."""
    images = _list(path)
    list(read_images(images.slice(len(images) - 1, 1), LIMIT, 0))
    place = chunks.Place(*(images[name][0].as_py() for name in chunks.Place._fields))
    pages = cells._open_chunk(place, "bytes", 0).pages
    for cache in (cells._footers, cells._chunks, chunks._pages):
        cache.clear()
    return [(page.begin, page.end) for page in pages]


SMALL_PAGES = {"use_dictionary": False, "write_batch_size": 10, "data_page_size": 1000}


def test_a_damaged_page_costs_its_own_images_alone(tmp_path):
    blobs = _blobs(100)
    path = _write(tmp_path / "a.parquet", blobs, **SMALL_PAGES)
    pages = _pages(path)
    assert len(pages) >= 5
    _, end = pages[1]
    _damage(path, end - 3000, os.urandom(3000))
    read = _read(_list(path))
    wrong = [n for n, (data, blob) in enumerate(zip(read, blobs, strict=True)) if data != blob]
    assert 0 < len(wrong) <= 10
    assert wrong == list(range(wrong[0], wrong[0] + len(wrong)))
    assert all(isinstance(read[n], OSError) for n in wrong)


def test_a_damaged_header_costs_the_images_behind_it(tmp_path):
    blobs = _blobs(100)
    path = _write(tmp_path / "a.parquet", blobs, **SMALL_PAGES)
    begin, _ = _pages(path)[2]
    _damage(path, begin, b"\xff" * 20)
    read = _read(_list(path))
    good = [n for n, data in enumerate(read) if not isinstance(data, Exception)]
    assert good == list(range(len(good)))
    assert 10 <= len(good) <= 90
    assert [read[n] for n in good] == blobs[: len(good)]
    assert "the Parquet file is damaged" in str(read[-1])


def _varint(number: int) -> bytes:
    number *= 2  # zigzag
    data = b""
    while number > 127:
        data += bytes([number & 127 | 128])
        number >>= 7
    return data + bytes([number])


@pytest.mark.parametrize(
    ("size", "compressed", "values", "message"),
    [
        (1 << 30, 100, 4, "a page of 1073741824 bytes for 4 images of at most 1000000 bytes"),
        (100, 1 << 30, 4, "damaged: the page at byte "),
        (100, 100, 1 << 30, "damaged: the page at byte "),
        (100, 100, 0, "damaged"),
        ((1 << 40), 100, 4, "damaged: no page begins at byte "),
        (100, 100, 4, "damaged"),
    ],
)
def test_what_a_page_claims_is_checked_before_memory_is_taken(
    size, compressed, values, message, tmp_path
):
    path = _write(tmp_path / "a.parquet", _blobs(50), use_dictionary=False)
    (begin, _), *_ = _pages(path)
    details = b"\x15" + _varint(values) + b"\x15\x00\x15\x06\x15\x06\x00"
    header = b"\x15\x00\x15" + _varint(size) + b"\x15" + _varint(compressed) + b"\x2c" + details
    _damage(path, begin, header + b"\x00")
    before = pa.default_memory_pool().max_memory()
    problems = _read(_list(path))
    assert all(isinstance(problem, OSError) for problem in problems)
    assert message in str(problems[0])
    assert pa.default_memory_pool().max_memory() < before + (1 << 28)


def test_random_damage_never_gives_other_bytes_silently_or_raises(tmp_path):
    """Bytes of one image may differ, as in a damaged file; none moves to another row."""
    blobs = [b"%04d" % n * 50 for n in range(60)]
    path = _write(tmp_path / "a.parquet", blobs, compression="none", **SMALL_PAGES)
    original, images = Path(path).read_bytes(), _list(path)
    end = _pages(path)[-1][1]
    generator = random.Random(0)
    for _ in range(150):
        place = generator.randrange(4, end)
        _damage(path, 0, original)
        _damage(path, place, generator.randbytes(generator.randint(1, 8)))
        for cache in (cells._footers, cells._chunks, chunks._pages):
            cache.clear()
        read = _read(images)
        assert len(read) == len(images)
        assert all(isinstance(data, (bytes, OSError)) for data in read)


def test_a_store_that_cannot_be_used_stops_the_job(tmp_path, monkeypatch):
    images = _list(_write(tmp_path / "a.parquet", _blobs(5)))

    def fail(*arguments, **keywords):
        raise StorageError("no credentials")

    monkeypatch.setattr(storage, "read_range", fail)
    with pytest.raises(StorageError):
        _read(images)


def test_a_failure_to_read_is_the_images_and_is_tried_again(tmp_path, monkeypatch):
    blobs = _blobs(5)
    images = _list(_write(tmp_path / "a.parquet", blobs))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_range", lambda *a, **k: (_ for _ in ()).throw(OSError("cut")))
        assert [str(problem) for problem in _read(images)] == ["cut"] * 5
    assert _read(images) == blobs


def test_threads_that_wait_get_the_error_of_the_one_that_makes(tmp_path):
    cache = SharedCache[int](2)
    began, go_on = threading.Event(), threading.Event()

    def fail() -> int:
        began.set()
        go_on.wait(10)
        raise OSError("cut")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, "a", fail)
        began.wait(10)
        second = pool.submit(cache.get, "a", lambda: 1)
        go_on.set()
        outcomes = {type(each.exception()) for each in (first, second)}
    assert OSError in outcomes
    assert cache.get("a", lambda: 2) in (1, 2)
