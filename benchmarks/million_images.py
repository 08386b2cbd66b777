"""Time and peak memory of the books of a caption job of a million images; the last line is JSON.

python benchmarks/million_images.py

The images are in a file system that only lists, the captions come from a captioner that only fills
rows. The same number of images is also planned in tar files with a thousand members each: links to
one tar file whose images are holes. Each stage runs in a process of its own, with the job's own
code for everything else. What a hundred times as many would take is the line through these figures
and those of a quarter.
"""

import io
import json
import math
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import fsspec
import numpy as np
import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from captioner import storage
from captioner.config import ListingConfig
from captioner.data.listing import list_source
from captioner.output.audit import audit, remaining_shards
from captioner.output.directory import OutputDirectory
from captioner.output.manifest import extend_manifest, read_manifest
from captioner.output.parts import part_name
from captioner.review import report
from captioner.schema import part_schema

SETTINGS = {"model": "none"}
SHARD = 256
MEMBERS = 1000  # of a tar file
PAGE = 1000  # names that a bucket lists at a request
# On Ray, of a shard: its part is written; twice, when its images are loaded and when they are
# captioned, a file in __captioner/attempts is looked for, written, and deleted with two requests.
SHARD_REQUESTS = 1 + 2 * 4
LISTINGS = 9  # how often a job lists its output
SPREAD = 0x9E3779B97F4A7C15  # makes names that are not in order


class Listing(AbstractFileSystem):
    """A bucket of so many images, which cannot be read."""

    protocol = "listing"

    def find(self, path: str, **_: object) -> dict[str, dict[str, object]]:
        """Names like those of a crawl, of 83 characters."""
        count = int(path.strip("/").rsplit("/", 1)[-1])
        names = (
            f"crawl/{number % 1000:03d}/{number * SPREAD % 2**64:016x}/{number:040d}.jpg"
            for number in range(count)
        )
        return {name: {"name": name, "size": 100_000, "type": "file"} for name in names}

    def isdir(self, path: str) -> bool:
        """Whatever is asked for is one."""
        return True


def plan(source: str, directory: OutputDirectory) -> dict[str, object]:
    """What a job does before its first image."""
    begin = time.monotonic()
    listed = list_source(source, ListingConfig())
    seconds = {"list": time.monotonic() - begin}
    directory.begin(SETTINGS)
    manifest = extend_manifest(directory, listed, SHARD)
    seconds["manifest"] = time.monotonic() - begin - sum(seconds.values())
    shards = list(remaining_shards(directory, manifest))
    seconds["shards"] = time.monotonic() - begin - sum(seconds.values())
    return {"seconds": seconds, "shards to do": len(shards)}


def tars(source: str, directory: OutputDirectory) -> dict[str, object]:
    """What a job of images in tar files does before its first image."""
    folder = Path(f"{directory.uri}-tars")
    folder.mkdir()
    first = folder / "00000.tar"
    with first.open("wb") as file:
        for number in range(MEMBERS):
            info = tarfile.TarInfo(f"{number:09d}.jpg")
            info.size = 100_000
            file.write(info.tobuf())
            file.seek(-(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, io.SEEK_CUR)
        file.write(bytes(2 * tarfile.BLOCKSIZE))
    for number in range(1, int(source.removeprefix("listing://")) // MEMBERS):
        (folder / f"{number:05d}.tar").hardlink_to(first)
    return plan(str(folder), OutputDirectory(f"{directory.uri}-of-tars"))


def caption(source: str, directory: OutputDirectory) -> dict[str, object]:
    """Writes all parts; not part of what is measured."""
    import pyarrow.parquet as pq

    maps, words = np.zeros(11 * 81, np.uint8).tobytes(), ["word"] * 11
    schema = part_schema(attention="tokens", levels=127)
    for shard in remaining_shards(directory, read_manifest(directory)):
        count = len(shard.uris)
        columns = {
            "uri": shard.uris,
            "caption": [" ".join(words)] * count,
            "tokens": [words] * count,
            "token_logprobs": [[-1.0] * 11] * count,
            "score": np.linspace(-2, -1, count),
            "attention": [maps] * count,
            "attention_peak": [[0.1] * 11] * count,
            "status": ["ok"] * count,
        }
        arrays = [
            pa.array(columns[field.name], field.type)
            if field.name in columns
            else pa.nulls(count, field.type)
            for field in schema
        ]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink, compression="zstd")
        path = Path(directory.uri, part_name(shard.number))
        path.write_bytes(sink.getvalue())
    return {}


def resume(source: str, directory: OutputDirectory) -> dict[str, object]:
    """What a job does that finds all its parts there."""
    done = plan(source, directory)
    begin = time.monotonic()
    accounts = audit(directory)
    done["seconds"]["accounts"] = time.monotonic() - begin  # type: ignore[index]
    return done | {"missing": len(accounts.missing)}


def read(source: str, directory: OutputDirectory) -> dict[str, object]:
    """What `captioner report` does."""
    begin = time.monotonic()
    lines = len(report.summarise(directory.uri).lines())
    return {"seconds": {"report": time.monotonic() - begin}, "lines": lines}


STAGES = {stage.__name__: stage for stage in (plan, caption, resume, read, tars)}


@click.command()
@click.option("--images", default=1_000_000, show_default=True)
@click.option("--stage", type=click.Choice(list(STAGES)), help="Only this, of an output begun.")
@click.option("--output", type=click.Path())
def main(images: int, stage: str | None, output: str | None) -> None:
    """Plans, fills, resumes and reports."""
    if stage and output:
        fsspec.register_implementation("listing", Listing)
        done = STAGES[stage](f"listing://{images}", OutputDirectory(storage.absolute(output)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        click.echo(json.dumps(done | {"largest MiB": round(peak)}))
        return
    quarter, whole = (run_stages(count) for count in (images // 4, images))
    many = 100 * images
    expected = extrapolate(quarter, whole, images, many)
    click.echo(f"{many} images, extrapolated:")
    for name, value in expected.items():
        click.echo(f"  {name}: {value:,}")
    click.echo(json.dumps({"images": images} | whole | {f"expected of {many}": expected}))


def run_stages(images: int) -> dict[str, Any]:
    """Each stage, in a process of its own and in this order."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in STAGES:
            command = [sys.executable, __file__, "--images", str(images), "--stage", name]
            ran = subprocess.run(
                [*command, "--output", f"{directory}/out"], stdout=subprocess.PIPE, check=True
            )
            done = results[name] = json.loads(ran.stdout)
            if "seconds" in done:
                done["seconds"] = {key: round(value, 2) for key, value in done["seconds"].items()}
                total = sum(done["seconds"].values())
                click.echo(
                    f"{images} images, {name}: {total:.1f} s, {done['largest MiB']} MiB: "
                    f"{done['seconds']}"
                )
        size = sum(path.stat().st_size for path in Path(directory, "out").rglob("manifest-*"))
        results["manifest bytes an image"] = round(size / images, 1)
    del results["caption"]
    return results


def extrapolate(
    quarter: dict[str, Any], whole: dict[str, Any], images: int, many: int
) -> dict[str, int]:
    """What ``many`` images would take: counted where it can be, else on a straight line."""

    def at(figure: Callable[[dict[str, Any]], float]) -> int:
        slope = (figure(whole) - figure(quarter)) / (images - images // 4)
        return round(figure(whole) + slope * (many - images))

    parts = math.ceil(many / SHARD)
    pages, part_pages = math.ceil(many / PAGE), math.ceil(parts / PAGE)
    return {
        "requests to list the images": pages,
        "requests to read the images": many,
        "requests for the shards, on Ray": SHARD_REQUESTS * parts,
        "requests to resume when all is done": pages + LISTINGS * part_pages + parts,
        "parts": parts,
        "manifest, MB": round(many * whole["manifest bytes an image"] / 1e6),
        "planning, s": at(lambda each: sum(each["plan"]["seconds"].values())),
        "planning, MiB": at(lambda each: each["plan"]["largest MiB"]),
        "planning in tar files, s": at(lambda each: sum(each["tars"]["seconds"].values())),
        "planning in tar files, MiB": at(lambda each: each["tars"]["largest MiB"]),
        "resuming, s": at(lambda each: sum(each["resume"]["seconds"].values())),
        "resuming, MiB": at(lambda each: each["resume"]["largest MiB"]),
        "attention before zstd, 9×9 and 11 words, GB": round(many * 9 * 9 * 11 / 1e9),
        "pixels of a shard in the object store, 260×260, MB": round(SHARD * 260 * 260 * 3 / 1e6),
    }


if __name__ == "__main__":
    main()
