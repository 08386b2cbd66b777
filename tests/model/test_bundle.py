import io
import json
import os
import pickle
import resource
import shutil
import socket
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from captioner.errors import BundleError, OutputError
from captioner.model import bundle
from captioner.model.vocabulary import Vocabulary
from conftest import tiny_model


@pytest.mark.parametrize("tied", [False, True])
def test_a_bundle_comes_back_as_it_was(tied, tmp_path: Path, vocabulary):
    model = tiny_model(tied_embeddings=tied)
    bundle.save(str(tmp_path), model, vocabulary)
    loaded = bundle.load(str(tmp_path))
    assert loaded.config == model.config
    assert loaded.grid == (3, 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert loaded.vocabulary.words(range(6)) == vocabulary.words(range(6))
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert ("decoder.head.weight" in stored) is not tied


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", lambda data: data[:-20], "config.json"),
        ("config.json", lambda data: data.replace(b'"heads"', b'"haeds"'), "haeds"),
        (
            "config.json",
            lambda data: data.replace(b'"width": 32', b'"width": 64'),
            "cannot be used",
        ),
        ("config.json", lambda data: data.replace(b'"layers": 2', b'"layers": true'), "layers"),
        ("config.json", lambda data: b"[" * 100_000, "config.json"),
        ("tokenizer.json", lambda data: b"{}", "tokenizer.json"),
        ("model.safetensors", lambda data: data[:1000], "cannot be used"),
        ("model.safetensors", lambda data: b"\xff" * 8 + data[8:], "cannot be used"),
    ],
)
def test_a_damaged_bundle_gets_one_line(name, damage, message, tmp_path, model_directory):
    for path in model_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(BundleError, match=message) as raised:
        bundle.load(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_the_kind_of_tokenizer_is_kept(tmp_path: Path):
    vocabulary = Vocabulary.from_captions(["a dog's ball."] * 5, kind="ptb")
    model = tiny_model(tokenizer="ptb", vocabulary_size=len(vocabulary))
    bundle.save(str(tmp_path), model, vocabulary)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["tokenizer"] == "ptb"
    loaded = bundle.load(str(tmp_path)).vocabulary
    assert loaded.encode("A dog's ball.", 9) == vocabulary.encode("a dog 's ball .", 9)


def test_which_map_a_model_gives_is_part_of_its_settings(tmp_path: Path, vocabulary):
    digests = []
    for kind, norms in (("last", False), ("mean", False), ("mean", True)):
        model = tiny_model(attention_map=kind, attention_norms=norms)
        bundle.save(str(tmp_path / f"{kind} {norms}"), model, vocabulary)
        loaded = bundle.load(str(tmp_path / f"{kind} {norms}"))
        assert (loaded.config.attention_map, loaded.config.attention_norms) == (kind, norms)
        digests.append(loaded.digests["config.json"])
    assert len(set(digests)) == 3


def test_a_bundle_without_later_settings_has_whitespace_and_plain_maps(
    model_directory, tmp_path: Path
):
    shutil.copytree(model_directory, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    for name in ("tokenizer", "attention_map", "attention_norms", "attention_blur"):
        del config["model"][name]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    loaded = bundle.load(str(tmp_path / "old"))
    assert loaded.vocabulary.kind == "whitespace"
    assert (loaded.config.attention_map, loaded.config.attention_norms) == ("last", False)
    assert loaded.config.attention_blur == 0


def test_the_bundled_model_splits_at_white_space_and_weights_the_mean_of_its_blocks():
    config = bundle.load(bundle.DEFAULT).config
    assert (config.tokenizer, config.attention_map) == ("whitespace", "mean")
    assert config.attention_norms


def test_the_images_that_a_model_has_seen_are_no_part_of_it(place: str, vocabulary):
    bundle.save(place, tiny_model(), vocabulary)
    digests = bundle.load(place).digests
    assert bundle.load_images(place) is None
    images = bundle.SeenImages(frozenset({"a/1.jpg", "é\n.png", "\ud800"}), frozenset())
    bundle.save_images(place, images)
    assert bundle.load_images(place) == images
    assert bundle.load(place).digests == digests


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"trained": []}',
        '{"trained": "x", "validated": []}',
        '{"trained": {}, "validated": []}',
        '{"trained": [], "validated": [[]]}',
    ],
)
def test_a_damaged_list_of_images_gets_one_line(text: str, tmp_path: Path):
    (tmp_path / "images.json").write_text(text)
    with pytest.raises(BundleError, match=r"^images\.json of the model .* two lists of names$"):
        bundle.load_images(str(tmp_path))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, vocabulary, weight: float):
    model = tiny_model()
    with torch.no_grad():
        model.decoder.embedding.weight[0, 0] = weight
    bundle.save(str(tmp_path), model, vocabulary)
    with pytest.raises(BundleError, match="not finite"):
        bundle.load(str(tmp_path))


def test_the_writers_version_is_no_part_of_the_fingerprint(tmp_path: Path, model_directory: Path):
    for path in model_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["captioner_version"] = "99"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert bundle.load(str(tmp_path)).digests == bundle.load(str(model_directory)).digests


def _copy(model_directory: Path, target: Path) -> Path:
    for path in model_directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_may_be_stored_in_fewer_bits_and_are_loaded_in_32(dtype, tmp_path, vocabulary):
    model = tiny_model()
    bundle.save(str(tmp_path), model, vocabulary, dtype=dtype)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    loaded = bundle.load(str(tmp_path)).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == tensor.dtype
        if tensor.is_floating_point():
            assert stored[name].dtype == dtype
            assert torch.equal(loaded[name], tensor.to(dtype).float()), name
        else:
            assert torch.equal(loaded[name], tensor), name


def test_a_weight_too_large_for_the_dtype_is_refused_before_anything_is_written(
    tmp_path: Path, vocabulary
):
    model = tiny_model()
    with torch.no_grad():
        model.decoder.head.weight[3, 5] = -70_000
    with pytest.raises(OutputError, match=r"^the weight -70000 in decoder\.head\.weight is too la"):
        bundle.save(str(tmp_path / "model"), model, vocabulary, dtype=torch.float16)
    assert not (tmp_path / "model").exists()
    bundle.save(str(tmp_path / "model"), model, vocabulary, dtype=torch.bfloat16)
    assert bundle.load(str(tmp_path / "model")).config == model.config


# Bundles that somebody means harm with.


def _config(**model: object) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        config["model"] |= model
        (directory / "config.json").write_text(json.dumps(config))

    return damage


def _written(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(data) and None


def _replaced(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        data = (directory / name).read_bytes()
        assert old in data
        (directory / name).write_bytes(data.replace(old, new, 1))

    return damage


def _header(change: Callable[[dict], object], extra: bytes = b"") -> Callable[[Path], None]:
    """model.safetensors with another header, or more data at its end."""

    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] + extra)

    return damage


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        state = safetensors.torch.load(path.read_bytes())
        change(state)
        path.write_bytes(safetensors.torch.save(state))

    return damage


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return _weights(lambda state: state.update({name: change(state[name])}))


def _special(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return damage


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket may have 107 bytes
        server.bind(path.name)
        os.chdir(here)


def _zipped() -> bytes:
    sink = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, sink)
    assert zipfile.is_zipfile(sink)
    return sink.getvalue()


def _words(count: int) -> bytes:
    words = ["<pad>", "<start>", "<eos>", "<unk>", *(f"w{i}" for i in range(count))]
    vocabulary = {word: i for i, word in enumerate(words)}
    return json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}}).encode()


W, C, T = "model.safetensors", "config.json", "tokenizer.json"
EMBEDDING = "decoder.embedding.weight"
CONFIGS = {
    "width 10⁹": (_config(width=10**9), "Storage size"),
    "width 10⁵": (_config(width=10**5), "decoder.* is F32"),
    "width 10¹⁸": (_config(width=10**18), "config.json"),
    "layers 10⁶": (_config(layers=10**6), "layers must be at most"),
    "layers 128": (_config(layers=128), "lacks the tensor decoder.blocks"),
    "vocabulary 10¹²": (_config(vocabulary_size=10**12), "tokenizer.json has 21 entries"),
    "image 10⁶": (_config(image_size=10**6), "image_size must be at most"),
    "grid 10⁶": (_config(grid=10**6), "grid must be at most"),
    "length 10⁹": (_config(max_length=10**9), "max_length must be at most"),
    "heads 3": (_config(heads=3), "does not divide"),
    "heads 0": (_config(heads=0), "heads must be at least"),
    "hub": (_config(backbone="hf-hub:somebody/model"), "timm has no backbone"),
    "hub, old": (_config(backbone="hf_hub:somebody/model"), "timm has no backbone"),
    "timm's hub": (_config(backbone="timm/resnet10t.c3_in1k"), "timm has no backbone"),
    "directory": (_config(backbone="local-dir:/tmp/model"), "timm has no backbone"),
    "path": (_config(backbone="../../resnet10t"), "timm has no backbone"),
    "tag": (_config(backbone="resnet10t.nobody"), "timm has no backbone"),
    "two lines": (_config(backbone="a\nb"), "timm has no backbone"),
    "surrogate": (_config(backbone="\ud800"), "timm has no backbone"),
    "huge backbone": (
        _config(backbone="eva02_enormous_patch14_clip_224"),
        "model.safetensors lacks",
    ),
    "no features": (_config(backbone="coat_tiny"), "config.json"),
    "image of 33": (_config(backbone="swin_tiny_patch4_window7_224", image_size=33), "lacks the"),
    "mean is infinite": (_replaced(C, b"0.485", b"1e999"), "mean must be"),
    "name twice": (_replaced(C, b'"width"', b'"width": 64, "width"'), "occurs twice"),
    "nested": (_written(C, b'{"format": ' * 10**5), "config.json"),
    "number of 10⁶ digits": (_replaced(C, b'"width": 32', b'"width": ' + b"9" * 10**5), C),
    "not UTF-8": (_written(C, b"\xff\xfe\xff"), C),
    "2 MB": (_written(C, b" " * 2_000_000), "config.json is larger than"),
    "list": (_written(C, b"[]"), C),
    "no model": (_written(C, b'{"format": "captioner-bundle-1"}'), "'model' is missing"),
    "model is a list": (_written(C, b'{"format": "captioner-bundle-1", "model": [1]}'), C),
    "model is empty": (_written(C, b'{"format": "captioner-bundle-1", "model": []}'), "not an obj"),
    "endless": (_special(C, lambda path: path.symlink_to("/dev/zero")), "not a regular file"),
}
TOKENIZERS = {
    "a million words": (
        _written(T, _words(10**6)),
        "has 1000004 entries|larger than 16777216 bytes",
    ),
    "20 MB of one word": (_written(T, b'{"model": {"a": "' + b"a" * 20_000_000), "larger than"),
    "15 MB of one word": (_written(T, b'{"model": "' + b"a" * 15_000_000 + b'"}'), T),
    "word twice": (_replaced(T, b'"<pad>":0', b'"<pad>":0,"<pad>":0'), "occurs twice"),
    "nested words": (_written(T, b'{"model": [' + b"[" * 10**5), T),
    "pipe": (_special(T, os.mkfifo), "not a regular file"),
}
WEIGHTS = {
    "huge header": (_written(W, struct.pack("<Q", 2**63) + b"{}"), "a header of 9223"),
    "header of 17 MB": (_written(W, struct.pack("<Q", 17_000_000) + b" " * 100), "a header of"),
    "header beyond the end": (
        _written(W, struct.pack("<Q", 10**6) + b"{}"),
        "header cannot be read|lacks the tensor",
    ),
    "no bytes": (_written(W, b""), "header cannot be read|lacks the tensor"),
    "nested header": (_written(W, struct.pack("<Q", 10**5) + b"[" * 10**5), "header cannot be"),
    "header is a list": (_written(W, struct.pack("<Q", 2) + b"[]"), "not an object"),
    "overlapping": (
        _header(lambda header: header[EMBEDDING].update(data_offsets=[0, 21 * 32 * 4])),
        "offset",
    ),
    "outside": (
        _header(lambda header: header[EMBEDDING].update(data_offsets=[2**62, 2**62 + 2688])),
        "offset",
    ),
    "offsets are text": (
        _header(lambda header: header[EMBEDDING].update(data_offsets=["a", None])),
        "header",
    ),
    "shape of 2⁶²": (
        _header(lambda header: header[EMBEDDING].update(shape=[2**62, 32])),
        "decoder.embedding.weight is F32",
    ),
    "no shape": (_header(lambda header: header[EMBEDDING].pop("shape")), "F32 None"),
    "entry is text": (_header(lambda header: header.update({EMBEDDING: "x"})), "None None"),
    "more data": (_header(lambda header: None, b"\0"), "longer than"),
    "cut short": (lambda path: os.truncate(path / W, 10_000), "header|shorter"),
    "whole numbers": (_tensor(EMBEDDING, lambda tensor: tensor.int()), "is I32"),
    "bytes": (_tensor(EMBEDDING, lambda tensor: tensor.to(torch.uint8)), "is U8"),
    "fp8": (_tensor(EMBEDDING, lambda tensor: tensor.to(torch.float8_e4m3fn)), "is F8_E4M3"),
    "fp64": (_tensor(EMBEDDING, lambda tensor: tensor.double()), "is F64"),
    "truth": (_tensor(EMBEDDING, lambda tensor: tensor > 0), "is BOOL"),
    "complex": (_header(lambda header: header[EMBEDDING].update(dtype="C64")), "is C64"),
    "unknown dtype": (_header(lambda header: header[EMBEDDING].update(dtype=["F32"])), "is .'F32"),
    "transposed": (_tensor(EMBEDDING, lambda tensor: tensor.T.contiguous()), r"\[32, 21\]"),
    "infinite": (_tensor(EMBEDDING, lambda tensor: tensor + torch.inf), "not finite"),
    "not a number": (_tensor(EMBEDDING, lambda tensor: tensor * torch.nan), "not finite"),
    "a tensor too few": (
        _weights(lambda state: state.pop(EMBEDDING)),
        "lacks the tensor decoder.embed",
    ),
    "a tensor too many": (
        _weights(lambda state: state.update(x=torch.ones(1))),
        "unknown tensor 'x'",
    ),
    "tensor twice": (
        _replaced(W, b'{"', b'{"a": 1, "a": 1, "'),
        "header",
    ),
    "pickle": (_written(W, pickle.dumps({"weight": [1.0] * 99})), "header"),
    "zip": (_written(W, _zipped()), "header"),
    "endless": (_special(W, lambda path: path.symlink_to("/dev/zero")), "not a regular file"),
    "pipe": (_special(W, os.mkfifo), "not a regular file"),
    "socket": (_special(W, _socket), "cannot read"),
    "directory": (_special(W, Path.mkdir), "cannot read"),
    "link to itself": (_special(W, lambda path: path.symlink_to(path)), "cannot read"),
    "link to nothing": (_special(W, lambda path: path.symlink_to("nowhere")), "has no model"),
}
HOSTILE = {
    f"{kind}: {name}": case
    for kind, cases in (("config", CONFIGS), ("tokenizer", TOKENIZERS), ("weights", WEIGHTS))
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_bundle_gets_one_line_soon_and_little_memory(
    name, tmp_path, model_directory, monkeypatch
):
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    damage, message = HOSTILE[name]
    damage(_copy(model_directory, tmp_path))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    with pytest.raises(BundleError, match=message) as raised:
        bundle.load(str(tmp_path))
    assert time.process_time() - begin < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000, "kilobytes"
    beginnings = (f"the model {tmp_path} cannot be used: ", "cannot read ")
    assert str(raised.value).startswith(beginnings)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 1000


def test_how_many_hostile_bundles_there_are(capsys):
    counts = {"config": len(CONFIGS), "tokenizer": len(TOKENIZERS), "weights": len(WEIGHTS)}
    with capsys.disabled():
        print(json.dumps({"hostile bundles": counts | {"all": len(HOSTILE)}}))
    assert len(HOSTILE) > 60
