"""Batches of the engine: no barriers, bounds, order, cancellation."""

import asyncio
from contextlib import suppress

import torch
from torch import Tensor

from serve.engine.turn import Turn
from serve.model.model import Model
from tests.serve.engine.harness import (
    Counting,
    fakes,
    images,
    only,
    request_for,
    run,
    running,
    same,
    until,
)


def test_a_busy_expert_does_not_hold_up_images_of_others(
    model: Model,
) -> None:
    async def work() -> None:
        experts = fakes(model)
        experts[0].free.clear()
        async with running(experts) as engine:
            held = request_for(model, 2, seed=1, **only(model, 0))
            waiting = asyncio.create_task(engine.run(held))
            await until(lambda: bool(experts[0].batches))
            for seed in (2, 3):
                other = request_for(model, 2, seed=seed, **only(model, 1))
                await engine.run(other)
                same(images(other), model.sample(2, seed=seed, **only(model, 1)))
            assert not waiting.done()
            assert not held.images
            experts[0].free.set()
            await waiting
            same(images(held), model.sample(2, seed=1, **only(model, 0)))

    run(work)


def test_a_new_request_joins_the_next_call(model: Model) -> None:
    async def work() -> None:
        experts = fakes(model)
        expert = experts[1]
        expert.free.clear()
        async with running(experts) as engine, asyncio.TaskGroup() as group:
            long, late = (
                request_for(model, 1, seed=seed, **only(model, 1, steps=20)) for seed in (1, 2)
            )
            group.create_task(engine.run(long))
            await until(lambda: len(expert.batches) == 1)
            group.create_task(engine.run(late))
            await until(lambda: engine.waiting(1) == 1)
            expert.free.set()
        start = late.plan.start(2, torch.tensor([0]))
        assert expert.batches[1][0].equal(start)

    run(work)


def test_calls_mix_requests_and_steps_up_to_max_batch(model: Model) -> None:
    async def work() -> None:
        turn = Turn(1)
        experts, metrics = fakes(model, turn=turn), Counting()
        expert = experts[2]
        expert.free.clear()
        async with (
            running(experts, turn=turn, max_batch=4, metrics=metrics) as engine,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(engine.run(request_for(model, 10, seed=1, **only(model, 2))))
            await until(lambda: bool(expert.batches))
            group.create_task(engine.run(request_for(model, 1, seed=2, **only(model, 2, steps=8))))
            group.create_task(engine.run(request_for(model, 1, seed=3, **only(model, 2, steps=9))))
            expert.free.set()
        assert expert.sizes[:2] == [4, 4]
        assert max(expert.sizes) == 4
        assert sum(expert.sizes) == 10 * 3 + 8 + 9 == metrics.counts["nfe", "expert-02"]
        assert [fill * 4 for fill in metrics.fills] == expert.sizes
        assert max(len(t.unique()) for _, t in expert.batches) >= 3
        assert metrics.counts["images", ""] == 12
        assert not metrics.counts["retries", "expert-02"]

    run(work)


def test_requests_of_one_image_are_served_in_order_of_arrival(model: Model) -> None:
    async def work() -> None:
        experts = fakes(model)
        expert = experts[0]
        expert.free.clear()
        async with running(experts, max_batch=1) as engine, asyncio.TaskGroup() as group:
            requests = [request_for(model, 1, seed=seed, **only(model, 0)) for seed in range(6)]
            for i, request in enumerate(requests):
                group.create_task(engine.run(request))
                await until(lambda i=i: engine.waiting(0) + len(expert.batches) == i + 1)  # type: ignore[misc]
            expert.free.set()
        for request, (x, _) in zip(requests, expert.batches, strict=False):
            assert x.equal(request.plan.start(request.seed, request.index))

    run(work)


def test_max_active_bounds_the_images_of_requests_that_came_together(model: Model) -> None:
    async def work() -> None:
        experts = fakes(model)
        expert = experts[0]
        expert.free.clear()
        requests = [request_for(model, n, seed=n, **only(model, 0)) for n in (2, 3, 4)]
        active = []

        def answer(x: Tensor, t: Tensor) -> Tensor:
            active.append(sum(request.active for request in requests))
            return model.experts[0](x, t)

        expert.denoise = answer
        async with running(experts, max_active=4, max_batch=2) as engine:
            async with asyncio.TaskGroup() as group:
                for request in requests:
                    group.create_task(engine.run(request))
                await until(lambda: engine.waiting(0) + sum(expert.sizes) == 4)
                assert [request.begun for request in requests] == [2, 1, 1]
                assert engine.cost == (2 + 3 + 4) * 3
                expert.free.set()
            assert engine.cost == 0
        assert max(active) == 4
        for request in requests:
            n = len(request.index)
            same(images(request), model.sample(n, seed=request.seed, **only(model, 0)))

    run(work)


def test_a_cancelled_request_leaves_at_once_and_frees_its_room(model: Model) -> None:
    async def work() -> None:
        experts = fakes(model)
        expert = experts[0]
        expert.free.clear()
        async with running(experts, max_active=3, max_batch=2) as engine:
            counts = (1, 1, 1, 3)  # the last begins one image, its share
            requests = [
                request_for(model, n, seed=i, **only(model, 0)) for i, n in enumerate(counts)
            ]
            tasks = []
            for i, request in enumerate(requests):
                tasks.append(asyncio.create_task(engine.run(request)))
                await until(lambda i=i: engine.waiting(0) + sum(expert.sizes) == i + 1)  # type: ignore[misc]
            assert engine.cost == 6 * 3
            assert requests[3].begun == 1
            for leaving in (0, 2):
                tasks[leaving].cancel()
            await asyncio.wait([tasks[0], tasks[2]])
            assert engine.cost == 4 * 3
            assert list(engine.requests) == [requests[1], requests[3]]
            await until(lambda: requests[3].begun == 2)  # while the expert is still held
            expert.free.set()
            await asyncio.gather(tasks[1], tasks[3])
            for i in (1, 3):
                same(images(requests[i]), model.sample(counts[i], seed=i, **only(model, 0)))
            for i in (0, 2):
                assert tasks[i].cancelled()
                assert not requests[i].images
                assert requests[i].nfe == 0

    run(work)


def test_finished_and_cancelled_requests_leave_nothing_behind(model: Model) -> None:
    async def work() -> None:
        experts = fakes(model)
        async with running(experts, max_active=4) as engine:
            for _ in range(5):
                tasks = [
                    asyncio.create_task(engine.run(request_for(model, 2, seed=s, steps=3)))
                    for s in range(4)
                ]
                calls = sum(len(expert.batches) for expert in experts)
                await until(
                    lambda calls=calls: sum(len(expert.batches) for expert in experts) > calls + 1
                )  # type: ignore[misc]
                for task in tasks[::2]:
                    task.cancel()
                for task in tasks:
                    with suppress(asyncio.CancelledError):
                        await task
            assert not engine.requests and engine.cost == 0
            await until(lambda: [engine.waiting(k) for k in range(3)] == [0, 0, 0])
            assert not engine._ready

    run(work)
