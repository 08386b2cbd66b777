"""Finding and fetching models, against a server on this machine that answers as the hub does."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch

from captioner.errors import BundleError, CaptionerError
from captioner.model.huggingface.hub import is_hub_name, locate
from captioner.model.loading import load_model
from hub_server import MAIN, V1, Hub, Repository, serving

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def tiny(directory_of: Callable[[str], Path]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory_of("blip").iterdir()}


def as_pickles(files: dict[str, bytes]) -> dict[str, bytes]:
    """A model's files with its weights pickled."""
    written = io.BytesIO()
    torch.save(safetensors.torch.load(files["model.safetensors"]), written)
    rest = {name: data for name, data in files.items() if name != "model.safetensors"}
    return rest | {"pytorch_model.bin": written.getvalue()}


@pytest.fixture
def hub(tiny: dict[str, bytes]) -> Iterator[Hub]:
    files = tiny | {"onnx/model.onnx": b"", "code.py": b""}
    pickled = {"config.json": b"{}", "pytorch_model.bin": b""}
    repositories = {
        "models/owner/tiny": Repository({MAIN: files, V1: files | {"extra.json": b"{}"}}),
        "models/owner/gated": Repository({MAIN: files}, gated=True),
        "models/owner/pickled": Repository({MAIN: pickled}),
        "models/owner/old": Repository({MAIN: as_pickles(tiny) | {"code.py": b""}}),
    }
    with serving(repositories) as server:
        yield server


FETCH = """
import sys
from captioner.errors import CaptionerError
from captioner.model.huggingface.hub import locate
try:
    location = locate(sys.argv[1])
    print(location.identity)
    print(location.fetch())
except CaptionerError as error:
    print("ERROR", error)
"""
IMPORT = """
import sys
from captioner.errors import CaptionerError
from captioner.model.huggingface.importing import import_model
try:
    print(import_model(*sys.argv[1:]))
except CaptionerError as error:
    print("ERROR", error)
"""


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Callable[..., list[str]]:
    """Runs code in a process of its own: the client of the hub reads its settings once."""

    def run(code: str, *arguments: str, **environment: str) -> list[str]:
        settings = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | settings | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.fixture
def fetch(run: Callable[..., list[str]]) -> Callable[..., list[str]]:
    return partial(run, FETCH)


def test_a_model_is_fetched_at_its_commit_without_code(hub, fetch, tiny) -> None:
    identity, directory = fetch("owner/tiny")
    assert identity == f"owner/tiny@{MAIN}"
    assert {path.name: path.read_bytes() for path in Path(directory).iterdir()} == tiny
    gets = [each for each in hub.requests if each.startswith("GET /owner")]
    assert gets
    assert all(MAIN in each for each in gets if "config.json" not in each)
    assert not [each for each in hub.requests if "code.py" in each or "onnx" in each]


def test_a_revision_is_resolved_to_its_commit(fetch) -> None:
    identity, directory = fetch("owner/tiny@v1")
    assert identity == f"owner/tiny@{V1}"
    assert (Path(directory) / "extra.json").exists()


def test_a_download_that_is_cut_short_is_resumed(hub, fetch) -> None:
    weights = os.urandom(24 << 20)  # the client keeps what it has by tens of megabytes
    hub.repositories["models/owner/tiny"].commits[MAIN]["model.safetensors"] = weights
    hub.cut = "model.safetensors"
    _, directory = fetch("owner/tiny")
    assert (Path(directory) / "model.safetensors").read_bytes() == weights
    [begin] = [int(each.removeprefix("bytes=").removesuffix("-")) for each in hub.ranges]
    assert 0 < begin <= len(weights) // 2


def test_a_fetched_model_is_found_without_a_network(hub, fetch) -> None:
    first = fetch("owner/tiny")
    hub.requests.clear()
    assert fetch("owner/tiny", HF_HUB_OFFLINE="1") == first
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("owner/nothing", {}, r"there is no model owner/nothing: .* set HF_TOKEN"),
        ("owner/tiny@v9", {}, r"the model owner/tiny has no revision 'v9'"),
        ("owner/gated", {}, r"gated: accept its terms .* set HF_TOKEN"),
        (
            "owner/pickled",
            {},
            r"only as pytorch_model.bin, .* captioner import-model owner/pickled DIRECTORY",
        ),
        ("owner/tiny", {"HF_HUB_OFFLINE": "1"}, r"not in the cache, and HF_HUB_OFFLINE is set"),
        (
            "owner/tiny",
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            r"not in the cache, and the hub is not reached",
        ),
    ],
)
def test_what_goes_wrong_is_one_line_that_says_what_to_do(
    fetch, name: str, environment: dict[str, str], message: str
) -> None:
    [line] = fetch(name, **environment)
    assert line.startswith("ERROR ")
    assert re.search(message, line), line


def test_pickled_weights_are_imported_from_the_hub(hub, run, tmp_path: Path, tiny) -> None:
    [written] = run(IMPORT, "owner/old", str(tmp_path / "converted"))
    weights = safetensors.torch.load_file(Path(written) / "model.safetensors")
    expected = safetensors.torch.load(tiny["model.safetensors"])
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not [each for each in hub.requests if "code.py" in each]
    hub.requests.clear()
    [again] = run(IMPORT, "owner/old", str(tmp_path / "again"), HF_HUB_OFFLINE="1")
    assert (Path(again) / "config.json").read_bytes() == tiny["config.json"]
    assert hub.requests == []


def test_an_import_without_a_network_is_one_line(run, tmp_path: Path) -> None:
    address = "http://127.0.0.1:9"
    [line] = run(IMPORT, "owner/old", str(tmp_path / "converted"), HF_ENDPOINT=address)
    assert re.search(r"^ERROR .*not in the cache, and the hub is not reached", line), line


def test_names_of_the_hub_are_told_from_paths(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert is_hub_name("Salesforce/blip-image-captioning-large")
    assert is_hub_name("Salesforce/blip-image-captioning-large@refs/pr/3")
    for path in (
        "models/mine",
        "/models/mine",
        "./models/mine",
        "s3://bucket/mine",
        "mine",
        "a/b/c",
    ):
        assert not is_hub_name(path)


def test_a_local_directory_has_an_identity_of_its_content(tmp_path: Path, tiny) -> None:
    def written(name: str, **changes: bytes) -> str:
        directory = tmp_path / name
        directory.mkdir()
        for file, data in (tiny | changes).items():
            (directory / file).write_bytes(data)
        return locate(str(directory)).identity

    changed = bytearray(tiny["model.safetensors"])
    changed[-1] ^= 1
    identities = [
        written("one"),
        written("two"),
        written("three", **{"model.safetensors": changed}),
    ]
    assert identities[0] == identities[1] != identities[2]


def test_a_buckets_model_is_copied_once(tmp_path: Path, tiny, memory_bucket, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    for name, data in tiny.items():
        with fs.open(f"{memory_bucket}/model/{name}", "wb") as file:
            file.write(data)
    location = locate(f"{memory_bucket}/model")
    directory = location.fetch()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == tiny
    before = directory.stat().st_mtime_ns
    assert location.fetch() == directory
    assert directory.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("config.json", {}, "is not a model: it has no config.json"),
        ("model.safetensors", {}, "is not a model: it has no model.safetensors"),
        (
            "model.safetensors",
            {"pytorch_model.bin": b"x"},
            r"only as pytorch_model.bin, .*captioner import-model .* DIRECTORY",
        ),
    ],
)
def test_an_incomplete_directory_is_refused(
    tmp_path: Path, tiny, remove: str, add: dict[str, bytes], message: str
) -> None:
    for name, data in (tiny | add).items():
        if name != remove:
            (tmp_path / name).write_bytes(data)
    with pytest.raises(BundleError, match=message):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, r"type 'bert', which is not an image captioner .* BLIP, GIT"),
        (
            {"model_type": "own", "auto_map": {"AutoModel": "own.Model"}},
            r"needs Python code of its own, which captioner does not run",
        ),
    ],
)
def test_a_model_that_is_no_captioner_is_refused(
    tmp_path: Path, tiny, changes: dict[str, object], message: str
) -> None:
    for name, data in tiny.items():
        (tmp_path / name).write_bytes(data)
    config = json.loads(tiny["config.json"]) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CaptionerError, match=message):
        load_model(str(tmp_path))
