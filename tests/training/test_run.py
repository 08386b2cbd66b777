import copy
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from captioner import storage
from captioner.config import PRESETS, DecodeConfig, LaunchConfig, TrainConfig
from captioner.data import dataset
from captioner.data.dataset import CaptionedImage, Split
from captioner.data.views import load_view
from captioner.errors import CaptionerError, InputError, OutputError, StoppedError
from captioner.evaluation.cider import CiderD
from captioner.model import bundle
from captioner.model.build import build_model
from captioner.model.bundle import SeenImages
from captioner.model.encoder import ImageEncoder
from captioner.model.native import Captioner
from captioner.model.vocabulary import EOS, PAD, START, Vocabulary
from captioner.training import features as features_module
from captioner.training import run as training
from captioner.training import self_critical, trainer
from captioner.training.batches import TrainingImages, collate
from captioner.training.features import compute_features
from captioner.training.images import load_images
from captioner.training.journal import Epoch, best_of
from captioner.training.self_critical import SelfCriticalTraining
from captioner.training.validation import Validation
from captioner.training.worker import Job, Worker
from conftest import TINY, tiny_model, write_photos

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty-eight squares of a colour, two captions each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "data"
    (directory / "Images").mkdir(parents=True)
    lines = ["image,caption"]
    for index in range(48):
        word, colour = list(COLOURS.items())[index % 3]
        Image.new("RGB", (64, 64), colour).save(directory / "Images" / f"{index:02d}.png")
        lines += [f"{index:02d}.png,A {word} square .", f'{index:02d}.png,"{word}, all of it ."']
    (directory / "captions.txt").write_text("\n".join(lines) + "\n")
    names = [f"{index:02d}.png" for index in range(48)]
    (directory / "train.txt").write_text("\n".join(names[:36]))
    (directory / "val.txt").write_text("\n".join(names[36:]))
    return directory


def _weights(tmp_path: Path) -> str:
    path = tmp_path / "encoder.pth"
    torch.manual_seed(0)
    torch.save(tiny_model().encoder.backbone.state_dict(), path)
    return str(path)


def _split(data: Path) -> Split:
    return dataset.read_dataset(str(data)).split(str(data / "train.txt"), str(data / "val.txt"))


def _config(**changes: object) -> TrainConfig:
    config = TrainConfig(
        epochs=2,
        batch_size=6,
        captions="all",
        minimum_count=2,
        learning_rate=2e-3,
        fine_tune_from=None,
        precision="fp32",
    )
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("fine_tune_from", [None, 2])
def test_a_model_learns_to_name_colours(fine_tune_from, data: Path, tmp_path: Path):
    output = tmp_path / "model"
    epochs = training.train(
        _split(data),
        str(output),
        model_config=dataclasses.replace(TINY, pre_norm=True),
        config=_config(epochs=12, captions="first", fine_tune_from=fine_tune_from),
        encoder_weights=_weights(tmp_path),
    )
    assert epochs[-1].train_loss < epochs[0].train_loss / 2
    captioner = Captioner(bundle.load(str(output)), DecodeConfig(), device="cpu", precision="fp32")
    pixels = np.stack([np.full((64, 64, 3), colour, np.uint8) for colour in COLOURS.values()])
    expected = [f"a {word} square ." for word in COLOURS]
    assert [caption.text for caption in captioner(pixels)] == expected


def test_a_run_leaves_what_people_look_at(data: Path, tmp_path: Path, capsys):
    output = tmp_path / "model"
    epochs = training.train(
        _split(data),
        str(output),
        model_config=TINY,
        config=_config(scst_epochs=1, views=3, sort_batches=2, average=0.5, accumulate=2),
        encoder_weights=_weights(tmp_path),
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [each["epoch"] for each in lines] == [1, 2, 3]
    assert ["train_cider" in each for each in lines] == [False, False, True]
    assert capsys.readouterr().out.count("validation loss") == 3
    with Image.open(output / "curves.png") as plot:
        assert plot.format == "PNG"
    samples = (output / "samples.md").read_text()
    assert "## 36\\.png" in samples
    assert samples.count("\n3. ") == len(epochs[0].samples) == 8
    reader = EventAccumulator(str(output / "tensorboard"))
    reader.Reload()
    scalars = [each.value for each in reader.Scalars("validation_cider")]
    assert scalars == pytest.approx([each.validation_cider for each in epochs])
    best = max(epochs, key=lambda each: (each.validation_cider, -each.validation_loss))
    for directory, epoch in ((output, best), (output / "last", epochs[-1])):
        captioner = Captioner(bundle.load(str(directory)), DecodeConfig(max_words=30), device="cpu")
        [caption] = captioner(load_view(str(data / "Images" / "36.png"), 64, 0)[None])
        assert caption.text == epoch.samples[0]


def test_a_model_remembers_its_images_and_those_of_the_model_that_it_began_with(
    data: Path, tmp_path: Path
):
    names = [f"{index:02d}.png" for index in range(48)]
    first, second = tmp_path / "first", tmp_path / "second"
    begun = {"encoder_weights": _weights(tmp_path)}
    for output, (begin, middle, end) in {first: (0, 30, 40), second: (6, 36, 48)}.items():
        (data / "train.txt").write_text("\n".join(names[begin:middle]))
        (data / "val.txt").write_text("\n".join(names[middle:end]))
        split = _split(data)
        training.train(split, str(output), model_config=TINY, config=_config(epochs=1), **begun)
        begun = {"initial_model": str(output)}
    for output, middle, end in ((first, 30, 40), (second, 36, 48)):
        expected = bundle.SeenImages(frozenset(names[:middle]), frozenset(names[30:end]))
        for directory in (output, output / "last"):
            assert bundle.load_images(str(directory)) == expected


def test_training_goes_on_with_a_model(data: Path, tmp_path: Path):
    """Its vocabulary, its weights, its sizes: what the caller asks for is for new models."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    arguments = {"model_config": TINY, "encoder_weights": _weights(tmp_path)}
    begun = training.train(_split(data), first, config=_config(epochs=4), **arguments)
    wider = dataclasses.replace(TINY, width=96)
    config = _config(epochs=0, scst_epochs=1, scst_learning_rate=0.0)
    split = _split(data)
    arguments = {"model_config": wider, "config": config, "initial_model": first + "/last"}
    kept = training.train(split, second, **arguments)
    assert kept[0].validation_loss == begun[-1].validation_loss
    assert bundle.load(second).digests == bundle.load(first + "/last").digests
    fine_tuned = str(tmp_path / "third")
    arguments["config"] = _config(epochs=1, fine_tune_from=2, learning_rate=1e-3)
    assert training.train(split, fine_tuned, **arguments)[0].train_loss < begun[-1].train_loss
    with pytest.raises(OutputError, match=r"other settings \(--model\)"):
        training.train(split, fine_tuned, **{**arguments, "initial_model": fine_tuned})
    nothing = _config(epochs=0)
    with pytest.raises(InputError, match="nothing to train"):
        training.train(split, str(tmp_path / "fourth"), model_config=TINY, config=nothing)


def test_self_critical_training_raises_the_reward(data: Path, tmp_path: Path):
    """From a model that has barely begun to learn, samples come to name the colour."""
    epochs = training.train(
        _split(data),
        str(tmp_path / "model"),
        model_config=dataclasses.replace(TINY, pre_norm=True),
        config=_config(epochs=3, scst_epochs=12, scst_learning_rate=2e-3),
        encoder_weights=_weights(tmp_path),
    )
    critical = [each.train_cider for each in epochs if each.train_cider is not None]
    assert critical[-1] > 1.5 * critical[0]
    assert epochs[-1].validation_cider > epochs[2].validation_cider


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_killed_run_ends_as_one_that_was_not(
    average: float, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed in the second epoch, and between the first epoch's files and its checkpoint."""
    arguments = {
        "model_config": dataclasses.replace(TINY, pre_norm=True),
        "config": _config(epochs=3, scst_epochs=1, views=2, average=average),
        "encoder_weights": _weights(tmp_path),
    }
    whole = training.train(_split(data), str(tmp_path / "whole"), **arguments)
    output = tmp_path / "killed"
    real_validate, real_write = Validation.run, storage.write

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    def write_no_checkpoint(uri: str, content: bytes) -> None:
        if uri.endswith("checkpoint.pt"):
            raise KeyboardInterrupt
        real_write(uri, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", write_no_checkpoint)
        with pytest.raises(StoppedError, match="SIGINT: 0 of 4 epochs done; run the same command"):
            training.train(_split(data), str(output), **arguments)
    calls = iter([real_validate, dies])
    with monkeypatch.context() as patch:
        patch.setattr(Validation, "run", lambda *args: next(calls)(*args))
        with pytest.raises(StoppedError, match="SIGINT: 1 of 4 epochs done"):
            training.train(_split(data), str(output), **arguments)
    resumed = training.train(_split(data), str(output), **arguments)
    for one, other in zip(whole, resumed, strict=True):
        assert one.validation_loss == other.validation_loss
        assert one.train_loss == other.train_loss
        assert one.train_cider == other.train_cider
        assert one.samples == other.samples
    again = training.train(_split(data), str(output), **arguments)
    assert again == resumed


def test_another_run_in_the_same_place_is_refused(data: Path, tmp_path: Path):
    output = str(tmp_path / "model")
    weights = _weights(tmp_path)

    def run(**changes: object) -> list[Epoch]:
        overwrite = bool(changes.pop("overwrite", False))
        return training.train(
            _split(data),
            output,
            model_config=TINY,
            config=_config(epochs=1, **changes),
            encoder_weights=weights,
            overwrite=overwrite,
        )

    assert len(run()) == 1
    with pytest.raises(OutputError, match=r"other settings \(--batch-size\)"):
        run(batch_size=4)
    assert len(run(scst_epochs=1)) == 2
    assert len(run(batch_size=4, overwrite=True)) == 1
    with (
        storage.locked(f"{output}/_training/lock"),
        pytest.raises(OutputError, match=r"^another job is using"),
    ):
        run(overwrite=True)  # it would delete what the other writes
    assert (tmp_path / "model" / "epochs.json").exists()
    shutil.rmtree(tmp_path / "model" / "_training")
    (tmp_path / "model" / "training.json").unlink()
    before = sorted((tmp_path / "model").iterdir())
    with pytest.raises(OutputError, match="holds a model already"):
        run()
    assert sorted((tmp_path / "model").iterdir()) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_no_directory_is_one_line(overwrite, data: Path, tmp_path: Path):
    weights = _weights(tmp_path)
    for output in (data / "captions.txt", data / "captions.txt" / "below"):
        with pytest.raises(OutputError, match=r"^cannot .*captions\.txt.*: Not a directory$"):
            training.train(
                _split(data),
                str(output),
                model_config=TINY,
                config=_config(epochs=1),
                encoder_weights=weights,
                overwrite=overwrite,
            )


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_left_alone(overwrite, data: Path, tmp_path: Path):
    before = sorted(data.rglob("*"))
    with pytest.raises(OutputError, match="holds other files and no model: use an empty directory"):
        training.train(
            _split(data),
            str(data),
            model_config=TINY,
            config=_config(epochs=1),
            encoder_weights=_weights(tmp_path),
            overwrite=overwrite,
        )
    assert sorted(data.rglob("*")) == before


def test_the_largest_seed_is_one_that_torch_takes(data: Path, tmp_path: Path):
    epochs = training.train(
        _split(data),
        str(tmp_path / "model"),
        model_config=TINY,
        config=_config(epochs=1, seed=2**32 - 1),
        encoder_weights=_weights(tmp_path),
    )
    assert len(epochs) == 1


@pytest.mark.parametrize("fine_tune_from", [None, 2])
def test_bad_images_are_left_out(
    fine_tune_from, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    """Of training, of the validation's captions and of its CIDEr."""
    for name in ("05.png", "36.png"):
        (data / "Images" / name).write_bytes(b"no image")
    judged = []
    real_score = CiderD.score

    def score(self: CiderD, image: int, words: list[str]) -> float:
        judged.append(image)
        return real_score(self, image, words)

    monkeypatch.setattr(CiderD, "score", score)
    [epoch] = training.train(
        _split(data),
        str(tmp_path / "model"),
        model_config=TINY,
        config=_config(epochs=1, fine_tune_from=fine_tune_from),
        encoder_weights=_weights(tmp_path),
    )
    assert np.isfinite(epoch.train_loss)
    assert sorted(judged) == list(range(1, 12))
    assert [bool(text) for text in epoch.samples] == [False] + [True] * 7
    assert all(caplog.text.count(name) == 1 for name in ("05.png", "36.png"))


@pytest.mark.parametrize("fine_tune_from", [None, 2])
@pytest.mark.parametrize("side", ["train", "val"])
def test_images_of_which_none_can_be_read_are_refused(
    side: str, fine_tune_from, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a frozen encoder before the first epoch: all have been read by then."""
    if fine_tune_from is None:
        monkeypatch.delattr(trainer.Trainer, "train_epoch")
    for name in (data / f"{side}.txt").read_text().split():
        (data / "Images" / name).write_bytes(b"no image")
    with pytest.raises(InputError, match=r"^none of the .*images"):
        training.train(
            _split(data),
            str(tmp_path / "model"),
            model_config=TINY,
            config=_config(fine_tune_from=fine_tune_from),
            encoder_weights=_weights(tmp_path),
        )


@pytest.mark.parametrize("fine_tune_from", [None, 2])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_bad_image_changes_nothing_of_a_step(
    epoch: int, fine_tune_from, data: Path, vocabulary, monkeypatch: pytest.MonkeyPatch
):
    """Neither the gradient nor the mean, in the cross-entropy and in self-critical training."""
    captions = {
        "00.png": ["a dog runs", "the dog in the grass"],
        "01.png": ["two men"],
        "02.png": ["a cat and a dog", "red water"],
        "missing.png": ["a dog jumps", "a dog"],
    }
    examples = [CaptionedImage(str(data / "Images" / n), texts) for n, texts in captions.items()]
    config = _config(epochs=1, scst_epochs=1, scst_samples=2, fine_tune_from=fine_tune_from)
    samples = torch.tensor([[START, 4, EOS, PAD], [START, 4, 8, EOS]])  # "a", "a dog"
    monkeypatch.setattr(self_critical, "sample", lambda _, each, *__: samples.repeat(len(each), 1))

    def step(count: int) -> tuple[float, list[torch.Tensor]]:
        model = tiny_model(
            embedding_dropout=0, attention_dropout=0, residual_dropout=0, head_dropout=0
        )
        own = trainer.Trainer(model, vocabulary, config, device="cpu")
        critical = SelfCriticalTraining(own, examples)
        views = None
        if fine_tune_from is None:
            views = compute_features(model.encoder, examples[:count], image_size=64)
        images = TrainingImages(examples[:count], views, TINY, vocabulary)
        step = critical.step if epoch > config.epochs else None
        value = own.train_epoch(images, epoch, lambda *_: None, step=step)
        return value, [each.grad for each in model.parameters() if each.requires_grad]

    expected, gradients = step(3)
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0.1
    value, others = step(4)
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(others, gradients, rtol=1e-3, atol=1e-5)


def test_every_image_is_in_one_batch_of_an_epoch():
    lengths = np.random.default_rng(0).integers(5, 30, 101).tolist()
    for sort_batches in (1, 4):
        config = TrainConfig(batch_size=8, sort_batches=sort_batches)
        plans = [trainer.plan_batches(lengths, config, epoch) for epoch in (1, 1, 2)]
        assert plans[0] == plans[1] != plans[2]
        assert sorted(i for batch in plans[0] for i in batch) == list(range(101))
        assert {len(batch) for batch in plans[0]} == {7, 8}
    padding = [
        sum(max(lengths[i] for i in batch) * len(batch) for batch in plan) - sum(lengths)
        for plan in (
            trainer.plan_batches(lengths, TrainConfig(batch_size=8), 1),
            trainer.plan_batches(lengths, TrainConfig(batch_size=8, sort_batches=13), 1),
        )
    ]
    assert padding[1] < padding[0] / 3


def test_a_mirrored_image_has_no_caption_that_names_a_side(vocabulary, data: Path):
    examples = [
        CaptionedImage("a", ["a dog on the left", "a dog runs"]),
        CaptionedImage("b", ["the Right dog"]),
        CaptionedImage("c", ["a bright dog"]),
        CaptionedImage("d", ["a dog on the left."]),
        CaptionedImage("e", ["a man looks right, away"]),
        CaptionedImage("f", ["the left-most man"]),
        CaptionedImage("g", ['the man in the upright "cleft"']),
    ]
    source = TrainingImages(examples, None, TINY, vocabulary)
    encoded = source.ids
    assert source.choose(0, 0) == (0, encoded[0])
    assert source.choose(0, 1) == (1, encoded[0][1:])
    assert source.choose(1, 3) == (2, encoded[1])
    assert [source.choose(i, 1)[0] for i in range(2, 7)] == [1, 0, 0, 0, 1]


def test_views_are_the_image_its_mirror_image_and_crops(tmp_path: Path):
    [path] = write_photos(tmp_path, 1)
    views = [load_view(str(path), 48, view) for view in range(5)]
    assert all(view.shape == (48, 48, 3) for view in views)
    np.testing.assert_array_equal(views[1], views[0][:, ::-1])
    assert not any(np.array_equal(views[0], view) for view in views[1:])
    np.testing.assert_array_equal(views[2], load_view(str(path), 48, 2))
    assert load_view(str(tmp_path / "missing.jpg"), 48, 0) is None


def test_strong_augmentation_changes_what_is_seen_but_not_hues(tmp_path: Path):
    path = str(tmp_path / "red.png")
    Image.new("RGB", (64, 64), (200, 40, 40)).save(path)
    for view in range(2):
        np.testing.assert_array_equal(
            load_view(path, 48, view, "strong"), load_view(path, 48, view)
        )
    erased = 0
    colours = set()
    for view in range(2, 42):
        pixels = load_view(path, 48, view, "strong")
        np.testing.assert_array_equal(pixels, load_view(path, 48, view, "strong"))
        away = (pixels == 127).all(-1)
        erased += away.any()
        assert away.mean() < 0.13
        red, green, blue = (int(value) for value in pixels[~away][0])
        assert red > green == blue
        colours.add((red, green))
    assert 15 < erased < 33
    assert len(colours) > 35


@pytest.mark.parametrize("backbone", ["resnet10t", "tf_efficientnet_lite0", "test_vit"])
def test_branches_are_dropped_in_training_only(backbone):
    torch.manual_seed(0)
    encoder = ImageEncoder(dataclasses.replace(TINY, backbone=backbone))
    names = encoder.state_dict().keys()
    encoder.fine_tune(4)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm's new ResNets begin with branches of nothing
    images = torch.randint(256, (8, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        before = encoder.eval()(images)
        torch.testing.assert_close(encoder.train()(images), before)
        encoder.use_stochastic_depth(0.5)
        torch.testing.assert_close(encoder.eval()(images), before)
        assert not torch.allclose(encoder.train()(images), before)
    assert encoder.state_dict().keys() == names


def test_a_backbone_without_branches_has_none_to_drop():
    encoder = ImageEncoder(dataclasses.replace(TINY, backbone="vgg11"))
    with pytest.raises(InputError, match=r"^--drop-path: vgg11 has no residual branches to drop$"):
        encoder.use_stochastic_depth(0.1)


def test_the_loss_is_the_notebooks():
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 9)
    ids = torch.randint(4, 9, (3, 6))
    ids[1, 4:] = 0
    labels = ids.clone()
    labels[ids == 0] = -100
    expected = nn.CrossEntropyLoss()(
        logits[..., :-1, :].reshape(-1, 9), labels[..., 1:].reshape(-1)
    )
    words = ids[:, 1:] != 0
    loss = trainer.caption_loss(logits[:, :-1][words], ids)
    torch.testing.assert_close(loss / words.sum(), expected)


def test_the_loss_of_many_words_is_the_sum_over_them():
    torch.manual_seed(0)
    logits = torch.randn(700, 9, requires_grad=True)
    ids = torch.randint(4, 9, (100, 8))
    loss = trainer.caption_loss(logits, ids, 0.1)
    expected = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")(
        logits, ids[:, 1:].flatten()
    )
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(each, logits)[0] for each in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert trainer.caption_loss(logits[:0], torch.zeros(3, 8, dtype=torch.long)) == 0


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(warmup_steps=4, schedule="cosine")
    factors = [trainer.learning_rate_factor(step, 14, config) for step in range(14)]
    assert factors[:5] == [0.2, 0.4, pytest.approx(0.6), 0.8, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert trainer.learning_rate_factor(9, 14, config) == pytest.approx(0.5)
    assert trainer.learning_rate_factor(9, 14, TrainConfig()) == 1.0


def test_of_epochs_with_the_same_cider_the_one_with_the_lower_loss_is_the_best():
    losses = {1: 3.0, 2: 2.0, 3: 2.5}
    figures = {"train_loss": 1.0, "train_cider": None, "seconds": 1.0, "images_per_second": 1.0}
    epochs = [
        Epoch(epoch=n, validation_loss=loss, validation_cider=0.0, samples=[], **figures)
        for n, loss in losses.items()
    ]
    assert best_of(epochs).epoch == 2
    better = dataclasses.replace(epochs[0], validation_cider=0.1)
    assert best_of([better, *epochs[1:]]).epoch == 1


def test_a_model_whose_validation_loss_is_not_finite_is_not_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    validate = Validation.run

    def ruined(self: Validation, *arguments: object) -> tuple[float, dict[int, str]]:
        with torch.no_grad():
            self._trainer.model.decoder.head.weight.fill_(torch.nan)
        return validate(self, *arguments)

    monkeypatch.setattr(Validation, "run", ruined)
    with pytest.raises(CaptionerError, match=r"not finite after epoch 1: .*lower --learning-rate"):
        training.train(
            _split(data),
            str(tmp_path / "model"),
            model_config=TINY,
            config=_config(),
            encoder_weights=_weights(tmp_path),
        )
    assert not (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize(("images", "batch", "workers"), [(17, 2, 2), (2, 8, 3), (9, 4, 4)])
def test_batches_with_too_few_images_for_the_workers_are_refused_at_once(
    images, batch, workers, data: Path, tmp_path: Path
):
    split = _split(data)
    split = Split(split.train[:images], split.validation, [])
    with pytest.raises(InputError, match=f"--workers {workers}: some batches would have fewer"):
        training.train(
            split,
            str(tmp_path / "model"),
            model_config=TINY,
            config=_config(batch_size=batch),
            launch=LaunchConfig(workers=workers),
            encoder_weights=_weights(tmp_path),
        )
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "backbone", ["resnet10t", "mobilenetv3_small_050", "convnext_atto", "test_vit"]
)
def test_all_that_is_trained_of_an_encoder_has_a_gradient(backbone: str):
    """Or several workers would wait for it."""
    encoder = ImageEncoder(dataclasses.replace(TINY, backbone=backbone)).eval()
    before = copy.deepcopy(encoder.state_dict())
    encoder.fine_tune(0)
    torch.testing.assert_close(encoder.state_dict(), before, rtol=0, atol=0)
    trained = {name for name, each in encoder.named_parameters() if each.requires_grad}
    unused = {name for name, _ in encoder.named_parameters()} - trained
    assert len(trained) > 20
    assert {name.split(".")[1] for name in unused} <= {"conv_head", "head"}, unused
    assert bool(unused) == (backbone == "mobilenetv3_small_050")
    assert not encoder.training
    encoder.encode_blank_image().sum().backward()
    assert all(
        each.grad is not None for name, each in encoder.named_parameters() if name in trained
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_all_weights_of_notebook_decay_and_the_matrices_of_small(preset, vocabulary):
    config = dataclasses.replace(PRESETS[preset].train, learning_rate=0.1, weight_decay=0.5)
    learner = trainer.Trainer(tiny_model(), vocabulary, config, device="cpu")
    trained = [each for each in learner.model.parameters() if each.requires_grad]
    before = [each.detach().clone() for each in trained]
    for each in trained:
        each.grad = torch.zeros_like(each)
    learner.optimizer.step()
    assert {each.ndim for each in trained} >= {1, 2}
    for parameter, value in zip(trained, before, strict=True):
        decays = preset == "notebook" or parameter.ndim >= 2
        torch.testing.assert_close(parameter.detach(), value * (0.95 if decays else 1.0))


def test_features_are_computed_once_and_bad_images_left_out(data: Path, tmp_path: Path):
    (data / "Images" / "05.png").write_bytes(b"no image")
    encoder = tiny_model().encoder.eval()
    uris = [str(data / "Images" / f"{index:02d}.png") for index in range(8)]
    examples = [CaptionedImage(uri, ["a"]) for uri in uris]
    [features] = compute_features(encoder, examples, image_size=64)
    assert features[0].shape == (2, 2, 512)
    assert features.decodable().tolist() == [i != 5 for i in range(8)]
    with torch.no_grad():
        expected = encoder(torch.from_numpy(load_view(uris[0], 64, 0))[None])[0].numpy()
    np.testing.assert_allclose(features[0], expected, rtol=2e-3, atol=1e-3)
    assert np.isnan(features[5]).all()
    [file] = (tmp_path / "cache" / "captioner" / "features").iterdir()
    before = file.stat().st_mtime_ns
    compute_features(encoder, examples, image_size=64)
    assert file.stat().st_mtime_ns == before
    _, mirrored = compute_features(encoder, examples, image_size=64, views=2)
    assert mirrored.decodable().tolist() == [i != 5 for i in range(8)]
    assert file.stat().st_mtime_ns == before
    Image.new("RGB", (64, 64)).save(uris[5])
    compute_features(encoder, examples, image_size=64)
    assert len(list(file.parent.iterdir())) == 3


def test_a_cache_that_cannot_hold_features_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encoder, examples = tiny_model().encoder.eval(), _examples(data, 4)
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 4 * 2 * 2 * 512 * 2 - 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OutputError, match=r"features take 0.0 GB, and .* has 0.0 GB free"):
            compute_features(encoder, examples, image_size=64, views=3)
        compute_features(encoder, examples, image_size=64, views=2)
        compute_features(encoder, examples, image_size=64, views=3)  # of which two are there
    folder = tmp_path / "cache" / "captioner" / "features"
    names = sorted(folder.iterdir())
    assert len(names) == 3

    def fill(tensors: object, path: Path) -> None:
        path.write_bytes(b"some of it")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(features_module, "save_file", fill)
        with pytest.raises(OutputError, match=r"cannot write features to .*: No space left"):
            compute_features(encoder, examples[:2], image_size=64)
    assert sorted(folder.iterdir()) == names
    monkeypatch.setattr(storage, "cache_directory", (data / "captions.txt").joinpath)
    with pytest.raises(OutputError, match=r"cannot write features to .*: Not a directory"):
        compute_features(encoder, examples, image_size=64)


def test_the_cache_of_features_is_bounded_but_for_a_runs_own_files(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The features of one image take 4096 bytes and a header."""
    encoder, examples = tiny_model().encoder.eval(), _examples(data, 6)
    folder = tmp_path / "cache" / "captioner" / "features"
    files = []
    for index, example in enumerate(examples[:3]):
        compute_features(encoder, [example], image_size=64)
        [file] = set(folder.iterdir()) - set(files)
        files.append(file)
        os.utime(file, (index, index))
    compute_features(encoder, examples[:1], image_size=64)  # uses the oldest file
    assert files[0].stat().st_mtime == 0
    monkeypatch.setattr(features_module, "_MOST_BYTES", 2 * files[0].stat().st_size + 4096)
    compute_features(encoder, examples[3:4], share=(1, 2), image_size=64)
    assert set(files) < set(folder.iterdir())  # another process of the run trims
    [fourth] = set(folder.iterdir()) - set(files)
    compute_features(encoder, examples[4:5], image_size=64)
    remaining = set(folder.iterdir())
    assert (len(remaining), remaining >= {files[0], fourth}) == (3, True)
    monkeypatch.setattr(features_module, "_MOST_BYTES", 0)
    compute_features(encoder, examples[:1], image_size=64, views=2)
    assert (len(set(folder.iterdir())), files[0].exists()) == (2, True)


def test_a_damaged_file_of_features_is_computed_again(data: Path, tmp_path: Path):
    encoder, examples = tiny_model().encoder.eval(), _examples(data, 4)
    [features] = compute_features(encoder, examples, image_size=64)
    expected = features[2]
    [file] = (tmp_path / "cache" / "captioner" / "features").iterdir()
    del features  # the file is mapped
    data_of_file = file.read_bytes()
    for damaged in (b"", data_of_file[:5], data_of_file[:-1]):
        file.unlink()
        file.write_bytes(damaged)
        [features] = compute_features(encoder, examples, image_size=64)
        np.testing.assert_array_equal(features[2], expected)


def test_features_of_another_backbone_with_the_same_weights_are_others(data: Path, tmp_path: Path):
    first, second = (
        tiny_model(backbone=name).encoder.eval() for name in ("resnet10t", "resnet10t.c3_in1k")
    )
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    for encoder in (first, second):
        compute_features(encoder, _examples(data, 2), image_size=64)
    assert len(list((tmp_path / "cache" / "captioner" / "features").iterdir())) == 2


def test_versions_of_images_are_asked_for_side_by_side(data: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a bucket each is a request."""
    together = threading.Barrier(4)

    def version(uri: str) -> str:
        together.wait(timeout=20)
        return uri

    monkeypatch.setattr(storage, "version", version)
    compute_features(tiny_model().encoder.eval(), _examples(data, 4), image_size=64)


def _examples(data: Path, count: int) -> list[CaptionedImage]:
    return [CaptionedImage(str(data / "Images" / f"{i:02d}.png"), ["a dog"]) for i in range(count)]


def test_two_workers_name_the_same_features_and_leave_the_model_as_it_is(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In bfloat16, where the second worker has nothing to compute."""
    examples = _examples(data, 4)
    real_encode, encoded = features_module._encode, []

    def encode(*arguments: object) -> dict[str, np.ndarray]:
        encoded.append(arguments)
        return real_encode(*arguments)

    monkeypatch.setattr(features_module, "_encode", encode)
    first, expected = tiny_model().encoder.eval(), tiny_model().encoder.state_dict()
    second = copy.deepcopy(first)
    arguments = {"image_size": 64, "views": 2, "dtype": torch.bfloat16}
    views = compute_features(first, examples, share=(0, 2), **arguments)
    others = compute_features(second, examples, share=(1, 2), **arguments)
    assert len(encoded) == 2  # one for each view
    for encoder in (first, second):
        torch.testing.assert_close(encoder.state_dict(), expected, rtol=0, atol=0)
    for view, other in zip(views, others, strict=True):
        np.testing.assert_array_equal(view[3], other[3])
    with torch.no_grad():
        pixels = torch.from_numpy(load_view(examples[3].uri, 64, 1))
        exact = first(pixels[None])[0].numpy()
    np.testing.assert_allclose(views[1][3], exact, rtol=0.1, atol=0.1 * exact.max())
    # The second worker cannot ask for an image's version, and so looks for another name.
    monkeypatch.setattr(storage, "version", lambda _: "")
    [view] = compute_features(second, examples, share=(1, 2), image_size=64)
    assert view.decodable().all()


def test_an_image_that_cannot_be_read_for_a_moment_is_tried_again(
    data: Path, monkeypatch: pytest.MonkeyPatch
):
    """Too many open files, a bucket's time-out: the features kept do not say so for good."""
    examples = _examples(data, 4)
    encoder = tiny_model().encoder.eval()
    real_read, reads = storage.read, []

    def read(uri: str) -> bytes:
        reads.append(uri)
        if uri == examples[2].uri and reads.count(uri) == 2:  # of the second view
            raise OSError(errno.EMFILE, "Too many open files")
        return real_read(uri)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read", read)
        views = compute_features(encoder, examples, image_size=64, views=2)
    assert [view.decodable().tolist() for view in views] == [[True] * 4, [True, True, False, True]]
    assert np.isnan(views[1][2]).all()
    monkeypatch.setattr(storage, "read", lambda uri: reads.append(uri) or real_read(uri))
    reads.clear()
    views = compute_features(encoder, examples, image_size=64, views=2)
    assert all(view.decodable().all() for view in views)
    assert np.isfinite(views[1][2]).all()
    assert sorted(reads) == [each.uri for each in examples]  # those of the second view


def test_an_image_that_any_worker_lacks_in_any_view_is_left_out(
    data: Path, vocabulary, monkeypatch: pytest.MonkeyPatch, caplog
):
    """With a frozen encoder; all workers still plan the same batches."""
    examples = _examples(data, 8)
    split = Split(examples[:6], examples[6:], [])
    own = trainer.Trainer(tiny_model(), vocabulary, _config(views=2), device="cpu")
    real_read, reads = storage.read, []

    def read(uri: str) -> bytes:
        reads.append(uri)
        if uri == examples[2].uri and reads.count(uri) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return real_read(uri)

    monkeypatch.setattr(storage, "read", read)
    others = {examples[4].uri}  # the other worker is on another machine

    def gather(value: object) -> list[object]:
        return [value, others if isinstance(value, set) else None]

    worker = Worker(0, 2, (0, 1), gather, lambda *_: None)
    seen = SeenImages(frozenset(), frozenset())
    job = Job(split, "", _config(views=2), "cpu", seen)
    source = load_images(job, own, worker, "training")
    assert source.unreadable == {examples[2].uri, examples[4].uri}
    assert len(source.lengths) == 6
    assert "2 images cannot be read or decoded and are left out: " in caplog.text
    for view in range(2):
        batch = source.batch([(image, view) for image in range(6)])
        assert batch.readable.tolist() == [True, True, False, True, False, True]
        assert batch.inputs.isfinite().all()
        assert not batch.inputs[[2, 4]].any()


def test_features_keep_no_file_open(data: Path, monkeypatch: pytest.MonkeyPatch):
    """COCO's fill more than a thousand files."""
    monkeypatch.setattr(features_module, "_CHUNK", 2)
    examples = _examples(data, 8)
    encoder = tiny_model().encoder.eval()
    before = len(os.listdir("/proc/self/fd"))
    views = compute_features(encoder, examples, image_size=64, views=3)
    read = [view[image] for view in views for image in range(8)]
    assert len(os.listdir("/proc/self/fd")) == before
    np.testing.assert_array_equal(read[0], read[3])  # both are of one red
    assert not np.array_equal(read[0], read[1])


def test_captions_of_an_image_stand_together(vocabulary):
    encoded = [
        [vocabulary.encode(t, 12) for t in texts]
        for texts in (["a dog runs", "the dog"], ["grass"])
    ]
    ids = collate(encoded)
    assert ids.shape == (4, 5)
    assert ids[:, 0].tolist() == [1, 1, 1, 0]
    assert ids[3].tolist() == [0] * 5
    assert ids[1, 3] == 2


def test_what_is_left_out_of_a_dataset_is_counted(data: Path):
    with open(data / "captions.txt", "a") as table:
        table.write("00.png,  \nghost.png,A ghost .\n")
    Image.new("RGB", (9, 9)).save(data / "Images" / "silent.png")
    read = dataset.read_dataset(str(data))
    assert (len(read.images), read.empty_captions) == (48, 1)
    assert (read.without_image, read.without_caption) == (1, 1)
    assert read.images[0].captions == ["A red square .", "red, all of it ."]


def test_a_pickle_is_not_executed(tmp_path: Path):
    marker = tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"weight": Hostile()}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth is not a state dict"):
        build_model(TINY, str(tmp_path / "weights.pth"))
    assert not marker.exists()


def test_a_file_that_holds_no_weights_is_one_line(tmp_path: Path):
    """Whatever torch says of it: that is to unpickle the file all the same."""
    state = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, state)
    path = tmp_path / "weights.pth"
    for content, message in {
        b"Weights of the encoder\n": "is not a state dict",
        b"hello world\n": "is not a state dict",
        b"": "is not a state dict",
        state.getvalue()[:-9]: "cannot read the weights in .*failed finding central directory",
    }.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            build_model(TINY, str(path))
        assert not re.search("weights_only|\n", str(error.value))
    with pytest.raises(InputError, match=rf"^cannot read {tmp_path}: Is a directory$"):
        build_model(TINY, str(tmp_path))


def test_strong_augmentation_without_crops_is_refused():
    with pytest.raises(InputError, match=r"augmentation.*views"):
        TrainConfig(augmentation="strong", views=2)
    TrainConfig(augmentation="strong", views=3)


def test_a_warm_up_longer_than_the_training_is_told(data: Path, tmp_path: Path, caplog):
    training.train(
        _split(data),
        str(tmp_path / "model"),
        model_config=TINY,
        config=_config(epochs=1, warmup_steps=1000),
        encoder_weights=_weights(tmp_path),
    )
    assert "--warmup-steps is 1000" in caplog.text


def test_a_finished_training_can_get_more_epochs_and_another_learning_rate(
    data: Path, tmp_path: Path, caplog
):
    output = tmp_path / "model"

    def run(**changes: object) -> list[Epoch]:
        return training.train(
            _split(data),
            str(output),
            model_config=TINY,
            config=_config(**changes),
            encoder_weights=_weights(tmp_path),
        )

    first = run(epochs=1)
    with caplog.at_level("INFO"):
        second = run(epochs=2, learning_rate=1e-5)
    assert second[:1] == first
    assert len(second) == 2
    assert "resuming after epoch 1 of 2" in caplog.text
    settings = json.loads((output / "training.json").read_text())
    assert {each["setting"]: (each["from"], each["to"]) for each in settings["changes"]} == {
        "epochs": (1, 2),
        "learning_rate": (_config().learning_rate, 1e-5),
    }
    config = json.loads((output / "config.json").read_text())
    assert settings["model"]["vocabulary_size"] == config["model"]["vocabulary_size"] > 4


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A lower learning rate then continues from the last checkpoint."""
    output = str(tmp_path / "model")
    real, steps = trainer.caption_loss, []

    def run(**changes: object) -> list[Epoch]:
        return training.train(
            _split(data),
            output,
            model_config=TINY,
            config=_config(epochs=2, batch_size=4, **changes),
            encoder_weights=_weights(tmp_path),
        )

    def ruined(*arguments: object) -> torch.Tensor:
        steps.append(0)
        return real(*arguments) * (torch.nan if len(steps) == 2 else 1)

    monkeypatch.setattr(trainer, "caption_loss", ruined)
    with pytest.raises(CaptionerError, match=r"not finite in step 2 of epoch 1; .*--learning-rate"):
        run(learning_rate=1e-3)
    assert len(steps) == 2
    monkeypatch.undo()
    assert len(run(learning_rate=1e-4)) == 2


def test_overwrite_leaves_the_old_model_until_the_new_one_trains(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "model"
    arguments = {"model_config": TINY, "encoder_weights": _weights(tmp_path), "overwrite": True}
    training.train(_split(data), str(output), config=_config(epochs=1), **arguments)
    with pytest.raises(InputError):
        training.train(
            _split(data),
            str(output),
            config=_config(epochs=1),
            **(arguments | {"encoder_weights": str(tmp_path / "missing.pth")}),
        )
    assert (output / "config.json").exists()

    def die(*_: object, **__: object) -> float:
        assert not (output / "config.json").exists()
        assert not (output / "last").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "train_epoch", die)
    with pytest.raises(StoppedError):
        training.train(_split(data), str(output), config=_config(epochs=1), **arguments)


def test_captions_without_spaces_are_refused(data: Path, tmp_path: Path):
    lines = (data / "captions.txt").read_text().splitlines()
    texts = [f"{line.split(',')[0]},一只狗在草地上奔跑第{i}只" for i, line in enumerate(lines[1:])]
    (data / "captions.txt").write_text("\n".join([lines[0], *texts]) + "\n")
    with pytest.raises(InputError, match=r"too rare for the vocabulary.*--minimum-count"):
        training.train(
            _split(data),
            str(tmp_path / "model"),
            model_config=TINY,
            config=_config(minimum_count=5),
            encoder_weights=_weights(tmp_path),
        )
    assert not (tmp_path / "model").exists()


def test_words_that_a_model_does_not_know_are_told_refused_or_added(
    data: Path, tmp_path: Path, caplog
):
    vocabulary = Vocabulary.from_captions(["a the dog cat"] * 5)
    start = str(tmp_path / "start")
    bundle.save(start, tiny_model(vocabulary_size=len(vocabulary)), vocabulary)

    def run(name: str, **changes: object) -> bundle.Bundle:
        training.train(
            _split(data),
            str(tmp_path / name),
            model_config=TINY,
            config=_config(epochs=1, minimum_count=1, **changes),
            initial_model=start,
        )
        return bundle.load(str(tmp_path / name))

    with pytest.raises(InputError, match=r"% of the words.*unknown.*--extend-vocabulary"):
        run("refused")
    with caplog.at_level("INFO"):
        assert len(run("accepted", largest_unknown=1.0).vocabulary) == len(vocabulary)
        assert "% of the words in the training captions are unknown" in caplog.text
    extended = run("extended", extend_vocabulary=True, learning_rate=0.0)
    assert len(extended.vocabulary) > len(vocabulary)
    assert extended.vocabulary.words(range(len(vocabulary))) == vocabulary.words(
        range(len(vocabulary))
    )
    embedding = extended.model.decoder.head.weight
    torch.testing.assert_close(embedding[-1], embedding[: len(vocabulary)].mean(0))


def test_an_open_tensorboard_follows_the_epochs_and_their_steps(data: Path, tmp_path: Path):
    output = tmp_path / "model"
    arguments = {"model_config": TINY, "encoder_weights": _weights(tmp_path)}
    training.train(_split(data), str(output), config=_config(epochs=1), **arguments)
    [events] = (output / "tensorboard").iterdir()
    inode, before = events.stat().st_ino, events.read_bytes()
    training.train(_split(data), str(output), config=_config(epochs=2), **arguments)
    assert events.stat().st_ino == inode
    assert events.read_bytes().startswith(before)
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    read = event_accumulator.EventAccumulator(str(output / "tensorboard"))
    read.Reload()
    assert [each.step for each in read.Scalars("validation_loss")] == [1, 2]
    for name in ("step/value", "step/gradient_norm", "step/learning_rate"):
        assert all(each.value > 0 for each in read.Scalars(name))


def test_samples_stand_beside_what_people_wrote(data: Path, tmp_path: Path):
    output = tmp_path / "model"
    split = _split(data)
    training.train(
        split,
        str(output),
        model_config=TINY,
        config=_config(epochs=1),
        encoder_weights=_weights(tmp_path),
    )
    text = (output / "samples.md").read_text()
    assert f"- {split.validation[0].captions[0].replace('.', '')}" in text.replace("\\.", "")
