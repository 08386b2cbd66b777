import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from captioner import __version__, storage
from captioner.caption.crash_log import CrashLog
from captioner.data.source import list_files
from captioner.errors import FingerprintError, OutputError
from captioner.output.audit import Audit, audit, remaining_shards, shards_to_retry
from captioner.output.directory import OutputDirectory
from captioner.output.manifest import Shard, extend_manifest, read_manifest
from captioner.output.parts import Part, part_name, read_part
from captioner.schema import COLUMNS, MANIFEST, CaptionRow, rows_to_table
from captioner.storage import Listed
from conftest import break_bucket

SETTINGS = {"model": "0" * 64, "vocabulary": "1" * 64, "beam": 1, "length_penalty": 1.0}


@pytest.fixture
def output(place: str) -> OutputDirectory:
    """A directory that a job has begun."""
    directory = OutputDirectory(f"{place}/out [1]")
    directory.begin(SETTINGS)
    return directory


def _listed(*numbers: int) -> pa.Table:
    return list_files(Listed(f"/photos/{number}.jpg", number * 100) for number in numbers)


def _shard(number: int, uris: list[str], sizes: list[int | None], redone: tuple[int, ...] = ()):
    return Shard(number, list_files(map(Listed, uris, sizes)), list(redone))


def _write_part(output: OutputDirectory, number: int, statuses: list[str]) -> None:
    """A part with the shard's images, as many as there are statuses; others where it has fewer."""
    manifest = read_manifest(output)
    uris = manifest.filter(pc.equal(manifest["shard"], number))["uri"].to_pylist()
    uris += [f"{number}/{row}" for row in range(len(uris), len(statuses))]
    rows = [CaptionRow(uri=uri, status=status) for uri, status in zip(uris, statuses, strict=False)]
    sink = io.BytesIO()
    pq.write_table(rows_to_table(rows), sink)
    storage.write(f"{output.uri}/{part_name(number)}", sink.getvalue())


def _contents(directory: str) -> dict[str, bytes]:
    """Every file below a directory, by name."""
    found = {}
    for listed in storage.find(directory, ("",)):
        name = listed.uri.split("/out [1]/")[1]
        found[name] = storage.read(listed.uri)
    return found


# Beginning a job.


def test_a_new_directory_becomes_the_jobs(output):
    run = output.read_json("run.json")
    created = run.pop("created")
    assert created.endswith("+00:00")
    assert run == {
        "schema_version": 2,
        "fingerprint": hashlib.sha256(json.dumps(SETTINGS, sort_keys=True).encode()).hexdigest(),
        "settings": SETTINGS,
        "low_score": None,
        "captioner_version": __version__,
    }
    assert list(_contents(output.uri)) == ["__captioner/run.json"]


def test_the_same_settings_go_on(output):
    before = _contents(output.uri)
    output.begin(dict(reversed(SETTINGS.items())))
    output.begin({**SETTINGS, "length_penalty": 1})
    assert _contents(output.uri) == before


def test_a_tuple_is_the_list_that_it_becomes(place):
    output = OutputDirectory(f"{place}/out [1]")
    output.begin({"sizes": (1, 2)})
    output.begin({"sizes": (1, 2)})
    with pytest.raises(FingerprintError, match=r"settings: --beam was None, is 2\. "):
        output.begin({"sizes": (1, 2), "beam": 2})


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"beam": 3}, "--beam was 1, is 3"),
        ({"model": "f" * 64}, "another model"),
        ({"attention": "mean"}, "--attention was None, is mean"),
        (
            {"vocabulary": "f" * 64, "model": "f" * 64, "length_penalty": 0.5},
            "--length-penalty was 1.0, is 0.5; another model; another vocabulary",
        ),
    ],
)
def test_other_settings_are_refused_with_what_differs(output, changes, difference):
    before = _contents(output.uri)
    with pytest.raises(FingerprintError) as caught:
        output.begin({**SETTINGS, **changes})
    assert str(caught.value) == (
        f"{output.uri} was begun with other settings: {difference}. "
        "Give the earlier settings, use another directory, or --overwrite"
    )
    assert _contents(output.uri) == before


def test_a_missing_setting_is_a_difference(output):
    fewer = {name: value for name, value in SETTINGS.items() if name != "beam"}
    with pytest.raises(FingerprintError, match=r"other settings: --beam was 1, is None\. "):
        output.begin(fewer)


@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_elses_directory_is_refused(place, overwrite):
    storage.write(f"{place}/out [1]/thesis.tex", b"years of work")
    output = OutputDirectory(f"{place}/out [1]")
    with pytest.raises(
        OutputError, match=r"out \[1\] is not empty, and not a caption job's output: use"
    ):
        output.begin(SETTINGS, overwrite=overwrite)
    assert _contents(output.uri) == {"thesis.tex": b"years of work"}


def test_hidden_files_and_an_interrupted_beginning_do_not_matter(tmp_path):
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "__captioner").mkdir()
    (tmp_path / "__captioner" / ".run.json.tmp-0123abcd").write_bytes(b"{")
    OutputDirectory(str(tmp_path)).begin(SETTINGS)
    assert os.listdir(tmp_path / "__captioner") == ["run.json"]
    assert (tmp_path / ".DS_Store").exists()


@pytest.mark.parametrize("name", ["out", "out/__captioner"])
def test_a_file_is_no_directory(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"1")
    with pytest.raises(OutputError, match=r"^cannot use .+/out for output: Not a directory$"):
        OutputDirectory(f"{tmp_path}/out").begin(SETTINGS)
    assert path.read_bytes() == b"1"


def test_overwriting_deletes_what_is_ours_and_nothing_else(output):
    extend_manifest(output, _listed(1, 2, 3), shard_size=2)
    extend_manifest(output, _listed(4), shard_size=2)
    output.write_summary({"images": 4})
    for number in range(3):
        _write_part(output, number, ["ok"])
    foreign = {"notes.txt": b"mine", "part-1.parquet": b"mine", "best/part-000000.parquet": b"mine"}
    for name, data in foreign.items():
        storage.write(f"{output.uri}/{name}", data)
    output.begin({"beam": 9}, overwrite=True)
    after = _contents(output.uri)
    assert json.loads(after.pop("__captioner/run.json"))["settings"] == {"beam": 9}
    assert after == foreign
    assert read_manifest(output).num_rows == 0


def test_overwriting_deletes_what_makes_it_ours_last(tmp_path):
    output = OutputDirectory(f"{tmp_path}/out")
    output.begin(SETTINGS)
    extend_manifest(output, _listed(1), shard_size=1)
    extend_manifest(output, _listed(2), shard_size=1)
    output.write_summary({})
    _write_part(output, 0, ["ok"])
    code = """
import os, sys
from captioner.output.directory import OutputDirectory
sys.addaudithook(lambda event, args: event == "os.remove" and print(os.path.basename(args[0])))
OutputDirectory(sys.argv[1]).begin({}, overwrite=True)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, output.uri], capture_output=True, text=True, check=True
    )
    manifests = ["manifest-0001.parquet", "manifest-0000.parquet"]
    assert ran.stdout.split() == ["part-000000.parquet", *manifests, "summary.json", "run.json"]


def test_an_interrupted_deletion_can_be_gone_on_with(output):
    for number in (1, 2, 3):
        extend_manifest(output, _listed(number), shard_size=2)
    # The order of deletion, seen from where it may end: the last manifest goes first.
    storage.delete(f"{output.uri}/__captioner/manifest-0002.parquet")
    output.begin(SETTINGS)
    manifest = extend_manifest(output, _listed(1, 2, 3), shard_size=2)
    assert manifest["uri"].to_pylist() == _listed(1, 2, 3)["uri"].to_pylist()
    assert read_manifest(output).equals(manifest)


def test_temporary_files_of_killed_writers_are_deleted(tmp_path):
    output = OutputDirectory(f"{tmp_path}/out [1]")
    output.begin(SETTINGS)
    for name in (".part-000000.parquet.tmp-0123abcd", "__captioner/.run.json.tmp-0123abcd"):
        storage.write(f"{output.uri}/{name}", b"half")
    storage.write(f"{output.uri}/.keep.tmp", b"")
    output.begin(SETTINGS)
    assert set(_contents(output.uri)) == {".keep.tmp", "__captioner/run.json"}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "cannot read"),
        (b"{", "cannot read"),
        (b"\xff", "cannot read"),
        (b"[]", "is not a JSON"),
        (b"[" * 100_000, "cannot read"),
        (b"{}", "has no settings"),
        (b'{"settings": ["a list"]}', "has no settings"),
    ],
)
def test_broken_books_are_refused(output, data, problem):
    storage.write(f"{output.uri}/__captioner/run.json", data)
    with pytest.raises(OutputError, match=problem):
        output.begin(SETTINGS)


def test_a_directory_without_books_is_no_jobs_output(place):
    with pytest.raises(
        OutputError, match=r"none is not a caption job's output: it has no run\.json$"
    ):
        OutputDirectory(f"{place}/none").read_json("run.json")


def test_the_summary_is_read_back(output):
    assert output.read_summary() == {}
    output.write_summary({"images": 3, "rows": {"ok": 3}})
    assert output.read_summary() == {"images": 3, "rows": {"ok": 3}}


# Shards.


def test_a_listing_becomes_shards(output):
    manifest = extend_manifest(
        output,
        pa.concat_tables([_listed(5, 3, 1, 4), list_files([Listed("s3://b/k", None)])]),
        shard_size=2,
    )
    assert manifest.schema.equals(MANIFEST)
    assert manifest.select(["uri", "size", "shard", "row"]).to_pydict() == {
        "uri": [*(f"/photos/{number}.jpg" for number in (5, 3, 1, 4)), "s3://b/k"],
        "size": [500, 300, 100, 400, None],
        "shard": [0, 0, 1, 1, 2],
        "row": [0, 1, 0, 1, 0],
    }
    assert read_manifest(output).equals(manifest)
    assert list(remaining_shards(output, manifest)) == [
        _shard(0, ["/photos/5.jpg", "/photos/3.jpg"], [500, 300]),
        _shard(1, ["/photos/1.jpg", "/photos/4.jpg"], [100, 400]),
        _shard(2, ["s3://b/k"], [None]),
    ]


def test_sizes_that_nobody_told_are_null(output):
    listing = list_files([Listed("a.jpg", None), Listed("b.jpg", None)])
    extend_manifest(output, listing, shard_size=256)
    assert read_manifest(output).schema.equals(MANIFEST)
    assert read_manifest(output)["size"].to_pylist() == [None, None]


def test_nothing_new_changes_nothing(output):
    manifest = extend_manifest(output, _listed(1, 2), shard_size=1)
    before = _contents(output.uri)
    assert extend_manifest(output, _listed(2, 1), shard_size=7).equals(manifest)
    assert extend_manifest(output, _listed(), shard_size=1).equals(manifest)
    assert _contents(output.uri) == before


def test_new_images_become_new_shards_and_old_manifests_stay(output):
    extend_manifest(output, _listed(1, 2, 3), shard_size=2)
    before = _contents(output.uri)
    manifest = extend_manifest(output, _listed(0, 1, 2, 2, 3, 9), shard_size=5)
    after = _contents(output.uri)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"__captioner/manifest-0001.parquet"}
    assert manifest["uri"].to_pylist() == [f"/photos/{number}.jpg" for number in (1, 2, 3, 0, 9)]
    assert manifest["shard"].to_pylist() == [0, 0, 1, 2, 2]
    assert manifest["row"].to_pylist() == [0, 1, 0, 0, 1]
    assert read_manifest(output).equals(manifest)


def test_images_that_left_the_source_stay_in_the_manifest(output):
    extend_manifest(output, _listed(1, 2), shard_size=2)
    manifest = extend_manifest(output, _listed(3), shard_size=2)
    assert len(manifest) == 3


def test_additions_are_in_the_order_of_their_numbers(output):
    for number in range(3):
        extend_manifest(output, _listed(number), shard_size=4)
    private = f"{output.uri}/__captioner"
    for new, old in ((10000, 2), (9999, 1)):
        data = storage.read(f"{private}/manifest-{old:04d}.parquet")
        storage.write(f"{private}/manifest-{new}.parquet", data)
        storage.delete(f"{private}/manifest-{old:04d}.parquet")
    assert read_manifest(output)["shard"].to_pylist() == [0, 1, 2]


def test_jobs_that_begin_at_once_in_a_bucket_share_their_books(memory_bucket, monkeypatch):
    """One reads the directory, then the other does its part, then the first goes on."""
    one, other = (OutputDirectory(f"{memory_bucket}/out") for _ in range(2))
    write = storage.write
    meanwhile: list[Callable[[], object]] = []

    def overtaken(path: str, data: bytes, **keywords: bool) -> None:
        if meanwhile:
            meanwhile.pop()()
        write(path, data, **keywords)

    monkeypatch.setattr(storage, "write", overtaken)
    meanwhile.append(lambda: other.begin({"beam": 2}))
    with pytest.raises(FingerprintError, match="beam was 2, is 1"):
        one.begin({"beam": 1})
    meanwhile.append(lambda: extend_manifest(other, _listed(0, 1), shard_size=4))
    manifest = extend_manifest(one, _listed(0, 8, 9), shard_size=4)
    assert manifest.equals(read_manifest(other))
    assert manifest["uri"].to_pylist() == [f"/photos/{n}.jpg" for n in (0, 1, 8, 9)]
    assert manifest["shard"].to_pylist() == [0, 0, 1, 1]


def test_books_that_cannot_be_reached_are_an_output_error(memory_bucket, monkeypatch):
    output = OutputDirectory(f"{memory_bucket}/out")
    output.begin({})
    crash_log = CrashLog(output.uri)
    crash_log.begin(3)
    break_bucket(monkeypatch, "ls", "cat_file")
    asked = (output.parts, output.delete_replaced_parts)
    books = (lambda: read_manifest(output), lambda: audit(output))
    for ask in (
        *asked,
        *books,
        crash_log.shards,
        crash_log.clear_after_orderly_end,
        lambda: crash_log.crashes(3),
    ):
        with pytest.raises(OutputError, match=r"^cannot .* memory://bucket/out.*no connection"):
            ask()


def test_an_image_that_is_listed_twice_is_added_once(output):
    extend_manifest(output, _listed(4, 0), shard_size=2)
    manifest = extend_manifest(output, _listed(1, 0, 1, 2, 1, 4, 3), shard_size=2)
    assert manifest["uri"].to_pylist() == [f"/photos/{number}.jpg" for number in (4, 0, 1, 2, 3)]
    assert manifest["shard"].to_pylist() == [0, 0, 1, 1, 2]


def test_many_additions_keep_their_order(output):
    for number in range(12):
        manifest = extend_manifest(output, _listed(number), shard_size=4)
    assert manifest["shard"].to_pylist() == list(range(12))
    assert read_manifest(output).equals(manifest)
    assert [shard.number for shard in remaining_shards(output, manifest)] == list(range(12))


def test_what_has_its_part_does_not_remain(output):
    manifest = extend_manifest(output, _listed(*range(7)), shard_size=2)
    _write_part(output, 2, ["ok", "ok"])
    _write_part(output, 0, ["ok", "ok"])
    storage.write(f"{output.uri}/.part-000001.parquet.tmp-0123abcd", b"half")
    storage.write(f"{output.uri}/part-000003.parquet.bak", b"")
    assert [part.first for part in output.parts()] == [0, 2]
    assert [shard.number for shard in remaining_shards(output, manifest)] == [1, 3]


def test_nothing_remains_of_nothing(output):
    assert read_manifest(output).equals(MANIFEST.empty_table())
    assert list(remaining_shards(output, read_manifest(output))) == []
    assert audit(output) == Audit(0, {}, [])


def test_part_names_sort_as_their_numbers():
    assert part_name(0) == "part-000000.parquet"
    assert part_name(999_999) == "part-999999.parquet"
    assert part_name(1_234_567) == "part-1234567.parquet"


def test_a_part_after_the_millionth_is_found(output):
    storage.write(f"{output.uri}/{part_name(1_234_567)}", b"")
    assert [part.shards for part in output.parts()] == [range(1_234_567, 1_234_568)]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"x" + data[1:] + b"x"]
)
def test_a_damaged_manifest_is_refused(output, damage):
    extend_manifest(output, _listed(1), shard_size=1)
    uri = f"{output.uri}/__captioner/manifest-0000.parquet"
    storage.write(uri, damage(storage.read(uri)))
    with pytest.raises(OutputError, match=r"^the manifest of .+ cannot be read: ") as caught:
        read_manifest(output)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_no_manifest_is_refused(output):
    uri = f"{output.uri}/__captioner/manifest-0000.parquet"
    for table in (pa.table({"uri": ["a"]}), pa.table({name: ["a"] for name in MANIFEST.names})):
        sink = io.BytesIO()
        pq.write_table(table, sink)
        storage.write(uri, sink.getvalue())
        with pytest.raises(OutputError, match=r"^the manifest of .+ cannot be read: "):
            read_manifest(output)


# Audit.


def test_every_row_is_counted_and_what_is_missing_is_named(output):
    extend_manifest(output, _listed(*range(5)), shard_size=2)
    _write_part(output, 0, ["ok", "rejected"])
    missing = ["/photos/2.jpg", "/photos/3.jpg", "/photos/4.jpg"]
    assert audit(output) == Audit(5, {"ok": 1, "rejected": 1}, missing)
    _write_part(output, 2, ["ok"])
    assert audit(output) == Audit(5, {"ok": 2, "rejected": 1}, missing[:2])
    _write_part(output, 1, ["failed", "unreadable"])
    rows = {"ok": 2, "rejected": 1, "failed": 1, "unreadable": 1}
    assert audit(output) == Audit(5, rows, [])


@pytest.mark.parametrize("statuses", [["ok"], ["ok"] * 3, []])
def test_a_part_with_another_number_of_rows_is_an_error(output, statuses):
    extend_manifest(output, _listed(0, 1, 2), shard_size=2)
    _write_part(output, 0, statuses)
    with pytest.raises(
        OutputError, match=rf"^part-000000\.parquet has {len(statuses)} rows, its shard 2$"
    ):
        audit(output)


def test_a_part_with_other_images_is_an_error(output):
    extend_manifest(output, _listed(0, 1), shard_size=2)
    for uris in (["/photos/1.jpg", "/photos/0.jpg"], ["/photos/0.jpg"] * 2):
        rows = [CaptionRow(uri=uri, status="ok") for uri in uris]
        sink = io.BytesIO()
        pq.write_table(rows_to_table(rows), sink)
        storage.write(f"{output.uri}/{part_name(0)}", sink.getvalue())
        with pytest.raises(
            OutputError, match=r"^part-000000\.parquet holds other images than its shard$"
        ):
            audit(output)


def test_what_is_not_ok_is_found_in_its_place(output):
    manifest = extend_manifest(output, _listed(*range(6)), shard_size=3)
    _write_part(output, 0, ["failed", "ok", "unreadable"])
    assert list(shards_to_retry(output, manifest)) == [
        _shard(0, ["/photos/0.jpg", "/photos/2.jpg"], [None, None], (0, 2))
    ]


# The lock.


def test_a_second_job_on_the_same_directory_is_told_so(tmp_path):
    first, second = OutputDirectory(f"{tmp_path}/out"), OutputDirectory(f"{tmp_path}/out")
    with first.locked():
        with (
            pytest.raises(
                OutputError,
                match=rf"^another job is using this output: .+ locked by process {os.getpid()} on ",
            ),
            second.locked(),
        ):
            pass
        first.begin(SETTINGS)
        first.begin({"beam": 9}, overwrite=True)  # which must not delete the lock
        with (
            pytest.raises(OutputError, match=r"^another job is using"),
            second.locked(),
        ):
            pass
    with second.locked():
        second.begin({"beam": 9})


def test_somebody_elses_directory_is_not_locked(tmp_path):
    (tmp_path / "thesis.tex").write_bytes(b"years of work")
    with pytest.raises(OutputError, match="is not empty"), OutputDirectory(str(tmp_path)).locked():
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_part_of_no_shard_is_an_error(output):
    extend_manifest(output, _listed(0, 1), shard_size=2)
    _write_part(output, 0, ["ok", "ok"])
    _write_part(output, 7, ["ok"])
    with pytest.raises(
        OutputError, match=r"^part-000007\.parquet belongs to no shard of the manifest$"
    ):
        audit(output)


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-9], lambda data: data[:99]]
)
def test_a_damaged_part_is_an_error(output, damage):
    extend_manifest(output, _listed(0, 1), shard_size=2)
    _write_part(output, 0, ["ok", "ok"])
    uri = f"{output.uri}/{part_name(0)}"
    storage.write(uri, damage(storage.read(uri)))
    with pytest.raises(OutputError, match=r"^cannot read .+/part-000000\.parquet: ") as caught:
        audit(output)
    assert "\n" not in str(caught.value)


def test_a_part_is_read_by_its_columns(output):
    _write_part(output, 0, ["ok", "failed"])
    assert read_part(output.uri, Part(0, 0), ["status"]).to_pydict() == {"status": ["ok", "failed"]}
    assert read_part(output.uri, Part(0, 0)).column_names == COLUMNS.names
    with pytest.raises(OutputError, match=r"^cannot read .+/part-000001\.parquet: "):
        read_part(output.uri, Part(1, 1))
