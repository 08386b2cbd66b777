"""Which words or subwords of a dataset's captions a model is trained on."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest
from click.testing import CliRunner, Result

from captioner.cli import main
from captioner.config import DecodeConfig, LaunchConfig, RunConfig, TrainConfig
from captioner.data.dataset import CaptionedImage, Split
from captioner.evaluation.captions import caption_dataset
from captioner.model import bundle
from captioner.model.vocabulary import EOS, PAD, START, Vocabulary
from captioner.output.attention import decode as decode_maps
from captioner.training.batches import captions_to_encode
from captioner.training.run import train
from captioner.training.self_critical import SelfCriticalTraining
from captioner.training.trainer import Trainer
from captioner.training.words import check_tokenizer
from conftest import TINY, tiny_model, write_photos

IMAGE = CaptionedImage("a.jpg", ["A dog's ball.", "A dog."], "a.jpg", [["a", "ball"], ["a"]])


def test_the_words_that_a_dataset_gives_are_trained_on():
    assert captions_to_encode(IMAGE, "all", "ptb") == [["a", "ball"], ["a"]]
    assert captions_to_encode(IMAGE, "first", "ptb") == [["a", "ball"]]
    without = dataclasses.replace(IMAGE, tokens=None)
    assert captions_to_encode(without, "all", "ptb") == IMAGE.captions
    assert captions_to_encode(IMAGE, "all", "bpe") == IMAGE.captions, "subwords keep the spelling"


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


@pytest.mark.parametrize(
    ("largest", "minimum", "expected"),
    [(None, 1, {"a", "dog", "on", ".", "'s"}), (2, 1, {"a", "dog"}), (9, 2, {"a", "dog"})],
)
def test_the_most_frequent_words_are_kept(largest, minimum, expected):
    vocabulary = Vocabulary.from_captions(
        ["a dog's dog on a dog."], minimum_count=minimum, largest=largest, kind="ptb"
    )
    assert set(vocabulary.words(range(4, len(vocabulary)))) == expected


# A model of subwords, trained, resumed and used from the command line.


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def _line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    return result.output.splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A dataset of eight photos, and the weights of an encoder."""
    folder = tmp_path_factory.mktemp("subwords")
    photos = write_photos(folder / "data" / "Images", 8)
    texts = ("A dog's ball, on the grass .", "Two dogs — “jumping” — near a café!")
    lines = [f'{path.name},"{texts[number % 2]}"' for number, path in enumerate(photos)]
    (folder / "data" / "captions.txt").write_text("\n".join(["image,caption", *lines]) + "\n")
    for name, some in (("train", photos[:6]), ("val", photos[6:])):
        (folder / f"{name}.txt").write_text("\n".join(path.name for path in some))
    _random_weights(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder


def _train(folder: Path, output: str, *options: object) -> Result:
    lists = ("--train-list", folder / "train.txt", "--val-list", folder / "val.txt")
    where = ("--device", "cpu", "--precision", "fp32")
    size = ("--batch-size", 3, "--minimum-count", 1, "--warmup-steps", 0)
    return _run("train", folder / "data", folder / output, *lists, *where, *size, *options)


def _new(folder: Path, output: str, *options: object) -> Result:
    shape = ("--encoder", TINY.backbone, "--image-size", 64, "--width", 32, "--layers", 2)
    weights = ("--heads", 4, "--encoder-weights", folder / "weights.safetensors")
    return _train(folder, output, *shape, *weights, *options)


BPE = ("--tokenizer", "bpe", "--vocabulary-size", 270)


@pytest.fixture(scope="module")
def subword_model(folder: Path) -> Path:
    result = _new(folder, "model", *BPE, "--epochs", 1, "--scst-epochs", 1, "--scst-samples", 2)
    assert result.exit_code == 0, result.output
    return folder / "model"


def test_a_model_of_subwords_is_trained_and_resumed(folder: Path, subword_model: Path):
    loaded = bundle.load(str(subword_model))
    assert loaded.config.tokenizer == loaded.vocabulary.kind == "bpe"
    assert loaded.config.vocabulary_size == len(loaded.vocabulary) == 274
    assert json.loads((subword_model / "training.json").read_text())["model"]["tokenizer"] == "bpe"
    ids = loaded.vocabulary.encode("a dog's ball, near a café", 50)
    assert loaded.vocabulary.decode(ids[1:-1]) == "a dog's ball, near a café"
    before = (subword_model / "tokenizer.json").read_bytes()
    more = ("--epochs", 1, "--scst-epochs", 2, "--scst-samples", 2)
    for changed, option in (
        (BPE[2:], "--tokenizer"),
        ((*BPE[:3], 280), "--vocabulary-size"),
        (BPE[:2], "--vocabulary-size"),
    ):
        assert f"other settings ({option})" in _line(_new(folder, "model", *changed, *more))
    resumed = _new(folder, "model", *BPE, *more)
    assert resumed.exit_code == 0, resumed.output
    epochs = (subword_model / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(each)["epoch"] for each in epochs] == [1, 2, 3]
    assert (subword_model / "last" / "tokenizer.json").read_bytes() == before


def test_each_word_of_a_caption_has_a_map_and_a_logprob(
    folder: Path, subword_model: Path, tmp_path: Path
):
    arguments = ("caption", folder / "data" / "Images", tmp_path / "out", "--model", subword_model)
    result = _run(*arguments, "--engine", "local", "--device", "cpu")
    assert result.exit_code == 0, result.output
    rows = pyarrow.dataset.dataset(tmp_path / "out").to_table().to_pylist()
    assert len(rows) == 8
    for row in rows:
        assert (row["status"], row["caption"]) == ("ok", " ".join(row["tokens"]))
        maps_THW = decode_maps(row["attention"], row["attention_peak"])
        assert len(maps_THW) == len(row["tokens"]) == len(row["token_logprobs"])
        np.testing.assert_allclose(maps_THW.sum((1, 2)), 1, atol=0.05)
        assert row["finish"] in ("stop", "length")
    assert "--allow-unknown is for models of words" in _line(_run(*arguments, "--allow-unknown"))
    data = [CaptionedImage(row["uri"], ["a dog"]) for row in rows]
    run = RunConfig(device="cpu", precision="fp32")
    scored = caption_dataset(data, str(subword_model), decode=DecodeConfig(), run=run)
    assert scored.captions == [row["caption"] for row in rows]


def test_training_on_keeps_the_models_tokenizer(folder: Path, subword_model: Path):
    again = ("--model", subword_model, "--epochs", 1)
    refused = {
        f"--tokenizer words: the model {subword_model} was trained with --tokenizer bpe": (
            "--tokenizer",
            "words",
        ),
        "give --model or --vocabulary-size, not both": ("--vocabulary-size", 300),
        "--extend-vocabulary is for models with words": ("--extend-vocabulary",),
    }
    for message, options in refused.items():
        assert message in _line(_train(folder, "refused", *again, *options))
    assert not (folder / "refused").exists()
    kept = _train(folder, "kept", *again, "--tokenizer", "bpe")
    assert kept.exit_code == 0, kept.output
    expected = (subword_model / "tokenizer.json").read_bytes()
    assert (folder / "kept" / "tokenizer.json").read_bytes() == expected


def test_a_model_of_words_does_not_become_one_of_subwords(folder: Path, model_directory: Path):
    options = ("--model", model_directory, "--epochs", 1, "--largest-unknown", 1)
    message = "was trained with --tokenizer words and keeps it: remove --tokenizer or --model"
    assert message in _line(_train(folder, "other", *options, "--tokenizer", "bpe"))
    check_tokenizer(str(model_directory), "words")


def test_too_few_subwords_and_captions_that_do_not_fit_are_told(folder: Path, caplog):
    few = _new(folder, "few", *BPE[:3], 255)
    assert "--vocabulary-size 255: --tokenizer bpe needs at least 256" in _line(few)
    assert not (folder / "few").exists()
    examples = [CaptionedImage(str(path), ["a dog " * 9]) for path in _photos(folder)]
    with caplog.at_level("WARNING"):
        train(
            Split(examples[:6], examples[6:], []),
            str(folder / "long"),
            model_config=dataclasses.replace(TINY, tokenizer="bpe"),
            config=TrainConfig(epochs=1, minimum_count=1, largest_vocabulary=256),
            launch=LaunchConfig(device="cpu"),
            encoder_weights=str(folder / "weights.safetensors"),
        )
    [line] = [each for each in caplog.messages if "positions" in each]
    assert line.startswith("100.0% of the training captions are longer than the model's 12 ")


def _photos(folder: Path) -> list[Path]:
    return sorted((folder / "data" / "Images").iterdir())


def test_self_critical_rewards_compare_words(folder: Path):
    text = "A dog's ball, on the grass."
    vocabulary = Vocabulary.from_captions([text] * 5, largest=270, kind="bpe")
    model = tiny_model(tokenizer="bpe", vocabulary_size=len(vocabulary))
    trainer = Trainer(model, vocabulary, TrainConfig(scst_samples=2), device="cpu")
    images = [CaptionedImage(str(path), [text]) for path in _photos(folder)]
    critical = SelfCriticalTraining(trainer, images)
    ids = vocabulary.encode(text, 99)
    assert len(ids) > 9
    assert critical._words([*ids, PAD, PAD]) == [
        "a",
        "dog",
        "'s",
        "ball",
        "on",
        "the",
        "grass",
        "<eos>",
    ]
    assert critical._words(ids[:-1])[-1] == "grass"
    # Spelled in bytes: other ids, the same words.
    places = {each: id_ for id_, each in enumerate(vocabulary.words(range(260)))}
    spelled = [places[byte] for word in text.lower().split() for byte in f"Ġ{word}"]
    assert critical._words([START, *spelled, EOS]) == critical._words(ids)
