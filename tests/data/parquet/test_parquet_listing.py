"""Parquet files as sources: images in their cells, and URIs, in a file or a folder."""

import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner import storage
from captioner.config import ListingConfig
from captioner.data.listing import list_source
from captioner.data.parquet.listing import cell_uri
from captioner.data.reading import groups, is_in_container, read_images
from captioner.errors import InputError
from captioner.schema import KEPT
from conftest import write_photos

datasets = pytest.importorskip("datasets")  # does not admit our lowest versions

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _write(uri: object, first: int, count: int, **columns: pa.Array) -> None:
    images = pa.array([{"bytes": b"%d" % n, "path": None} for n in range(first, first + count)])
    numbers = pa.array(range(first, first + count), pa.int32())
    table = pa.table({"image": images.cast(IMAGE), "id": numbers, **columns})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=2)
    storage.write(str(uri), sink.getvalue())


def _list(source: object, **listing: object) -> pa.Table:
    return list_source(str(source), ListingConfig(**listing))


def _kept(images: pa.Table) -> dict[str, list[object]]:
    struct = images[KEPT].combine_chunks()
    return {field.name: struct.field(field.name).to_pylist() for field in struct.type}


def _read(images: pa.Table) -> list[bytes | Exception]:
    pieces = (images.slice(group.start, len(group)) for group in groups(images))
    return [data for piece in pieces for data in read_images(piece, 100_000, 0)]


def test_a_folder_of_parquet_files_is_a_source_of_images(place, caplog):
    for number in (1, 0, 2):
        _write(f"{place}/data/train-{number:05d}-of-00003.parquet", 5 * number, 5)
    storage.write(f"{place}/README.md", b"# A dataset")
    with caplog.at_level("INFO"):
        images = _list(place, keep="id")
    assert _read(images) == [b"%d" % n for n in range(15)]
    assert _kept(images) == {"id": list(range(15))}
    first = images.slice(3, 1).to_pylist()[0]
    container = f"{place}/data/train-00000-of-00003.parquet"
    assert first["uri"] == f"{container}#image=3"
    assert (first["container"], first["column"]) == (container, "image")
    assert (first["row_group"], first["position"], first["size"]) == (1, 1, None)
    assert first["version"] == storage.version(container)
    assert "images from the column image of 3 Parquet files" in caplog.text


def test_the_names_of_folders_are_columns(place):
    for split, year, first in (("train", "2023", 0), ("train", "2024", 2), ("a%20b", "2024", 4)):
        _write(f"{place}/split={split}/year={year}/x.parquet", first, 2)
    images = _list(place, keep="all")
    assert _read(images) == [b"4", b"5", b"0", b"1", b"2", b"3"]
    assert _kept(images) == {
        "id": [4, 5, 0, 1, 2, 3],
        "split": ["a b", "a b", "train", "train", "train", "train"],
        "year": [2024, 2024, 2023, 2023, 2024, 2024],
    }
    assert set(_kept(_list(f"{place}/split=train", keep="year=y"))["y"]) == {2023, 2024}


def test_numbers_of_folders_with_zeros_before_stay_text(tmp_path):
    _write(tmp_path / "part=007" / "x.parquet", 0, 1)
    _write(tmp_path / "part=__HIVE_DEFAULT_PARTITION__" / "x.parquet", 1, 1)
    assert _kept(_list(tmp_path, keep="part")) == {"part": ["007", None]}


def test_a_folder_of_parquet_files_may_be_a_list(place):
    for name, uris in (("a", ["x.jpg", None, f"{place}/y.jpg"]), ("b", ["../a/x.jpg", "x.jpg"])):
        sink = io.BytesIO()
        pq.write_table(pa.table({"url": uris, "id": [f"{name}{u}" for u in uris]}), sink)
        storage.write(f"{place}/{name}/list.parquet", sink.getvalue())
    images = _list(place, keep="id")
    assert images["uri"].to_pylist() == [f"{place}/a/x.jpg", f"{place}/y.jpg", f"{place}/b/x.jpg"]
    assert _kept(images)["id"] == ["ax.jpg", f"a{place}/y.jpg", "bx.jpg"]


def test_images_of_a_folder_come_before_its_parquet_files(tmp_path, caplog):
    write_photos(tmp_path, 1)
    _write(tmp_path / "x.parquet", 0, 2)
    with caplog.at_level("INFO"):
        assert _list(tmp_path)["uri"].to_pylist() == [f"{tmp_path}/photo-0000.jpg"]
    assert "files of other endings passed over: 1 .parquet" in caplog.text


def test_files_that_programs_keep_for_themselves_are_passed_over(tmp_path, caplog):
    _write(tmp_path / "x.parquet", 0, 1)
    for name in ("_temporary/y.parquet", ".cache/y.parquet", "_y.parquet", "old/z.parquet"):
        _write(tmp_path / name, 1, 1)
    with caplog.at_level("INFO"):
        images = _list(tmp_path, exclude=("old",))
    assert _read(images) == [b"0"]
    assert "Parquet files passed over whose path has a name with _ or .: 3" in caplog.text


def test_a_limit_reads_no_more_files_than_it_needs(tmp_path):
    for number in range(100):
        _write(tmp_path / f"{number:03d}.parquet", 3 * number, 3)
    (tmp_path / "099.parquet").write_bytes(b"no Parquet at all")
    images = _list(tmp_path, limit=7)
    assert _read(images) == [b"%d" % n for n in range(7)]


def test_what_datasets_writes_is_read_with_its_columns(tmp_path):
    paths = write_photos(tmp_path / "photos", 5)
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    data = {"image": cells, "label": [0, 1, 0, 1, 1]}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    written = datasets.Dataset.from_dict(data, features=features)
    written.to_parquet(tmp_path / "x.parquet", batch_size=2)
    images = _list(tmp_path / "x.parquet", keep="all")
    assert _read(images) == [path.read_bytes() for path in paths]
    assert _kept(images) == {"label": [0, 1, 0, 1, 1]}


def test_names_of_columns_are_escaped_in_uris():
    assert cell_uri("s3://b/x.parquet", "an image/100%#a=b", 7) == (
        "s3://b/x.parquet#an%20image%2F100%25%23a%3Db=7"
    )
    for column in ("image", "a/b", "a#b", "a.b", "größe", "a b"):
        assert is_in_container(cell_uri("/x/y.parquet", column, 0))


@pytest.mark.parametrize("column", ["a.b", "größe", "a b", "a=b/c#d%"])
def test_columns_with_odd_names_are_read(column, tmp_path):
    table = pa.table({column: pa.array([{"bytes": b"1", "path": "x"}], IMAGE), "a": [1]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert _read(_list(tmp_path / "x.parquet")) == [b"1"]


# Files that are damaged, or differ.


def test_a_damaged_file_among_others_is_one_row(place, caplog):
    for number in range(3):
        _write(f"{place}/{number}.parquet", 2 * number, 2)
    whole = storage.read(f"{place}/1.parquet")
    storage.write(f"{place}/1.parquet", whole[: len(whole) // 2])
    images = _list(place, keep="id")
    assert images["uri"].to_pylist()[2] == f"{place}/1.parquet"
    problems = images["problem"].to_pylist()
    assert [problem is not None for problem in problems] == [False, False, True, False, False]
    assert "the Parquet file cannot be read: " in problems[2]
    assert _kept(images)["id"] == [0, 1, None, 4, 5]
    assert f"{place}/1.parquet: the Parquet file cannot be read" in caplog.text


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + b"\0" * 100, b"<html>" * 100])
def test_a_source_that_is_no_parquet_file_is_refused(data, tmp_path):
    (tmp_path / "x.parquet").write_bytes(data)
    for source in (tmp_path, tmp_path / "x.parquet"):
        with pytest.raises(InputError, match=r"^cannot read .*x\.parquet: "):
            _list(source)


def _rewrite_footer(path: Path, old: bytes, new: bytes) -> None:
    """Changes numbers in a footer, which is in Thrift's compact protocol."""
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - length : -8]
    assert old in footer
    footer = footer.replace(old, new)
    path.write_bytes(data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def _varint(number: int) -> bytes:
    number, data = number * 2, b""
    while number > 127:
        data += bytes([number & 127 | 128])
        number >>= 7
    return data + bytes([number])


def test_a_footer_that_claims_more_rows_than_the_file_can_hold_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    rows = [{"bytes": b"x", "path": None}] * 777
    pq.write_table(pa.table({"image": pa.array(rows, IMAGE)}), path)
    _rewrite_footer(path, _varint(777), _varint(10**15))
    with pytest.raises(
        InputError, match=r"^.*x\.parquet: .* claims 1000000000000000 images in \d+"
    ):
        _list(path)


def test_a_footer_that_claims_some_more_rows_gives_unreadable_images(tmp_path):
    path = tmp_path / "x.parquet"
    rows = [{"bytes": b"x%d" % n, "path": None} for n in range(777)]
    pq.write_table(pa.table({"image": pa.array(rows, IMAGE)}), path)
    _rewrite_footer(path, _varint(777), _varint(1000))
    read = _read(_list(path))
    assert read[:777] == [b"x%d" % n for n in range(777)]
    assert all("damaged: 777 rows instead of 1000" in str(data) for data in read[777:])


def test_an_offset_beyond_the_file_gives_unreadable_images(tmp_path):
    path = tmp_path / "x.parquet"
    image = pa.array([{"bytes": b"%d" % n, "path": None} for n in range(2)], IMAGE)
    table = pa.table({"before": [random.Random(0).randbytes(99_999)] * 2, "image": image})
    pq.write_table(table, path)
    chunk = pq.read_metadata(path).row_group(0).column(1)
    assert chunk.path_in_schema == "image.bytes"
    for offset in (chunk.dictionary_page_offset, chunk.data_page_offset):
        _rewrite_footer(path, _varint(offset), _varint(10**12 + offset))
    assert [type(data) for data in _read(_list(path))] == [OSError, OSError]


def test_random_damage_to_a_footer_is_an_input_error_or_rows(tmp_path):
    path = tmp_path / "x.parquet"
    _write(path, 0, 6)
    data, generator = path.read_bytes(), random.Random(0)
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for _ in range(100):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[generator.randrange(begin, len(data))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            images = _list(path)
        except InputError:
            continue
        assert all(isinstance(each, (bytes, OSError)) for each in _read(images))


def test_files_with_other_columns_are_named(tmp_path):
    _write(tmp_path / "a.parquet", 0, 1)
    pq.write_table(pa.table({"caption": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet has no column image, which .* --exclude"):
        _list(tmp_path)
    assert _read(_list(tmp_path, exclude=("b.parquet",))) == [b"0"]


def test_kept_columns_whose_types_do_not_fit_are_refused(tmp_path):
    _write(tmp_path / "a.parquet", 0, 1, note=pa.array(["x"]))
    _write(tmp_path / "b.parquet", 1, 1, note=pa.array([[1]]))
    with pytest.raises(InputError, match=r"^--keep: a column differs between the Parquet files"):
        _list(tmp_path, keep="note")
    assert _kept(_list(tmp_path, keep="id")) == {"id": [0, 1]}


def test_files_without_rows_are_refused(tmp_path):
    _write(tmp_path / "a.parquet", 0, 0)
    with pytest.raises(InputError, match="lists no images: its Parquet files have no rows"):
        _list(tmp_path)


def test_features_choose_the_column(tmp_path):
    table = pa.table({"front": pa.array([b"1"]), "back": pa.array([b"2"])})
    features = {"info": {"features": {"back": {"_type": "Image"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert _read(_list(tmp_path)) == [b"2"]
    assert _read(_list(tmp_path, column="front")) == [b"1"]
