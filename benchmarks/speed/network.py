"""The UNet (128 channels, multipliers 1 2 2 2, two blocks, attention at 16; 35.7M parameters)
against diffusers' `UNet2DModel` of the same shape, 3x32x32. Of both, forward alone and with the
backward pass, in eager float32 and bfloat16, in channels_last and compiled. GPUs multiply float32
in convolutions as TF32.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.timing import (
    Call,
    Ceiling,
    Figures,
    Variant,
    against_ceiling,
    alternate,
    brief,
    flop_of,
    parameters,
)
from experts.unet import UNetConfig

SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Mode:
    """How a network runs."""

    name: str
    bf16: bool = True
    channels_last: bool = True
    compiled: bool = False


FLOAT32 = Mode("eager float32", bf16=False, channels_last=False)
BF16 = Mode("eager bf16", channels_last=False)
CHANNELS_LAST = Mode("channels-last bf16")
COMPILED = Mode("compiled bf16", compiled=True)


def variants(device: str) -> list[Variant]:
    """The rows of the table, the most valuable ones with the lowest rank."""

    def row(rank: int, mode: Mode, batch: int, backward: bool, channels: int = 128) -> Variant:
        passes = "forward + backward" if backward else "forward"
        name = f"{channels} channels, {mode.name}, {passes}, batch {batch}"
        work = partial(_measured, device, mode, batch, backward, channels)
        return Variant(name, work, rank, needs_s=60 if mode.compiled or device == "cpu" else 10)

    batch = 16 if device == "cpu" else 256
    found = []
    for backward in (True, False):
        found.append(row(0, CHANNELS_LAST, batch, backward))
        found += [row(1, mode, batch, backward) for mode in (BF16, FLOAT32)]
    # Compiling takes a minute or more: what needs none comes first.
    found += [row(1, COMPILED, batch, True), row(2, COMPILED, batch, False)]
    if device != "cpu":
        found += [row(3, COMPILED, batch, True, channels) for channels in (64, 96)]
        found += [row(4, mode, 64, True) for mode in (CHANNELS_LAST, COMPILED)]
        found += [row(4, mode, 64, False) for mode in (CHANNELS_LAST, COMPILED)]
        found += [row(4, COMPILED, batch, False, channels) for channels in (64, 96)]
        found += [row(5, mode, 64, True) for mode in (BF16, FLOAT32)]
        found += [row(5, mode, 64, False) for mode in (BF16, FLOAT32)]
    return found


def _measured(device: str, mode: Mode, batch: int, backward: bool, channels: int) -> Figures:
    x = torch.randn(batch, *SHAPE, device=device)
    t = torch.linspace(0.1, 0.9, batch, device=device)
    ceiling = Ceiling("bfloat16" if mode.bf16 else _float32(device), device)
    builders: dict[str, Callable[[int], nn.Module]] = {"ddm": unet, "diffusers": diffusers_unet}
    if channels != 128:
        del builders["diffusers"]
    sides: dict[str, Call] = {"ceiling": ceiling.call()}
    figures: Figures = {}
    flop = 0.0
    for name, build in builders.items():
        try:
            network = build(channels).to(device)
            if name == "ddm":
                flop = flop_of(network, x, t, backward)
                figures = {"Mparameters": parameters(network), "GFLOP/image": flop / 1e9}
            sides[name] = _call(network, x, t, mode, backward)
        except Exception as error:  # a peer's alone is no reason to stop
            if name == "ddm":
                raise
            figures[f"{name} error"] = brief(error)
    timing = alternate(sides, device)
    names = tuple(builders)
    return {
        **figures,
        **timing.rates(names, batch, "images/s"),
        **timing.compared("ddm", "diffusers"),
        **against_ceiling(timing, names, batch * flop, ceiling),
    }


def _float32(device: str) -> str:
    return "float32" if device == "cpu" else "tf32"


def _call(network: nn.Module, x: Tensor, t: Tensor, mode: Mode, backward: bool) -> Call:
    layout = torch.channels_last if mode.channels_last else torch.contiguous_format
    network.to(memory_format=layout)
    x = x.contiguous(memory_format=layout)
    if mode.compiled:
        network.compile(dynamic=False)

    def forward() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=mode.bf16):
            return network(x, t)

    def both() -> None:
        network.zero_grad()
        forward().float().square().mean().backward()

    return both if backward else torch.no_grad()(forward)


def unet(channels: int) -> nn.Module:
    """Ours, without dropout, as diffusers' has none."""
    return UNetConfig(channels=channels, dropout=0.0).build(SHAPE)


def diffusers_unet(channels: int) -> nn.Module:
    """Diffusers' network of the same shape. Raises `ImportError` if diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        raise ImportError("diffusers is not installed")
    return Peer(channels)


class Peer(nn.Module):
    """`UNet2DModel` as google/ddpm-cifar10-32 configures it: attention with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        down, up = ["DownBlock2D"] * 4, ["UpBlock2D"] * 4
        down[1], up[-2] = "AttnDownBlock2D", "AttnUpBlock2D"
        self.network: Any = UNet2DModel(
            sample_size=SHAPE[-1],
            in_channels=SHAPE[0],
            out_channels=SHAPE[0],
            layers_per_block=2,
            block_out_channels=(channels, 2 * channels, 2 * channels, 2 * channels),
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            attention_head_dim=None,
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, 1000 * t, return_dict=False)[0]
