"""BLEU-4 and CIDEr of a model for several beam widths and length penalties; the last line is JSON.

python benchmarks/beam_search.py DATA --list DATA/val.txt --model model
"""

import itertools
import json

import click
import numpy as np
import torch

from captioner import storage
from captioner.config import DecodeConfig
from captioner.data.dataset import read_dataset
from captioner.evaluation import metrics
from captioner.model import bundle
from captioner.model.generate import generate
from captioner.runtime.device import choose_device, choose_dtype
from captioner.runtime.memory import keep_freed_memory
from captioner.training.features import compute_features

BATCH = 50  # images


@click.command()
@click.argument("data")
@click.option("--list", "names", required=True, help="File of the images' names.")
@click.option("--model", default=bundle.DEFAULT, help="Model directory.")
@click.option("--beams", default="1,2,3,5", show_default=True)
@click.option("--length-penalties", default="0.7,1.0", show_default=True)
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto")
def main(
    data: str, names: str, model: str, beams: str, length_penalties: str, precision: str
) -> None:
    """Scores the greedy and the beam searches of a model side by side."""
    device = choose_device("auto")
    dtype = choose_dtype(precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    listed = read_dataset(storage.absolute(data)).listed(names)
    loaded = bundle.load(storage.absolute(model))
    encoder = loaded.model.encoder.to(device)
    size = loaded.config.image_size
    [features] = compute_features(encoder, listed, image_size=size, dtype=dtype)
    places = np.flatnonzero(features.decodable())
    decoder = loaded.model.decoder.to(device, dtype)
    references = [listed[place].captions for place in places]
    results = []
    for beam, penalty in itertools.product(
        map(int, beams.split(",")), map(float, length_penalties.split(","))
    ):
        if beam == 1 and any(result["beam"] == 1 for result in results):
            continue  # greedy search has nothing to rank
        decode = DecodeConfig(beam=beam, length_penalty=penalty, max_words=30, attention="none")
        captions = []
        for begin in range(0, len(places), BATCH):
            some = [features[place] for place in places[begin : begin + BATCH]]
            batch = torch.from_numpy(np.stack(some))
            hypotheses = generate(decoder, batch.to(device, dtype), decode)
            captions += [loaded.vocabulary.decode(each.ids) for each in hypotheses]
        scores = metrics.score(captions, references).corpus
        results.append({"beam": beam, "length_penalty": penalty, **scores})
        click.echo(
            f"beam {beam}, length penalty {penalty}: "
            + ", ".join(
                f"{metrics.NAMES[name]} {100 * value:.1f}" for name, value in scores.items()
            )
        )
    click.echo(json.dumps({"model": model, "images": len(places), "results": results}))


if __name__ == "__main__":
    main()
