"""Trains a captioner with an encoder of each family, for an epoch on a few photos.

python benchmarks/encoder_families.py DATA --weights tf_efficientnet_lite2=FILE

Each encoder is trained twice from the same weights, with a decoder of two blocks of 256: frozen,
and with its last stage trained. Encoders without a file of weights begin at random ones: the table
then shows that a family trains, not how well it captions. The last line is JSON.
"""

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import safetensors.torch
import timm
import torch
from caption_speed import describe_machine

from captioner import storage
from captioner.config import PRESETS, TrainConfig
from captioner.data.dataset import Split, read_dataset
from captioner.model import bundle
from captioner.model.backbone import with_encoder
from captioner.training import run as training

#: A backbone of each family, its weights' tag left to timm, and a size that its patches divide.
FAMILIES = {
    "DINOv2": ("vit_small_patch14_reg4_dinov2", 70),
    "SigLIP": ("vit_base_patch32_siglip_256", 128),
    "CLIP": ("vit_xsmall_patch16_clip_224", 80),
    "ViT": ("vit_tiny_patch16_224", 80),
    "ConvNeXt": ("convnext_atto", 96),
    "ResNet": ("resnet50.tv_in1k", 96),
    "EfficientNet": ("tf_efficientnet_lite2", 128),
}


@dataclass(frozen=True)
class Figures:
    """One epoch with one encoder."""

    family: str
    encoder: str
    weights: str  # a file's name, or "random"
    parameters: int
    image_size: int
    grid: tuple[int, int]
    trained: str  # what is trained of the encoder: "frozen", or "stage N"
    train_loss: float
    validation_loss: float
    validation_cider: float

    def row(self) -> str:
        """A row of the table."""
        height, width = self.grid
        cells = [
            self.family,
            f"`{self.encoder}`",
            self.weights,
            f"{self.parameters / 1e6:.1f}",
            f"{self.image_size}",
            f"{height}×{width}",
            self.trained,
            f"{self.train_loss:.2f}",
            f"{self.validation_loss:.2f}",
            f"{self.validation_cider:.1f}",
        ]
        return f"| {' | '.join(cells)} |"


HEADER = (
    "| family | encoder | weights | million parameters | image size | grid | encoder is | loss "
    "| validation loss | validation CIDEr |\n|---|---|---|---|---|---|---|---|---|---|"
)


def random_weights(encoder: str, directory: str, seed: int) -> str:
    """A file of random weights, under the names of the published ones."""
    torch.manual_seed(seed)
    path = f"{directory}/{encoder}.safetensors"
    safetensors.torch.save_file(timm.create_model(encoder).state_dict(), path)
    return path


def train(
    split: Split, family: str, size: int, weights: str | None, config: TrainConfig
) -> list[Figures]:
    """One epoch with the encoder of a family frozen, and one with its last stage trained."""
    encoder, _ = FAMILIES[family]
    decoder = replace(PRESETS["small"].model, width=256, layers=2, heads=4)
    model_config = replace(with_encoder(decoder, encoder), image_size=size)
    figures = []
    with tempfile.TemporaryDirectory() as directory:
        file = weights or random_weights(encoder, directory, config.seed)
        stage = None
        for name in ("frozen", "tuned"):
            [epoch] = training.train(
                split,
                f"{directory}/{name}",
                model_config=model_config,
                config=replace(config, fine_tune_from=stage),
                encoder_weights=file,
            )
            trained = bundle.load(f"{directory}/{name}")
            backbone = trained.model.encoder
            assert epoch.train_loss is not None
            figures.append(
                Figures(
                    family=family,
                    encoder=encoder,
                    weights=Path(weights).name if weights else "random",
                    parameters=sum(each.numel() for each in backbone.parameters()),
                    image_size=size,
                    grid=trained.grid,
                    trained="frozen" if stage is None else f"trained from stage {stage}",
                    train_loss=epoch.train_loss,
                    validation_loss=epoch.validation_loss,
                    validation_cider=epoch.validation_cider,
                )
            )
            stage = backbone.last_stage
    return figures


@click.command()
@click.argument("data")
@click.option("--train-list", help="Names of the images to train on.")
@click.option("--val-list", help="Names of the images to validate on.")
@click.option("--images", default=300, show_default=True, help="Of those to train on.")
@click.option("--family", "families", type=click.Choice(list(FAMILIES)), multiple=True)
@click.option("--image-size", type=int, help="Of all encoders.  [default: 70 to 128]")
@click.option("--weights", multiple=True, metavar="ENCODER=FILE", help="Published weights.")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--json", "json_file", type=click.Path(), help="Write the last line there too.")
def main(
    data: str,
    train_list: str | None,
    val_list: str | None,
    images: int,
    families: tuple[str, ...],
    image_size: int | None,
    weights: tuple[str, ...],
    learning_rate: float,
    json_file: str | None,
) -> None:
    """Trains on some of DATA's images; prints a row for each family, frozen and trained."""
    files = dict(each.split("=", 1) for each in weights)
    whole = read_dataset(storage.absolute(data)).split(train_list, val_list)
    split = Split(whole.train[:images], whole.validation[:50], whole.test)
    config = replace(
        PRESETS["small"].train,
        epochs=1,
        batch_size=10,
        captions="first",
        views=1,
        warmup_steps=2,
        minimum_count=2,
        average=0.0,  # of so few steps it would be the random decoder
        learning_rate=learning_rate,
    )
    figures = []
    for family in families or FAMILIES:
        encoder, size = FAMILIES[family]
        figures += train(split, family, image_size or size, files.get(encoder), config)
        click.echo("\n".join([HEADER, *(each.row() for each in figures)]))
    results = {
        "machine": describe_machine("torch", "timm"),
        "images": len(split.train),
        "encoders": [asdict(each) for each in figures],
    }
    if json_file:
        Path(json_file).write_text(json.dumps(results, indent=2) + "\n")
    click.echo(json.dumps(results))


if __name__ == "__main__":
    main()
