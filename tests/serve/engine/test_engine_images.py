"""The engine samples the images of `Model.sample`, alone or among others."""

import asyncio
from typing import Any

import torch
from torch import Tensor

from ddm.samplers import SAMPLERS, drive
from router.policies import POLICIES
from router.routing import RoutedDenoiser
from router.sources import SOURCES
from serve.engine.state import StepRecord
from serve.engine.turn import Turn
from serve.model.model import Model
from tests.serve.engine.harness import (
    fakes,
    images,
    request_for,
    run,
    running,
    same,
    same_trace,
    until,
)

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


def test_a_request_alone_equals_sample_for_all_settings(
    model: Model,
) -> None:
    async def work() -> None:
        async with running(fakes(model)) as engine:
            for settings in [{"steps": 5, **more} for more in [*EVERYTHING, *clustered(model)]]:
                request = request_for(model, 2, seed=4, first_index=3, trace=True, **settings)
                await engine.run(request)
                expected, trace = model.sample(2, seed=4, first_index=3, trace=True, **settings)
                same(images(request), expected)
                same_trace(request, trace)

    run(work)


def test_an_image_among_64_others_equals_sample(
    model: Model,
) -> None:
    mix = [
        {"steps": 3 + i % 5, **more} for i, more in enumerate([*EVERYTHING, *clustered(model)] * 3)
    ][:65]

    async def work() -> None:
        turn = Turn(1)  # one device: routing and all experts take turns
        experts = fakes(model, turn=turn)
        calls = 0

        def heard(place: int, record: StepRecord, denoised: Tensor) -> None:
            nonlocal calls
            calls += 1

        async with running(experts, turn=turn, max_active=40, max_batch=16) as engine:
            first = request_for(model, 1, seed=1, steps=40, on_step=heard)
            requests = [
                request_for(model, 1 + i % 2, seed=100 + i, first_index=i % 7, **more)
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


def test_images_keep_their_place_in_any_order_of_completion(
    model: Model,
) -> None:
    async def work() -> None:
        for max_active in (1, 2, 9):
            async with running(fakes(model), max_active=max_active, max_batch=2) as engine:
                request = request_for(model, 1, seed=2, steps=4)
                request.index = torch.tensor([7, 2, 2**33 + 5, 0])
                await engine.run(request)
                for place, i in enumerate(request.index.tolist()):
                    same(request.images[place], model.sample(1, seed=2, first_index=i, steps=4)[0])

    run(work)


def test_on_step_gets_the_denoised_images_of_the_sampler(
    model: Model,
) -> None:
    settings = {"sampler": "heun", "policy": "adaptive", "steps": 4}
    plan = model.plan(model.settings(**settings))
    index, heard = torch.arange(3), {place: list[tuple[StepRecord, Tensor]]() for place in range(3)}
    routed = RoutedDenoiser(
        model.experts,
        plan.router,
        seed=6,
        index=index,
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
            request = request_for(
                model,
                3,
                seed=6,
                on_step=lambda place, record, d: heard[place].append((record, d)),
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
                    for (record, _), kept in zip(way, request.records[place], strict=True)
                )

    run(work)
