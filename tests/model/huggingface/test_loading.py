"""Loading models and settings: what a user may get wrong is one line that says what to do."""

import json
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captioner.config import DecodeConfig
from captioner.errors import BundleError, InputError, OutputError
from captioner.model.huggingface import loading
from captioner.model.huggingface.captioner import PretrainedCaptioner
from captioner.model.huggingface.importing import import_model
from captioner.model.huggingface.loading import load_directory
from captioner.model.huggingface.settings import GenerationSettings
from captioner.model.loading import load_model

pytest.importorskip("transformers")

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)


def load(directory: Path, **settings: Any) -> Any:
    return load_directory(directory, GenerationSettings(**settings), device="cpu", precision="fp32")


@pytest.fixture
def copied(directory_of: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory_of("blip"), tmp_path / "blip"))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("vit_gpt2", {"prompt": "a photo of"}, "ViT-GPT2 takes no prompt: remove --prompt"),
        ("blip", {"system_prompt": "Be brief."}, "BLIP takes no system prompt"),
        ("florence2", {"prompt": "Describe it."}, r"takes a task: one of <CAPTION>, <DETAILED"),
        ("blip2", {"attention": "tokens"}, "BLIP-2 has no attention maps: use --attention none"),
        ("blip", {"temperature": 0.7, "beam": 3}, "--temperature 0.7 samples .* --beam 3"),
        ("blip", {"captions": 3}, "--captions 3 needs sampling: add for example --temperature"),
        ("blip", {"top_p": 0.5}, "--top-p 0.5 needs sampling"),
        ("blip", {"max_words": 9}, "--max-words is for models that captioner trained"),
        ("blip", {"allow_unknown": True}, "--allow-unknown is for models .* remove"),
        ("blip", {"prompt": "a {title"}, "write {{ and }} for braces"),
    ],
)
def test_an_option_that_the_family_has_not_is_refused(
    family: str, changes: dict[str, Any], message: str, directory_of: Any
) -> None:
    model = load_model(str(directory_of(family)))
    with pytest.raises(InputError, match=message):
        model.resolve(DecodeConfig(**changes))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", "a photo of"),
        ("system_prompt", "Be brief."),
        ("max_new_tokens", 9),
        ("temperature", 0.5),
        ("top_p", 0.5),
        ("repetition_penalty", 1.1),
        ("captions", 2),
    ],
)
def test_a_model_of_ours_refuses_the_options_of_pretrained_ones(
    name: str, value: Any, model_directory: Path
) -> None:
    model = load_model(str(model_directory))
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is for pretrained models"):
        model.resolve(DecodeConfig(**{name: value}))


def test_braces_are_written_twice(directory_of: Any) -> None:
    model = load_model(str(directory_of("blip")))
    decode = model.resolve(DecodeConfig(prompt="a {{b}}"))
    loaded = model.load(decode, device="cpu", precision="fp32")
    assert isinstance(loaded, PretrainedCaptioner)
    assert loaded.settings.prompt == "a {b}"


@pytest.mark.parametrize(
    ("family", "attention", "prompt", "tokens"),
    [
        ("blip", "tokens", "", 64),
        ("git", "tokens", "", 64),
        ("vit_gpt2", "tokens", None, 64),
        ("florence2", "tokens", "<CAPTION>", 256),
        ("blip2", "none", "", 64),
        ("paligemma", "none", "caption en", 64),
        ("llava", "none", "Describe this image in one sentence.", 256),
    ],
)
def test_each_family_has_its_defaults(
    family: str, attention: str, prompt: str | None, tokens: int, directory_of: Any
) -> None:
    decode = load_model(str(directory_of(family))).resolve(DecodeConfig())
    assert (decode.attention, decode.prompt, decode.max_new_tokens) == (attention, prompt, tokens)


def test_a_repetition_penalty_changes_captions(directory_of: Any) -> None:
    usual = load(directory_of("blip"), max_new_tokens=20)
    other = load(directory_of("blip"), max_new_tokens=20, repetition_penalty=2.0)
    assert usual.caption([IMAGE])[0].text != other.caption([IMAGE])[0].text


def test_a_system_prompt_changes_captions(directory_of: Any) -> None:
    usual = load(directory_of("llava"), max_new_tokens=8)
    other = load(directory_of("llava"), max_new_tokens=8, system_prompt="two blue dogs")
    assert usual.caption([IMAGE])[0].text != other.caption([IMAGE])[0].text


def test_damaged_weights_are_named(copied: Path) -> None:
    (copied / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(BundleError, match=r"weights .*model.safetensors are damaged"):
        load(copied)


def test_weights_that_end_early_are_named(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BundleError, match=r"the model .*blip"):
        load(copied)


def test_a_model_larger_than_the_memory_is_refused_before_it_is_read(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [70_000, 100_000], "data_offsets": [0, 28_000_000_000]}}
    ).encode()
    weights = struct.pack("<Q", len(header)) + header
    (copied / "model.safetensors").write_bytes(weights)
    monkeypatch.setattr(loading, "_free_memory", lambda device: 16_000_000_000)
    with pytest.raises(BundleError, match=r"7.0 billion parameters .* 30.8 GB, and cpu has 16.0"):
        load(copied)


def test_a_chat_model_without_a_template_is_refused(directory_of: Any, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(directory_of("llava"), tmp_path / "llava"))
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(BundleError, match="no chat template"):
        load(copied)


class _Evil:
    def __reduce__(self) -> Any:
        return (print, ("code of a stranger",))


def test_pickled_weights_are_converted_once(directory_of: Any, tmp_path: Path) -> None:
    original = directory_of("blip")
    source = Path(shutil.copytree(original, tmp_path / "pickled"))
    from safetensors.torch import load_file

    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(BundleError, match="captioner import-model"):
        load_model(str(source))
    converted = import_model(str(source), str(tmp_path / "converted"))
    expected = load(original, max_new_tokens=9).caption([IMAGE])[0]
    assert load(converted, max_new_tokens=9).caption([IMAGE])[0].text == expected.text
    with pytest.raises(OutputError, match="exists"):
        import_model(str(source), str(converted))


def test_a_pickle_with_code_is_refused_and_not_run(
    copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (copied / "model.safetensors").unlink()
    with open(copied / "pytorch_model.bin", "wb") as file:
        pickle.dump({"w": _Evil()}, file)
    with pytest.raises(BundleError, match=r"pytorch_model.bin .* is not plain weights"):
        import_model(str(copied), str(tmp_path / "converted"))
    assert "stranger" not in capfd.readouterr().out
    assert not (tmp_path / "converted").exists()


WITHOUT = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, *rest):
    return None if name.split(".")[0] in ("transformers", "huggingface_hub") else find(name, *rest)
PathFinder.find_spec = staticmethod(find_spec)
from captioner.errors import CaptionerError
from captioner.model.loading import load_model
for model in sys.argv[1:]:
    try:
        print(type(load_model(model)).__name__)
    except CaptionerError as error:
        print(error)
print("transformers" in sys.modules)
"""


def test_without_the_packages_our_models_load_and_one_line_names_the_extra(
    directory_of: Any, model_directory: Path
) -> None:
    models = [str(model_directory), str(directory_of("blip")), "owner/name"]
    command = [sys.executable, "-c", WITHOUT, *models]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ours, local, hub, imported = done.stdout.splitlines()
    assert (ours, imported) == ("NativeModel", "False")
    assert "pip install 'captioner[hf]'" in local
    assert "no directory owner/name" in hub
    assert "pip install 'captioner[hf]'" in hub
