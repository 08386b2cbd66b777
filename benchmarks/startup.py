"""Seconds until ten photos are captioned from a cold start, and of --help; last line JSON.

python benchmarks/startup.py

Each run is a process of its own: the two commands as a user gives them, and the first of them once
more with the clock read between its steps, which tells where its time goes.
"""

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
from PIL import Image

from captioner.commands.importing import importing

CAPTIONER = str(Path(sys.executable).with_name("captioner"))
PHOTOS = 10


def write_photos(folder: Path) -> None:
    """JPEGs of a usual size."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(PHOTOS):
        coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


def seconds_of(command: list[str]) -> float:
    """Of a process, from its start to its end."""
    begin = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - begin


def stepwise(begin: float, photos: str, output: str) -> None:
    """The command in this process, which was started at ``begin``; prints its steps as JSON."""
    steps: dict[str, float] = {"Python": time.time() - begin}

    def timed(step: str, action: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(action)
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.time()
            try:
                return action(*arguments, **options)
            finally:
                steps[step] = steps.get(step, 0.0) + time.time() - start

        return run

    with importing():
        timed("import torch", __import__)("torch")
        timed("import timm", __import__)("timm")
        timed("import the rest", __import__)("captioner.caption.job")
    from captioner.caption import inputs, job
    from captioner.caption import steps as stages
    from captioner.caption.batches import BatchCaptioner
    from captioner.model import bundle

    inputs.load_model = timed("load the model", inputs.load_model)
    BatchCaptioner.load = timed("prepare the model", BatchCaptioner.load)  # type: ignore
    BatchCaptioner.__call__ = timed("caption", BatchCaptioner.__call__)  # type: ignore
    stages.write_part = timed("write the part", stages.write_part)
    caption_images = timed("all of the job", job.caption_images)
    caption_images(photos, output, bundle.DEFAULT)
    inner = ("load the model", "prepare the model", "caption", "write the part")
    steps["list, read, decode, keep the books"] = steps.pop("all of the job") - sum(
        steps[step] for step in inner
    )
    print(json.dumps(steps | {"ended": time.time()}))


def steps_of(photos: str, output: str) -> dict[str, float]:
    """Seconds of each step, in a process of its own."""
    code = "import startup, sys; startup.stepwise(float(sys.argv[1]), *sys.argv[2:])"
    command = [sys.executable, "-c", code, str(time.time()), photos, output]
    folder = Path(__file__).parent
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=folder)
    steps: dict[str, float] = json.loads(ran.stdout)
    steps["end of the process"] = time.time() - steps.pop("ended")
    return steps


@click.command()
@click.option("--runs", default=5, show_default=True)
def main(runs: int) -> None:
    """Times the commands in turns; prints medians."""
    seconds: dict[str, list[float]] = {"caption": [], "help": []}
    steps: list[dict[str, float]] = []
    with TemporaryDirectory() as directory:
        photos = Path(directory, "photos")
        write_photos(photos)
        for run in range(runs):
            output = f"{directory}/{run}"
            seconds["help"].append(seconds_of([CAPTIONER, "--help"]))
            caption = [CAPTIONER, "caption", str(photos), output, "--engine", "local"]
            seconds["caption"].append(seconds_of(caption))
            steps.append(steps_of(str(photos), f"{output}-stepwise"))
    medians = {step: statistics.median(each[step] for each in steps) for step in steps[0]}
    for step, spent in medians.items():
        click.echo(f"{step:36} {spent:6.2f} s")
    results = {name: round(statistics.median(each), 2) for name, each in seconds.items()}
    click.echo(f"captioner caption, {PHOTOS} photos: {results['caption']} s")
    click.echo(f"captioner --help: {results['help']} s")
    rounded = {step: round(spent, 2) for step, spent in medians.items()}
    click.echo(json.dumps({"runs": runs, "seconds": results, "steps": rounded}))


if __name__ == "__main__":
    main()
