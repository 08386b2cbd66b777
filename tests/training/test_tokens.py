"""Which words of a dataset's captions a model is trained on."""

import dataclasses
import json

import pytest

from captioner.config import LaunchConfig, TrainConfig
from captioner.data.dataset import CaptionedImage, Split
from captioner.model import bundle
from captioner.training.batches import captions_to_encode
from captioner.training.run import train
from conftest import TINY, write_photos

IMAGE = CaptionedImage("a.jpg", ["A dog's ball.", "A dog."], "a.jpg", [["a", "ball"], ["a"]])


def test_the_words_that_a_dataset_gives_are_trained_on():
    assert captions_to_encode(IMAGE, "all", "ptb") == [["a", "ball"], ["a"]]
    assert captions_to_encode(IMAGE, "first", "ptb") == [["a", "ball"]]
    without = dataclasses.replace(IMAGE, tokens=None)
    assert captions_to_encode(without, "all", "ptb") == IMAGE.captions


def test_the_notebooks_tokenizer_splits_the_captions_itself():
    assert captions_to_encode(IMAGE, "all", "whitespace") == IMAGE.captions
    assert captions_to_encode(IMAGE, "first", "whitespace") == ["A dog's ball."]


@pytest.mark.parametrize(
    ("tokenizer", "known", "unknown"),
    [("ptb", {"dog", "'s", "grass", "."}, "grass."), ("whitespace", {"dog's", "grass."}, "'s")],
)
def test_the_words_of_a_trained_model(tmp_path, tokenizer, known, unknown):
    paths = write_photos(tmp_path / "photos", 6)
    images = [CaptionedImage(str(path), ["A dog's on the grass."], path.name) for path in paths]
    train(
        Split(images[:4], images[4:], []),
        str(tmp_path / "model"),
        model_config=dataclasses.replace(TINY, tokenizer=tokenizer),
        config=TrainConfig(epochs=1, scst_epochs=1, scst_samples=2, batch_size=4, minimum_count=1),
        launch=LaunchConfig(device="cpu"),
        encoder_weights=_random_weights(tmp_path),
    )
    vocabulary = bundle.load(str(tmp_path / "model")).vocabulary
    words = set(vocabulary.words(range(len(vocabulary))))
    assert known < words
    assert unknown not in words
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model"]["tokenizer"] == tokenizer == vocabulary.kind


def _random_weights(folder) -> str:
    import timm
    from safetensors.torch import save_file

    path = folder / "weights.safetensors"
    save_file(timm.create_model(TINY.backbone).state_dict(), path)
    return str(path)
