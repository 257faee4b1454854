"""The training step (forward, backward, Adam) of ten shapes of the UNet on a CPU, 3x32x32: which
shape makes the most of the machine. `patch` p: space-to-depth by p at the input, depth-to-space at
the output.
"""

from functools import partial
from typing import Any

import torch

from benchmarks.speed.timing import (
    Call,
    Ceiling,
    Figures,
    Variant,
    against_ceiling,
    alternate,
    flop_of,
    parameters,
    spread,
)
from experts.unet import UNetConfig

SHAPE = (3, 32, 32)
SHAPES: list[dict[str, Any]] = [
    {"channels": 8, "multipliers": [1, 2, 4, 4], "blocks": 1, "attention": [8]},
    {"channels": 16, "multipliers": [1, 2, 4, 4], "blocks": 1, "attention": [8]},
    {"channels": 32, "multipliers": [1, 2, 2], "blocks": 1, "attention": [8]},
    {"patch": 2, "channels": 32, "multipliers": [1, 2, 2], "blocks": 1, "attention": [8]},
    {"patch": 2, "channels": 32, "multipliers": [1, 2, 2], "blocks": 2, "attention": [8]},
    {"patch": 2, "channels": 64, "multipliers": [1, 2], "blocks": 1, "attention": [8]},
    {"patch": 2, "channels": 64, "multipliers": [1, 2, 2], "blocks": 1, "attention": [8]},
    {"patch": 4, "channels": 64, "multipliers": [1, 2], "blocks": 1, "attention": [4]},
    {"patch": 4, "channels": 96, "multipliers": [1, 2], "blocks": 1, "attention": [4]},
    {"patch": 4, "channels": 96, "multipliers": [1, 2], "blocks": 2, "attention": [4]},
]


def variants(device: str) -> list[Variant]:
    """The rows of the table: none on a GPU, where the small shapes are not used."""
    if device != "cpu":
        return []
    return [
        Variant(
            f"{shown_shape(sizes)}, batch {batch}",
            partial(measured, sizes, batch),
            2 if batch == 16 else 3,
            15,
        )
        for batch in (16, 64)
        for sizes in SHAPES
    ]


def shown_shape(sizes: dict[str, Any]) -> str:
    """A shape in words."""
    multipliers = " ".join(map(str, sizes["multipliers"]))
    patch = f"patch {sizes['patch']}, " if sizes.get("patch", 1) > 1 else ""
    return f"{patch}{sizes['channels']} channels, {multipliers}; {sizes['blocks']} per level"


def measured(sizes: dict[str, Any], batch: int) -> Figures:
    """Milliseconds per step and GFLOP/s in float32 and under bfloat16's autocast.

    Raises `TypeError` if `UNetConfig` does not have one of the keys yet.
    """
    network = UNetConfig(**sizes, dropout=0.0).build(SHAPE)
    adam = torch.optim.Adam(network.parameters(), fused=True)
    x = torch.randn(batch, *SHAPE).contiguous(memory_format=torch.channels_last)
    t = torch.linspace(0.1, 0.9, batch)
    flop = batch * flop_of(network, x, t, backward=True)

    def step(bf16: bool) -> None:
        adam.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = network(x, t)
        (out.float() - x).square().mean().backward()
        adam.step()

    figures: Figures = {"Mparameters": parameters(network), "GFLOP/step": flop / 1e9}
    ceilings = {name: Ceiling(name, "cpu") for name in ("float32", "bfloat16")}
    for name, ceiling in ceilings.items():
        sides: dict[str, Call] = {
            name: partial(step, name == "bfloat16"),
            "ceiling": ceiling.call(),
        }
        timing = alternate(sides, "cpu", most_s=10)
        figures[f"{name} ms/step"] = 1000 * timing.median(name)
        figures[f"{name} ± %"] = spread(timing.seconds[name])
        figures[f"{name} GFLOP/s"] = flop / timing.median(name) / 1e9
        figures |= against_ceiling(timing, [name], flop, ceiling)
    return figures
