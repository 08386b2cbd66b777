from pathlib import Path

import safetensors.torch
import torch
from click.testing import CliRunner, Result

from captioner.cli import main
from captioner.model import bundle
from captioner.model.vocabulary import Vocabulary
from conftest import tiny_model


def _average(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["average-models", *map(str, arguments)])


def test_the_average_is_stored_in_half_precision(tmp_path: Path, vocabulary):
    models = [tiny_model(seed) for seed in range(2)]
    for number, model in enumerate(models):
        bundle.save(str(tmp_path / str(number)), model, vocabulary)
        seen = bundle.SeenImages(frozenset({f"{number}.jpg"}), frozenset({"2.jpg"}))
        bundle.save_images(str(tmp_path / str(number)), seen)
    published = tiny_model(2).encoder.backbone.state_dict()
    torch.save(published, tmp_path / "encoder.pth")
    options = ("--encoder-weights", tmp_path / "encoder.pth")
    averaged = _average(tmp_path / "0", tmp_path / "0", tmp_path / "1", tmp_path / "new", *options)
    assert averaged.exit_code == 0, averaged.output
    for number in range(2):  # their record is not the next model's in that place
        (tmp_path / str(number) / bundle.IMAGES).rename(tmp_path / f"{number}.json")
    assert _average(tmp_path / "0", tmp_path / "new", "--overwrite").exit_code == 0
    assert bundle.load_images(str(tmp_path / "new")) is None
    for number in range(2):
        (tmp_path / f"{number}.json").rename(tmp_path / str(number) / bundle.IMAGES)
    options += ("--overwrite",)
    averaged = _average(tmp_path / "0", tmp_path / "0", tmp_path / "1", tmp_path / "new", *options)
    assert averaged.exit_code == 0, averaged.output
    seen = bundle.SeenImages(frozenset({"0.jpg", "1.jpg"}), frozenset({"2.jpg"}))
    assert bundle.load_images(str(tmp_path / "new")) == seen
    stored = safetensors.torch.load_file(tmp_path / "new" / "model.safetensors")
    first, second = (model.state_dict() for model in models)
    for name, tensor in stored.items():
        expected = (2 * first[name].double() + second[name].double()) / 3
        if name.startswith("encoder."):
            expected = (expected + published[name.removeprefix("encoder.backbone.")]) / 2
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float16
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-3, atol=1e-4)


def test_models_of_different_settings_are_not_averaged(tmp_path: Path, vocabulary):
    bundle.save(str(tmp_path / "0"), tiny_model(), vocabulary)
    bundle.save(str(tmp_path / "1"), tiny_model(layers=1), vocabulary)
    for other, message in (("1", "differ in config.json"), ("2", "it has no config.json")):
        refused = _average(tmp_path / "0", tmp_path / other, tmp_path / "new")
        assert refused.exit_code == 2
        [line] = refused.output.splitlines()
        assert message in line
    assert not (tmp_path / "new").exists()


def test_models_of_different_tokenizers_are_not_averaged(tmp_path: Path, vocabulary):
    subwords = [
        Vocabulary.from_captions([text] * 5, largest=260, kind="bpe")
        for text in ("a dog on the grass", "two men in red")
    ]
    for number, each in enumerate(subwords):
        model = tiny_model(tokenizer="bpe", vocabulary_size=len(each))
        bundle.save(str(tmp_path / str(number)), model, each)
    bundle.save(str(tmp_path / "words"), tiny_model(), vocabulary)
    assert _average(tmp_path / "0", tmp_path / "0", tmp_path / "same").exit_code == 0
    assert bundle.load(str(tmp_path / "same")).vocabulary.kind == "bpe"
    for other, message in (("1", "differ in tokenizer.json"), ("words", "differ in config.json")):
        refused = _average(tmp_path / "0", tmp_path / other, tmp_path / "new")
        assert refused.exit_code == 2
        [line] = refused.output.splitlines()
        assert message in line
    assert not (tmp_path / "new").exists()


def test_words_that_only_some_models_know_are_averaged_over_these(tmp_path: Path, vocabulary):
    wide = vocabulary.extended([f"{word} zebra" for word in ("a", "red")] * 5)
    assert len(wide) == len(vocabulary) + 1
    models = [tiny_model(0), tiny_model(1, vocabulary_size=len(wide))]
    for number, (model, words) in enumerate(zip(models, (vocabulary, wide), strict=True)):
        bundle.save(str(tmp_path / str(number)), model, words)
    averaged = _average(*(tmp_path / name for name in ("0", "1", "1", "new")))
    assert averaged.exit_code == 0, averaged.output
    new = bundle.load(str(tmp_path / "new"))
    assert new.vocabulary.words(range(len(wide))) == wide.words(range(len(wide)))
    for name in ("decoder.embedding.weight", "decoder.head.weight"):
        small, large = (model.state_dict()[name] for model in models)
        expected = torch.cat([(small + 2 * large[:-1]) / 3, large[-1:]])
        torch.testing.assert_close(new.model.state_dict()[name], expected, rtol=1e-3, atol=1e-4)
    other = Vocabulary.from_captions(["two men and a dog"] * 5)
    bundle.save(str(tmp_path / "2"), tiny_model(2, vocabulary_size=len(other)), other)
    refused = _average(tmp_path / "1", tmp_path / "2", tmp_path / "newer")
    assert refused.exit_code == 2
    assert f"{tmp_path}/2 and the other models differ in tokenizer.json" in refused.output


def test_a_forgotten_output_replaces_no_model(tmp_path: Path, vocabulary):
    for number in range(2):
        bundle.save(str(tmp_path / str(number)), tiny_model(number), vocabulary)
    before = (tmp_path / "1" / "model.safetensors").read_bytes()
    refused = _average(tmp_path / "0", tmp_path / "1")
    assert refused.exit_code == 2
    message = f"captioner: {tmp_path}/1 has a model already; add --overwrite to replace it\n"
    assert refused.output == message
    assert (tmp_path / "1" / "model.safetensors").read_bytes() == before
    (tmp_path / "file").touch()
    refused = _average(tmp_path / "0", tmp_path / "file")
    assert refused.exit_code == 2
    assert refused.output.startswith("captioner: cannot write ")
