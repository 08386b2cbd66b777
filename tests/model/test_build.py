"""New models: their encoder's weights from a file or from the hub."""

import dataclasses
import socket
from pathlib import Path

import pytest
import torch

from captioner.errors import InputError
from captioner.model.build import build_model
from conftest import TINY, tiny_model


@pytest.mark.parametrize(
    "wrapper", [None, "state_dict", "model", "model_state_dict", "model_state", "state_dict_ema"]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_a_training_script_is_taken(wrapper, prefix, tmp_path: Path):
    weights = tiny_model(seed=3).encoder.backbone.state_dict()
    state = {prefix + name: value for name, value in weights.items()}
    whole = state if wrapper is None else {wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(whole, tmp_path / "weights.pth")

    built = build_model(TINY, str(tmp_path / "weights.pth")).encoder.backbone.state_dict()

    assert all(torch.equal(built[name], value) for name, value in weights.items())


@pytest.mark.parametrize("state", [{}, {"epoch": 3}, {"model": {"a": 1}}, [torch.ones(1)]])
def test_what_is_no_state_dict_is_one_line(state, tmp_path: Path):
    torch.save(state, tmp_path / "weights.pth")

    with pytest.raises(InputError, match=r"weights\.pth is not a state dict"):
        build_model(TINY, str(tmp_path / "weights.pth"))


def test_without_a_hub_the_option_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
):
    from huggingface_hub import constants

    with socket.socket() as unused:  # bound and not listened on: connections are refused
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/{revision}/{filename}"
        )
        with pytest.raises(InputError, match=r"resnet10t from timm/.*--encoder-weights") as caught:
            build_model(dataclasses.replace(TINY, backbone="resnet10t"), None)

    assert "\n" not in str(caught.value)
    assert "Retrying" not in capfd.readouterr().err
    assert not constants.HF_HUB_OFFLINE
