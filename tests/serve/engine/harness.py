"""Fake experts and helpers for tests of the engine."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from serve.engine.expert import UnavailableError
from serve.engine.metrics import Metrics
from serve.engine.scheduler import Engine
from serve.engine.shares import ANYONE, Key
from serve.engine.state import Request, StepRecord
from serve.engine.turn import Turn
from serve.model.model import Model
from serve.model.running import Trace

Denoise = Callable[[Tensor, Tensor], Tensor]
AWAY = UnavailableError("no route")


class Fake:
    """An expert that answers with `denoise`; it can be held, be away, or fail in its next calls."""

    def __init__(self, k: int, denoise: Denoise, calls: int = 1, turn: Turn | None = None) -> None:
        self.name, self.denoise, self.calls = f"expert-{k:02d}", denoise, calls
        self.turn = turn or Turn(calls)
        self.batches: list[tuple[Tensor, Tensor]] = []  # of every call, as it came
        self.free = asyncio.Event()  # while it is not set, calls wait
        self.free.set()
        self.faults: deque[Exception | Denoise | None] = (
            deque()
        )  # of the next calls: raised, or what answers instead
        self.away = False  # then every call and check is lost
        self.poison: Callable[[Tensor], bool] = lambda x: (
            False
        )  # images [C, H, W] on which it fails

    async def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.batches.append((x, t))
        await asyncio.sleep(0)  # as real experts, it lets other tasks run
        fault = self.faults.popleft() if self.faults else None
        await self.free.wait()
        if self.away:
            raise AWAY
        if isinstance(fault, BaseException):
            raise fault
        if any(self.poison(image) for image in x):
            raise RuntimeError("poisoned")
        with torch.inference_mode():
            return (fault or self.denoise)(x, t)

    async def check(self) -> None:
        if self.away:
            raise AWAY

    @property
    def sizes(self) -> list[int]:
        return [len(x) for x, _ in self.batches]


class Counting(Metrics):
    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.fills: list[float] = []

    def count(self, name: str, amount: float = 1, **label: str) -> None:
        self.counts[name, label.get("expert", "")] += int(amount)

    def observe(self, name: str, value: float, **label: str) -> None:
        if name == "batch_fill":
            self.fills.append(value)


def fakes(model: Model, **settings: Any) -> list[Fake]:
    return [Fake(k, expert, **settings) for k, expert in enumerate(model.experts)]


def request_for(
    model: Model,
    n: int = 1,
    seed: int = 0,
    first_index: int = 0,
    on_step: Callable[[int, StepRecord, Tensor], None] | None = None,
    trace: bool = False,
    key: Key = ANYONE,
    **settings: Any,
) -> Request:
    return Request(
        model.plan(model.settings(**settings)),
        seed,
        torch.arange(first_index, first_index + n),
        on_step,
        trace,
        key,
    )


def only(model: Model, k: int, steps: int = 3) -> dict[str, Any]:
    """Settings with which images need expert k and no other."""
    return {
        "clusters": {model.names[k]: 1.0},
        "source": "prior",
        "policy": "top_k",
        "steps": steps,
        "control_variate": "none",
    }


def images(request: Request) -> Tensor:
    assert sorted(request.images) == list(range(len(request.index)))
    return torch.stack([request.images[place] for place in range(len(request.index))])


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def same_trace(request: Request, trace: Trace) -> None:
    """The request's trace is that of `sample`."""
    for place in range(len(request.index)):
        steps = request.records[place]
        assert [record.t for record in steps] == pytest.approx(trace.t.tolist())
        torch.testing.assert_close(
            torch.stack([record.alpha for record in steps]),
            trace.alpha[:, place],
            atol=1e-4,
            rtol=0,
        )
        assert torch.stack([record.chosen for record in steps]).equal(trace.chosen[:, place])
    assert request.nfe == trace.calls


@asynccontextmanager
async def running(experts: list[Fake], **settings: Any) -> AsyncIterator[Engine]:
    engine = Engine(experts, settings.pop("turn", None) or Turn(1), **settings)
    engine.start()
    try:
        async with asyncio.timeout(120):
            yield engine
    finally:
        for expert in experts:
            expert.free.set()
        await engine.close()
    assert not engine.requests
    assert asyncio.all_tasks() == {asyncio.current_task()}  # it leaves none behind


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def call_instead(
    expert: Fake, call: Callable[[Tensor, Tensor], Coroutine[Any, Any, Tensor]]
) -> Any:
    """The expert with another call, for the calls to come."""

    class Instead(Fake):
        def __init__(self) -> None:
            self.__dict__.update(expert.__dict__)

        async def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return await call(x, t)

    return Instead()
