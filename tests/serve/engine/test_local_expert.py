"""Experts in this process: what they answer is their network's, and all on one device take turns."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serve import load
from serve.engine.local_expert import LocalExpert, Runner, local_experts
from serve.engine.scheduler import Engine
from serve.engine.state import Request


def affine(x: Tensor, t: Tensor) -> Tensor:
    return 3 * x + t.reshape(-1, 1, 1, 1)


def test_a_runner_answers_as_its_network_in_the_type_of_what_it_was_asked() -> None:
    x, t = torch.randn(5, 1, 2, 2), torch.linspace(0.1, 1, 5, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        answer = Runner(affine, torch.device("cpu"))(x.to(dtype), t)
        assert answer.dtype == dtype
        torch.testing.assert_close(answer, (3 * x + t.float().reshape(-1, 1, 1, 1)).to(dtype))


def test_a_compiled_network_sees_only_powers_of_two_and_answers_no_more_than_it_was_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []

    def compiled(
        network: Callable[[Tensor, Tensor], Tensor], dynamic: bool
    ) -> Callable[[Tensor, Tensor], Tensor]:
        assert not dynamic

        def call(x: Tensor, t: Tensor) -> Tensor:
            sizes.append(len(x))
            assert len(t) == len(x)
            return network(x, t)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    runner = Runner(affine, torch.device("cpu"), compiled=True)
    for size in (1, 2, 3, 4, 5, 9, 33):
        x, t = torch.randn(size, 1, 2, 2), torch.rand(size)
        torch.testing.assert_close(runner(x, t), affine(x, t))
    assert sizes == [1, 2, 4, 4, 8, 16, 64]


def test_the_experts_of_a_model_are_its_networks_in_their_order(small_run: Path) -> None:
    model = load(small_run)
    x, t = torch.randn(3, *model.shape), torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)

    async def work() -> None:
        experts = local_experts(model, asyncio.Semaphore(1))
        assert [expert.name for expert in experts] == ["expert-00", "expert-01", "expert-02"]
        for expert, network in zip(experts, model.experts, strict=True):
            await expert.check()
            with torch.inference_mode():
                torch.testing.assert_close(await expert(x, t), network(x, t.float()))

    asyncio.run(work())


def test_experts_on_one_device_and_routing_are_never_at_work_together(small_run: Path) -> None:
    model = load(small_run)
    at_work, most, threads = 0, 0, set()

    def one_at_a_time(network: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            nonlocal at_work, most
            at_work += 1
            most = max(most, at_work)
            threads.add(threading.current_thread())
            try:
                return network(*args)
            finally:
                at_work -= 1

        return call

    settings = {"steps": 4, "policy": "full", "source": "posterior"}
    expected = model.sample(6, seed=1, **settings)
    model.posterior = one_at_a_time(model.posterior)  # type: ignore[assignment]
    model._cached_router.cache_clear()
    model._cached_plan.cache_clear()

    async def work() -> None:
        turn = asyncio.Semaphore(1)
        runners = [Runner(one_at_a_time(expert), model.device) for expert in model.experts]  # type: ignore[arg-type]
        experts = [LocalExpert(f"expert-{k:02d}", runner, turn) for k, runner in enumerate(runners)]
        engine = Engine(experts, turn, max_batch=2)
        engine.start()
        request = Request(model.plan(model.settings(**settings)), 1, torch.arange(6))
        async with asyncio.timeout(30):
            await engine.run(request)
        await engine.close()
        torch.testing.assert_close(
            torch.stack([request.images[i] for i in range(6)]), expected, rtol=0, atol=1e-4
        )

    asyncio.run(work())
    assert most == 1
    assert threading.main_thread() not in threads  # the loop stays free
