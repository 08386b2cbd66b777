import platform
from types import SimpleNamespace

import pytest
import torch

from captioner.errors import InputError
from captioner.runtime import device as device_module
from captioner.runtime.device import choose_device, identify, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "mps:7"])
def test_a_device_that_is_not_here_is_an_input_error_that_names_the_choices(name):
    with pytest.raises(InputError, match=f"no device '{name}' here; use auto, cpu, cuda"):
        choose_device(name)


@pytest.mark.parametrize(("amx", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_only_where_the_hardware_multiplies_in_it(amx, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"


def test_a_device_has_one_name_in_all_processes_and_no_other_device_has_it(monkeypatch):
    assert identify(CPU) == identify(CPU)
    properties = {index: SimpleNamespace(uuid=f"4f7d-{index}") for index in (0, 1)}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: properties[device.index]
    )
    names = {identify(torch.device("cuda", index)) for index in (0, 1)}
    assert names == {"GPU 4f7d-0", "GPU 4f7d-1"}
    monkeypatch.setattr(device_module, "_BOOT", device_module.Path("/nowhere"))
    assert identify(CPU) == f"cpu of machine {platform.node()}"
