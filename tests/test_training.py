import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from captioner import bundle, dataset, training
from captioner.captioning import Captioner
from captioner.config import DecodeConfig, TrainConfig
from captioner.dataset import CaptionedImage, Split
from captioner.errors import InputError
from conftest import TINY, tiny_model

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


@pytest.mark.parametrize("fine_tune_from", [None, 2])
def test_a_model_learns_to_name_colours(fine_tune_from, data: Path, tmp_path: Path):
    split = dataset.read_dataset(str(data)).split(str(data / "train.txt"), str(data / "val.txt"))
    config = TrainConfig(
        epochs=12,
        batch_size=6,
        captions="first",
        minimum_count=2,
        learning_rate=2e-3,
        fine_tune_from=fine_tune_from,
        precision="fp32",
    )
    output = tmp_path / "model"
    metrics = training.train(
        split,
        str(output),
        model_config=dataclasses.replace(TINY, pre_norm=True),
        config=config,
        encoder_weights=_weights(tmp_path),
        device="cpu",
    )
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"] / 2
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 13))
    with Image.open(output / "loss.png") as plot:
        assert plot.format == "PNG"
    captioner = Captioner(bundle.load(str(output)), DecodeConfig(), device="cpu", precision="fp32")
    pixels = np.stack([np.full((64, 64, 3), colour, np.uint8) for colour in COLOURS.values()])
    expected = [f"a {word} square ." for word in COLOURS]
    assert [caption.text for caption in captioner(pixels)] == expected


def test_the_best_epoch_is_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    losses = iter([3.0, 1.0, 2.0])
    saved = []
    monkeypatch.setattr(training.Trainer, "validate", lambda *_: next(losses))
    monkeypatch.setattr(training.bundle, "save", lambda *_: saved.append(len(saved)))
    split = dataset.read_dataset(str(data)).split(str(data / "train.txt"), str(data / "val.txt"))
    training.train(
        split,
        str(tmp_path / "model"),
        model_config=TINY,
        config=TrainConfig(epochs=3, fine_tune_from=None, minimum_count=1),
        encoder_weights=_weights(tmp_path),
        device="cpu",
    )
    assert len(saved) == 2


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
    torch.testing.assert_close(training.caption_loss(logits, ids), expected)


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(warmup_steps=4, schedule="cosine")
    factors = [training.learning_rate_factor(step, 14, config) for step in range(14)]
    assert factors[:5] == [0.2, 0.4, pytest.approx(0.6), 0.8, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert training.learning_rate_factor(9, 14, config) == pytest.approx(0.5)
    assert training.learning_rate_factor(9, 14, TrainConfig()) == 1.0


def test_features_are_computed_once_and_bad_images_left_out(data: Path, tmp_path: Path, capsys):
    (data / "Images" / "05.png").write_bytes(b"no image")
    encoder = tiny_model().encoder.eval()
    uris = [str(data / "Images" / f"{index:02d}.png") for index in range(8)]
    features = dataset.compute_features(encoder, uris, image_size=64, dtype=torch.float32)
    assert features.shape == (8, 2, 2, 512)
    assert [bool(np.isnan(each).all()) for each in features] == [i == 5 for i in range(8)]
    with torch.no_grad():
        pixels = torch.from_numpy(dataset.load_pixels(uris[0], 64))[None]
        np.testing.assert_allclose(features[0], encoder(pixels)[0].numpy(), rtol=2e-3, atol=1e-3)
    [file] = (tmp_path / "cache" / "captioner" / "features").iterdir()
    before = file.stat().st_mtime_ns
    dataset.compute_features(encoder, uris, image_size=64, dtype=torch.float32)
    assert file.stat().st_mtime_ns == before


def test_captions_of_an_image_stand_together(vocabulary):
    ids = dataset.collate([["a dog runs", "the dog"], ["grass"]], vocabulary, 12)
    assert ids.shape == (4, 5)
    assert ids[:, 0].tolist() == [1, 1, 1, 0]
    assert ids[3].tolist() == [0] * 5
    assert ids[1, 3] == 2


def test_the_notebooks_split_holds_out_the_last_300():
    images = [CaptionedImage(str(i), ["a"]) for i in range(1000)]
    split = dataset.Dataset(images, 0, 0, 0).split()
    assert split == Split(images[:700], images[700:900], images[900:])
    with pytest.raises(InputError, match="too few"):
        dataset.Dataset(images[:300], 0, 0, 0).split()


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
    with pytest.raises(InputError, match="cannot read the weights"):
        training.build_model(TINY, str(tmp_path / "weights.pth"))
    assert not marker.exists()
