"""Samplers as generators that know nothing of networks, batches or servers.

A sampler asks for denoised pictures and gets them: `x0 = yield x, t`. Whoever runs it decides how the answer comes
about: `drive` calls a denoiser in a loop, `drive_async` awaits one that may be anywhere. Both count the calls.
"""

from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ddm.errors import one_of
from ddm.grids import time_grid
from ddm.randomness import Use, normal
from ddm.schedules import Schedule, velocity

SAMPLERS = ("euler", "ddim")

Denoiser = Callable[
    [Tensor, Tensor], Tensor
]  # (x [B, ...], t [] or [B]) -> E[x0 | x_t = x] [B, ...]; t of any device and dtype
Noise = Callable[[int], Tensor]  # the standard normal noise of step n, shaped like x
Walk = Generator[
    tuple[Tensor, Tensor], Tensor, Tensor
]  # yields (x, t), is sent the denoised x, returns x at the grid's end


def euler(x: Tensor, schedule: Schedule, times: Tensor, noise: Noise) -> Walk:
    """Euler's method on the probability-flow ODE, `x' = x + (t' - t) v(x, t)`: the sampler of the paper's routed ODE."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, (yield x, t), schedule(t))
    return x


def ddim(x: Tensor, schedule: Schedule, times: Tensor, noise: Noise) -> Walk:
    """`x' = a' D + (s'/s) (x - a D)` (arXiv 2010.02502, eq. 12 with sigma = 0): exact where D is constant over the step."""
    for t, t_next in pairwise(times):
        c, c_next = schedule(t), schedule(t_next)
        denoised = yield x, t
        x = c_next.a * denoised + c_next.s / c.s * (x - c.a * denoised)
    return x


@dataclass(frozen=True)
class Sampler:
    """A way to walk from noise to data: its generator, its order of accuracy in 1/N, and its denoiser calls a step."""

    walk: Callable[[Tensor, Schedule, Tensor, Noise], Walk]
    order: int
    calls_per_step: int = 1


def sampler(name: str) -> Sampler:
    """The sampler of that name. Raises `ConfigError` for one that does not exist."""
    match name:
        case "euler":
            return Sampler(euler, order=1)
        case "ddim":
            return Sampler(ddim, order=1)
        case _:
            raise one_of("sample.sampler", name, SAMPLERS)


def drive(walk: Walk, denoise: Denoiser) -> tuple[Tensor, int]:
    """Run a sampler to its end with a denoiser at hand. Returns its result and the number of calls made."""
    calls = 0
    try:
        x, t = next(walk)
        while True:
            calls += 1
            x, t = walk.send(denoise(x, t))
    except StopIteration as end:
        return end.value, calls


async def drive_async(walk: Walk, denoise: Callable[[Tensor, Tensor], Awaitable[Tensor]]) -> tuple[Tensor, int]:
    """`drive`, for a denoiser that must be awaited."""
    calls = 0
    try:
        x, t = next(walk)
        while True:
            calls += 1
            x, t = walk.send(await denoise(x, t))
    except StopIteration as end:
        return end.value, calls


def start(
    x: Tensor,
    schedule: Schedule,
    sampler_name: str,
    steps: int,
    grid: str,
    *,
    seed: int = 0,
    index: Tensor | None = None,
    t_min: float = 0.0,
) -> Walk:
    """A sampler ready to be driven from `x` `[B, ...]` at t = 1.

    The noise of step n is that of the pictures `index` (default 0 ... B-1) of the seed.
    """
    index = torch.arange(len(x), device=x.device) if index is None else index
    times = time_grid(grid, steps, schedule, t_min)  # on the CPU: no step waits for a device to learn its time

    def noise(step: int) -> Tensor:
        return normal(seed, Use.STEP, index, step, x.shape[1:]).to(x.dtype)

    return sampler(sampler_name).walk(x, schedule, times, noise)


def sample(
    denoiser: Denoiser,
    x: Tensor,
    schedule: Schedule,
    sampler: str = "ddim",
    steps: int = 25,
    grid: str = "uniform_t",
    seed: int = 0,
    t_min: float = 0.0,
) -> Tensor:
    """Follow the probability flow from `x` `[B, ...]` at t = 1 to the grid's end at `t_min`; returns x there.

    Raises `ConfigError` for an unknown sampler or grid, or steps below 1.
    """
    return drive(start(x, schedule, sampler, steps, grid, seed=seed, t_min=t_min), denoiser)[0]
