import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from captioner.config import TrainConfig
from captioner.data.splits import CaptionedImage, Split
from captioner.errors import InputError
from captioner.model.vocabulary import Vocabulary
from captioner.training import run as training
from captioner.training.trainer import Trainer
from captioner.training.validation import Validation
from conftest import TINY, tiny_model

CONFIG = TrainConfig(
    epochs=6,
    batch_size=4,
    minimum_count=1,
    fine_tune_from=None,
    precision="fp32",
    early_stopping=2,
)


def test_a_run_stops_after_epochs_that_are_not_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    examples = []
    for index in range(6):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (64, 64), (40 * index, 90, 20)).save(path)
        examples.append(CaptionedImage(str(path), ["a dog runs"], path.name))
    weights = str(tmp_path / "encoder.pth")
    torch.save(tiny_model().encoder.backbone.state_dict(), weights)
    ciders = iter([10.0, 30.0, 20.0, 25.0, 5.0, 40.0, 1.0, 1.0])
    figures = Validation.figures
    monkeypatch.setattr(
        Validation,
        "figures",
        lambda self, *given: dataclasses.replace(figures(self, *given), cider=next(ciders)),
    )
    caplog.set_level(logging.INFO)

    def run(config: TrainConfig) -> list[float]:
        epochs = training.train(
            Split(examples[:4], examples[4:], []),
            str(tmp_path / "model"),
            model_config=TINY,
            config=config,
            encoder_weights=weights,
        )
        return [each.validation_cider for each in epochs]

    assert run(CONFIG) == [10, 30, 20, 25]
    assert "stopped early after epoch 4 of 6; the best epoch is 2" in caplog.text
    assert run(CONFIG) == [10, 30, 20, 25]
    assert run(dataclasses.replace(CONFIG, early_stopping=None)) == [10, 30, 20, 25, 5, 40]


def test_the_encoder_has_a_learning_rate_of_its_own(vocabulary: Vocabulary):
    config = TrainConfig(learning_rate=1e-3, encoder_learning_rate=1e-5, fine_tune_from=2)
    model = tiny_model()
    trainer = Trainer(model, vocabulary, config, device="cpu")
    trainer._set_rates(1e-3, 1e-5)
    rates = {p: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    encoder = [p for p in model.encoder.parameters() if p.requires_grad]
    assert encoder
    assert {rates[p] for p in encoder} == {1e-5}
    assert {rates[p] for p in model.decoder.parameters()} == {1e-3}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())


def test_a_frozen_encoder_has_no_learning_rate():
    with pytest.raises(InputError, match="encoder_learning_rate needs a trained encoder"):
        TrainConfig(encoder_learning_rate=1e-5, fine_tune_from=None)
