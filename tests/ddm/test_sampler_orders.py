"""The order of each sampler, measured against the oracle's own path or law."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ddm.oracle import GaussianMixture
from ddm.samplers import (
    drive,
    plan_steps,
    sample,
    sampler,
)
from ddm.schedules import Schedule, schedule, velocity
from tests.ddm.sampler_problems import DEFINED, STOCHASTIC, mixture, start_noise

T_END = 0.02


def exact_end(oracle: GaussianMixture, x: Tensor, t_end: float) -> Tensor:
    """The probability-flow ODE from t = 1, by scipy."""

    def v(t: float, flat: np.ndarray) -> np.ndarray:
        at, points = torch.tensor(t, dtype=torch.float64), torch.from_numpy(flat).reshape(x.shape)
        return velocity(points, oracle.denoise(points, at), oracle.schedule(at)).flatten().numpy()

    path = solve_ivp(v, (1.0, t_end), x.flatten().numpy(), method="DOP853", rtol=1e-10, atol=1e-11)
    return torch.from_numpy(path.y[:, -1]).reshape(x.shape)


@functools.cache
def problem(name: str) -> tuple[GaussianMixture, Tensor, Tensor]:
    """An oracle, points at t = 1, and where the ODE takes them at t = T_END."""
    oracle = mixture(name)
    x = start_noise(32, oracle.schedule)
    return oracle, x, exact_end(oracle, x, T_END)


def fitted_order(process: str, name: str, steps: list[int], order: int = 3) -> float:
    oracle, x, reference = problem(process)
    grid = "uniform_log_snr"
    ends = [
        sample(oracle.denoise, x, oracle.schedule, name, n, grid, t_min=T_END, order=order)
        for n in steps
    ]
    errors = [float((end - reference).square().mean().sqrt()) for end in ends]
    assert errors[-1] < 0.02
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


@pytest.mark.parametrize("process", ["vp_linear", "vp_cosine", "rectified_flow"])
@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)]
)
def test_samplers_have_their_order(name: str, order: int, process: str) -> None:
    assert sampler(name).order == order
    assert fitted_order(process, name, [64, 128, 256]) == pytest.approx(order, abs=0.25)


def test_the_accelerated_ode_sampler_is_second_order() -> None:
    assert sampler("accelerated_ode").order == 2
    assert fitted_order("vp_linear", "accelerated_ode", [64, 128, 256]) == pytest.approx(
        2, abs=0.25
    )


@pytest.mark.parametrize("process", ["vp_linear", "vp_cosine", "rectified_flow"])
@pytest.mark.parametrize(("order", "least"), [(2, 2.3), (3, 3.3)])
def test_unipc_has_at_least_its_order_and_its_corrector_adds_one(
    order: int, least: float, process: str
) -> None:
    assert sampler("unipc", order).order == order
    assert least < fitted_order(process, "unipc", [32, 64, 128], order) < least + 1.2


def law_error(name: str, process: Schedule, steps: int, grid: str) -> tuple[float, float]:
    """The error of the mean and of the variance that a sampler leaves of `N(0.7, 0.5^2)`, exactly,
    without a single draw.

    There D is affine in x, so a sampler is linear in its start and in each noise: an image whose
    coordinate 0 is the mean, 1 the start and n + 2 noise n carries every coefficient, and the sum
    of their squares is the variance.
    """
    method, times = plan_steps(name, steps, grid, process, T_END)
    unit = torch.eye(2 * steps + 2, dtype=torch.float64)

    def gaussian(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, s, _, _ = process(t)
        return a, 0.7 * a, (0.5 * a) ** 2 + s**2

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, mean, variance = gaussian(t)
        gain = a * 0.25 / variance
        return gain * x + (0.7 - gain * mean) * unit[0]

    _, mean, variance = gaussian(times[0])
    end, _ = drive(
        method.trajectory(
            mean * unit[0] + variance.sqrt() * unit[1], process, times, lambda n: unit[n + 2]
        ),
        denoise,
    )
    _, mean, variance = gaussian(times[-1])
    return float(end[0] - mean), float(end[1:].square().sum() - variance)


@pytest.mark.parametrize("grid", ["uniform_t", "uniform_log_snr"])
@pytest.mark.parametrize(
    ("name", "process"),
    [
        (name, process)
        for name, process in DEFINED
        if name in STOCHASTIC and process in ("vp_linear", "vp_constant", "edm")
    ],
)
def test_stochastic_samplers_have_their_order_on_a_gaussian(
    name: str, process: str, grid: str
) -> None:
    steps = [512, 1024] if (process, grid) == ("edm", "uniform_t") else [128, 256]
    (mean_error, first), (_, second) = (law_error(name, schedule(process), n, grid) for n in steps)
    order = 2 if name == "accelerated_sde" else 1
    assert sampler(name).order == 1  # of any score
    assert math.log2(first / second) == pytest.approx(order, abs=0.1)
    assert abs(mean_error) < (
        1e-2 if name == "euler_maruyama" else 1e-12
    )  # the others are DDIM in the mean


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ipndm_has_its_order_on_steps_even_in_sigma(order: int) -> None:
    oracle = GaussianMixture(**{**vars(mixture()), "schedule": schedule("edm", sigma_max=2.0)})
    x = start_noise(32, oracle.schedule)
    reference, errors, steps = exact_end(oracle, x, 0.05), [], [128, 256, 512]
    for n in steps:
        end = sample(
            oracle.denoise, x, oracle.schedule, "ipndm", n, "uniform_t", t_min=0.05, order=order
        )
        errors.append(float((end - reference).square().mean(dim=1).sqrt().median()))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("process", ["vp_linear", "vp_cosine", "rectified_flow"])
@pytest.mark.parametrize(("order", "of_accuracy"), [(1, 1), (2, 2), (3, 2), (4, 2)])
def test_ipndm_is_second_order_on_other_steps(order: int, of_accuracy: int, process: str) -> None:
    assert sampler("ipndm", order).order == of_accuracy
    slope = fitted_order(process, "ipndm", [128, 256, 512], order)
    assert of_accuracy - 0.25 < slope < of_accuracy + 0.6
