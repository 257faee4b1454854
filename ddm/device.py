"""The device that networks run on: one rule for training, evaluation, sampling and serving."""

import os
import platform

import torch

from ddm.errors import ConfigError, shown


def pick_device(name: str = "auto") -> str:
    """A torch device by name; `auto` is cuda if this machine has one, else cpu.

    `auto` is never Apple's mps, which lacks the float64 that schedules and samplers need.

    Raises `ConfigError` naming `device` if this machine does not have it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()  # `meta` and the like hold no numbers
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ConfigError(
            f"device must be auto or a device of this machine, got {shown(name)}", "device"
        ) from error
    return name


def device_name(device: str) -> str:
    """The hardware behind a torch device, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores of {platform.machine()}"
