"""Samplers against the oracle, and the drivers that run them."""

import asyncio

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import ddm.samplers
from ddm.errors import ConfigError
from ddm.grids import GRIDS, time_grid
from ddm.measures import sliced_w2
from ddm.oracle import GaussianMixture
from ddm.randomness import Use, normal
from ddm.samplers import SAMPLERS, Noise, Sampler, Walk, drive, drive_async, sample, sampler, start
from ddm.schedules import SCHEDULES, Schedule, schedule

T_END = 0.02


def mixture(name: str = "vp_linear") -> GaussianMixture:
    return GaussianMixture(
        weights=torch.tensor([0.5, 0.2, 0.3]),
        means=torch.tensor([[-1.0, 0.2], [0.8, 0.9], [0.6, -0.7]]),
        stds=torch.tensor([[0.2, 0.3], [0.15, 0.2], [0.3, 0.1]]),
        schedule=schedule(name),
    )


def start_noise(n: int) -> Tensor:
    return normal(0, Use.START, torch.arange(n), 0, (2,)).double()


def exact_end(oracle: GaussianMixture, x: Tensor, t_end: float) -> Tensor:
    """The probability-flow ODE from t = 1, by scipy, with the velocity written as `da/a x - (s ds - s^2 da/a) score`."""

    def v(t: float, flat: np.ndarray) -> np.ndarray:
        at = torch.tensor(t, dtype=torch.float64)
        points = torch.from_numpy(flat).reshape(x.shape)
        a, s, da, ds = oracle.schedule(at)
        score = (a * oracle.denoise(points, at) - points) / s**2
        return (da / a * points - (s * ds - s**2 * da / a) * score).flatten().numpy()

    path = solve_ivp(v, (1.0, t_end), x.flatten().numpy(), method="DOP853", rtol=1e-9, atol=1e-10)
    return torch.from_numpy(path.y[:, -1]).reshape(x.shape)


@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_euler_and_ddim_are_first_order(name: str) -> None:
    oracle, x, steps = mixture(), start_noise(32), [64, 128, 256, 512]
    reference = exact_end(oracle, x, T_END)
    ends = [sample(oracle.denoise, x, oracle.schedule, name, n, t_min=T_END) for n in steps]
    errors = [float((end - reference).square().mean().sqrt()) for end in ends]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert sampler(name).order == 1
    assert slope == pytest.approx(1, abs=0.1)
    assert errors[-1] < 0.02


def test_an_euler_step_is_the_one_computed_by_hand() -> None:
    # rectified flow at t = 1: v = (ds/s) x + (da - a ds/s) D = x - D = 1.5; x' = 2 - 1.5 (1 - 0.4)
    end = sample(
        lambda x, t: torch.full_like(x, 0.5), torch.tensor([[2.0]]), schedule("rectified_flow"), "euler", 1, t_min=0.4
    )
    assert float(end) == pytest.approx(1.1)


def test_a_ddim_step_is_the_one_computed_by_hand() -> None:
    # rectified flow at t = 1 has eps = x = 2; x' = 0.6 D + 0.4 eps
    end = sample(
        lambda x, t: torch.full_like(x, 0.5), torch.tensor([[2.0]]), schedule("rectified_flow"), "ddim", 1, t_min=0.4
    )
    assert float(end) == pytest.approx(1.1)
    # vp_linear at t = 1: eps = (2 - a 0.5) / s
    (a, s, _, _), (a_end, s_end, _, _) = (schedule("vp_linear")(torch.tensor(t)) for t in (1.0, 0.4))
    end = sample(
        lambda x, t: torch.full_like(x, 0.5), torch.tensor([[2.0]]), schedule("vp_linear"), "ddim", 1, t_min=0.4
    )
    assert float(end) == pytest.approx(float(a_end * 0.5 + s_end * (2 - a * 0.5) / s))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule_name", SCHEDULES)
def test_ddim_is_exact_where_the_denoiser_is_constant(schedule_name: str, grid: str) -> None:
    x, process = start_noise(4), schedule(schedule_name)
    many, one = (sample(lambda x, t: torch.full_like(x, 0.3), x, process, "ddim", n, grid, t_min=0.1) for n in (7, 1))
    torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-9)
    end = sample(lambda x, t: torch.full_like(x, 0.3), x, process, "ddim", 7, grid)
    torch.testing.assert_close(end, torch.full_like(x, 0.3), rtol=1e-9, atol=1e-9)


def test_euler_walks_a_straight_line_exactly() -> None:
    end = sample(lambda x, t: torch.full_like(x, 0.3), start_noise(4), schedule("rectified_flow"), "euler", 7)
    torch.testing.assert_close(end, torch.full((4, 2), 0.3, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_divides_by_s_at_zero(name: str, schedule_name: str, grid: str, dtype: torch.dtype) -> None:
    oracle, x = mixture(schedule_name), start_noise(8).to(dtype)
    for steps in (1, 2, 7):
        end = sample(oracle.denoise, x, oracle.schedule, name, steps, grid, t_min=0.0)
        assert end.isfinite().all()
        assert end.dtype == dtype
        assert end.abs().max() < 5


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_samplers_turn_noise_into_the_mixture(name: str, schedule_name: str) -> None:
    oracle = mixture(schedule_name)
    drawn = sample(oracle.denoise, start_noise(2000), oracle.schedule, name, 60, t_min=1e-3)
    truth, other_truth = oracle.sample(2000, seed=1), oracle.sample(2000, seed=2)
    assert sliced_w2(drawn, truth) < 0.05 + sliced_w2(other_truth, truth)


@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_the_denoiser_is_asked_once_a_step_at_the_times_of_the_grid(name: str) -> None:
    oracle, asked = mixture(), []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return oracle.denoise(x, t)

    _, calls = drive(start(start_noise(2), oracle.schedule, name, 6, "quadratic", t_min=0.1), denoise)
    assert asked == time_grid("quadratic", 6, oracle.schedule, 0.1)[:-1].tolist()
    assert calls == len(asked) == 6


@pytest.mark.parametrize("name", SAMPLERS)
def test_awaited_denoisers_give_what_called_ones_give(name: str) -> None:
    oracle, x = mixture(), start_noise(4)

    async def denoise(x: Tensor, t: Tensor) -> Tensor:
        await asyncio.sleep(0)
        return oracle.denoise(x, t)

    async def both() -> list[tuple[Tensor, int]]:
        walks = [start(part, oracle.schedule, name, 5, "uniform_t", seed=3, index=i) for part, i in halves]
        return await asyncio.gather(*(drive_async(walk, denoise) for walk in walks))

    halves = [(x[:2], torch.tensor([0, 1])), (x[2:], torch.tensor([2, 3]))]
    together, calls = drive(start(x, oracle.schedule, name, 5, "uniform_t", seed=3), oracle.denoise)
    answers = asyncio.run(both())
    torch.testing.assert_close(torch.cat([part for part, _ in answers]), together, rtol=1e-12, atol=1e-12)
    assert [count for _, count in answers] == [calls, calls] == [5 * sampler(name).calls_per_step] * 2


@pytest.mark.parametrize("index", [None, torch.tensor([7, 3])])
def test_the_noise_of_a_step_is_that_of_seed_picture_and_step(
    index: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_noise(x: Tensor, schedule: Schedule, times: Tensor, noise: Noise) -> Walk:
        yield x, times[0]
        return noise(4)

    monkeypatch.setattr(ddm.samplers, "sampler", lambda name: Sampler(only_noise, order=1))
    walk = start(torch.zeros(2, 1, 3, 3).double(), schedule("vp_linear"), "any", 5, "uniform_t", seed=9, index=index)
    noise, _ = drive(walk, lambda x, t: x)
    expected = normal(9, Use.STEP, torch.arange(2) if index is None else index, 4, (1, 3, 3))
    torch.testing.assert_close(noise, expected.double(), rtol=0, atol=0)


def test_an_unknown_sampler_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"^sample.sampler must be one of euler ddim.*, got 'eular'$"):
        sample(lambda x, t: x, torch.zeros(1, 2), schedule("vp_linear"), sampler="eular")
