"""Training on several workers: the same steps as one, and no run lost."""

import dataclasses
import socket
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from captioner import dataset
from captioner.config import TrainConfig
from captioner.dataset import Split
from captioner.trainer import Source, Trainer
from captioner.vocabulary import Vocabulary
from conftest import TINY, tiny_model, write_photos

NO_DROPOUT = dataclasses.replace(
    TINY, embedding_dropout=0, attention_dropout=0, residual_dropout=0, head_dropout=0
)
CONFIG = TrainConfig(
    epochs=2,
    batch_size=31,  # an epoch is one step; it does not divide into two equal shares
    captions="all",
    views=2,
    sort_batches=2,
    minimum_count=1,
    learning_rate=1e-3,
    clip_norm=1.0,
    label_smoothing=0.1,
    average=0.9,
    fine_tune_from=3,
    precision="fp32",
)


def write_data(directory: Path, images: int) -> Path:
    """Photos whose captions differ in number and length."""
    paths = write_photos(directory / "Images", images)
    words = ["a", "red", "dog", "runs", "over", "the", "green", "grass", "with", "two", "men"]
    lines = ["image,caption"]
    for index, path in enumerate(paths):
        lengths = [2 + (index + n) % 9 for n in range(1 + index % 3)]
        lines += [f"{path.name},{' '.join(words[:length])}" for length in lengths]
    (directory / "captions.txt").write_text("\n".join(lines) + "\n")
    names = [path.name for path in paths]
    (directory / "train.txt").write_text("\n".join(names[: images * 3 // 4]))
    (directory / "val.txt").write_text("\n".join(names[images * 3 // 4 :]))
    return directory


def read_split(directory: Path) -> Split:
    lists = str(directory / "train.txt"), str(directory / "val.txt")
    return dataset.read_dataset(str(directory)).split(*lists)


def _take_steps(rank: int, workers: int, port: int, data: Path, result: Path) -> None:
    """Two steps, one of them in parts; leaves the gradients, the losses and the captions."""
    torch.set_num_threads(1)
    if workers > 1:
        distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers
        )
    split = read_split(data)
    texts = [text for each in split.train for text in each.captions]
    vocabulary = Vocabulary.from_captions(texts, minimum_count=1)
    model_config = dataclasses.replace(NO_DROPOUT, vocabulary_size=len(vocabulary))
    model = tiny_model(**dataclasses.asdict(model_config))
    trainer = Trainer(model, vocabulary, CONFIG, device="cpu", rank=rank, workers=workers)
    training_source = Source(split.train, None, model_config, vocabulary)
    losses, gradients = [], []
    for epoch, accumulate in ((1, 1), (2, 3)):
        trainer.config = dataclasses.replace(CONFIG, accumulate=accumulate)
        losses.append(trainer.train_epoch(training_source, epoch, lambda *_: None))
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        gradients.append([p.grad.clone() for p in trained])
    validation = Source(split.validation, None, model_config, vocabulary)
    loss, captions = trainer.validate(validation)
    torch.save(
        {
            "gradients": gradients,
            "kept": list(trainer.kept.parameters()),
            "losses": [*losses, loss],
            "captions": captions,
        },
        result / f"{workers}-{rank}.pt",
    )
    if workers > 1:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_take_the_same_steps_as_one(tmp_path: Path):
    data = write_data(tmp_path / "data", 42)
    _take_steps(0, 1, 0, data, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_take_steps, (2, port, data, tmp_path), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for alone, together in zip(one["gradients"], first["gradients"], strict=True):
        assert sum(float(gradient.abs().sum()) for gradient in alone) > 1
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(first["kept"], second["kept"], rtol=0, atol=0)
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert {**first["captions"], **second["captions"]} == one["captions"]
