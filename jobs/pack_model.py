"""Stores a trained model in half precision: ``python jobs/pack_model.py MODEL DIRECTORY``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import torch

from captioner import bundle, storage


@click.command()
@click.argument("model")
@click.argument("directory")
def main(model: str, directory: str) -> None:
    """Writes the bundle MODEL to DIRECTORY with float16 weights."""
    loaded = bundle.load(storage.absolute(model))
    bundle.save(storage.absolute(directory), loaded.model, loaded.vocabulary, dtype=torch.float16)


if __name__ == "__main__":
    main()
