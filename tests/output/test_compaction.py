"""Merging and splitting parts: every image keeps its one row, whatever happens meanwhile."""

import io
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from captioner import storage
from captioner.cli import main
from captioner.data.source import list_files
from captioner.errors import OutputError
from captioner.output.audit import Audit, audit, remaining_shards, shards_to_retry
from captioner.output.compaction import compact, isolate_shards
from captioner.output.directory import OutputDirectory
from captioner.output.manifest import extend_manifest, read_manifest
from captioner.output.parts import Part, delete_parts, find_parts, part_name
from captioner.output.rows import read_row, read_rows
from captioner.schema import part_schema
from captioner.storage import Listed
from conftest import write_photos

IMAGES = 35  # in nine shards, the last of which has one fewer
MAP = 20_000  # bytes
SIZE = 85_000  # of a part, about
SCHEMA = part_schema(attention="tokens", levels=127)


def _write_part(uri: str, number: int, uris: list[str]) -> None:
    """Its rows are large, so that files have the sizes that their rows have."""
    columns = {
        "uri": uris,
        "status": ["failed" if name.endswith("3.jpg") else "ok" for name in uris],
        "caption": [f"a {name}" for name in uris],
        "score": [-float(name[1:4]) for name in uris],
        "attention": [np.random.default_rng(int(name[1:4])).bytes(MAP) for name in uris],
    }
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.nulls(len(uris), field.type)
        for field in SCHEMA
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), sink, compression="zstd")
    storage.write(storage.join(uri, part_name(number)), sink.getvalue())


def finish(uri: str, images: int = IMAGES) -> OutputDirectory:
    """An output whose images all have their rows, in shards of four; every tenth failed."""
    output = OutputDirectory(uri)
    if not storage.names(uri):
        output.begin({})
    manifest = extend_manifest(
        output, list_files(Listed(f"/{n:03d}.jpg", n) for n in range(images)), 4
    )
    for shard in remaining_shards(output, manifest):
        _write_part(uri, shard.number, shard.uris)
    return output


def _names(uri: str) -> list[str]:
    return [name for name in storage.names(uri) if name != "__captioner"]


def rows_of_parts(uri: str) -> pa.Table:
    """What a reader makes of it that knows no rule."""
    return pa.concat_tables(
        pq.read_table(io.BytesIO(storage.read(storage.join(uri, name)))) for name in _names(uri)
    )


def test_parts_are_merged_to_about_the_size_and_stay_in_order(place):
    output = finish(f"{place}/out [1]")
    before = rows_of_parts(output.uri)
    done = compact(output.uri, int(4.5 * SIZE))
    assert done.describe() == f"{output.uri}: 35 images, 9 parts before, 3 now"
    names = ["part-000000-000003.parquet", "part-000004-000007.parquet", "part-000008.parquet"]
    assert _names(output.uri) == names
    assert rows_of_parts(output.uri).equals(before)
    for name in names:
        file = pq.ParquetFile(io.BytesIO(storage.read(storage.join(output.uri, name))))
        assert file.schema_arrow.equals(before.schema, check_metadata=True)
        assert file.num_row_groups == 1
    assert before.schema.metadata == SCHEMA.metadata
    assert audit(output) == Audit(35, {"ok": 31, "failed": 4}, [])


def test_what_is_compact_stays_and_a_larger_size_merges_it_further(place):
    output = finish(f"{place}/out")
    before = rows_of_parts(output.uri)
    for singles, expected in ((2.5, 5), (2.5, 5), (5.5, 2), (5.5, 2), (99, 1), (99, 1), (1, 1)):
        assert compact(output.uri, int(SIZE * singles)).after == expected
        assert rows_of_parts(output.uri).equals(before)
    assert _names(output.uri) == ["part-000000-000008.parquet"]


def test_parts_that_are_links_are_merged_and_what_they_led_to_stays(tmp_path):
    output = finish(f"{tmp_path}/out")
    before = rows_of_parts(output.uri)
    (tmp_path / "objects").mkdir()
    for path in (tmp_path / "out").glob("part-*"):
        path.symlink_to(path.rename(tmp_path / "objects" / path.name))
    assert compact(output.uri, 10**9).after == 1
    assert rows_of_parts(output.uri).equals(before)
    assert len(list((tmp_path / "objects").iterdir())) == 9


def test_a_merged_part_has_row_groups_of_many_rows(place, monkeypatch):
    monkeypatch.setattr("captioner.output.parts._ROW_GROUP", 10)
    output = finish(f"{place}/out")
    before = rows_of_parts(output.uri)
    compact(output.uri, 10**9)
    [name] = _names(output.uri)
    file = pq.ParquetFile(io.BytesIO(storage.read(storage.join(output.uri, name))))
    groups = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert groups == [10, 10, 10, 5]
    assert rows_of_parts(output.uri).equals(before)
    for row in (0, 9, 10, 34):
        [found] = read_row(output, row // 4, row % 4).to_pylist()
        assert found["uri"] == f"/{row:03d}.jpg"
    isolate_shards(output, read_manifest(output), {3})
    assert rows_of_parts(output.uri).equals(before)


# Killed at any moment.


class Crash(BaseException):
    """Ends a process, as far as a test in it can tell."""


def _crash_at(monkeypatch: pytest.MonkeyPatch, step: int, *, after: bool) -> None:
    """Of the steps that change a directory, lets one be the last, or the first not to be done."""
    steps = itertools.count()

    def last(do: Callable[[], object]) -> None:
        number = next(steps)
        if number >= step and not (after and number == step):
            raise Crash
        do()
        if number >= step:
            raise Crash

    delete, writing = storage.delete, storage.writing

    @contextmanager
    def crashing(uri: str) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)

            def write() -> None:
                with writing(uri) as there:
                    there.write(file.read())

            last(write)

    monkeypatch.setattr(storage, "delete", lambda uri: last(lambda: delete(uri)))
    monkeypatch.setattr(storage, "writing", crashing)


def _merge(output: OutputDirectory) -> None:
    compact(output.uri, int(4.5 * SIZE))


def _split(output: OutputDirectory) -> None:
    """What --retry-failed does first."""
    output.begin({})
    manifest = read_manifest(output)
    failed = {shard.number for shard in shards_to_retry(output, manifest)}
    output.delete_replaced_parts()
    isolate_shards(output, manifest, failed)


@pytest.mark.parametrize("change", [_merge, _split])
@pytest.mark.parametrize("after", [False, True])
def test_whatever_step_is_the_last_every_image_keeps_its_one_row(place, change, after, monkeypatch):
    steps = 0
    while True:
        output = finish(f"{place}/{steps}")
        if change is _split:
            compact(output.uri, 10**9)
        before = audit(output)
        rows = rows_of_parts(output.uri)
        with monkeypatch.context() as patched:
            _crash_at(patched, steps, after=after)
            try:
                change(output)
                break
            except Crash:
                pass
        assert audit(output) == before
        assert pa.concat_tables(read_rows(output)).equals(rows)
        uris = rows_of_parts(output.uri)["uri"].to_pylist()
        assert set(uris) == set(rows["uri"].to_pylist()), "a row is missing to a plain reader"
        {0: output.delete_replaced_parts, 1: lambda output=output: change(output)}[steps % 2]()
        assert rows_of_parts(output.uri).equals(rows)
        assert audit(output) == before
        change(output)
        assert rows_of_parts(output.uri).equals(rows)
        steps += 1
    assert steps == (10 if change is _merge else 8)  # merged: 2 from 8; split: 7 from 1


_KILLED = """
import os, shutil, signal, sys
from captioner.output.compaction import compact

finished, output, size = sys.argv[1:]
for step in range(100):
    shutil.copytree(finished, f"{output}/{step}")
    if not (child := os.fork()):
        steps = iter(range(step))
        def audit(event, arguments):
            if event in ("os.rename", "os.remove") and next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(audit)
        compact(f"{output}/{step}", int(size))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""


def test_a_kill_before_any_renaming_or_deletion_costs_nothing(tmp_path):
    finished = finish(f"{tmp_path}/finished")
    rows = rows_of_parts(finished.uri)
    code = [sys.executable, "-c", _KILLED, finished.uri, f"{tmp_path}/killed"]
    ran = subprocess.run([*code, str(int(4.5 * SIZE))], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    killed = sorted((tmp_path / "killed").iterdir(), key=lambda path: int(path.name))
    assert len(killed) == 11  # of two parts four went into each: before ten steps, and not at all
    for path in killed:
        assert pa.concat_tables(read_rows(OutputDirectory(str(path)))).equals(rows)
        assert compact(str(path), int(4.5 * SIZE)).after == 3
        assert rows_of_parts(str(path)).equals(rows)
        assert all(name.startswith("part-") for name in _names(str(path)))


# The other commands.


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_reading_finishes_what_a_killed_compaction_left(tmp_path):
    output = finish(f"{tmp_path}/out")
    rows = rows_of_parts(output.uri)
    singles = {name: storage.read(storage.join(output.uri, name)) for name in _names(output.uri)}
    compact(output.uri, 10**9)
    for name in list(singles)[3:5]:
        storage.write(storage.join(output.uri, name), singles[name])
    with output.locked():  # as the compaction does that is still at it
        assert "31 ok" in _run("report", output.uri).output
    assert len(_names(output.uri)) == 3
    result = _run("report", output.uri)
    assert result.exit_code == 0, result.output
    assert "31 ok" in result.output
    assert "0 images have no row" in result.output
    assert rows_of_parts(output.uri).equals(rows)


@pytest.mark.parametrize("command", ["report", "caption"])
def test_in_a_bucket_nobody_deletes_what_a_part_is_split_into(command, memory_bucket, monkeypatch):
    output = finish(f"{memory_bucket}/out")
    compact(output.uri, 10**9)
    rows = rows_of_parts(output.uri)
    written: list[list[str]] = []

    def meanwhile(directory: str, sources: list[Part]) -> None:
        written.append(_names(directory))
        if command == "report":
            assert "31 ok" in _run("report", directory).output
        else:
            OutputDirectory(directory).begin({})
        assert _names(directory) == written[-1]
        delete_parts(directory, sources)

    monkeypatch.setattr("captioner.output.parts.delete_parts", meanwhile)
    isolate_shards(output, read_manifest(output), {3, 4})
    assert len(written) == 1
    assert rows_of_parts(output.uri).equals(rows)


def test_a_part_stays_where_what_it_was_split_into_is_gone(memory_bucket, monkeypatch):
    output = finish(f"{memory_bucket}/out")
    compact(output.uri, 10**9)
    rows = rows_of_parts(output.uri)
    writing = storage.writing

    @contextmanager
    def stolen(uri: str) -> Iterator[IO[bytes]]:
        with writing(uri) as file:
            yield file
        if uri.endswith("part-000003.parquet"):  # by a compaction that goes on at the same moment
            OutputDirectory(output.uri).delete_replaced_parts()

    monkeypatch.setattr(storage, "writing", stolen)
    with pytest.raises(OutputError, match=r"^part-0000.* is gone: another job is using "):
        isolate_shards(output, read_manifest(output), {3})
    output.delete_replaced_parts()
    assert rows_of_parts(output.uri).equals(rows)


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.thorough)])
def test_a_job_goes_on_with_a_compact_output(engine, model_directory, tmp_path, request):
    if engine == "ray":
        request.getfixturevalue("local_ray")
    photos, output = tmp_path / "photos", tmp_path / "out"
    paths = write_photos(photos, 20)
    broken = [paths[n] for n in (1, 2, 13)]
    sound = paths[0].read_bytes()
    for path in broken:
        path.write_bytes(b"broken")
    caption = ["caption", photos, output, "--model", model_directory, "--engine", engine]
    caption += ["--shard-size", "3", "--device", "cpu", "--precision", "fp32"]
    caption += ["--max-error-rate", "1"]
    assert "17 ok, 3 undecodable" in _run(*caption).output
    before = rows_of_parts(str(output))
    result = _run("compact", output)
    assert result.output == f"{output}: 20 images, 7 parts before, 1 now\n"
    assert result.exit_code == 0

    result = _run(*caption)
    assert "17 ok, 3 undecodable); 0 now" in result.output
    assert _names(str(output)) == ["part-000000-000006.parquet"]
    result = _run("show", output, paths[11].name, "-o", tmp_path / "drawn.png")
    assert result.exit_code == 0, result.output
    [expected] = before.filter(pc.equal(before["uri"], str(paths[11])))["caption"].to_pylist()
    assert result.output == f"{expected}\nwrote {tmp_path / 'drawn.png'}\n"
    assert "17 ok" in _run("report", output).output

    write_photos(photos / "more", 4, seed=1)
    assert "21 ok, 3 undecodable); 4 now" in _run(*caption).output
    assert rows_of_parts(str(output)).slice(0, 20).equals(before)
    result = _run("compact", output)
    assert result.output == f"{output}: 24 images, 3 parts before, 1 now\n"

    broken[0].write_bytes(sound)
    broken[2].write_bytes(sound)
    caption.append("--retry-failed")
    assert "24 images, 3 to caption, in 2 shards" in _run(*caption, "--dry-run").output
    assert _names(str(output)) == ["part-000000-000008.parquet"]
    assert "23 ok, 1 undecodable); 3 now" in _run(*caption).output
    names = ["000000", "000001-000003", "000004", "000005-000008"]
    assert _names(str(output)) == [f"part-{name}.parquet" for name in names]
    after = rows_of_parts(str(output))
    assert after["uri"].to_pylist()[:20] == before["uri"].to_pylist()
    for new, old in zip(after.to_pylist(), before.to_pylist(), strict=False):
        if new["uri"] in (str(broken[0]), str(broken[2])):
            assert (new["status"], old["status"]) == ("ok", "undecodable")
        else:
            assert new == old
    assert _run("compact", output).output.endswith(" 4 parts before, 1 now\n")
    assert rows_of_parts(str(output)).equals(after)


def test_what_cannot_be_compacted_is_one_line(tmp_path):
    output = finish(f"{tmp_path}/out")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").touch()
    none = "not a caption job's output: it has no run.json"
    cases = [(name, none) for name in ("none", "foreign")]
    for name, message in cases:
        result = _run("compact", tmp_path / name)
        assert (result.exit_code, len(result.output.splitlines())) == (2, 1), result.output
        assert message in result.output
    assert not (tmp_path / "none").exists()
    with output.locked():
        result = _run("compact", output.uri)
    assert result.exit_code == 2
    assert "another job is using" in result.output
    for size in ("0", "256XB", "-1MB", ""):
        assert _run("compact", output.uri, "--size", size).exit_code == 2
    storage.delete(storage.join(output.uri, part_name(4)))
    before = _names(output.uri)
    result = _run("compact", output.uri)
    assert result.exit_code == 2
    assert result.output == (
        f"captioner: {output.uri} is not finished: 4 images have no row; "
        "run its caption job again first\n"
    )
    assert _names(output.uri) == before


def test_parts_with_other_columns_are_not_merged(place):
    output = finish(f"{place}/out")
    uri = storage.join(output.uri, part_name(2))
    sink = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(storage.read(uri))).drop_columns("score"), sink)
    storage.write(uri, sink.getvalue())
    before = _names(output.uri)
    with pytest.raises(
        OutputError, match=r"^part-000002\.parquet has other columns than part-0000"
    ):
        compact(output.uri, 10**9)
    assert _names(output.uri) == before


def test_parts_that_hold_some_of_the_same_images_are_an_error():
    assert find_parts(["part-000000-000004.parquet", "part-000002-000004.parquet"]) == (
        [Part(0, 4)],
        [Part(2, 4)],
    )
    with pytest.raises(OutputError, match=r"^part-000000-000004.parquet and part-000002-000007"):
        find_parts(["part-000000-000004.parquet", "part-000002-000007.parquet"])


def test_overwriting_deletes_merged_parts(place):
    output = finish(f"{place}/out")
    compact(output.uri, int(4.5 * SIZE))
    output.begin({"beam": 2}, overwrite=True)
    assert _names(output.uri) == []


@pytest.mark.parametrize(
    ("text", "size"), [("256MB", 256 * 10**6), ("1.5 gb", 15 * 10**8), ("7", 7), ("2KB", 2000)]
)
def test_sizes_are_said_with_or_without_a_unit(text, size):
    option = next(each for each in main.commands["compact"].params if each.name == "size")
    assert option.type.convert(text, option, None) == size


READ = """
import os, sys
from captioner.output.audit import audit
from captioner.output.directory import OutputDirectory
from captioner.output.rows import lowest_ranked_rows, read_row, read_rows

def threads():
    return len(os.listdir("/proc/self/task"))

output, before = OutputDirectory(sys.argv[1]), threads()
assert not audit(output).missing
assert sum(map(len, read_rows(output))) == 35
assert len(lowest_ranked_rows(output, lambda scores: scores, 99)) == 35
assert read_row(output, 8, 1)["uri"].to_pylist() == ["/033.jpg"]
print(threads() - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc")
def test_arrow_reads_in_the_thread_that_asks(tmp_path):
    """What its own threads hold of Python aborts the process where they let go of it at its end."""
    output = finish(f"{tmp_path}/out")
    compact(output.uri, SIZE)
    done = subprocess.run([sys.executable, "-c", READ, output.uri], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
