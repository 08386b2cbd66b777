"""Memory of a caption job by its number of images, with both engines; the last line is JSON.

python benchmarks/memory.py DATA

Every job is a process of its own. Once a second the memory of it and of all that it started, Ray's
processes too, is added up as the kernel's proportional set size, in which a shared page counts
once. What is shared memory of it is Ray's object store. Linux only.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from captioner.config import ListingConfig
from captioner.model import bundle

CAPTIONER = str(Path(sys.executable).with_name("captioner"))
SECONDS = 1.0  # between two looks


def tree(root: int) -> set[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(path.name))
    found, waiting = set(), [root]
    while waiting:
        found.add(process := waiting.pop())
        waiting += children.get(process, [])
    return found


def memory(processes: set[int]) -> tuple[float, float]:
    """MiB of some processes, and how much of it is shared memory."""
    total = shared = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        fields = {words[0]: int(words[1]) for line in lines[1:] if (words := line.split())}
        total += fields["Pss:"]
        shared += fields["Pss_Shmem:"]
    return total / 1024, shared / 1024


def caption(photos: Path, output: Path, count: int, options: list[str]) -> dict[str, float]:
    """A job of so many images; its largest memory."""
    command = [CAPTIONER, "caption", str(photos), str(output), "--limit", str(count), *options]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    largest = largest_shared = 0.0
    most = 0
    while job.poll() is None:
        processes = tree(job.pid)
        total, shared = memory(processes)
        largest, largest_shared = max(largest, total), max(largest_shared, shared)
        most = max(most, len(processes))
        time.sleep(SECONDS)
    if job.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with {job.returncode}")
    summary = json.loads((output / "__captioner/summary.json").read_text())
    return {
        "largest_mib": round(largest),
        "object_store_mib": round(largest_shared),
        "processes": most,
        "ok": summary["rows"]["ok"],
        "images_per_second": round(summary["images_per_second"], 1),
    }


@click.command()
@click.argument("data", type=click.Path(exists=True, resolve_path=True, path_type=Path))
@click.option("--counts", default="2000,7000", show_default=True, help="Images of the jobs.")
@click.option("--engines", default="local,ray", show_default=True)
@click.option("--model", default=bundle.DEFAULT, help="Model directory.")
def main(data: Path, counts: str, engines: str, model: str) -> None:
    """Captions photos of DATA, a folder that is searched, over again where there are too few."""
    endings = ListingConfig().endings
    found = sorted(path for path in data.rglob("*") if path.suffix.lower() in endings)
    if not found:
        raise click.ClickException(f"{data} holds no images")
    sizes = sorted(map(int, counts.split(",")))
    results: dict[str, dict[str, dict[str, float]]] = {}
    with TemporaryDirectory() as directory:
        photos = Path(directory, "photos")
        photos.mkdir()
        for number in range(sizes[-1]):
            path = found[number % len(found)]
            (photos / f"{number:07d}{path.suffix}").symlink_to(path)
        for engine in engines.split(","):
            results[engine] = {}
            for size in sizes:
                output = Path(directory, f"{engine}-{size}")
                options = ["--model", model, "--engine", engine]
                result = caption(photos, output, size, options)
                results[engine][str(size)] = result
                click.echo(f"{engine}, {size} images: {result}")
    growth = {
        engine: round(jobs[str(sizes[-1])]["largest_mib"] / jobs[str(sizes[0])]["largest_mib"], 2)
        for engine, jobs in results.items()
    }
    for engine, factor in growth.items():
        click.echo(f"{engine}: {factor} times the memory for {sizes[-1] / sizes[0]:g} the images")
    click.echo(json.dumps({"jobs": results, "growth": growth}))


if __name__ == "__main__":
    main()
