"""Experts that cannot be reached."""

import asyncio
import dataclasses
import itertools
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from router.policies import first_uniforms, weights
from router.sources import Stateless, prior
from serve.engine.expert import ExpertAwayError
from serve.model.model import Model
from tests.serve.engine.harness import (
    AWAY,
    Counting,
    Fake,
    call_instead,
    fakes,
    images,
    only,
    request_for,
    run,
    running,
    same,
    same_trace,
    until,
)


@pytest.mark.parametrize("fault", [AWAY, asyncio.CancelledError(), TimeoutError()])
def test_a_lost_call_is_repeated_with_the_same_result(model: Model, fault: Exception) -> None:
    async def work() -> None:
        experts, metrics = fakes(model), Counting()
        experts[0].faults.extend([fault, fault, None, fault])
        async with running(experts, metrics=metrics) as engine:
            requests = [request_for(model, 3, seed=seed, **only(model, 0)) for seed in (1, 2)]
            await asyncio.gather(*map(engine.run, requests))
            for request in requests:
                same(images(request), model.sample(3, seed=request.seed, **only(model, 0)))
                assert request.nfe == 3 * 3
            assert not any(request.absent for request in requests)
            assert all(engine.alive)
        assert metrics.counts["retries", "expert-00"] >= 9
        assert metrics.counts["nfe", "expert-00"] == 18

    run(work)


def test_images_of_a_lost_call_come_first_in_the_next(
    model: Model,
) -> None:
    async def work() -> None:
        experts = fakes(model)
        expert = experts[0]
        expert.free.clear()
        expert.faults.append(AWAY)
        async with running(experts, max_batch=1) as engine, asyncio.TaskGroup() as group:
            requests = [request_for(model, 1, seed=seed, **only(model, 0)) for seed in range(2)]
            for i, request in enumerate(requests):
                group.create_task(engine.run(request))
                await until(lambda i=i: engine.waiting(0) + len(expert.batches) == i + 1)  # type: ignore[misc]
            expert.free.set()
        first, second = (request.plan.start(request.seed, request.index) for request in requests)
        assert [x.equal(first) for x, _ in expert.batches[:3]] == [True, True, False]
        assert expert.batches[2][0].equal(second)

    run(work)


def test_a_call_beyond_its_timeout_is_repeated(model: Model) -> None:
    async def work() -> None:
        experts = fakes(model)
        hung, begun = experts[0].free, experts[0].batches
        hung.clear()
        async with running(experts, call_timeout_s=0.05) as engine:
            request = request_for(model, 2, seed=1, **only(model, 0))
            going = asyncio.create_task(engine.run(request))
            await until(lambda: len(begun) >= 3)
            assert not going.done()
            hung.set()
            await going
            same(images(request), model.sample(2, seed=1, **only(model, 0)))

    run(work)


def test_an_expert_that_stays_away_fails_its_requests_until_it_is_back(
    model: Model,
) -> None:
    async def work() -> None:
        experts = fakes(model)
        async with running(experts, retry_s=0.1) as engine:
            experts[0].away = True
            needing, other = (request_for(model, 2, seed=k, **only(model, k)) for k in (0, 1))
            ends = await asyncio.gather(
                engine.run(needing), engine.run(other), return_exceptions=True
            )
            assert isinstance(ends[0], ExpertAwayError) and str(ends[0]) == "expert-00 is away"
            same(images(other), model.sample(2, seed=1, **only(model, 1)))
            assert engine.alive == [False, True, True]
            asked = len(experts[0].batches)
            with pytest.raises(ExpertAwayError, match="expert-00 is away"):
                await engine.run(request_for(model, 2, seed=3, **only(model, 0)))
            assert len(experts[0].batches) == asked  # it was not even tried
            experts[0].away = False
            await until(lambda: engine.alive[0])
            again = request_for(model, 2, seed=0, **only(model, 0))
            await engine.run(again)
            same(images(again), model.sample(2, seed=0, **only(model, 0)))
            assert not again.absent

    run(work)


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "full"},
        {"policy": "full", "sampler": "heun", "source": "posterior"},
        {"policy": "top_k", "top_k": 2},
        {"policy": "nucleus", "source": "prior"},
        {"policy": "stochastic"},
        {"policy": "stochastic", "sampler": "ddpm", "control_variate": "none"},
    ],
)
def test_renormalized_images_are_those_of_the_other_clusters(
    model: Model, settings: dict[str, Any]
) -> None:
    others = {name: 1.0 for k, name in enumerate(model.names) if k != 1}

    async def work() -> None:
        experts = fakes(model)
        experts[1].away = True
        async with running(experts, retry_s=0.05, degraded="renormalize") as engine:
            lost = request_for(model, 3, seed=4, steps=4, **settings)  # this one finds out
            await engine.run(lost)
            if not lost.absent:  # nobody of it was expert 1's
                await engine.run(
                    request_for(model, 1, seed=9, steps=1, **{**settings, "policy": "full"})
                )
            assert engine.alive == [True, False, True]
            request = request_for(model, 3, seed=4, steps=4, trace=True, **settings)
            await engine.run(request)
            expected, trace = model.sample(
                3, seed=4, steps=4, trace=True, clusters=others, **settings
            )
            same(images(request), expected)
            same_trace(request, trace)
            assert request.absent == {"expert-01"}
            if settings["policy"] == "full":
                same(images(lost), expected)
                assert lost.absent == {"expert-01"}

    run(work)


@pytest.mark.parametrize(
    ("policy", "seed"),
    [("balanced", 5), ("balanced", 6), ("balanced", 8), ("adaptive", 5), ("switching", 5)],
)
def test_renormalization_begins_at_the_step_of_the_loss(
    model: Model, policy: str, seed: int
) -> None:
    """Against a loop of its own over `Router.route`: that step is routed again from the memory before it."""
    settings = {
        "steps": 8,
        "policy": policy,
        "control_variate": "none",
        "clip": False,
        "sampler": "ddim",
    }
    job_recipe = model.plan(model.settings(**settings))
    gone, index = 0, torch.tensor([2])
    alive = torch.tensor([k != gone for k in range(3)])

    def alone(lost_at: int) -> tuple[Tensor, int]:
        """The image if the expert is lost at its call number `lost_at`; and how often it was called."""
        router, called = job_recipe.router, 0
        x = job_recipe.start(seed, index)
        trajectory = job_recipe.trajectory(x, seed, index)
        memory = router.start(x, first_uniforms(seed, index))
        x, t = next(trajectory)
        t_last = t
        for step in itertools.count():
            number = torch.tensor([step])
            draws = router.policy.uniforms(seed, index, number, t_last[None], t[None])
            draw, t_last = draws[:, 0], t
            among = alive if called > lost_at else None
            alpha, after = router.route(x, t, memory, draw, available=among)
            if after.chosen[0, gone]:
                called += 1
                if called > lost_at:
                    alpha, after = router.route(x, t, memory, draw, available=alive)
            memory = after
            share = weights(alpha, after.chosen)[0]
            with torch.inference_mode():
                answers = [
                    share[k] * model.experts[k](x, t) for k in range(3) if after.chosen[0, k]
                ]
                try:
                    x, t = trajectory.send(torch.stack(answers).sum(dim=0))
                except StopIteration as end:
                    return end.value[0], called
        raise AssertionError

    whole, turns = alone(10**9)
    same(whole, model.sample(1, first_index=2, seed=seed, **settings)[0])
    assert turns >= 1

    async def work() -> None:
        for lost_at in range(turns):
            experts = fakes(model)
            expert = experts[gone]

            def answer(
                x: Tensor, t: Tensor, expert: Fake = expert, lost_at: int = lost_at
            ) -> Tensor:
                expert.away = len(expert.batches) > lost_at
                if expert.away:
                    raise AWAY
                return model.experts[gone](x, t)

            expert.denoise = answer
            async with running(experts, retry_s=0.05, degraded="renormalize") as engine:
                request = request_for(model, 1, seed=seed, first_index=2, **settings)
                await engine.run(request)
                expected, _ = alone(lost_at)
                same(request.images[0], expected)
                assert (expected - whole).abs().max() > 1e-3
                assert request.absent == {"expert-00"}

    run(work)


def test_only_requests_that_need_the_lost_expert_are_affected(
    model: Model,
) -> None:
    async def work() -> None:
        experts = fakes(model)
        experts[0].away = True
        async with running(experts, retry_s=0.05, degraded="renormalize") as engine:
            for _ in range(2):  # lost on the way, and away from the beginning
                with pytest.raises(ExpertAwayError, match=r"^expert-00 is away$"):
                    await engine.run(request_for(model, 1, seed=1, **only(model, 0)))
            request = request_for(model, 1, seed=1, **only(model, 1))
            await engine.run(request)
            assert not request.absent
            same(images(request), model.sample(1, seed=1, **only(model, 1)))

    run(work)


def test_all_experts_away_fails_requests_in_both_modes(
    model: Model,
) -> None:
    async def work() -> None:
        for degraded in ("fail", "renormalize"):
            experts = fakes(model)
            async with running(experts, retry_s=0.05, degraded=degraded) as engine:
                for expert in experts:
                    expert.away = True
                with pytest.raises(ExpertAwayError, match=r"expert-0\d .*away"):
                    await engine.run(request_for(model, 2, seed=1, steps=3, policy="full"))
                await until(lambda engine=engine: not all(engine.alive))  # type: ignore[misc]
                for expert in experts:
                    expert.away = False
                await until(lambda engine=engine: all(engine.alive))  # type: ignore[misc]
                request = request_for(model, 2, seed=1, steps=3, policy="full")
                await engine.run(request)
                same(images(request), model.sample(2, seed=1, steps=3, policy="full"))
                assert not request.absent

    run(work)


def test_an_expert_lost_during_routing_is_done_without(
    model: Model,
) -> None:
    others = dict.fromkeys(model.names[1:], 1.0)
    settings = {"steps": 3, "policy": "full", "source": "prior", "control_variate": "none"}

    async def work() -> None:
        experts = fakes(model)
        experts[0].away = True
        routing, go_on = threading.Event(), threading.Event()
        async with running(experts, retry_s=0.05, degraded="renormalize") as engine:
            request = request_for(model, 1, seed=3, **settings)

            def slow(x: Tensor, t: Tensor) -> Tensor:
                if not routing.is_set():
                    routing.set()
                    go_on.wait(20)
                return prior(model.pi)(x, t)

            request.plan = dataclasses.replace(
                request.plan,
                router=dataclasses.replace(request.plan.router, source=Stateless(slow)),
            )
            finds_out = asyncio.create_task(
                engine.run(request_for(model, 1, seed=1, **only(model, 0)))
            )
            await until(lambda: bool(experts[0].batches))
            going = asyncio.create_task(engine.run(request))
            await until(routing.is_set)
            await until(lambda: not engine.alive[0])
            go_on.set()
            await going
            same(images(request), model.sample(1, seed=3, clusters=others, **settings))
            assert request.absent == {"expert-00"}
            assert [len(expert.batches) for expert in experts[1:]] == [
                3,
                3,
            ]  # nobody was asked twice
            with pytest.raises(ExpertAwayError):
                await finds_out

    run(work)


def test_two_calls_under_way_both_learn_that_the_expert_is_away(model: Model) -> None:
    async def work() -> None:
        experts = fakes(model, calls=2)
        expert, slow = experts[0], asyncio.Event()

        async def call(x: Tensor, t: Tensor) -> Tensor:
            expert.batches.append((x, t))
            if len(expert.batches) == 1:
                await slow.wait()
            raise AWAY

        async with running(experts, retry_s=0.05, max_batch=1) as engine:
            expert.away = True
            engine.experts = [call_instead(expert, call), *experts[1:]]
            slowly, at_once = (
                asyncio.create_task(engine.run(request_for(model, 1, seed=s, **only(model, 0))))
                for s in (1, 2)
            )
            with pytest.raises(ExpertAwayError):
                await at_once
            assert not slowly.done() and not engine.alive[0]
            slow.set()
            with pytest.raises(ExpertAwayError):
                await slowly

    run(work)


def test_calls_lost_far_apart_are_not_one_outage(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now)
    monkeypatch.setattr("serve.engine.availability.time", clock)
    monkeypatch.setattr("serve.engine.scheduler.time", clock)

    async def work() -> None:
        nonlocal now
        experts = fakes(model)
        async with running(experts, retry_s=60) as engine:
            experts[0].away = True
            first = asyncio.create_task(engine.run(request_for(model, 1, seed=1, **only(model, 0))))
            await until(lambda: len(experts[0].batches) >= 2)
            first.cancel()
            await asyncio.wait([first])
            experts[0].away = False
            now = 1000.0
            experts[0].faults.append(AWAY)
            request = request_for(model, 1, seed=2, **only(model, 0))
            await engine.run(request)
            same(images(request), model.sample(1, seed=2, **only(model, 0)))
            assert all(engine.alive)

    run(work)


def test_an_expert_is_away_after_retry_s_of_lost_calls(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now)
    monkeypatch.setattr("serve.engine.availability.time", clock)
    monkeypatch.setattr("serve.engine.scheduler.time", clock)

    async def work() -> None:
        nonlocal now
        experts = fakes(model)
        experts[0].away = True
        async with running(experts, retry_s=60) as engine:
            going = asyncio.create_task(engine.run(request_for(model, 1, seed=1, **only(model, 0))))
            for passed in (0.0, 4.0, 8.0):
                now = passed
                asked = len(experts[0].batches)
                await until(lambda asked=asked: len(experts[0].batches) > asked + 1)  # type: ignore[misc]
                assert all(engine.alive) and not going.done()
            now = 61.0
            await asyncio.wait([going])
            assert isinstance(going.exception(), ExpertAwayError)

    # from 8 to 61 nobody is asked only because the clock is ours
    monkeypatch.setattr("serve.engine.availability._PAUSE_S", 100.0)
    run(work)


def test_a_health_check_that_raises_is_logged_once_and_repeated(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    class Unhealthy(Fake):
        checks = 0

        async def check(self) -> None:
            self.checks += 1
            if self.checks < 4:
                raise KeyError("actor")
            await super().check()

    async def work() -> None:
        experts = fakes(model)
        expert = experts[0] = Unhealthy(0, model.experts[0])
        expert.away = True
        async with running(experts, retry_s=0.05) as engine:
            with pytest.raises(ExpertAwayError):
                await engine.run(request_for(model, 1, seed=1, **only(model, 0)))
            await until(lambda: expert.checks > 1)
            expert.away = False
            await until(lambda: engine.alive[0])

    run(work)
    logged = [record.getMessage() for record in caplog.records]
    assert logged.count("the health check of expert-00 failed") == 1
    assert "expert-00 is back" in logged
