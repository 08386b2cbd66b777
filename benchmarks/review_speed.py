"""The review page over a million rows: the first page, a filter by word, a sort by score, memory.

Writes an output with synthetic rows (merged parts of 8,192 rows, or shards of 256 with --shards),
serves it with ``captioner review`` in a process of its own, and asks for pages as a browser does.
The last line is JSON: seconds, and MiB of the server.
"""

import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.data.source import list_files
from captioner.output.parts import Part
from captioner.schema import MANIFEST, part_schema
from captioner.storage import Listed

WORDS = [
    "a",
    "the",
    "two",
    "man",
    "woman",
    "dog",
    "cat",
    "child",
    "bird",
    "horse",
    "red",
    "blue",
    "small",
    "large",
    "old",
    "young",
    "runs",
    "sits",
    "stands",
    "jumps",
    "plays",
    "rides",
    "holds",
    "on",
    "in",
    "near",
    "with",
    "grass",
    "street",
    "water",
    "snow",
    "table",
    "field",
    "beach",
    "ball",
    "hat",
]
RARE = "zebra"  # in one caption of a thousand


@click.command()
@click.option("--rows", default=1_000_000, show_default=True)
@click.option("--shards", is_flag=True, help="Parts of 256 rows, as a job writes them.")
@click.option("--repeats", default=5, show_default=True)
def main(rows: int, shards: bool, repeats: int) -> None:
    """Measure the review page."""
    with tempfile.TemporaryDirectory(prefix="captioner-review-speed-") as folder:
        output = f"{folder}/out"
        write_output(output, rows, part_rows=256 if shards else 8192)
        command = [sys.executable, "-m", "captioner.cli", "review", output]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                address = server.stdout.readline().split()[2]
                figures = measure(address, server.pid, rows, repeats)
            finally:
                server.terminate()
    click.echo(json.dumps({"rows": rows, "parts of": 256 if shards else 8192, **figures}))


def measure(address: str, process: int, rows: int, repeats: int) -> dict[str, float]:
    """Seconds of each request, and the server's memory at the end."""
    begin = time.perf_counter()
    figures = {"first page, while rows are indexed": fetch(address)}
    while (progress := json.loads(get(f"{address}progress")))["rows"] < rows:
        click.echo(f"{progress['rows']} of {rows} rows indexed", err=True)
        time.sleep(2)
    figures["indexing"] = time.perf_counter() - begin
    for name, query in {
        "page": "",
        "page 10,000": "?page=10000",
        "filter by a word": f"?words={RARE}",
        "filter by status and score": "?status=ok&least=-0.1",
        "sort by score": "?sort=best",
        "random order": "?sort=random&seed=1",
    }.items():
        figures[name] = statistics.median(fetch(address + query) for _ in range(repeats))
    status = Path(f"/proc/{process}/status").read_text()
    for name in ("VmHWM", "VmRSS"):
        [line] = [line for line in status.splitlines() if line.startswith(name)]
        figures[f"MiB ({name})"] = round(int(line.split()[1]) / 1024)
    return {name: round(value, 3) for name, value in figures.items()}


def fetch(url: str) -> float:
    """Seconds of a page."""
    begin = time.perf_counter()
    assert b"</html>" in get(url)
    return time.perf_counter() - begin


def get(url: str) -> bytes:
    """The answer to a request."""
    with urllib.request.urlopen(url) as response:
        data: bytes = response.read()
        return data


def write_output(output: str, rows: int, part_rows: int, shard_rows: int = 256) -> None:
    """An output of a finished job, as far as readers look at it."""
    generator = np.random.default_rng(0)
    schema = part_schema(attention="tokens", levels=127)
    uris = [f"/photos/{number // 1000:05d}/{number:09d}.jpg" for number in range(rows)]
    number = np.arange(rows)
    storage.write(f"{output}/__captioner/run.json", b'{"settings": {}, "fingerprint": ""}')
    manifest = list_files(Listed(uri, 50_000) for uri in uris)
    for name, values in (("shard", number // shard_rows), ("row", number % shard_rows)):
        manifest = manifest.append_column(name, pa.array(values))
    manifest = manifest.cast(MANIFEST)
    write_table(f"{output}/__captioner/manifest-0000.parquet", manifest)
    for begin in range(0, rows, part_rows):
        end = min(begin + part_rows, rows)
        part = Part(begin // shard_rows, (end - 1) // shard_rows)
        write_table(f"{output}/{part.name}", synthetic(uris[begin:end], generator, schema))


def synthetic(uris: list[str], generator: np.random.Generator, schema: pa.Schema) -> pa.Table:
    """Rows with captions of ten words and maps of 9×9."""
    count = len(uris)
    tokens = [[WORDS[i] for i in row] for row in generator.integers(0, len(WORDS), (count, 10))]
    for row in np.flatnonzero(generator.random(count) < 0.001):
        tokens[row][3] = RARE
    ok = generator.random(count) > 0.01
    maps = generator.integers(0, 128, (count, 10 * 81), np.uint8)
    rows = [
        {
            "uri": uri,
            "caption": " ".join(tokens[i]) if ok[i] else None,
            "tokens": tokens[i] if ok[i] else None,
            "token_logprobs": [-0.3] * 10 if ok[i] else None,
            "score": -float(generator.gamma(2, 0.2)) if ok[i] else None,
            "attention": maps[i].tobytes() if ok[i] else None,
            "attention_peak": [0.1] * 10 if ok[i] else None,
            "width": 640,
            "height": 480,
            "bytes": 50_000,
            "status": "ok" if ok[i] else "undecodable",
            "error": None if ok[i] else "the image is truncated",
        }
        for i, uri in enumerate(uris)
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def write_table(uri: str, table: pa.Table) -> None:
    """Writes Parquet."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    storage.write(uri, sink.getvalue())


if __name__ == "__main__":
    main()
