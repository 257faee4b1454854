"""Experts in this process: what they answer is their network's, and all on one device take turns."""

import asyncio
import threading
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from serve import load
from serve.engine.local_expert import LocalExpert, Runner, local_experts
from serve.engine.scheduler import Engine
from serve.engine.state import Request
from serve.engine.turn import Turn
from serve.settings import ServePrecision


def affine(x: Tensor, t: Tensor) -> Tensor:
    return 3 * x + t.reshape(-1, 1, 1, 1)


def test_a_runner_answers_as_its_network_in_the_type_of_what_it_was_asked() -> None:
    x, t = torch.randn(5, 1, 2, 2), torch.linspace(0.1, 1, 5, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        answer = Runner(affine, torch.device("cpu"))(x.to(dtype), t)
        assert answer.dtype == dtype
        torch.testing.assert_close(answer, (3 * x + t.float().reshape(-1, 1, 1, 1)).to(dtype))


def test_experts_are_compiled_once_for_all_sizes_of_batches_and_before_the_first_request(
    small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compiled, backend=backend))
    model = load(small_run)
    runners = [e.run for e in local_experts(model, Turn(1), compiled=True)]
    compiled_at_start = len(graphs)
    assert compiled_at_start == 3
    for runner, network in zip(runners, load(small_run).experts, strict=True):
        for size in (1, 2, 3, 12, 17, 300):
            x, t = torch.randn(size, *model.shape), torch.rand(size)
            with torch.inference_mode():
                torch.testing.assert_close(runner(x, t), network(x, t))
    assert len(graphs) == compiled_at_start


def test_in_bf16_the_answer_keeps_its_type_and_is_nearly_the_same(small_run: Path) -> None:
    model = load(small_run)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(5, *model.shape, generator=generator), torch.rand(5, generator=generator)
    for expert in model.experts:
        whole, half = (
            Runner(expert, model.device, precision)(x, t) for precision in get_args(ServePrecision)
        )
        assert half.dtype == torch.float32
        assert 0 < (half - whole).abs().max() < 0.02


def test_the_experts_of_a_model_are_its_networks_in_their_order(small_run: Path) -> None:
    model = load(small_run)
    x, t = torch.randn(3, *model.shape), torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)

    async def work() -> None:
        experts = local_experts(model, Turn(1))
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
        turn = Turn(1)
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
