"""A service of fakes of a model's experts, for tests of what it accepts and of its weights."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve import load
from serve.engine.expert import UnavailableError
from serve.engine.metrics import Metrics
from serve.engine.service import AdmittedRequest, Service
from serve.engine.turn import Turn
from serve.model.model import Model
from serve.settings import settings

STEPS = 3


class Fake:
    """An expert of a model that can be held or be away, and counts its calls."""

    calls = 1

    def __init__(
        self, k: int, denoise: Callable[[Tensor, Tensor], Tensor], free: asyncio.Event
    ) -> None:
        self.name, self.denoise, self.free, self.turn = (
            f"expert-{k:02d}",
            denoise,
            free,
            Turn(1),
        )
        self.asked, self.away = 0, False

    async def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked += 1
        await self.free.wait()
        if self.away:
            raise UnavailableError("no route")
        with torch.inference_mode():
            return self.denoise(x, t)

    async def check(self) -> None:
        if self.away:
            raise UnavailableError("no route")


class Connected:
    """Connects a service to fakes of the experts of its bundle; `free` holds them all."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.free.set()
        self.experts: list[Fake] = []  # of the version that was connected last

    def __call__(self, model: Model, folder: Path, turn: Turn) -> list[Fake]:
        assert not model.experts  # they are elsewhere
        self.experts = [Fake(k, expert, self.free) for k, expert in enumerate(load(folder).experts)]
        return self.experts

    @property
    def asked(self) -> int:
        return sum(expert.asked for expert in self.experts)


@asynccontextmanager
async def serving(
    run: Path, *words: str, connect: Connected | None = None
) -> AsyncIterator[Service]:
    tree = {"run": str(run), "serve": {"device": "cpu"}, "sample": {"steps": STEPS}}
    service = Service(settings(tree, words), Metrics(), connect)
    await service.start()
    try:
        async with asyncio.timeout(60):
            yield service
    finally:
        if connect is not None:
            connect.free.set()
        await service.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def images(order: AdmittedRequest) -> Tensor:
    return torch.stack([order.request.images[place] for place in range(len(order.request.index))])


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
