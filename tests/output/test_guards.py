"""Guards against losing rows hold where Python removes assertions."""

import re
import subprocess
import sys

import pytest

BEGIN = """
import io, sys
import pyarrow.parquet as pq
from captioner import storage
from captioner.output.audit import audit
from captioner.output.directory import OutputDirectory
from captioner.data.source import list_files
from captioner.output.manifest import extend_manifest
from captioner.output.parts import Part, part_name, rewrite
from captioner.schema import CaptionRow, rows_to_table
from captioner.storage import Listed

assert False, "assertions are on"
directory = OutputDirectory(sys.argv[1])
directory.begin({})
extend_manifest(directory, list_files(Listed(f"/{number}.jpg", 1) for number in range(4)), 2)

def row(number):
    return CaptionRow(uri=f"/{number}.jpg", status="ok")

def put(shard, *numbers):
    sink = io.BytesIO()
    pq.write_table(rows_to_table([row(number) for number in numbers]), sink)
    storage.write(f"{directory.uri}/{part_name(shard)}", sink.getvalue())
"""


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (
            "put(0, 0, 1); rewrite(directory.uri, [Part(0, 0)], {Part(0, 1): 3}, print)",
            "OutputError: .* hold fewer rows than images",
        ),
        (
            "put(0, 0, 1); rewrite(directory.uri, [Part(0, 0)], {Part(0, 1): 1}, print)",
            "OutputError: .* hold more rows than images",
        ),
        ("put(0, 0); audit(directory)", "OutputError: part-000000.parquet has 1 rows, its shard 2"),
        ("put(0, 1, 0); audit(directory)", "OutputError: part-000000.parquet holds other images"),
        ("put(2, 0); audit(directory)", "OutputError: part-000002.parquet belongs to no shard"),
    ],
)
def test_a_lost_row_is_an_error_without_assertions(code, error, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-O", "-c", BEGIN + code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert re.search(error, ran.stderr.splitlines()[-1]), ran.stderr
    if "rewrite" in code:
        assert [path.name for path in (tmp_path / "out").glob("part-*")] == ["part-000000.parquet"]
