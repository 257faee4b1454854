"""What all samplers share: what they ask, the noise they use, the drivers that run them, and what is refused."""

import asyncio
import functools
import math
import re
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import ddm.samplers
from ddm.errors import ConfigError
from ddm.grids import GRIDS, time_grid
from ddm.measures import sliced_w2
from ddm.oracle import GaussianMixture
from ddm.rng import RngStream, normal
from ddm.samplers import (
    SAMPLERS,
    Course,
    Sampler,
    Step,
    drive,
    drive_async,
    sample,
    sampler,
    start,
)
from ddm.schedules import SCHEDULES, Schedule, schedule
from tests.ddm.sampler_problems import (
    DEFINED,
    ENDS_WITHOUT_SIGNAL,
    EXPLODING,
    STOCHASTIC,
    mixture,
    no_noise,
    start_noise,
    truth,
)

DETERMINISTIC = tuple(name for name in SAMPLERS if name not in STOCHASTIC)


# What holds for all


@functools.cache
def walks(process: str, t_min: float) -> list[tuple[Schedule, Tensor]]:
    """A schedule and times, of every grid that walks it."""
    numbers = [
        (grid, schedule(process), steps) for grid in GRIDS if grid != "own" for steps in (1, 2, 7)
    ]
    if process == "two_phase" and t_min == 0:
        numbers += [
            ("own", schedule("two_phase", steps=steps, c0=1.0, c1=2.0), steps) for steps in (2, 7)
        ]
    return [(path, time_grid(grid, steps, path, t_min)) for grid, path, steps in numbers]


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc", "ipndm"])
@pytest.mark.parametrize("process", SCHEDULES)
def test_a_constant_denoiser_is_walked_exactly(process: str, name: str) -> None:
    for t_min in (0.0, 0.1):
        for path, times in walks(process, t_min):
            x, (c, c_end) = start_noise(4, path), (path(t) for t in times[[0, -1]])
            trajectory = sampler(name).trajectory(x, path, times, no_noise)
            end, _ = drive(trajectory, lambda x, t: torch.full_like(x, 0.3))
            expected = c_end.a * 0.3 + c_end.s * (x - c.a * 0.3) / c.s
            torch.testing.assert_close(end, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc", "ipndm"])
@pytest.mark.parametrize("process", ENDS_WITHOUT_SIGNAL)
def test_the_ode_is_walked_up_to_where_no_signal_is_left(process: str, name: str) -> None:
    path, oracle = schedule(process), mixture(process)
    start_from = oracle.marginal(200, 1e-3, seed=1)

    def noise_of(method: str, steps: int) -> Tensor:
        times = time_grid("half", steps, path, 1e-3).flip(0)
        trajectory = sampler(method).trajectory(start_from, path, times, no_noise)
        return drive(trajectory, oracle.denoise)[0]

    error = (noise_of(name, 25) - noise_of("heun", 200)).square().mean().sqrt()
    assert error < (0.1 if name == "unipc" else 0.05)


def test_euler_walks_a_straight_line_exactly() -> None:
    end = sample(
        lambda x, t: torch.full_like(x, 0.3), start_noise(4), schedule("rectified_flow"), "euler", 7
    )
    torch.testing.assert_close(
        end, torch.full((4, 2), 0.3, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(("name", "process"), DEFINED)
def test_the_step_to_zero_is_the_denoised_image(name: str, process: str) -> None:
    for path, times in walks(process, 0.0):
        for dtype in (torch.float32, torch.float64):
            oracle, answers = GaussianMixture(**{**vars(mixture()), "schedule": path}), []

            def denoise(
                x: Tensor,
                t: Tensor,
                oracle: GaussianMixture = oracle,
                answers: list[Tensor] = answers,
            ) -> Tensor:
                answers.append(oracle.denoise(x, t))
                return answers[-1]

            x, steps = start_noise(4, path).to(dtype), len(times) - 1
            noise = [start_noise(4).to(dtype)] * 2 * steps
            end, calls = drive(
                sampler(name).trajectory(x, path, times, lambda n, noise=noise: noise[n]), denoise
            )
            assert end.isfinite().all()
            assert end.dtype == dtype
            # a sampler that calls twice has nothing to ask at t = 0
            assert (
                calls
                == len(answers)
                == steps * sampler(name).calls_per_step - (sampler(name).calls_per_step == 2)
            )
            if name in ("euler", "ipndm"):
                assert (
                    end.abs().max() < 10 + 10 * path(torch.ones(())).ds
                )  # one step of exploding noise overshoots
            else:
                torch.testing.assert_close(end, answers[-1], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "process"), DEFINED)
def test_samplers_turn_noise_into_the_mixture(name: str, process: str) -> None:
    oracle, t_min = mixture(process), 1e-3
    steps = (
        150 if name == "euler" and process in EXPLODING else 80 if sampler(name).order == 1 else 30
    )
    grid = "edm" if process in EXPLODING else "uniform_log_snr"
    drawn = sample(
        oracle.denoise,
        start_noise(1000, oracle.schedule),
        oracle.schedule,
        name,
        steps,
        grid,
        t_min=t_min,
    )
    exact, distance = truth(oracle.schedule, t_min)
    assert sliced_w2(drawn, exact, projections=64) < 0.06 + distance


@pytest.mark.parametrize("name", [*STOCHASTIC, "accelerated_ode"])
def test_the_papers_samplers_sample_the_mixture_on_two_phase(name: str) -> None:
    oracle = GaussianMixture(**{**vars(mixture()), "schedule": schedule("two_phase", steps=120)})
    drawn = sample(
        oracle.denoise, start_noise(1000, oracle.schedule), oracle.schedule, name, 120, "own"
    )
    exact, distance = truth(oracle.schedule, 0.0)
    assert sliced_w2(drawn, exact, projections=64) < 0.06 + distance


ASKED: dict[str, Callable[[list[float]], list[float]]] = {
    "heun": lambda times: [t for pair in pairwise(times) for t in pair],
    "accelerated_ode": lambda times: [
        *times[:2],
        *(t for pair in pairwise(times[:-1]) for t in pair[::-1]),
    ],
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_denoiser_is_asked_at_the_times_of_the_grid(name: str) -> None:
    oracle, asked = mixture(), []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return oracle.denoise(x, t)

    _, calls = drive(
        start(start_noise(2), oracle.schedule, name, 6, "quadratic", t_min=0.1), denoise
    )
    times = time_grid("quadratic", 6, oracle.schedule, 0.1).tolist()
    assert asked == ASKED.get(name, lambda times: times[:-1])(times)
    assert calls == len(asked) == 6 * sampler(name).calls_per_step


def test_times_of_ones_own_are_walked_to_their_end() -> None:
    x, times = start_noise(2), [1.0, 0.7, 0.2, 0.05]
    end = sample(mixture().denoise, x, schedule("vp_linear"), "heun", 3, times)
    at = torch.tensor(times, dtype=torch.float64)
    trajectory = sampler("heun").trajectory(x, schedule("vp_linear"), at, no_noise)
    torch.testing.assert_close(end, drive(trajectory, mixture().denoise)[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_awaited_denoisers_give_what_called_ones_give(name: str) -> None:
    oracle, x = mixture(), start_noise(4)

    async def denoise(x: Tensor, t: Tensor) -> Tensor:
        await asyncio.sleep(0)
        return oracle.denoise(x, t)

    async def both() -> list[tuple[Tensor, int]]:
        walks = [
            start(part, oracle.schedule, name, 5, "uniform_t", seed=3, index=i)
            for part, i in halves
        ]
        return await asyncio.gather(*(drive_async(trajectory, denoise) for trajectory in walks))

    halves = [(x[:2], torch.tensor([0, 1])), (x[2:], torch.tensor([2, 3]))]
    together, calls = drive(start(x, oracle.schedule, name, 5, "uniform_t", seed=3), oracle.denoise)
    answers = asyncio.run(both())
    torch.testing.assert_close(
        torch.cat([part for part, _ in answers]), together, rtol=1e-12, atol=1e-12
    )
    assert [count for _, count in answers] == [calls, calls]


# Noise


@pytest.mark.parametrize("index", [None, torch.tensor([7, 3])])
def test_the_noise_of_a_step_is_that_of_seed_image_and_step(
    index: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_noise(course: Course, n: int, x: Tensor) -> Step:
        yield x, course.times[n]
        return (course.noise(n),)

    monkeypatch.setattr(ddm.samplers, "sampler", lambda name, order: Sampler(only_noise, order=1))
    trajectory = start(
        torch.zeros(2, 1, 3, 3).double(),
        schedule("vp_linear"),
        "any",
        5,
        "uniform_t",
        seed=9,
        index=index,
    )
    noise, _ = drive(trajectory, lambda x, t: x)
    expected = normal(9, RngStream.STEP, torch.arange(2) if index is None else index, 4, (1, 3, 3))
    torch.testing.assert_close(noise, expected.double(), rtol=0, atol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_noise_is_used_once_in_order(name: str) -> None:
    drawn: list[int] = []

    def noise(n: int) -> Tensor:
        drawn.append(n)
        return torch.zeros(2, 2, dtype=torch.float64)

    oracle, times = mixture(), time_grid("uniform_t", 6, schedule("vp_linear"), 0.1)
    drive(sampler(name).trajectory(start_noise(2), oracle.schedule, times, noise), oracle.denoise)
    noises = 0 if name in DETERMINISTIC else 12 if name == "accelerated_sde" else 6
    assert drawn == list(range(noises))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_an_image_is_independent_of_its_batch(
    name: str,
) -> None:
    oracle, x = mixture(), start_noise(5)

    def drawn(of: Tensor, seed: int, index: Tensor | None = None) -> Tensor:
        return drive(
            start(of, oracle.schedule, name, 6, "uniform_t", seed=seed, index=index), oracle.denoise
        )[0]

    together = drawn(x, 4)
    torch.testing.assert_close(
        drawn(x[3:4], 4, torch.tensor([3])), together[3:4], rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        sample(oracle.denoise, x, oracle.schedule, name, 6, seed=4), together, rtol=0, atol=0
    )
    for other in (drawn(x, 5), drawn(x, 4, torch.arange(5, 10))):
        assert (other - together).abs().amax(dim=1).min() > 1e-3
    same_start = drawn(x[:1].expand(5, 2), 4)
    assert torch.pdist(same_start).min() > 1e-3


def test_noises_of_successive_steps_are_independent() -> None:
    noise = [normal(0, RngStream.STEP, torch.arange(20_000), n, (1,))[:, 0] for n in range(4)]
    correlations = torch.corrcoef(torch.stack(noise)) - torch.eye(4)
    assert correlations.abs().max() < 5 / math.sqrt(20_000)


# Refusals


@pytest.mark.parametrize(
    ("name", "process", "message"),
    [
        (
            "ddpm",
            "rectified_flow",
            "euler ddim heun dpmpp_2m unipc ipndm for RectifiedFlow(), where a falls to 0: it divides by a; got 'ddpm'",
        ),
        (
            "euler_maruyama",
            "rectified_flow",
            "euler ddim heun dpmpp_2m unipc ipndm for RectifiedFlow(), where a falls to 0: it divides by a; got 'euler_maruyama'",
        ),
        (
            "accelerated_ode",
            "vp_cosine",
            "euler ddim heun dpmpp_2m unipc ipndm for VPCosine(shift=0.008), where a falls to 6.1e-17: it divides by a; "
            "got 'accelerated_ode'",
        ),
        (
            "accelerated_ode",
            "ve_exponential",
            "euler ddim heun dpmpp_2m unipc ipndm euler_maruyama ddpm for VEExponential(b=0.041, c=8.5), "
            "where a^2 + s^2 is 2389 at t = 1: it needs 1; got 'accelerated_ode'",
        ),
        (
            "accelerated_ode",
            "edm",
            "euler ddim heun dpmpp_2m unipc ipndm euler_maruyama ddpm for EDM(sigma_max=80.0), "
            "where a^2 + s^2 is 6401 at t = 1: it needs 1; got 'accelerated_ode'",
        ),
        (
            "accelerated_sde",
            "edm",
            "euler ddim heun dpmpp_2m unipc ipndm euler_maruyama ddpm for EDM(sigma_max=80.0), "
            "where a^2 + s^2 is 6401 at t = 1: it needs 1; got 'accelerated_sde'",
        ),
    ],
)
def test_an_undefined_sampler_is_refused_with_those_that_are_defined(
    name: str, process: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape('sampler must be one of ' + message)}$"):
        sample(lambda x, t: x, torch.zeros(1, 2), schedule(process), sampler=name)


@pytest.mark.parametrize("process", SCHEDULES)
def test_a_sampler_is_refused_exactly_where_it_is_not_defined(process: str) -> None:
    times = time_grid("uniform_t", 5, schedule(process))
    assert [name for name in SAMPLERS if not sampler(name).lacks(schedule(process), times)] == [
        name for name in SAMPLERS if (name, process) in DEFINED
    ]


@pytest.mark.parametrize(
    ("name", "order", "orders"),
    [
        ("unipc", 1, "[2, 3]"),
        ("unipc", 4, "[2, 3]"),
        ("ipndm", 0, "[1, 4]"),
        ("ipndm", 5, "[1, 4]"),
    ],
)
def test_an_order_that_a_sampler_does_not_have_is_refused(
    name: str, order: int, orders: str
) -> None:
    message = f"order must be in {orders} for sampler={name}, got {order}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        sample(lambda x, t: x, torch.zeros(1, 2), schedule("vp_linear"), name, order=order)


def test_the_order_means_nothing_to_samplers_that_have_one_alone() -> None:
    assert sampler("ddim", 17) == sampler("ddim")


def test_no_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^steps must be at least 1, got 0$"):
        sample(lambda x, t: x, torch.zeros(1, 2), schedule("vp_linear"), steps=0)


def test_an_unknown_sampler_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match=rf"^sampler must be one of {' '.join(SAMPLERS)}, got 'eular'$"
    ):
        sample(lambda x, t: x, torch.zeros(1, 2), schedule("vp_linear"), sampler="eular")
