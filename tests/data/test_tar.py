"""Images in tar files: members, listing, columns, damage, reading."""

import io
import json
import os
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from captioner import storage
from captioner.config import ListingConfig
from captioner.data.listing import list_source
from captioner.data.reading import groups, is_in_container, read_images
from captioner.data.tar.members import Damage, read_members
from captioner.data.tar.names import expand, key_of
from captioner.errors import InputError
from captioner.schema import KEPT

LIMIT = 1 << 20


def add(tar: tarfile.TarFile, name: str, data: bytes, **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data) if info.isreg() else None)


def make(path: object, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """Writes a tar file at a URI; returns its bytes."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=kind) as tar:
        for name, data in members.items():
            add(tar, name, data)
    storage.write(str(path), sink.getvalue())
    return sink.getvalue()


def listed(source: object, **listing: object) -> list[dict]:
    rows: list[dict] = list_source(str(source), ListingConfig(**listing)).to_pylist()
    return rows


def read(source: object, limit: int = LIMIT, **listing: object) -> list[bytes | Exception]:
    images = list_source(str(source), ListingConfig(**listing))
    found: list[bytes | Exception] = []
    for group in groups(images):
        found += read_images(images.slice(group.start, len(group)), limit, 0)
    return found


IMAGES = {f"{number:03d}.jpg": bytes([number]) * (number * 100 + 1) for number in range(70)}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_listed_in_order_and_read(place, kind):
    make(f"{place}/a.tar", IMAGES, kind)
    rows = listed(f"{place}/a.tar")
    assert [row["size"] for row in rows] == [len(data) for data in IMAGES.values()]
    assert {row["container"] for row in rows} == {f"{place}/a.tar"}
    assert read(f"{place}/a.tar") == [*IMAGES.values()]


def test_a_members_uri_is_fsspecs(tmp_path):
    make(tmp_path / "a.tar", {"folder/0.jpg": b"0", "0.jpg": b"1"})
    uris = [row["uri"] for row in listed(tmp_path / "a.tar")]
    assert uris == [f"tar://{name}::file://{tmp_path}/a.tar" for name in ("folder/0.jpg", "0.jpg")]
    for uri, data in zip(uris, (b"0", b"1"), strict=True):
        assert is_in_container(uri)
        with fsspec.open(uri) as file:
            assert file.read() == data


def test_neighbours_come_with_one_request_and_never_with_their_whole_tar(place, monkeypatch):
    make(f"{place}/a.tar", {**IMAGES, "gap.bin": bytes(3 << 20), "last.jpg": b"x"})
    requests: list[int] = []
    read_range = storage.read_range

    def count(uri: str, begin: int, end: int, **settings: object) -> bytes:
        requests.append(end - begin)
        return read_range(uri, begin, end, **settings)

    images = list_source(f"{place}/a.tar", ListingConfig())
    monkeypatch.setattr(storage, "read_range", count)
    assert [*read_images(images.slice(60), LIMIT, 0)] == [*[*IMAGES.values()][60:], b"x"]
    assert len(requests) == 2
    assert sum(requests) < 100_000


def test_names_of_any_length_and_bytes(tmp_path):
    names = ["x" * 90 + "/" + "y" * 300 + ".jpg", "naïve 照片.jpg", os.fsdecode(b"\xff.jpg")]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        make(
            tmp_path / "a.tar",
            {name: name[-9:].encode("utf-8", "replace") for name in names},
            kind,
        )
        uris = [
            row["uri"].removeprefix("tar://").split("::")[0] for row in listed(tmp_path / "a.tar")
        ]
        assert uris[:2] == names[:2]
        assert uris[2] in ("%FF.jpg", "%ED%B3%BF.jpg")


def test_names_outside_of_the_tar_are_only_names(tmp_path):
    names = ["../../etc/passwd.jpg", "/abs.jpg", "a/../b.jpg"]
    make(tmp_path / "in" / "a.tar", dict.fromkeys(names, b"1"))
    assert len(listed(tmp_path / "in" / "a.tar")) == 3
    assert read(tmp_path / "in" / "a.tar") == [b"1"] * 3
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a.tar"]


def test_a_name_that_comes_twice_is_two_images(tmp_path):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        add(tar, "a.jpg", b"first")
        add(tar, "a.jpg", b"second")
    (tmp_path / "a.tar").write_bytes(sink.getvalue())
    rows = listed(tmp_path / "a.tar")
    assert [row["uri"].split("::")[0] for row in rows] == [
        "tar://a.jpg#offset=512",
        "tar://a.jpg#offset=1536",
    ]
    assert read(tmp_path / "a.tar") == [b"first", b"second"]


def test_links_and_sparse_files_are_rows_and_folders_are_not(tmp_path):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        add(tar, "folder.jpg", b"", type=tarfile.DIRTYPE)
        add(tar, "a.jpg", b"data")
        add(tar, "hard.jpg", b"", type=tarfile.LNKTYPE, linkname="a.jpg")
        add(tar, "soft.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "device.jpg", b"", type=tarfile.CHRTYPE)
        add(tar, "b.jpg", b"more")
    (tmp_path / "a.tar").write_bytes(sink.getvalue())
    rows = listed(tmp_path / "a.tar")
    assert [row["uri"].split("::")[0][6:] for row in rows] == [
        "a.jpg",
        "hard.jpg",
        "soft.jpg",
        "b.jpg",
    ]
    assert [row["problem"] is None for row in rows] == [True, False, False, True]
    assert "a link in a tar file" in rows[1]["problem"]


# Damage.


def test_a_tar_that_is_cut_off_keeps_what_is_before_and_tells_of_the_rest(place):
    data = make(f"{place}/a.tar", {f"{n}.jpg": bytes(1000) for n in range(4)})
    # each member takes 1,536 bytes: a header of 512 and two blocks of data
    for length, images in ((1536 * 3 + 700, 3), (1536 * 2 + 100, 2), (1536 + 512, 1)):
        storage.write(f"{place}/a.tar", data[:length])
        rows = listed(f"{place}/a.tar")
        assert [row["problem"] for row in rows[:-1]] == [None] * images
        assert rows[-1]["uri"].startswith(f"tar://#offset={1536 * images}::")
        assert rows[-1]["problem"].startswith("the rest of the tar file cannot be listed: it ")


def test_a_tar_without_end_mark_is_told_and_loses_nothing(tmp_path, caplog):
    data = make(tmp_path / "a.tar", {f"{n}.jpg": bytes(1000) for n in range(4)})
    (tmp_path / "a.tar").write_bytes(data[: 1536 * 4])
    assert len(listed(tmp_path / "a.tar")) == 4
    assert "a.tar: it has no end mark, and may be cut off" in caplog.text


def test_a_damaged_header_is_told_where_tarfile_would_end(tmp_path):
    data = bytearray(make(tmp_path / "a.tar", {f"{n}.jpg": bytes(1000) for n in range(4)}))
    data[1536 * 2 + 10] ^= 0xFF
    (tmp_path / "a.tar").write_bytes(data)
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert len(tar.getnames()) == 2
    rows = listed(tmp_path / "a.tar")
    assert [row["problem"] is None for row in rows] == [True, True, False]
    assert "it is damaged after 1.jpg: bad checksum" in rows[-1]["problem"]


@pytest.mark.parametrize("padding", [1024, 10_240, 10_752, 50_000])
def test_padding_behind_the_end_mark_is_no_damage(padding, tmp_path):
    info = tarfile.TarInfo("a.jpg")
    (tmp_path / "a.tar").write_bytes(info.tobuf() + bytes(padding))
    assert [row["problem"] for row in listed(tmp_path / "a.tar")] == [None]


def test_joined_tar_files_are_told(tmp_path):
    data = make(tmp_path / "a.tar", {"a.jpg": bytes(20_000)})
    (tmp_path / "a.tar").write_bytes(data * 2)
    rows = listed(tmp_path / "a.tar")
    assert rows[0]["problem"] is None
    assert "behind its end mark: it may be several in one" in rows[1]["problem"]


def _header(**fields: bytes) -> bytes:
    """A header with a right checksum and whatever else."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    places = {"size": (124, 12), "type": (156, 1)}
    for name, value in fields.items():
        begin, length = places[name]
        header[begin : begin + length] = value.ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    "data",
    [
        _header(size=b"77777777777"),  # 8 GiB
        _header(size=b"\x80" + b"\xff" * 11),  # 2^95 bytes
        _header(size=b"\xff" * 12),  # -1
        _header(size=b"hello"),
        _header(size=b"77777777777", type=b"x"),  # POSIX's records of 8 GiB
        _header(size=b"77777777777", type=b"L"),  # GNU's long name of 8 GiB
        (_header(size=b"00000000000", type=b"x")) * 5000,
        os.urandom(10_240),
        b"",
        b"\xff\xd8\xff\xe0" + bytes(10_000),  # a JPEG
    ],
    ids=["8GiB", "2^95", "negative", "text", "pax", "gnu", "nested", "random", "empty", "jpeg"],
)
def test_hostile_headers_take_no_memory_and_raise_nothing(data):
    found = [*read_members(io.BytesIO(data + bytes(2048) if data else b""), len(data) + 2048)]
    assert isinstance(found[-1], Damage)


def test_a_large_member_is_listed_and_not_read(tmp_path):
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        info = tarfile.TarInfo("large.jpg")
        info.size = 2 << 30
        file.write(info.tobuf())
        file.seek(2 << 30, os.SEEK_CUR)  # a hole
        with tarfile.open(fileobj=file, mode="w") as tar:
            add(tar, "small.jpg", b"small")
    rows = listed(path)
    assert [row["size"] for row in rows] == [2 << 30, 5]
    images = list_source(str(path), ListingConfig()).slice(1)
    assert [*read_images(images, LIMIT, 0)] == [b"small"]


def test_a_tar_that_changed_since_it_was_listed_is_not_read(place):
    make(f"{place}/a.tar", IMAGES)
    images = list_source(f"{place}/a.tar", ListingConfig()).slice(0, 3)
    make(f"{place}/a.tar", {"x.jpg": b"x", **IMAGES})
    found = [*read_images(images, LIMIT, 0)]
    assert [str(each) for each in found] == ["the tar file has changed since it was listed"] * 3
    storage.delete(f"{place}/a.tar")
    assert all(isinstance(each, OSError) for each in read_images(images, LIMIT, 0))


# Sources.


@pytest.fixture
def three(place: str) -> str:
    for number in range(3):
        make(f"{place}/t/{number:05d}.tar", {f"{number}.jpg": b"1", f"{number}.txt": b"a text"})
    return f"{place}/t"


@pytest.mark.parametrize(
    "source", ["{00000..00002}.tar", "0000{0,1,2}.tar", "*.tar", "0000[012].tar", "", "list.txt"]
)
def test_several_tars_are_one_source(three, source):
    names = "\n".join(f"{number:05d}.tar" for number in range(3))
    storage.write(f"{three}/list.txt", names.encode())
    rows = listed(f"{three}/{source}" if source else three)
    assert [row["container"].rsplit("/", 1)[1] for row in rows] == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
    ]


def test_a_shard_never_crosses_a_tar(tmp_path):
    from captioner.output.manifest import new_shards
    from captioner.schema import MANIFEST

    for name, images in (("a", 5), ("b", 2), ("c", 4)):
        make(tmp_path / f"{name}.tar", {f"{n}.jpg": b"1" for n in range(images)})
    shards = new_shards(MANIFEST.empty_table(), list_source(str(tmp_path), ListingConfig()), 3)
    assert shards["shard"].to_pylist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 4]
    assert shards["row"].to_pylist() == [0, 1, 2, 0, 1, 0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("/a.tar", ["/a.tar"]),
        ("/{8..11}.tar", ["/8.tar", "/9.tar", "/10.tar", "/11.tar"]),
        ("/{08..11}.tar", ["/08.tar", "/09.tar", "/10.tar", "/11.tar"]),
        ("/{a,b}{1..2}.tar", ["/a1.tar", "/a2.tar", "/b1.tar", "/b2.tar"]),
    ],
)
def test_patterns_are_expanded(pattern, expected):
    assert expand(pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/{a}.tar", "cannot expand {a}; use for example {000..099} or {first,second}"),
        ("/{5..1}.tar", "cannot expand"),
        ("/{0..99999999}.tar", "more than 1000000 names"),
        ("/{0..9999}{0..9999}.tar", "more than 1000000"),
        ("/nowhere/*.tar", "no file matches /nowhere/.*tar"),
    ],
)
def test_patterns_that_stand_for_nothing_are_refused(pattern, message):
    with pytest.raises(InputError, match=message):
        expand(pattern)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "{0..9}.tar.zst", "a.TAR.XZ"])
def test_compressed_tars_are_refused(name, tmp_path):
    with pytest.raises(
        InputError, match=r"compressed tar file, .*; decompress it to a \.tar file$"
    ):
        list_source(f"{tmp_path}/{name}", ListingConfig())


def test_tars_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"^cannot list .*/none.tar: it does not exist"):
        list_source(f"{tmp_path}/none.tar", ListingConfig())
    make(tmp_path / "text.tar", {"a.txt": b"1"})
    with pytest.raises(InputError, match=r"^no images in .*text.tar, only other files: 1 .txt$"):
        list_source(f"{tmp_path}/text.tar", ListingConfig())
    with pytest.raises(InputError, match=r"^--column is for a list, and tar files have none"):
        list_source(f"{tmp_path}/text.tar", ListingConfig(column="url"))


def test_images_beside_tars_come_alone(tmp_path, caplog):
    make(tmp_path / "a.tar", {"0.jpg": b"1"})
    (tmp_path / "b.jpg").write_bytes(b"1")
    caplog.set_level("INFO")
    assert [row["uri"] for row in listed(tmp_path)] == [f"{tmp_path}/b.jpg"]
    assert "files of other endings passed over: 1 .tar" in caplog.text


def test_members_of_other_programs_and_excluded_ones_are_passed_over(tmp_path):
    make(
        tmp_path / "a.tar", dict.fromkeys(["a.jpg", "._a.jpg", "__MACOSX/b.jpg", "old/c.jpg"], b"1")
    )
    assert [row["uri"][6:11] for row in listed(tmp_path / "a.tar", exclude=("old",))] == ["a.jpg"]


# Columns.


def kept(source: object, keep: str) -> list[dict]:
    rows: list[dict] = list_source(str(source), ListingConfig(keep=keep))[KEPT].to_pylist()
    return rows


def test_fields_and_texts_of_members_come_along(place):
    members = {}
    for number in range(3):
        members[f"{number}.jpg"] = b"1"
        members[f"{number}.json"] = json.dumps({"id": number, "of": ["x"]}).encode()
        members[f"{number}.txt"] = f"text {number}\n".encode()
    del members["1.json"]
    make(f"{place}/a.tar", members)
    assert kept(f"{place}/a.tar", "id,txt=alt,key") == [
        {"id": 0, "alt": "text 0", "key": "0"},
        {"id": None, "alt": "text 1", "key": "1"},
        {"id": 2, "alt": "text 2", "key": "2"},
    ]
    assert kept(f"{place}/a.tar", "all")[0] == {"id": 0, "of": ["x"], "txt": "text 0", "key": "0"}
    with pytest.raises(
        InputError,
        match=r"^--keep licence: no column 'licence' in .*a\.tar; .* are id, of, txt, key$",
    ):
        kept(f"{place}/a.tar", "licence")


def test_the_table_that_img2dataset_writes_is_joined(tmp_path):
    make(tmp_path / "00000.tar", {"000000002.jpg": b"2", "000000000.jpg": b"0", "9.jpg": b"9"})
    table = pa.table(
        {
            "url": [f"http://x/{n}" for n in range(3)],
            "key": [f"{n:09d}" for n in range(3)],
            "status": ["success", "failed_to_download", "success"],
            "size": pa.array([7, 8, 9], pa.int32()),
        }
    )
    pq.write_table(table, tmp_path / "00000.parquet")
    images = list_source(f"{tmp_path}/00000.tar", ListingConfig(keep="url,size,status=download"))
    assert images[KEPT].to_pylist() == [
        {"url": "http://x/2", "size": 9, "download": "success"},
        {"url": "http://x/0", "size": 7, "download": "success"},
        {"url": None, "size": None, "download": None},
    ]
    assert images.schema.field(KEPT).type.field("size").type == pa.int32()


def test_columns_of_several_tars_have_one_type(tmp_path):
    for number, value in enumerate((1, 2.5, None)):
        row = {} if value is None else {"n": value}
        make(
            tmp_path / f"{number}.tar",
            {"a.jpg": b"1", "a.json": json.dumps({"m": 1} | row).encode()},
        )
    assert [row["m"] for row in kept(tmp_path, "m")] == [1, 1, 1]
    assert [row.get("n") for row in kept(tmp_path, "all")] == [1.0, 2.5, None]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_same(tmp_path):
    with webdataset.TarWriter(f"{tmp_path}/a.tar") as writer:
        for number in range(5):
            writer.write({"__key__": f"k/{number}", "jpg": bytes([number]), "json": {"n": number}})
    samples = [*webdataset.WebDataset(f"{tmp_path}/a.tar", shardshuffle=False)]
    assert [sample["jpg"] for sample in samples] == read(f"{tmp_path}/a.tar")
    assert [sample["__key__"] for sample in samples] == [
        row["key"] for row in kept(f"{tmp_path}/a.tar", "key")
    ]


@pytest.mark.parametrize(
    ("name", "key"),
    [("a.b.jpg", ("a", "b.jpg")), ("x.y/a.jpg", ("x.y/a", "jpg")), ("a", ("a", ""))],
)
def test_keys_end_at_the_first_dot_of_the_name(name, key):
    assert key_of(name) == key
