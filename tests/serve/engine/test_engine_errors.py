"""Errors in routers, samplers, callbacks and workers; closing the engine."""

import asyncio
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddm.samplers import Course, Step
from router.step import Router
from serve.engine.expert import ServingError
from serve.engine.state import Request, StepRecord
from serve.engine.turn import Turn
from serve.model.model import Model
from tests.serve.engine.harness import (
    fakes,
    images,
    request_for,
    run,
    running,
    same,
    until,
)


class Failing:
    """A source that fails at its start, or over an image."""

    def __init__(
        self, at_start: bool = False, over: Callable[[Tensor], bool] | None = None
    ) -> None:
        self.at_start, self.over = at_start, over

    def start(self, x: Tensor) -> Tensor:
        if self.at_start:
            raise ValueError("no start")
        return x.new_zeros(len(x), 0)

    def step(self, x: Tensor, t: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        if self.over is None or any(map(self.over, x)):
            raise ValueError("no step")
        return x.new_tensor([0.5, 0.25, 0.25]).expand(len(x), -1), memory


def test_a_failing_router_ends_only_its_requests(model: Model) -> None:
    settings = {"steps": 3, "control_variate": "none", "source": "prior", "policy": "top_k"}

    async def work() -> None:
        turn = Turn(1)
        async with running(fakes(model, turn=turn), turn=turn) as engine:
            over = (
                request_for(model, 1, seed=21, **settings)
                .plan.start(21, torch.tensor([0]))[0]
                .equal
            )
            source = Failing(over=over)
            router = Router(
                source,
                request_for(model, **settings).plan.router.policy,
                torch.tensor([0.5, 0.25, 0.25]),
            )

            def through(router: Router, seed: int) -> Request:
                request = request_for(model, 2, seed=seed, **settings)
                request.plan = dataclasses.replace(request.plan, router=router)
                return request

            bad = [
                through(dataclasses.replace(router, source=Failing(start)), 1)
                for start in (True, False)
            ]
            bad.append(through(router, 21))
            company = through(router, 22)  # of the same router
            good = request_for(model, 2, seed=3, **settings)
            ends = await asyncio.gather(
                *map(engine.run, [*bad, company, good]), return_exceptions=True
            )
            assert [str(end) for end in ends[:3]] == [
                "an image failed: no start",
                "an image failed: no step",
                "an image failed: no step",
            ]
            assert all(type(end) is ServingError for end in ends[:3])
            assert ends[3:] == [None, None]
            same(images(good), model.sample(2, seed=3, **settings))
            largest = {model.names[0]: 1.0}  # what that router chooses at every step
            same(images(company), model.sample(2, seed=22, clusters=largest, **settings))
            after = request_for(model, 1, seed=4, **settings)
            await engine.run(after)
            same(images(after), model.sample(1, seed=4, **settings))

    run(work)


def test_a_failing_sampler_or_callback_ends_only_its_request(
    model: Model,
) -> None:
    def short(course: Course, n: int, x: Tensor) -> Step:
        yield x, torch.ones(())
        raise ValueError("no way")

    def deaf(place: int, record: StepRecord, denoised: Tensor) -> None:
        raise ValueError("not heard")

    async def work() -> None:
        async with running(fakes(model)) as engine:
            lost = request_for(model, 2, seed=1, steps=3)
            lost.plan = dataclasses.replace(
                lost.plan, method=dataclasses.replace(lost.plan.method, step=short)
            )
            unheard = request_for(model, 2, seed=2, steps=3, on_step=deaf)
            good = request_for(model, 2, seed=3, steps=3)
            ends = await asyncio.gather(
                *map(engine.run, [lost, unheard, good]), return_exceptions=True
            )
            assert [str(end) for end in ends[:2]] == [
                "an image failed: no way",
                "an image failed: not heard",
            ]
            assert ends[2] is None
            same(images(good), model.sample(2, seed=3, steps=3))

    run(work)


def test_a_worker_that_dies_is_replaced(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        for broken in ("_report", "_take"):
            experts = fakes(model)
            async with running(experts) as engine:
                with monkeypatch.context() as patch:
                    patch.setattr(engine, broken, lambda *_: 1 / 0)
                    with pytest.raises(ServingError, match="the engine failed"):
                        await engine.run(request_for(model, 2, seed=1, steps=3))
                request = request_for(model, 2, seed=1, steps=3)
                await engine.run(request)
                same(images(request), model.sample(2, seed=1, steps=3))

    run(work)


def test_closing_fails_present_and_later_requests(model: Model) -> None:
    async def work() -> None:
        experts = fakes(model)
        for expert in experts:
            expert.free.clear()
        async with running(experts, max_active=1) as engine:
            going = [
                asyncio.create_task(engine.run(request_for(model, 2, seed=seed, steps=3)))
                for seed in (1, 2)
            ]
            await until(lambda: any(expert.batches for expert in experts))
            await engine.close()
            for task in going:
                with pytest.raises(ServingError, match="the server is stopping"):
                    await task
            with pytest.raises(ServingError, match="the server is stopping"):
                await engine.run(request_for(model, 1, seed=3, steps=3))

    run(work)


def test_an_image_that_is_not_finite_ends_its_request_and_no_other(model: Model) -> None:
    async def work() -> None:
        experts = fakes(model)
        async with running(experts) as engine:
            experts[0].faults.extend([lambda x, t: torch.full_like(x, torch.nan)] * 3)
            damaged = request_for(model, 1, clusters={model.names[0]: 1.0}, steps=3)
            with pytest.raises(
                ServingError, match="an image failed: it is not finite: the weights"
            ):
                await engine.run(damaged)
            sound = request_for(model, 1, seed=2, steps=3)
            await engine.run(sound)
            same(images(sound), model.sample(1, seed=2, steps=3))

    run(work)
