"""Experts that fail on images."""

import asyncio

import pytest
import torch

from serve.engine.expert import ExpertFailedError
from serve.engine.turn import Turn
from serve.model.model import Model
from tests.serve.engine.harness import (
    Counting,
    Denoise,
    fakes,
    images,
    only,
    request_for,
    run,
    running,
    same,
)


def test_after_a_failed_call_its_images_are_retried_alone(
    model: Model,
) -> None:
    async def work() -> None:
        experts, metrics = fakes(model), Counting()
        expert = experts[1]
        expert.faults.extend([None, RuntimeError("once")])
        async with running(experts, metrics=metrics) as engine:
            request = request_for(model, 5, seed=3, **only(model, 1))
            await engine.run(request)
            same(images(request), model.sample(5, seed=3, **only(model, 1)))
        assert expert.sizes[:7] == [5, 5, 1, 1, 1, 1, 1]
        assert metrics.counts["retries", "expert-01"] == 5
        assert metrics.counts["nfe", "expert-01"] == 15

    run(work)


@pytest.mark.parametrize("wrong", [lambda x, t: x[:-1], lambda x, t: x[..., :4], lambda x, t: None])
def test_an_answer_of_another_shape_is_a_failed_call(model: Model, wrong: Denoise) -> None:
    async def work() -> None:
        experts = fakes(model)
        experts[1].faults.extend([wrong, None, wrong])
        async with running(experts) as engine:
            request = request_for(model, 2, seed=3, **only(model, 1))
            await engine.run(request)
            same(images(request), model.sample(2, seed=3, **only(model, 1)))

    run(work)


def test_three_failures_in_a_row_end_a_request_and_fewer_do_not(
    model: Model,
) -> None:
    async def work() -> None:
        experts = fakes(model)
        error = RuntimeError("on and off")
        async with running(experts) as engine:
            experts[1].faults.extend([error, error, None] * 6)
            request = request_for(model, 1, seed=3, **only(model, 1, steps=6))
            await engine.run(request)
            same(images(request), model.sample(1, seed=3, **only(model, 1, steps=6)))
            experts[1].batches.clear()
            experts[1].faults.extend([error, error, error])
            with pytest.raises(ExpertFailedError, match="expert-01 failed: on and off"):
                await engine.run(request_for(model, 1, seed=4, **only(model, 1)))
            assert len(experts[1].batches) == 3

    run(work)


@pytest.mark.parametrize("policy", ["top_k", "full"])
def test_an_image_on_which_all_experts_fail_ends_only_its_request(
    model: Model, policy: str
) -> None:
    settings = {"steps": 3, "policy": policy, "source": "prior", "control_variate": "none"}

    async def work() -> None:
        turn = Turn(1)  # so that all share their first calls
        experts = fakes(model, turn=turn)
        bad = request_for(model, 2, seed=13, **settings)
        poisoned = bad.plan.start(13, torch.tensor([1]))[0]
        for expert in experts:
            expert.poison = poisoned.equal
        async with running(experts, turn=turn) as engine:
            good = [request_for(model, 2, seed=seed, **settings) for seed in range(4)]
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
