"""The step engine: the images of `Model.sample`, whatever the company, the order and the faults, and nobody waits for ever."""

import asyncio
import dataclasses
import itertools
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddm.rng import RngStream, uniform
from ddm.samplers import SAMPLERS, drive
from router.policies import POLICIES, weights
from router.routing import RoutedDenoiser, Router
from router.sources import SOURCES, Stateless, prior
from serve import load
from serve.engine.expert import ExpertAwayError, ExpertFailedError, ServingError, UnavailableError
from serve.engine.metrics import Metrics
from serve.engine.scheduler import Engine
from serve.engine.state import Request, StepRecord
from serve.model.model import Model, Trace

Denoise = Callable[[Tensor, Tensor], Tensor]
AWAY = UnavailableError("no route")


class Fake:
    """An expert at hand. It answers as `denoise` does; it can be held, and be told what goes wrong in its next calls."""

    def __init__(
        self, k: int, denoise: Denoise, calls: int = 1, turn: asyncio.Semaphore | None = None
    ) -> None:
        self.name, self.denoise, self.calls = f"expert-{k:02d}", denoise, calls
        self.turn = turn or asyncio.Semaphore(calls)
        self.batches: list[tuple[Tensor, Tensor]] = []  # of every call, as it came
        self.free = asyncio.Event()  # while it is not set, calls wait
        self.free.set()
        self.faults: deque[Exception | Denoise | None] = (
            deque()
        )  # of the next calls: raised, or what answers instead
        self.away = False  # then every call and check is lost
        self.poison: Callable[[Tensor], bool] = lambda x: (
            False
        )  # an image `[C, H, W]` over which it stumbles

    async def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.batches.append((x, t))
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


@pytest.fixture(scope="module")
def model(small_run: Path) -> Model:
    return load(small_run)


def fakes(model: Model, **settings: Any) -> list[Fake]:
    return [Fake(k, expert, **settings) for k, expert in enumerate(model.experts)]


def job_of(
    model: Model,
    n: int = 1,
    seed: int = 0,
    first_index: int = 0,
    watch: Callable[[int, StepRecord, Tensor], None] | None = None,
    trace: bool = False,
    **settings: Any,
) -> Request:
    return Request(
        model.plan(model.settings(**settings)),
        seed,
        torch.arange(first_index, first_index + n),
        watch,
        trace,
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


@asynccontextmanager
async def running(experts: list[Fake], **settings: Any) -> AsyncIterator[Engine]:
    engine = Engine(experts, settings.pop("turn", None) or asyncio.Semaphore(1), **settings)
    engine.start()
    try:
        async with asyncio.timeout(30):
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


EVERYTHING: list[dict[str, Any]] = [
    *({"sampler": sampler} for sampler in SAMPLERS),
    *({"policy": policy} for policy in POLICIES),
    *({"source": source} for source in SOURCES),
    {"sampler": "heun", "policy": "adaptive"},
    {"sampler": "accelerated_ode", "policy": "nucleus", "source": "posterior"},
    {"sampler": "ddpm", "policy": "stochastic", "control_variate": "none"},
    {"policy": "top_k", "top_k": 2, "clip": False},
    {"policy": "stochastic", "temperature": 0.2},
    {"policy": "full", "temperature": 5.0, "source": "posterior"},
    {"policy": "full", "grid": "quadratic", "t_min": 0.05},
    {"steps": 1},
]


def clustered(model: Model) -> list[dict[str, Any]]:
    first, second, third = model.names
    return [
        {"clusters": {second: 1.0}},
        {"clusters": {first: 1.0, third: 3.0}, "policy": "stochastic"},
        {
            "clusters": {first: 0.2, second: 5.0, third: 1.0},
            "policy": "full",
            "source": "posterior",
        },
    ]


def test_a_request_alone_gets_the_images_choices_and_calls_of_sample_whatever_its_settings(
    model: Model,
) -> None:
    async def work() -> None:
        async with running(fakes(model)) as engine:
            for settings in [{"steps": 5, **more} for more in [*EVERYTHING, *clustered(model)]]:
                request = job_of(model, 2, seed=4, first_index=3, trace=True, **settings)
                await engine.run(request)
                expected, trace = model.sample(2, seed=4, first_index=3, trace=True, **settings)
                same(images(request), expected)
                told(request, trace)

    run(work)


def told(request: Request, trace: Trace) -> None:
    """A job's trace is that of `sample`."""
    for place in range(len(request.index)):
        way = request.record[place]
        assert [record.t for record in way] == pytest.approx(trace.t.tolist())
        torch.testing.assert_close(
            torch.stack([record.alpha for record in way]), trace.alpha[:, place], atol=1e-4, rtol=0
        )
        assert torch.stack([record.chosen for record in way]).equal(trace.chosen[:, place])
    assert request.calls == trace.calls


def test_an_image_among_64_others_of_all_settings_that_joined_at_other_moments_is_that_of_sample(
    model: Model,
) -> None:
    mix = [
        {"steps": 3 + i % 5, **more} for i, more in enumerate([*EVERYTHING, *clustered(model)] * 3)
    ][:65]

    async def work() -> None:
        turn = asyncio.Semaphore(1)  # one device: routing and all experts take turns
        experts = fakes(model, turn=turn)
        calls = 0

        def heard(place: int, record: StepRecord, denoised: Tensor) -> None:
            nonlocal calls
            calls += 1

        async with running(experts, turn=turn, max_active=40, max_batch=16) as engine:
            first = job_of(model, 1, seed=1, steps=40, watch=heard)
            requests = [
                job_of(model, 1 + i % 2, seed=100 + i, first_index=i % 7, **more)
                for i, more in enumerate(mix)
            ]
            async with asyncio.TaskGroup() as group:
                group.create_task(engine.run(first))
                for i, request in enumerate(requests):
                    await until(lambda i=i: calls >= i // 4)  # type: ignore[misc]
                    group.create_task(engine.run(request))
        same(images(first), model.sample(1, seed=1, steps=40))
        for i, (request, more) in enumerate(zip(requests, mix, strict=True)):
            same(images(request), model.sample(1 + i % 2, seed=100 + i, first_index=i % 7, **more))
        times = [t for expert in experts for _, t in expert.batches]
        assert max(map(len, times)) == 16
        assert sum(len(t.unique()) > 3 for t in times) > 10  # many steps in one call

    run(work)


def test_images_are_known_by_their_place_and_number_in_whatever_order_they_end(
    model: Model,
) -> None:
    async def work() -> None:
        for max_active in (1, 2, 9):
            async with running(fakes(model), max_active=max_active, max_batch=2) as engine:
                request = job_of(model, 1, seed=2, steps=4)
                request.index = torch.tensor([7, 2, 2**33 + 5, 0])
                await engine.run(request)
                for place, i in enumerate(request.index.tolist()):
                    same(request.images[place], model.sample(1, seed=2, first_index=i, steps=4)[0])

    run(work)


def test_what_is_watched_is_what_the_sampler_was_told_and_the_last_is_the_image(
    model: Model,
) -> None:
    settings = {"sampler": "heun", "policy": "adaptive", "steps": 4}
    plan = model.plan(model.settings(**settings))
    index, heard = torch.arange(3), {place: list[tuple[StepRecord, Tensor]]() for place in range(3)}
    router = plan.router
    routed = RoutedDenoiser(
        model.experts,
        router.source,
        router.policy,
        6,
        index=index,
        pi=router.pi,
        calls_per_step=2,
        clip=True,
        control_variate=plan.control_variate,
    )
    said: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        said.append(routed(x, t))
        return said[-1]

    with torch.inference_mode():
        drive(plan.trajectory(plan.start(6, index), 6, index), denoise)

    async def work() -> None:
        async with running(fakes(model)) as engine:
            request = job_of(
                model,
                3,
                seed=6,
                watch=lambda place, record, d: heard[place].append((record, d)),
                trace=True,
                **settings,
            )
            await engine.run(request)
            for place, way in heard.items():
                same(
                    torch.stack([denoised for _, denoised in way]),
                    torch.stack([d[place] for d in said]),
                )
                same(way[-1][1], request.images[place])
                assert all(
                    record is kept
                    for (record, _), kept in zip(way, request.record[place], strict=True)
                )

    run(work)


# No barriers, and order


def test_while_an_expert_is_held_images_that_need_only_others_end_and_new_ones_come_and_end(
    model: Model,
) -> None:
    async def work() -> None:
        experts = fakes(model)
        experts[0].free.clear()
        async with running(experts) as engine:
            held = job_of(model, 2, seed=1, **only(model, 0))
            waiting = asyncio.create_task(engine.run(held))
            await until(lambda: bool(experts[0].batches))
            for seed in (2, 3):
                other = job_of(model, 2, seed=seed, **only(model, 1))
                await engine.run(other)
                same(images(other), model.sample(2, seed=seed, **only(model, 1)))
            assert not waiting.done()
            assert not held.images
            experts[0].free.set()
            await waiting
            same(images(held), model.sample(2, seed=1, **only(model, 0)))

    run(work)


def test_a_new_request_is_in_the_very_next_call_of_its_expert(model: Model) -> None:
    async def work() -> None:
        experts = fakes(model)
        expert = experts[1]
        expert.free.clear()
        async with running(experts) as engine, asyncio.TaskGroup() as group:
            long, late = (
                job_of(model, 1, seed=seed, **only(model, 1, steps=20)) for seed in (1, 2)
            )
            group.create_task(engine.run(long))
            await until(lambda: len(expert.batches) == 1)
            group.create_task(engine.run(late))
            await until(lambda: engine.waiting(1) == 1)
            expert.free.set()
        start = late.plan.start(2, torch.tensor([0]))
        assert expert.batches[1][0].equal(start)

    run(work)


def test_requests_and_steps_share_a_call_and_none_is_above_max_batch(model: Model) -> None:
    async def work() -> None:
        turn = asyncio.Semaphore(1)
        experts, metrics = fakes(model, turn=turn), Counting()
        expert = experts[2]
        expert.free.clear()
        async with (
            running(experts, turn=turn, max_batch=4, metrics=metrics) as engine,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(engine.run(job_of(model, 10, seed=1, **only(model, 2))))
            await until(lambda: bool(expert.batches))
            group.create_task(engine.run(job_of(model, 1, seed=2, **only(model, 2, steps=4))))
            group.create_task(engine.run(job_of(model, 1, seed=3, **only(model, 2, steps=5))))
            expert.free.set()
        assert expert.sizes[:3] == [4, 4, 2]
        assert max(expert.sizes) == 4
        assert sum(expert.sizes) == 10 * 3 + 4 + 5 == metrics.counts["calls", "expert-02"]
        assert [fill * 4 for fill in metrics.fills] == expert.sizes
        assert max(len(t.unique()) for _, t in expert.batches) >= 3
        assert metrics.counts["images", ""] == 12
        assert not metrics.counts["retries", "expert-02"]

    run(work)


def test_who_waits_for_an_expert_is_served_first_come_first_served(model: Model) -> None:
    async def work() -> None:
        experts = fakes(model)
        expert = experts[0]
        expert.free.clear()
        async with running(experts, max_batch=1) as engine, asyncio.TaskGroup() as group:
            requests = [job_of(model, 1, seed=seed, **only(model, 0)) for seed in range(6)]
            for i, request in enumerate(requests):
                group.create_task(engine.run(request))
                await until(lambda i=i: engine.waiting(0) + len(expert.batches) == i + 1)  # type: ignore[misc]
            expert.free.set()
        for request, (x, _) in zip(requests, expert.batches, strict=False):
            assert x.equal(request.plan.start(request.seed, request.index))

    run(work)


def test_nobody_is_starved_between_two_steps_a_bounded_number_of_calls_goes_to_others(
    model: Model,
) -> None:
    """12 images are on their way at most and a call takes 2 of them: it is anyone's turn after 6 calls, and 2 for routing."""

    async def work() -> None:
        turn = asyncio.Semaphore(1)
        experts = fakes(model, turn=turn)
        seen: dict[int, list[int]] = {seed: [] for seed in range(40)}
        async with (
            running(experts, turn=turn, max_batch=2, max_active=12) as engine,
            asyncio.TaskGroup() as group,
        ):
            for seed, way in seen.items():
                note = lambda place, record, d, way=way: way.append(len(experts[0].batches))  # noqa: E731
                settings = only(model, 0, steps=4 + 3 * (seed % 5))
                group.create_task(engine.run(job_of(model, 1, seed=seed, watch=note, **settings)))
        for seed, way in seen.items():
            assert len(way) == 4 + 3 * (seed % 5)
            assert max(later - one for one, later in itertools.pairwise(way)) <= 8
        firsts = [way[0] for way in seen.values()]
        assert firsts == sorted(firsts)

    run(work)


def test_max_active_bounds_the_images_under_way_and_later_requests_wait_in_order(
    model: Model,
) -> None:
    async def work() -> None:
        experts = fakes(model)
        expert = experts[0]
        expert.free.clear()
        requests = [job_of(model, n, seed=n, **only(model, 0)) for n in (2, 3, 1, 1)]
        under_way, ended = [], []

        def answer(x: Tensor, t: Tensor) -> Tensor:
            under_way.append(sum(request.begun - len(request.images) for request in requests))
            return model.experts[0](x, t)

        async def through(i: int) -> None:
            await engine.run(requests[i])
            ended.append(i)

        expert.denoise = answer
        async with running(experts, max_active=3, max_batch=2) as engine:
            async with asyncio.TaskGroup() as group:
                for i in range(4):
                    group.create_task(through(i))
                await until(lambda: engine.waiting(0) + sum(expert.sizes) == 3)
                assert [request.begun for request in requests] == [2, 1, 0, 0]
                assert engine.cost == (2 + 3 + 1 + 1) * 3
                expert.free.set()
            assert engine.cost == 0
        assert max(under_way) == 3
        assert ended[0] == 0 and ended.index(1) < 3
        for request in requests:
            same(
                images(request),
                model.sample(len(request.index), seed=request.seed, **only(model, 0)),
            )

    run(work)


def test_a_request_that_is_cancelled_leaves_at_once_frees_its_room_and_its_late_answer_is_dropped(
    model: Model,
) -> None:
    async def work() -> None:
        experts = fakes(model)
        expert = experts[0]
        expert.free.clear()
        async with running(experts, max_active=3, max_batch=2) as engine:
            requests = [job_of(model, 1, seed=seed, **only(model, 0)) for seed in range(5)]
            tasks = []
            for i, request in enumerate(
                requests
            ):  # 0 in a call, 1 and 2 in the queue, 3 and 4 without room
                tasks.append(asyncio.create_task(engine.run(request)))
                await until(lambda request=request: request in engine.requests)  # type: ignore[misc]
                await until(lambda i=i: engine.waiting(0) + sum(expert.sizes) == min(i + 1, 3))  # type: ignore[misc]
            assert engine.cost == 5 * 3
            for leaving in (0, 2, 3):
                tasks[leaving].cancel()
            await asyncio.wait([tasks[0], tasks[2], tasks[3]])
            assert engine.cost == 2 * 3
            assert list(engine.requests) == [requests[1], requests[4]]
            await until(lambda: requests[4].begun == 1)  # while the expert is still held
            expert.free.set()
            await asyncio.gather(tasks[1], tasks[4])
            for seed in (1, 4):
                same(images(requests[seed]), model.sample(1, seed=seed, **only(model, 0)))
            for seed in (0, 2, 3):
                assert tasks[seed].cancelled()
                assert not requests[seed].images
                assert requests[seed].calls == 0

    run(work)


# Faults: calls that fail


def test_after_a_failed_call_each_of_its_images_is_asked_for_again_alone_and_all_are_as_without(
    model: Model,
) -> None:
    async def work() -> None:
        experts, metrics = fakes(model), Counting()
        expert = experts[1]
        expert.faults.extend([None, RuntimeError("once")])
        async with running(experts, metrics=metrics) as engine:
            request = job_of(model, 5, seed=3, **only(model, 1))
            await engine.run(request)
            same(images(request), model.sample(5, seed=3, **only(model, 1)))
        assert expert.sizes[:7] == [5, 5, 1, 1, 1, 1, 1]
        assert metrics.counts["retries", "expert-01"] == 5
        assert metrics.counts["calls", "expert-01"] == 15

    run(work)


@pytest.mark.parametrize("wrong", [lambda x, t: x[:-1], lambda x, t: x[..., :4], lambda x, t: None])
def test_an_answer_of_another_shape_is_a_failed_call(model: Model, wrong: Denoise) -> None:
    async def work() -> None:
        experts = fakes(model)
        experts[1].faults.extend([wrong, None, wrong])
        async with running(experts) as engine:
            request = job_of(model, 2, seed=3, **only(model, 1))
            await engine.run(request)
            same(images(request), model.sample(2, seed=3, **only(model, 1)))

    run(work)


def test_failures_with_an_answer_between_them_never_end_a_request_and_three_in_a_row_do(
    model: Model,
) -> None:
    async def work() -> None:
        experts = fakes(model)
        error = RuntimeError("on and off")
        async with running(experts) as engine:
            experts[1].faults.extend([error, error, None] * 6)
            request = job_of(model, 1, seed=3, **only(model, 1, steps=6))
            await engine.run(request)
            same(images(request), model.sample(1, seed=3, **only(model, 1, steps=6)))
            experts[1].batches.clear()
            experts[1].faults.extend([error, error, error])
            with pytest.raises(ExpertFailedError, match="expert-01 failed: on and off"):
                await engine.run(job_of(model, 1, seed=4, **only(model, 1)))
            assert len(experts[1].batches) == 3

    run(work)


@pytest.mark.parametrize("policy", ["top_k", "full"])
def test_an_image_that_every_expert_stumbles_over_ends_its_own_request_alone(
    model: Model, policy: str
) -> None:
    settings = {"steps": 3, "policy": policy, "source": "prior", "control_variate": "none"}

    async def work() -> None:
        turn = asyncio.Semaphore(1)  # so that all share their first calls
        experts = fakes(model, turn=turn)
        bad = job_of(model, 2, seed=13, **settings)
        poisoned = bad.plan.start(13, torch.tensor([1]))[0]
        for expert in experts:
            expert.poison = poisoned.equal
        async with running(experts, turn=turn) as engine:
            good = [job_of(model, 2, seed=seed, **settings) for seed in range(4)]
            ends = await asyncio.gather(
                *map(engine.run, [*good[:2], bad, *good[2:]]), return_exceptions=True
            )
        assert [type(end) for end in ends] == [type(None)] * 2 + [ExpertFailedError] + [
            type(None)
        ] * 2
        for request in good:
            same(images(request), model.sample(2, seed=request.seed, **settings))
        asked = [
            len(x) for expert in experts for x, _ in expert.batches if any(map(poisoned.equal, x))
        ]
        assert max(asked) == 10 and asked.count(1) >= 2  # with all, then alone

    run(work)


# Faults: experts that are away


@pytest.mark.parametrize("fault", [AWAY, asyncio.CancelledError(), TimeoutError()])
def test_a_lost_call_is_made_again_in_its_place_and_nothing_else_changes(
    model: Model, fault: Exception
) -> None:
    async def work() -> None:
        experts, metrics = fakes(model), Counting()
        experts[0].faults.extend([fault, fault, None, fault])
        async with running(experts, metrics=metrics) as engine:
            requests = [job_of(model, 3, seed=seed, **only(model, 0)) for seed in (1, 2)]
            await asyncio.gather(*map(engine.run, requests))
            for request in requests:
                same(images(request), model.sample(3, seed=request.seed, **only(model, 0)))
                assert request.calls == 3 * 3
            assert not any(request.absent for request in requests)
            assert all(engine.alive)
        assert metrics.counts["retries", "expert-00"] >= 9
        assert metrics.counts["calls", "expert-00"] == 18

    run(work)


def test_whoever_was_in_a_lost_call_is_asked_for_again_before_those_who_came_later(
    model: Model,
) -> None:
    async def work() -> None:
        experts = fakes(model)
        expert = experts[0]
        expert.free.clear()
        expert.faults.append(AWAY)
        async with running(experts, max_batch=1) as engine, asyncio.TaskGroup() as group:
            requests = [job_of(model, 1, seed=seed, **only(model, 0)) for seed in range(2)]
            for i, request in enumerate(requests):
                group.create_task(engine.run(request))
                await until(lambda i=i: engine.waiting(0) + len(expert.batches) == i + 1)  # type: ignore[misc]
            expert.free.set()
        first, second = (request.plan.start(request.seed, request.index) for request in requests)
        assert [x.equal(first) for x, _ in expert.batches[:3]] == [True, True, False]
        assert expert.batches[2][0].equal(second)

    run(work)


def test_a_call_without_an_answer_in_time_is_lost_and_made_again(model: Model) -> None:
    async def work() -> None:
        experts = fakes(model)
        hung, begun = experts[0].free, experts[0].batches
        hung.clear()
        async with running(experts, call_timeout_s=0.05) as engine:
            request = job_of(model, 2, seed=1, **only(model, 0))
            going = asyncio.create_task(engine.run(request))
            await until(lambda: len(begun) >= 3)
            assert not going.done()
            hung.set()
            await going
            same(images(request), model.sample(2, seed=1, **only(model, 0)))

    run(work)


def test_an_expert_that_stays_away_ends_the_requests_that_need_it_by_name_and_is_asked_again_when_back(
    model: Model,
) -> None:
    async def work() -> None:
        experts = fakes(model)
        async with running(experts, retry_s=0.1) as engine:
            experts[0].away = True
            needing, other = (job_of(model, 2, seed=k, **only(model, k)) for k in (0, 1))
            ends = await asyncio.gather(
                engine.run(needing), engine.run(other), return_exceptions=True
            )
            assert isinstance(ends[0], ExpertAwayError) and str(ends[0]) == "expert-00 is away"
            same(images(other), model.sample(2, seed=1, **only(model, 1)))
            assert engine.alive == [False, True, True]
            asked = len(experts[0].batches)
            with pytest.raises(ExpertAwayError, match="expert-00 is away"):
                await engine.run(job_of(model, 2, seed=3, **only(model, 0)))
            assert len(experts[0].batches) == asked  # it was not even tried
            experts[0].away = False
            await until(lambda: engine.alive[0])
            again = job_of(model, 2, seed=0, **only(model, 0))
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
def test_renormalized_over_the_living_an_image_is_that_of_their_clusters_and_says_whom_it_lacks(
    model: Model, settings: dict[str, Any]
) -> None:
    others = {name: 1.0 for k, name in enumerate(model.names) if k != 1}

    async def work() -> None:
        experts = fakes(model)
        experts[1].away = True
        async with running(experts, retry_s=0.05, degraded="renormalize") as engine:
            lost = job_of(model, 3, seed=4, steps=4, **settings)  # this one finds out
            await engine.run(lost)
            if not lost.absent:  # nobody of it was expert 1's
                await engine.run(
                    job_of(model, 1, seed=9, steps=1, **{**settings, "policy": "full"})
                )
            assert engine.alive == [True, False, True]
            request = job_of(model, 3, seed=4, steps=4, trace=True, **settings)
            await engine.run(request)
            expected, trace = model.sample(
                3, seed=4, steps=4, trace=True, clusters=others, **settings
            )
            same(images(request), expected)
            told(request, trace)
            assert request.absent == {"expert-01"}
            if settings["policy"] == "full":
                same(images(lost), expected)
                assert lost.absent == {"expert-01"}

    run(work)


@pytest.mark.parametrize(
    ("policy", "seed"), [("balanced", 5), ("balanced", 6), ("balanced", 8), ("adaptive", 5)]
)
def test_an_image_goes_on_among_the_living_from_the_very_step_at_which_an_expert_was_lost(
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
        memory = router.start(x, uniform(seed, RngStream.CHOICE, index)[:, 0])
        x, t = next(trajectory)
        for step in itertools.count(1):
            draw = uniform(seed, RngStream.CHOICE, index, step)[:, 0]
            among = alive if called > lost_at else None
            alpha, after = router.route(x, t, memory, draw, alive=among)
            if after.chosen[0, gone]:
                called += 1
                if called > lost_at:
                    alpha, after = router.route(x, t, memory, draw, alive=alive)
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
                request = job_of(model, 1, seed=seed, first_index=2, **settings)
                await engine.run(request)
                expected, _ = alone(lost_at)
                same(request.images[0], expected)
                assert (expected - whole).abs().max() > 1e-2
                assert request.absent == {"expert-00"}

    run(work)


def test_whoever_does_not_need_the_expert_that_is_away_lacks_nobody_and_whoever_needs_it_alone_is_told(
    model: Model,
) -> None:
    async def work() -> None:
        experts = fakes(model)
        experts[0].away = True
        async with running(experts, retry_s=0.05, degraded="renormalize") as engine:
            for _ in range(2):  # lost on the way, and away from the beginning
                with pytest.raises(ExpertAwayError, match=r"^expert-00 is away$"):
                    await engine.run(job_of(model, 1, seed=1, **only(model, 0)))
            request = job_of(model, 1, seed=1, **only(model, 1))
            await engine.run(request)
            assert not request.absent
            same(images(request), model.sample(1, seed=1, **only(model, 1)))

    run(work)


def test_with_all_experts_away_a_request_ends_in_either_mode_and_with_all_back_it_is_as_before(
    model: Model,
) -> None:
    async def work() -> None:
        for degraded in ("fail", "renormalize"):
            experts = fakes(model)
            async with running(experts, retry_s=0.05, degraded=degraded) as engine:
                for expert in experts:
                    expert.away = True
                with pytest.raises(ExpertAwayError, match=r"expert-0\d .*away"):
                    await engine.run(job_of(model, 2, seed=1, steps=3, policy="full"))
                await until(lambda engine=engine: not all(engine.alive))  # type: ignore[misc]
                for expert in experts:
                    expert.away = False
                await until(lambda engine=engine: all(engine.alive))  # type: ignore[misc]
                request = job_of(model, 2, seed=1, steps=3, policy="full")
                await engine.run(request)
                same(images(request), model.sample(2, seed=1, steps=3, policy="full"))
                assert not request.absent

    run(work)


def test_an_expert_that_goes_away_while_an_image_is_routed_to_it_and_others_is_done_without(
    model: Model,
) -> None:
    others = dict.fromkeys(model.names[1:], 1.0)
    settings = {"steps": 3, "policy": "full", "source": "prior", "control_variate": "none"}

    async def work() -> None:
        experts = fakes(model)
        experts[0].away = True
        routing, go_on = threading.Event(), threading.Event()
        async with running(experts, retry_s=0.05, degraded="renormalize") as engine:
            request = job_of(model, 1, seed=3, **settings)

            def slow(x: Tensor, t: Tensor) -> Tensor:
                if not routing.is_set():
                    routing.set()
                    go_on.wait(20)
                return prior(model.pi)(x, t)

            request.plan = dataclasses.replace(
                request.plan,
                router=dataclasses.replace(request.plan.router, source=Stateless(slow)),
            )
            finds_out = asyncio.create_task(engine.run(job_of(model, 1, seed=1, **only(model, 0))))
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


def test_of_two_calls_under_way_both_find_out_that_their_expert_is_away(model: Model) -> None:
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
                asyncio.create_task(engine.run(job_of(model, 1, seed=s, **only(model, 0))))
                for s in (1, 2)
            )
            with pytest.raises(ExpertAwayError):
                await at_once
            assert not slowly.done() and not engine.alive[0]
            slow.set()
            with pytest.raises(ExpertAwayError):
                await slowly

    run(work)


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


def test_two_calls_lost_long_after_each_other_do_not_make_an_expert_one_that_was_away_between(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(
        "serve.engine.scheduler.time",
        SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now),
    )

    async def work() -> None:
        nonlocal now
        experts = fakes(model)
        async with running(experts, retry_s=60) as engine:
            experts[0].away = True
            first = asyncio.create_task(engine.run(job_of(model, 1, seed=1, **only(model, 0))))
            await until(lambda: len(experts[0].batches) >= 2)
            first.cancel()
            await asyncio.wait([first])
            experts[0].away = False
            now = 1000.0
            experts[0].faults.append(AWAY)
            request = job_of(model, 1, seed=2, **only(model, 0))
            await engine.run(request)
            same(images(request), model.sample(1, seed=2, **only(model, 0)))
            assert all(engine.alive)

    run(work)


def test_an_expert_is_away_only_after_retry_s_of_lost_calls(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(
        "serve.engine.scheduler.time",
        SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now),
    )

    async def work() -> None:
        nonlocal now
        experts = fakes(model)
        experts[0].away = True
        async with running(experts, retry_s=60) as engine:
            going = asyncio.create_task(engine.run(job_of(model, 1, seed=1, **only(model, 0))))
            for passed in (0.0, 4.0, 8.0):
                now = passed
                asked = len(experts[0].batches)
                await until(lambda asked=asked: len(experts[0].batches) > asked + 1)  # type: ignore[misc]
                assert all(engine.alive) and not going.done()
            now = 61.0
            await asyncio.wait([going])
            assert isinstance(going.exception(), ExpertAwayError)

    # from 8 to 61 nobody is asked only because the clock is ours
    monkeypatch.setattr("serve.engine.scheduler._PAUSE_S", 100.0)
    run(work)


# Faults of our own


class Stumbling:
    """A source that stumbles where it is told to: at a start, or over an image."""

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


def test_a_router_that_stumbles_ends_its_own_requests_and_no_others(model: Model) -> None:
    settings = {"steps": 3, "control_variate": "none", "source": "prior", "policy": "top_k"}

    async def work() -> None:
        turn = asyncio.Semaphore(1)
        async with running(fakes(model, turn=turn), turn=turn) as engine:
            over = job_of(model, 1, seed=21, **settings).plan.start(21, torch.tensor([0]))[0].equal
            source = Stumbling(over=over)
            router = Router(
                source,
                job_of(model, **settings).plan.router.policy,
                torch.tensor([0.5, 0.25, 0.25]),
            )

            def through(router: Router, seed: int) -> Request:
                request = job_of(model, 2, seed=seed, **settings)
                request.plan = dataclasses.replace(request.plan, router=router)
                return request

            bad = [
                through(dataclasses.replace(router, source=Stumbling(start)), 1)
                for start in (True, False)
            ]
            bad.append(through(router, 21))
            company = through(router, 22)  # of the same router
            good = job_of(model, 2, seed=3, **settings)
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
            after = job_of(model, 1, seed=4, **settings)
            await engine.run(after)
            same(images(after), model.sample(1, seed=4, **settings))

    run(work)


def test_a_sampler_or_a_listener_that_stumbles_ends_its_own_request_and_no_other(
    model: Model,
) -> None:
    def short(x: Tensor, *_: Any) -> Any:
        yield x, torch.ones(())
        raise ValueError("no way")

    def deaf(place: int, record: StepRecord, denoised: Tensor) -> None:
        raise ValueError("not heard")

    async def work() -> None:
        async with running(fakes(model)) as engine:
            lost = job_of(model, 2, seed=1, steps=3)
            lost.plan = dataclasses.replace(
                lost.plan, method=dataclasses.replace(lost.plan.method, trajectory=short)
            )
            unheard = job_of(model, 2, seed=2, steps=3, watch=deaf)
            good = job_of(model, 2, seed=3, steps=3)
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


def test_a_worker_that_ends_fails_the_requests_of_that_moment_and_those_that_come_later_are_served(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        for broken in ("_report", "_take"):
            experts = fakes(model)
            async with running(experts) as engine:
                with monkeypatch.context() as patch:
                    patch.setattr(engine, broken, lambda *_: 1 / 0)
                    with pytest.raises(ServingError, match="the engine failed"):
                        await engine.run(job_of(model, 2, seed=1, steps=3))
                request = job_of(model, 2, seed=1, steps=3)
                await engine.run(request)
                same(images(request), model.sample(2, seed=1, steps=3))

    run(work)


# The end


def test_closing_ends_what_is_under_way_and_what_comes_later_with_an_error(model: Model) -> None:
    async def work() -> None:
        experts = fakes(model)
        for expert in experts:
            expert.free.clear()
        async with running(experts, max_active=1) as engine:
            going = [
                asyncio.create_task(engine.run(job_of(model, 2, seed=seed, steps=3)))
                for seed in (1, 2)
            ]
            await until(lambda: any(expert.batches for expert in experts))
            await engine.close()
            for task in going:
                with pytest.raises(ServingError, match="the server is stopping"):
                    await task
            with pytest.raises(ServingError, match="the server is stopping"):
                await engine.run(job_of(model, 1, seed=3, steps=3))

    run(work)


def test_requests_that_come_and_go_leave_nothing_in_the_engine(model: Model) -> None:
    async def work() -> None:
        experts = fakes(model)
        async with running(experts, max_active=4) as engine:
            for _ in range(5):
                tasks = [
                    asyncio.create_task(engine.run(job_of(model, 2, seed=s, steps=3)))
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
