"""What a training step is made of: functions of (seed, n) and of nothing else."""

import copy
import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from ddm.errors import ConfigError
from ddm.training import Batches, FitConfig, to_float


def images(n: int = 10) -> Tensor:
    return torch.arange(n * 2 * 3 * 3).reshape(n, 2, 3, 3).remainder(251).to(torch.uint8)


def parts(batches: Batches, step: int) -> list[Tensor]:
    return [*batches.x0(step), batches.times(step), batches.noise(step)]


def test_the_parts_of_a_batch_are_its_rows() -> None:
    whole = Batches(images(), 12, seed=3, flip=True)
    split = Batches(images(), 12, seed=3, flip=True, parts=3)
    for part in range(3):
        found = [*split.x0(5, part), split.times(5, part), split.noise(5, part)]
        for one, other in zip(parts(whole, 5), found, strict=True):
            assert torch.equal(one[part::3], other)


def test_bytes_are_scaled_to_minus_one_to_one() -> None:
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx(
        [-1, -0.6, 1]
    )
    assert to_float(torch.tensor([0.25, -3.0])).tolist() == [0.25, -3.0]


def test_a_step_is_a_function_of_seed_and_number() -> None:
    resumed = parts(Batches(images(), 16, seed=3, flip=True), 7)
    batches = Batches(images(), 16, seed=3, flip=True)
    for step in (0, 1, 9):
        parts(batches, step)
    for expected, found in zip(resumed, parts(batches, 7), strict=True):
        assert torch.equal(expected, found)
    for other in (parts(batches, 8), parts(Batches(images(), 16, seed=4, flip=True), 7)):
        assert not any(torch.equal(one, two) for one, two in zip(resumed, other, strict=True))


def test_images_are_those_at_their_places() -> None:
    x0, place = Batches(images(), 16, seed=0).x0(2)
    torch.testing.assert_close(x0, images()[place].float() / 127.5 - 1)


def test_places_are_drawn_evenly_from_all_images() -> None:
    batches = Batches(images(7), 100, seed=0)
    counts = torch.bincount(torch.cat([batches.x0(step)[1] for step in range(100)]), minlength=7)
    assert len(counts) == 7
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


def test_half_of_the_images_are_mirrored_left_to_right() -> None:
    x0, place = Batches(images(), 2000, seed=0, flip=True).x0(0)
    plain = images()[place].float() / 127.5 - 1
    as_is, mirrored = (
        (x0 == plain).flatten(1).all(dim=1),
        (x0 == plain[..., [2, 1, 0]]).flatten(1).all(dim=1),
    )
    assert (as_is ^ mirrored).all()
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=5 * 0.5 / 2000**0.5)


def test_times_fall_one_in_each_of_equal_intervals() -> None:
    times = torch.stack([Batches(images(), 8, seed=0).times(step) for step in range(500)]).double()
    within = times * 8 - torch.arange(8)
    assert ((within > 0) & (within < 1)).all()
    assert stats.kstest(within.flatten().numpy(), "uniform").pvalue > 0.01


def test_noise_is_standard_normal_and_differs_between_rows() -> None:
    noise = Batches(images(), 500, seed=0).noise(3)
    assert noise.shape == (500, 2, 3, 3)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    assert len(noise.unique(dim=0)) == 500


def test_dropout_is_a_function_of_seed_and_number() -> None:
    def dropped(seed: int, step: int) -> Tensor:
        Batches(images(), 4, seed).seed_dropout(step)
        return torch.nn.functional.dropout(torch.ones(200), 0.5)

    first = dropped(0, 5)
    dropped(0, 6)
    assert torch.equal(dropped(0, 5), first)
    assert not torch.equal(dropped(0, 6), first)
    assert not torch.equal(dropped(1, 5), first)


def test_images_are_drawn_as_their_chances_say() -> None:
    chances = torch.tensor([0.0, 0.5, 0.2, 0.3, 0.0], dtype=torch.float64)
    batches = Batches(images(5), 100, seed=1, chances=chances)
    places = torch.cat([batches.x0(step)[1] for step in range(50)])
    found = torch.bincount(places, minlength=5) / len(places)
    torch.testing.assert_close(found.double(), chances, rtol=0, atol=0.02)
    assert found[0] == found[4] == 0


def test_a_deep_copy_shares_the_images() -> None:
    batches = Batches(images(), 4, seed=1, flip=True)
    twin = copy.deepcopy(batches)
    assert twin is not batches
    assert twin.images is batches.images
    assert torch.equal(twin.x0(3)[0], batches.x0(3)[0])


@pytest.mark.parametrize(
    ("cooldown", "done", "expected"),
    [(0.0, 0, [1] * 8), (0.5, 0, [1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]), (0.5, 4, [0.8, 0.6, 0.4, 0.2])],
)
def test_the_learning_rate_falls_linearly_over_the_last_part_of_the_steps(
    cooldown: float, done: int, expected: list[float]
) -> None:
    config = FitConfig(learning_rate=0.5, steps=8, cooldown=cooldown)
    setup = config.optimization(nn.Linear(1, 1), done)
    found = []
    for _ in expected:
        found.append(setup["optimizer"].param_groups[0]["lr"] / 0.5)
        setup["optimizer"].step()
        setup["lr_scheduler"]["scheduler"].step()
    assert found == pytest.approx(expected)


def test_the_learning_rate_falls_as_a_cosine() -> None:
    config = FitConfig(steps=100, cooldown=0.4, cooldown_shape="cosine")
    for step, part in [(0, 0), (59, 0), (70, 11 / 41), (80, 21 / 41), (99, 40 / 41)]:
        assert config.rate(step) == pytest.approx((1 + math.cos(math.pi * part)) / 2)


@pytest.mark.parametrize(("warmup", "expected"), [(0, [1, 1, 1]), (3, [0.25, 0.5, 0.75, 1, 1])])
def test_the_learning_rate_warms_up_linearly(warmup: int, expected: list[float]) -> None:
    module = nn.Linear(1, 1, bias=False)
    setup = FitConfig(learning_rate=0.5, warmup_steps=warmup).optimization(module)
    optimizer, schedule = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    places = [float(module.weight.detach())]
    for _ in expected:
        # Adam moves by the learning rate where the gradient is always the same.
        module.weight.grad = torch.ones(1, 1)
        optimizer.step()
        schedule.step()
        places.append(float(module.weight.detach()))
    moved = [last - now for last, now in pairwise(places)]
    assert moved == pytest.approx([0.5 * share for share in expected], rel=1e-4)
    assert setup["lr_scheduler"]["interval"] == "step"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": -1}, "batch must be at least 1, got -1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"cooldown": 1.5}, "cooldown must be in [0, 1], got 1.5"),
        ({"cooldown_shape": "cosine"}, "cooldown must be above 0 for cooldown_shape=cosine, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"gradient_clip": -0.5}, "gradient_clip must be at least 0, got -0.5"),
        ({"ema_decay": 1.0}, "ema_decay must be in [0, 1), got 1.0"),
        ({"t_min": 0.0}, "t_min must be in (0, 1), got 0.0"),
        ({"t_min": 1.0}, "t_min must be in (0, 1), got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    FitConfig().check()
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        FitConfig(**change).check()
