"""The engine samples from images and masks as `Model.sample` does, among other requests."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from ddm.errors import ConfigError
from serve.engine.metrics import Metrics
from serve.engine.service import SamplingParams, Service
from serve.engine.state import Request
from serve.model.edits import Edit
from serve.model.model import Model
from serve.settings import settings
from tests.serve.engine.harness import fakes, images, request_for, run, running, same

IMAGE = torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)
MASK = torch.ones(8, 8).tril()

EDITS: list[dict[str, Any]] = [
    {"image": IMAGE},
    {"image": IMAGE, "strength": 0.3, "sampler": "heun"},
    {"image": IMAGE, "mask": MASK, "resamplings": 3},
    {"image": IMAGE, "mask": MASK, "resamplings": 1},
    {"image": IMAGE, "mask": MASK, "resamplings": 3, "sampler": "heun", "policy": "stochastic"},
    {"image": IMAGE, "mask": MASK, "strength": 0.7, "policy": "stochastic", "sampler": "ddpm"},
    {"image": IMAGE, "mask": MASK, "resamplings": 2, "sampler": "unipc", "policy": "fixed"},
    {"image": IMAGE, "strength": 1.0},
]


def editing(model: Model, seed: int, edit: dict[str, Any]) -> Request:
    keys = ("image", "mask", "strength", "resamplings")
    wanted = Edit(**{key: edit[key] for key in keys if key in edit})
    config = model.settings(steps=4, **{k: v for k, v in edit.items() if k not in keys})
    given = wanted.given(3, model.shape, model.device)
    return Request(model.plan(config, wanted), seed, torch.arange(3), trace=True, given=given)


def test_edits_and_samples_under_way_together_equal_sample(model: Model) -> None:
    async def work() -> None:
        async with running(fakes(model), max_batch=16) as engine:
            edits = [editing(model, i, edit) for i, edit in enumerate(EDITS)]
            plain = request_for(model, 3, seed=9, steps=4)
            async with asyncio.TaskGroup() as group:
                for request in (*edits, plain):
                    group.create_task(engine.run(request))
        for i, (request, edit) in enumerate(zip(edits, EDITS, strict=True)):
            same(images(request), model.sample(seed=i, steps=4, **edit))
            steps = [record.step for record in request.records[0]]
            assert sorted(set(steps)) == list(
                range(1, len(request.plan.times))
            ) and steps == sorted(steps)
        same(images(plain), model.sample(3, seed=9, steps=4))

    run(work)


def test_a_service_takes_an_image_and_a_mask(small_run: Path, model: Model) -> None:
    async def work() -> None:
        service = Service(settings({"run": str(small_run), "sample": {"steps": 3}}), Metrics())
        await service.start()
        try:
            edit = Edit(IMAGE[0], MASK, resamplings=2)
            params = SamplingParams(2, seed=5, edit=edit)
            admitted = service.admit(params)
            await service.run(admitted)
            expected = model.sample(2, seed=5, steps=3, image=IMAGE[0], mask=MASK, resamplings=2)
            same(images(admitted.request), expected)
            for wrong, key in (
                (Edit(IMAGE[0], strength=0.0), "sample.strength"),
                (Edit(IMAGE[0], torch.ones(7, 8)), "sample.mask"),
                (Edit(IMAGE[0], MASK, resamplings=100), "sample.steps"),
            ):
                with pytest.raises(ConfigError, match=f"^{key} must") as error:
                    service.admit(SamplingParams(2, edit=wrong))
                assert error.value.key == key
        finally:
            await service.stop()

    run(work)
