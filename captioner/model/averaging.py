"""Averages the weights of models.

Models that were fine-tuned from the same model are often better averaged than alone, and the
average is as fast as one model (Wortsman et al. 2022, "Model soups"). An encoder that has
memorised its images is better halfway back to its published weights (Wortsman et al. 2022, "Robust
fine-tuning of zero-shot models").
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from captioner import storage
from captioner.errors import InputError, OutputError
from captioner.model import bundle
from captioner.model.build import build_model

__all__ = ["average_models"]


def average_models(
    models: Sequence[str],
    output: str,
    *,
    encoder_weights: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the average of some bundles as a bundle with float16 weights.

    Args:
        models: the bundles' directories; a directory that is named twice counts twice.
        output: the directory to write.
        encoder_weights: published weights of the encoder; the average's encoder is averaged with
            them.
        overwrite: replace a model in ``output``.

    Raises:
        InputError: the models have different settings or vocabularies.
        BundleError: a model cannot be loaded.
        OutputError: ``output`` has a model already, or cannot be written.
    """
    output = storage.absolute(output)
    if not overwrite and "config.json" in storage.names(output):
        raise OutputError(f"{output} has a model already; add --overwrite to replace it")
    first, *others = (bundle.load(storage.absolute(model)) for model in models)
    state = {name: tensor.double() for name, tensor in first.model.state_dict().items()}
    for model, other in zip(models[1:], others, strict=True):
        for name in ("config.json", "tokenizer.json"):
            if other.digests[name] != first.digests[name]:
                raise InputError(f"{model} has another {name} than {models[0]}")
        for name, tensor in other.model.state_dict().items():
            state[name] += tensor
    state = {name: tensor / len(models) for name, tensor in state.items()}
    if encoder_weights is not None:
        published = build_model(first.model.config, encoder_weights).state_dict()
        state = _with_encoder_halfway(state, published)
    first.model.load_state_dict(state)
    first.model.config = replace(first.config, low_score=None)  # it was another model's
    if seen := [images for model in models if (images := bundle.load_images(model))]:
        bundle.save_images(output, reduce(or_, seen))
    else:
        storage.delete(storage.join(output, bundle.IMAGES))
    bundle.save(output, first.model, first.vocabulary, dtype=torch.float16)


def _with_encoder_halfway(
    state: dict[str, Tensor], published: dict[str, Tensor]
) -> dict[str, Tensor]:
    return {
        name: (tensor + published[name].double()) / 2 if name.startswith("encoder.") else tensor
        for name, tensor in state.items()
    }
