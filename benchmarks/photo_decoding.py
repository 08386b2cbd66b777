"""Decoding of 12-megapixel photos against decoding in full, and the captions; last line JSON.

python benchmarks/photo_decoding.py DATA --list DATA/val.txt

The photos are enlarged to 4000×3000 (Lanczos) and stored as JPEG of quality 90. Each is decoded as
captioner does it and in full, one after the other, in one thread; both ways end in the same resize.
How many captions change by themselves shows noise: a share of the values of the latter, one step of
255 up or down.
"""

import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
from PIL import Image

from captioner import storage
from captioner.config import DecodeConfig
from captioner.data import images
from captioner.data.dataset import read_dataset
from captioner.model import bundle
from captioner.model.native import Captioner

SIDES = 4000, 3000
BATCH = 32  # images
NOISE = 0.01, 0.1  # shares of the values


def enlarge(data: bytes) -> bytes:
    """A photo as a camera of 12 megapixels would store it."""
    sink = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        large = image.convert("RGB").resize(SIDES, Image.Resampling.LANCZOS)
    large.save(sink, "JPEG", quality=90)
    return sink.getvalue()


def decode(data: bytes, size: int) -> np.ndarray:
    """As captioner does it."""
    pixels = images.decode(data, size).pixels_HW3
    assert pixels is not None
    return pixels


def decode_in_full(data: bytes, size: int) -> np.ndarray:
    """All pixels, then the resize."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def with_noise(pixels: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """A share of the values one step up or down."""
    steps = random.choice([-1, 0, 1], pixels.shape, p=[share / 2, 1 - share, share / 2])
    return np.clip(pixels + steps, 0, 255).astype(np.uint8)


def timed(
    way: Callable[[bytes, int], np.ndarray], data: bytes, size: int
) -> tuple[float, np.ndarray]:
    """Seconds, and the pixels."""
    begin = time.perf_counter()
    pixels = way(data, size)
    return time.perf_counter() - begin, pixels


@click.command()
@click.argument("data")
@click.option("--list", "names", required=True, help="File of the images' names.")
@click.option("--model", default=bundle.DEFAULT, help="Model directory.")
@click.option("--images", "count", default=100, show_default=True, help="Evenly from the list.")
@click.option("--rounds", default=3, show_default=True, help="Times each photo is decoded.")
@click.option("--beam", type=int, help="Beam width.  [default: the model's]")
def main(data: str, names: str, model: str, count: int, rounds: int, beam: int | None) -> None:
    """Times both ways of decoding, and captions what comes of them in float32."""
    examples = read_dataset(storage.absolute(data)).listed(names)
    places = np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(int)
    loaded = bundle.load(storage.absolute(model))
    size = loaded.config.image_size
    ways = {"captioner": decode, "in full": decode_in_full}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    pixels: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    stored = 0
    with TemporaryDirectory() as folder:
        paths = [Path(folder, f"{place}.jpg") for place in places]
        for path, place in zip(paths, places, strict=True):
            path.write_bytes(enlarge(storage.read(examples[place].uri)))
            stored += path.stat().st_size
        for turn in range(rounds):
            for path in paths:
                photo = path.read_bytes()
                for way in list(ways)[:: 1 if turn % 2 else -1]:
                    spent, decoded = timed(ways[way], photo, size)
                    seconds[way].append(spent)
                    if turn == 0:
                        pixels[way].append(decoded)
    random = np.random.default_rng(0)
    for share in NOISE:
        noisy = [with_noise(each, share, random) for each in pixels["in full"]]
        pixels[f"noise in {share:.0%}"] = noisy
    captioner = Captioner(loaded, DecodeConfig(beam=beam, attention="none"), precision="fp32")
    captions: dict[str, list[str]] = {}
    for way, arrays in pixels.items():
        batches = (arrays[begin : begin + BATCH] for begin in range(0, len(arrays), BATCH))
        captions[way] = [each.text for batch in batches for each in captioner(np.stack(batch))]
    expected = captions.pop("in full")
    for ours, full in zip(captions["captioner"], expected, strict=True):
        if ours != full:
            click.echo(f"captioner: {ours}\nin full:   {full}\n")
    equal = {
        way: sum(ours == full for ours, full in zip(some, expected, strict=True))
        for way, some in captions.items()
    }
    ratio = statistics.median(
        full / ours for ours, full in zip(seconds["captioner"], seconds["in full"], strict=True)
    )
    speeds = {way: 1 / statistics.median(spent) for way, spent in seconds.items()}
    for way, speed in speeds.items():
        click.echo(f"{way}: {speed:.1f} images/s in one thread")
    click.echo(f"{ratio:.2f} times as fast")
    for way, count in equal.items():
        click.echo(f"{way}: {count} of {len(paths)} captions are equal to those in full")
    result = {
        "images": len(paths),
        "sides": SIDES,
        "bytes_an_image": round(stored / len(paths)),
        "images_per_second": {way: round(speed, 1) for way, speed in speeds.items()},
        "ratio": round(ratio, 2),
        "equal_captions": equal,
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
