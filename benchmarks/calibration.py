"""Whether a model's score and probabilities tell what is right; the last line is JSON.

captioner evaluate DATA --model MODEL --per-image flickr8k.parquet
python benchmarks/calibration.py flickr8k.parquet everyday.parquet --plot reliability.png

Each FILE has the images of one dataset, as ``captioner evaluate --per-image`` writes them. For
tenths of the images, by score, it prints the mean CIDEr. A score is *low* where the captions with
lower scores have half of their dataset's mean CIDEr, or less, on the mean of the datasets. With
``--write``, that goes into the config.json of a model, and whatever shows its captions marks them.

For tenths of the words, by probability, it prints the mean probability and the share of the words
that a reference of the image contains, and the expected calibration error, the mean difference of
the two.
"""

import json
import math
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet as pq

from captioner import storage
from captioner.errors import CaptionerError, InputError
from captioner.model.bundle import load_config
from captioner.model.tokenization import scoring_words
from captioner.runtime.plotting import prepare_matplotlib

COLUMNS = ["score", "cider", "tokens", "token_logprobs", "references"]
BINS = 10
LEAST_SHARE = 0.02  # of a dataset's images, below the low score: fewer say nothing
HALF = 0.5
_GIVE = "give a file that captioner evaluate --model MODEL --per-image FILE has written"


def read(path: str) -> pd.DataFrame:
    """The images' scores, CIDEr, words and references, the lowest score first.

    Raises:
        InputError: the file is not what ``captioner evaluate --per-image`` writes.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read: {reason}; {_GIVE}") from error
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise InputError(f"{path} has no column {missing[0]}; {_GIVE}")
    frame = table.select(COLUMNS).to_pandas()
    numbers = frame[["score", "cider"]]
    if set(numbers.dtypes) != {np.dtype(float)} or numbers.isna().any(axis=None):
        raise InputError(f"{path} lacks the score or the CIDEr of an image; {_GIVE}")
    if frame.empty:
        raise InputError(f"{path} has no images; {_GIVE}")
    return frame.sort_values("score", kind="stable").reset_index(drop=True)


def tenths(frame: pd.DataFrame) -> pd.DataFrame:
    """The means of each tenth of the rows."""
    return frame.groupby(np.arange(len(frame)) * BINS // len(frame)).mean(numeric_only=True)


def read_words(frame: pd.DataFrame) -> pd.DataFrame:
    """The words' ``probability``, lowest first; ``in_a_reference``: a reference contains the word.

    Punctuation is left out, as COCO's evaluation does.
    """
    words = []
    for image in frame.itertuples():
        known = {word for reference in image.references for word in scoring_words(reference)}
        for token, logprob in zip(image.tokens, image.token_logprobs, strict=True):
            if parts := set(scoring_words(token)):
                words.append((math.exp(logprob), parts <= known))
    found = pd.DataFrame(words, columns=["probability", "in_a_reference"]).astype(float)
    return found.sort_values("probability", kind="stable").reset_index(drop=True)


def calibration_error(bins: pd.DataFrame) -> float:
    """The mean difference of the probability and the share of words in a reference."""
    return float((bins["probability"] - bins["in_a_reference"]).abs().mean())


def rank_correlation(frame: pd.DataFrame) -> float:
    """Spearman's rank correlation of score and CIDEr."""
    return float(frame["score"].rank().corr(frame["cider"].rank()))


def find_low_score(frames: list[pd.DataFrame]) -> float | None:
    """The largest score below which captions have at most half of the CIDEr; None: there is none.

    Args:
        frames: the images of each dataset, the lowest score first.
    """
    means = [frame["cider"].cumsum() / np.arange(1, len(frame) + 1) for frame in frames]
    low = None
    for score in np.round(np.arange(-5.0, 0.0, 0.01), 2):
        below = [int(frame["score"].searchsorted(score)) for frame in frames]
        shares = [
            mean[count - 1] / frame["cider"].mean()
            for mean, count, frame in zip(means, below, frames, strict=True)
            if count >= LEAST_SHARE * len(frame)
        ]
        if shares and np.mean(shares) <= HALF:
            low = float(score)
    return low


def plot(frames: dict[str, pd.DataFrame], low: float | None, path: str) -> None:
    """Draws the mean CIDEr of each tenth by its mean score."""
    prepare_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, frame in frames.items():
        bins = tenths(frame)
        axes.plot(bins["score"], 100 * bins["cider"], marker="o", label=name)
    if low is not None:
        axes.axvline(low, color="grey", linestyle="--", label=f"low score, {low:g}")
    axes.set_xlabel("score: mean natural log-probability of a caption's words")
    axes.set_ylabel("CIDEr × 100")
    axes.legend()
    figure.savefig(path, dpi=100)


def write(model: str, low: float | None) -> None:
    """Records the low score in a model's config.json."""
    load_config(model)  # raises if this is not a model's directory
    path = storage.join(storage.absolute(model), "config.json")
    config = json.loads(storage.read(path))
    config["model"]["low_score"] = low
    storage.write(path, (json.dumps(config, indent=2) + "\n").encode())


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--plot", "picture", help="Picture file to write.  [default: none]")
@click.option("--write", "model", help="Model whose low score to set.  [default: none]")
def main(files: tuple[str, ...], picture: str | None, model: str | None) -> None:
    """Compares scores with CIDEr."""
    try:
        _compare(files, picture, model)
    except CaptionerError as error:
        raise click.ClickException(str(error)) from error


def _compare(files: tuple[str, ...], picture: str | None, model: str | None) -> None:
    frames = {Path(path).stem: read(path) for path in files}
    low = find_low_score(list(frames.values()))
    results = {}
    for name, frame in frames.items():
        bins, words = tenths(frame), tenths(read_words(frame))
        error, correlation = calibration_error(words), rank_correlation(frame)
        below = frame[frame["score"] < low] if low is not None else frame[:0]
        results[name] = {
            "images": len(frame),
            "cider": float(frame["cider"].mean()),
            "rank_correlation": correlation,
            "tenths": bins.round(3).to_dict("list"),
            "words": words.round(3).to_dict("list"),
            "calibration_error": error,
            "low": {"share": len(below) / len(frame), "cider": float(below["cider"].mean())},
        }
        click.echo(f"{name}: {len(frame)} images, rank correlation {correlation:.2f}")
        click.echo((bins * [1, 100]).round(2).to_string(index=False))
        click.echo(f"words, expected calibration error {error:.3f}")
        click.echo(words.round(2).to_string(index=False))
    click.echo(f"low score: {low}")
    if picture is not None:
        plot(frames, low, picture)
    if model is not None:
        write(model, low)
    click.echo(json.dumps({"low_score": low, "datasets": results}))


if __name__ == "__main__":
    main()
