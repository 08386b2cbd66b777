"""Stores trained models as one, in half precision: ``python jobs/pack_model.py MODEL… DIRECTORY``.

Several models' weights are averaged: models that were fine-tuned from one and the same model are
often better together than each alone, and cost no more than one (Wortsman et al. 2022, "Model
soups"). ``--encoder-weights`` is for an encoder that has learned its images by heart: between it
and the one that it was fine-tuned from is a better one to go on with (Wortsman et al. 2022,
"Robust fine-tuning").
"""

import sys
from functools import reduce
from operator import or_
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import torch

from captioner import storage
from captioner.errors import CaptionerError, printable
from captioner.model import bundle
from captioner.model.build import build_model


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.argument("directory")
@click.option(
    "--encoder-weights", help="Takes the encoder half the way back to these published weights."
)
def main(models: tuple[str, ...], directory: str, encoder_weights: str | None) -> None:
    """Writes the average of the bundles MODELS to DIRECTORY with float16 weights.

    A model that is named twice counts twice.
    """
    first, *others = (bundle.load(storage.absolute(model)) for model in models)
    state = {name: tensor.double() for name, tensor in first.model.state_dict().items()}
    for model, other in zip(models[1:], others, strict=True):
        for name in ("config.json", "tokenizer.json"):
            if other.digests[name] != first.digests[name]:
                raise click.ClickException(f"{model} has another {name} than {models[0]}")
        for name, tensor in other.model.state_dict().items():
            state[name] += tensor
    state = {name: tensor / len(models) for name, tensor in state.items()}
    if encoder_weights is not None:
        published = build_model(first.model.config, encoder_weights).state_dict()
        for name, tensor in published.items():
            if name.startswith("encoder."):
                state[name] = (state[name] + tensor.double()) / 2
    first.model.load_state_dict(state)
    directory = storage.absolute(directory)
    if seen := [images for model in models if (images := bundle.load_images(model))]:
        bundle.save_images(directory, reduce(or_, seen))
    else:
        storage.delete(storage.join(directory, bundle.IMAGES))
    bundle.save(directory, first.model, first.vocabulary, dtype=torch.float16)


if __name__ == "__main__":
    try:
        main()
    except CaptionerError as error:
        sys.exit(f"pack_model: {printable(str(error))}")
