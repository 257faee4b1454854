"""Experts in this process."""

import asyncio
from collections.abc import Callable

import torch
from torch import Tensor

from serve.engine.expert import in_thread
from serve.model.model import Model


class Runner:
    """One expert's network on its device: `(x [B, C, H, W], t [B]) -> [B, C, H, W]`, on x's device.

    A compiled network gets batches padded to a power of two, so that it is compiled for few sizes.
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
            padding = (1 << (size - 1).bit_length()) - size
            x = torch.cat([x, x[-1:].expand(padding, *x.shape[1:])])
            t = torch.cat([t, t[-1:].expand(padding)])
        return self.denoiser(x.to(self.device), t.to(self.device, torch.float32))[:size].to(x)


class LocalExpert:
    """An expert in this process; all experts of one device share `turn`."""

    calls = 1

    def __init__(self, name: str, run: Runner, turn: asyncio.Semaphore) -> None:
        self.name, self.run, self.turn = name, run, turn

    async def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return await in_thread(self.run, x, t)

    async def check(self) -> None:
        """Always available."""


def local_experts(
    model: Model, turn: asyncio.Semaphore, compiled: bool = False
) -> list[LocalExpert]:
    """All experts of a model, in this process."""
    runners = [Runner(expert, model.device, compiled) for expert in model.experts]
    return [LocalExpert(f"expert-{k:02d}", run, turn) for k, run in enumerate(runners)]
