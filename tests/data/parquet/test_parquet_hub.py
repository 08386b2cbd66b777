"""A dataset of the Hugging Face hub by its name, against a server that answers as the hub does."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_server import MAIN, Hub, Repository, digest, serving

pytest.importorskip("huggingface_hub")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {"README.md": b"# Photos"}
    for split, first in (("train", 0), ("test", 4)):
        cells = [{"bytes": b"%d" % n, "path": None} for n in range(first, first + 4)]
        table = pa.table({"image": pa.array(cells, IMAGE), "label": [*range(first, first + 4)]})
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=2)
        files[f"data/{split}-00000-of-00001.parquet"] = sink.getvalue()
    repositories = {
        "datasets/owner/photos": Repository({MAIN: files}),
        "datasets/owner/gated": Repository({MAIN: files}, gated=True),
    }
    with serving(repositories) as server:
        yield server


READ = """
import sys
from captioner.config import ListingConfig
from captioner.data.listing import list_source
from captioner.data.reading import groups, read_images
from captioner.errors import CaptionerError
from captioner.storage import absolute
try:
    images = list_source(absolute(sys.argv[1]), ListingConfig(keep="label"))
except CaptionerError as error:
    print("ERROR", error)
else:
    for group in groups(images):
        some = images.slice(group.start, len(group))
        for row, data in zip(some.to_pylist(), read_images(some, 1000, 0)):
            print(row["uri"], row["kept"]["label"], data, row["version"])
"""


@pytest.fixture
def read(hub: Hub) -> Callable[..., list[str]]:
    """Lists and reads a source in a process of its own: the client reads its settings once."""

    def run(source: str, **environment: str) -> list[str]:
        settings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", READ, source],
            env=os.environ | settings | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_the_images_of_a_dataset_are_read(hub, read):
    lines = read("hf://datasets/owner/photos", HF_TOKEN="hf_made_up")
    files = hub.repositories["datasets/owner/photos"].commits[MAIN]
    names = ["test-00000-of-00001.parquet"] * 4 + ["train-00000-of-00001.parquet"] * 4
    numbers = [4, 5, 6, 7, 0, 1, 2, 3]
    for line, name, number in zip(lines, names, numbers, strict=True):
        place = f"hf://datasets/owner/photos/data/{name}"
        version = f"{len(files[f'data/{name}'])} {digest(files[f'data/{name}'])}"
        assert line == f"{place}#image={number % 4} {number} b'{number}' {version}"
    assert hub.tokens == {"Bearer hf_made_up"}
    assert hub.sent < 10 * sum(map(len, files.values()))


def test_a_path_below_a_dataset_is_a_source(read):
    lines = read("hf://datasets/owner/photos/data/train-00000-of-00001.parquet")
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("source", "environment", "message"),
    [
        ("hf://datasets/owner/none", {}, r"^ERROR cannot use .*owner/none .repository not found"),
        ("hf://datasets/owner/gated", {}, r"^ERROR cannot read hf://datasets/owner/gated/data/.*"),
        ("hf://datasets/owner/photos", {"HF_ENDPOINT": "http://127.0.0.1:9"}, r"^ERROR cannot "),
    ],
)
def test_a_dataset_that_cannot_be_had_is_one_line(source, environment, message, read):
    [line] = read(source, **environment)
    assert re.search(message, line), line
