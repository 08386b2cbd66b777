"""Tiny models and pictures, and one local Ray for all tests that need it."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

# Read when torch is imported. Threads that spin while they wait take the cores from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

from captioner.config import ModelConfig
from captioner.model import bundle
from captioner.model.network import CaptionModel
from captioner.model.vocabulary import Vocabulary


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves the thorough tests out where nobody asks for them; slow ones come first.

    So at the end no process of pytest waits for a long test of another one. The longest start Ray.
    """
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, "ray" not in item.nodeid))
    if "CAPTIONER_TEST_THOROUGH" not in os.environ:
        skipped = pytest.mark.skip(reason="thorough: .ci/run thorough runs it")
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(skipped)


#: File names that a URI, a shell or a pattern could take for something else.
ODD_NAMES = [
    "plain.jpg",
    "two words.jpg",
    " space around .jpg",
    "line\nbreak.jpg",
    "tab\there.jpg",
    "quotes ' and \".jpg",
    "100%.jpg",
    "%41%zz.jpg",
    "🐕 ça.jpg",
    "composed \u00e9.jpg",
    "decomposed e\u0301.jpg",
    "line\u2028separator.jpg",
    "a::b.jpg",
    "s3:c.jpg",
    "star*[1]?.jpg",
    "#hash&and=.jpg",
    "back\\slash.jpg",
    "~home.jpg",
    "$HOME.jpg",
    "-dash.jpg",
    ".hidden.jpg",
    "two.dots.jpg",
]

WORDS = [
    "a",
    "the",
    "dog",
    "cat",
    "runs",
    "sits",
    "on",
    "grass",
    "with",
    "two",
    "men",
    "red",
    "ball",
    "in",
    "water",
    "and",
    "jumps",
]

TINY = ModelConfig(
    backbone="resnet10t",
    image_size=64,
    grid=3,
    width=32,
    layers=2,
    heads=4,
    max_length=12,
    vocabulary_size=len(WORDS) + 4,
)


def shared_data() -> Path:
    """The real photos that some tests use where they are at hand; skips where they are not."""
    default = Path(__file__).resolve().parents[2] / "shared"
    path = Path(os.environ.get("CAPTIONER_SHARED", default)) / "flickr8k"
    if not path.is_dir():
        pytest.skip("the Flickr8k photos are not here")
    return path


@contextmanager
def skips_what_pyarrow_cannot_write() -> Iterator[None]:
    """Skips a test whose file needs a newer pyarrow than this one."""
    try:
        yield
    except (TypeError, pa.ArrowNotImplementedError) as error:
        pytest.skip(f"pyarrow {pa.__version__}: {error}")


def tiny_model(seed: int = 0, **changes: object) -> CaptionModel:
    """A model whose random weights are large enough for captions to differ."""
    torch.manual_seed(seed)
    model = CaptionModel(dataclasses.replace(TINY, **changes)).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
        model.decoder.head.weight[2] *= 2  # captions end at different lengths
    return model


@pytest.fixture
def memory_bucket() -> Iterator[str]:
    """The URI of an empty bucket of a kind: fsspec's file system in memory."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield "memory://bucket"
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def break_bucket(monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
    """Makes methods of the file system in memory fail, as without a network."""

    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError("no connection")

    for method in methods:
        monkeypatch.setattr(type(fsspec.filesystem("memory")), method, fail)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest) -> str:
    """The URI of an empty directory: on the disk, and in a bucket of a kind."""
    return str(request.getfixturevalue("tmp_path" if request.param == "local" else "memory_bucket"))


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary.from_captions([" ".join(WORDS)] * 5)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> Path:
    path = tmp_path_factory.mktemp("model")
    bundle.save(str(path), tiny_model(), vocabulary)
    return path


def write_photos(directory: Path, count: int, seed: int = 0) -> list[Path]:
    """Small JPEGs that differ from each other."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = []
    for index in range(count):
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = directory / f"photo-{index:04d}.jpg"
        Image.fromarray(coarse).resize((80, 60)).save(path, quality=90)
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray on this machine, with two logical CPUs; ended with the tests."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of the tiny pretrained model of a family; skips where transformers is not."""
    pytest.importorskip("transformers")
    import tiny_pretrained

    written: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in written:
            path = tmp_path_factory.mktemp("pretrained") / family
            written[family] = tiny_pretrained.write(family, path)
        return written[family]

    return directory
