"""Experts in this process."""

import asyncio
from collections.abc import Callable

import torch
from torch import Tensor

from serve.engine.expert import in_thread
from serve.model.model import Model


class Runner:
    """One expert's network on its device: `(x [B, C, H, W], t [B]) -> [B, C, H, W]`, on x's device.

    With `compiled` the network is compiled, and batches are filled up to a power of two, so that it is compiled for a few sizes.
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor, Tensor], Tensor],
        device: torch.device,
        compiled: bool = False,
    ) -> None:
        self.device, self.compiled = device, compiled
        self.denoiser = torch.compile(denoiser, dynamic=False) if compiled else denoiser

    @torch.inference_mode()
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        size = len(x)
        if self.compiled:
            fill = (1 << (size - 1).bit_length()) - size
            x, t = (
                torch.cat([x, x[-1:].expand(fill, *x.shape[1:])]),
                torch.cat([t, t[-1:].expand(fill)]),
            )
        return self.denoiser(x.to(self.device), t.to(self.device, torch.float32))[:size].to(x)


class LocalExpert:
    """An expert in this process; all on one device take turns."""

    calls = 1

    def __init__(self, name: str, run: Runner, turn: asyncio.Semaphore) -> None:
        self.name, self.run, self.turn = name, run, turn

    async def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return await in_thread(self.run, x, t)

    async def check(self) -> None:
        """It is always here."""


def local_experts(
    model: Model, turn: asyncio.Semaphore, compiled: bool = False
) -> list[LocalExpert]:
    """All experts of a model, in this process."""
    runners = [Runner(expert, model.device, compiled) for expert in model.experts]
    return [LocalExpert(f"expert-{k:02d}", run, turn) for k, run in enumerate(runners)]
