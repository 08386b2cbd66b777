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
from captioner.config import ModelConfig
from captioner.errors import InputError, OutputError
from captioner.model import bundle
from captioner.model.build import build_model
from captioner.model.vocabulary import SPECIAL, Vocabulary

__all__ = ["average_models"]


def average_models(
    models: Sequence[str],
    output: str,
    *,
    encoder_weights: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the average of some bundles as a bundle with float16 weights.

    A vocabulary may be another one that was extended. The rows of the words that only some models
    know are averaged over these.

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
    storage.check_target(storage.join(output, "config.json"))
    if not overwrite and "config.json" in storage.names(output):
        raise OutputError(f"{output} has a model already; add --overwrite to replace it")
    loaded = [bundle.load(storage.absolute(model)) for model in models]
    widest = max(loaded, key=lambda each: len(each.vocabulary))
    for model, each in zip(models, loaded, strict=True):
        if _comparable(each.config) != _comparable(widest.config):
            raise InputError(f"{model} and the other models differ in config.json")
        if not _is_extended(each.vocabulary, widest.vocabulary):
            raise InputError(f"{model} and the other models differ in tokenizer.json")
    state = _mean([each.model.state_dict() for each in loaded], widest.model.state_dict())
    if encoder_weights is not None:
        published = build_model(widest.config, encoder_weights).state_dict()
        state = _with_encoder_halfway(state, published)
    widest.model.load_state_dict(state)
    widest.model.config = replace(widest.config, low_score=None)  # it was another model's
    if seen := [images for model in models if (images := bundle.load_images(model))]:
        bundle.save_images(output, reduce(or_, seen))
    else:
        storage.delete(storage.join(output, bundle.IMAGES))
    bundle.save(output, widest.model, widest.vocabulary, dtype=torch.float16)


def _comparable(config: ModelConfig) -> ModelConfig:
    """The settings without those that may differ."""
    return replace(config, low_score=None, vocabulary_size=len(SPECIAL))


def _is_extended(vocabulary: Vocabulary, other: Vocabulary) -> bool:
    """Whether the other one is this one, or this one with more words after its own."""
    if vocabulary.kind == "bpe":
        return vocabulary.to_json() == other.to_json()
    ids = range(len(vocabulary))
    return vocabulary.words(ids) == other.words(ids)


def _mean(states: Sequence[dict[str, Tensor]], widest: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean of each weight, row by row over the models that have the row."""
    means = {}
    for name, like in widest.items():
        rows = like.new_zeros(like.reshape(-1, *like.shape[1:]).shape, dtype=torch.float64)
        counts = torch.zeros(len(rows), dtype=torch.float64)
        for state in states:
            tensor = state[name].reshape(-1, *like.shape[1:])  # a number is one row
            rows[: len(tensor)] += tensor
            counts[: len(tensor)] += 1
        means[name] = (rows / counts.view(-1, *[1] * (rows.ndim - 1))).reshape(like.shape)
    return means


def _with_encoder_halfway(
    state: dict[str, Tensor], published: dict[str, Tensor]
) -> dict[str, Tensor]:
    return {
        name: (tensor + published[name].double()) / 2 if name.startswith("encoder.") else tensor
        for name, tensor in state.items()
    }
