"""One rule for the device, whatever the machine has."""

import pytest
import torch

from ddm.device import pick_device
from ddm.errors import ConfigError


@pytest.mark.parametrize(("cuda", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_or_cpu_and_never_mps(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device() == pick_device("auto") == expected


def test_a_device_of_this_machine_is_taken() -> None:
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["moon", "cuda:99", "meta", "", "cpu:x"])
def test_a_device_that_this_machine_lacks_is_refused_by_key(name: str) -> None:
    with pytest.raises(ConfigError, match="^device must be auto or a device of this") as error:
        pick_device(name)
    assert error.value.key == "device"
