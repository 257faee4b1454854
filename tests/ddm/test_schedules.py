"""The forward processes and the one conversion from a denoiser to a velocity."""

import math
import re
from typing import Any

import mpmath
import pytest
import torch
from scipy.integrate import quad

from ddm.errors import ConfigError
from ddm.schedules import SCHEDULES, Coeffs, schedule, velocity

TIMES = torch.tensor([1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999999], dtype=torch.float64)
VARIANCE_PRESERVING = [name for name in SCHEDULES if name.startswith("vp_")]


@pytest.mark.parametrize("name", SCHEDULES)
def test_da_and_ds_are_the_derivatives_of_a_and_s(name: str) -> None:
    t = TIMES.clone().requires_grad_()
    a, s, da, ds = schedule(name)(t)
    for value, derivative in ((a, da), (s, ds)):
        (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_vp_schedules_preserve_variance(name: str) -> None:
    a, s, da, ds = schedule(name)(TIMES)
    torch.testing.assert_close(a**2 + s**2, torch.ones_like(a), rtol=0, atol=1e-14)
    torch.testing.assert_close(a * da + s * ds, torch.zeros_like(a), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_at_the_data_and_ends_in_noise(name: str) -> None:
    a, s, _, _ = schedule(name)(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert (a[0], s[0]) == (1, 0)
    assert abs(a[1]) < 0.01 * s[1]


def test_vp_linear_integrates_beta() -> None:
    for t in TIMES.tolist():
        integral, _ = quad(lambda u: 0.2 + (9.0 - 0.2) * u, 0, t)
        a = schedule("vp_linear", beta_min=0.2, beta_max=9.0)(torch.tensor(t, dtype=torch.float64)).a
        assert float(a) == pytest.approx(math.exp(-integral / 2), rel=1e-12)


def test_vp_cosine_is_the_published_ratio_of_cosines() -> None:
    def f(t: float) -> float:
        return math.cos((t + 0.02) / (1 + 0.02) * math.pi / 2)

    for t in TIMES.tolist():
        a = schedule("vp_cosine", shift=0.02)(torch.tensor(t, dtype=torch.float64)).a
        assert float(a) == pytest.approx(f(t) / f(0), rel=1e-9)


def test_rectified_flow_is_the_straight_line() -> None:
    a, s, da, ds = schedule("rectified_flow")(torch.tensor([0.0, 0.25, 1.0]))
    assert (a.tolist(), s.tolist()) == ([1, 0.75, 0], [0, 0.25, 1])
    assert (da.tolist(), ds.tolist()) == ([-1, -1, -1], [1, 1, 1])


@pytest.mark.parametrize("t", [1e-7, 1e-5, 1e-3])
def test_s_is_exact_in_float32_near_the_data(t: float) -> None:
    exact_t = mpmath.mpf(float(torch.tensor(t)))
    with mpmath.workdps(50):
        u0 = mpmath.pi / 2 * mpmath.mpf("0.008") / mpmath.mpf("1.008")
        cosine = mpmath.cos(u0 + mpmath.pi / 2 * exact_t / mpmath.mpf("1.008")) / mpmath.cos(u0)
        linear = mpmath.exp(-(mpmath.mpf("0.1") * exact_t + mpmath.mpf("19.9") * exact_t**2 / 2) / 2)
        expected = {"vp_linear": float(mpmath.sqrt(1 - linear**2)), "vp_cosine": float(mpmath.sqrt(1 - cosine**2))}
    for name, s in expected.items():
        assert float(schedule(name)(torch.tensor(t)).s) == pytest.approx(s, rel=2e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_coefficients_have_the_dtype_of_t(name: str) -> None:
    in_double = schedule(name)(TIMES)
    for single, double in zip(schedule(name)(TIMES.float()), in_double, strict=True):
        assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-5)


def test_coefficients_beside_pictures_multiply_row_by_row() -> None:
    pictures = torch.arange(24.0).reshape(2, 1, 3, 4)
    c = Coeffs(*(torch.tensor([2.0, 3.0]) * n for n in (1, 2, 3, 4)))
    for n, coefficient in enumerate(c.beside(pictures), start=1):
        expected = torch.stack([2.0 * n * pictures[0], 3.0 * n * pictures[1]])
        torch.testing.assert_close(coefficient * pictures, expected, rtol=0, atol=0)
    scalar = Coeffs(*(torch.tensor(n) for n in (1.0, 2.0, 3.0, 4.0))).beside(pictures)
    torch.testing.assert_close(scalar.ds * pictures, 4 * pictures, rtol=0, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_velocity_of_a_known_picture_is_that_of_its_path(name: str) -> None:
    x0, eps = torch.tensor([[0.3, -1.0]]).double(), torch.tensor([[-0.7, 2.0]]).double()
    for t in TIMES:
        c = schedule(name)(t)
        v = velocity(c.a * x0 + c.s * eps, x0, c)
        torch.testing.assert_close(v, c.da * x0 + c.ds * eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_velocity_moves_the_quantiles_of_a_gaussian(name: str) -> None:
    mean, std, z = 0.8, 0.3, torch.tensor([[-1.5], [0.4]], dtype=torch.float64)
    for time in TIMES:
        t = time.clone().requires_grad_()
        c = schedule(name)(t)
        deviation = (c.a**2 * std**2 + c.s**2).sqrt()
        x = c.a * mean + deviation * z
        denoised = mean + c.a * std**2 / deviation * z
        for row in range(2):
            (expected,) = torch.autograd.grad(x[row, 0], t, retain_graph=True)
            torch.testing.assert_close(velocity(x, denoised, c)[row, 0].detach(), expected, rtol=1e-8, atol=1e-8)


def test_velocity_of_vp_linear_is_half_beta_times_x_plus_score() -> None:
    x, denoised = torch.tensor([[0.5, -2.0]]).double(), torch.tensor([[0.9, 0.1]]).double()
    for t in TIMES:
        c = schedule("vp_linear")(t)
        beta, score = 0.1 + 19.9 * t, (c.a * denoised - x) / c.s**2
        torch.testing.assert_close(velocity(x, denoised, c), -beta / 2 * (x + score), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_mixing_denoisers_is_mixing_velocities(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, denoised = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 2), (3, 5, 2)))
    weights = torch.tensor([0.7, 0.5, -0.2], dtype=torch.float64)[:, None, None]  # they need only sum to one
    c = schedule(name)(torch.linspace(0.1, 0.9, 5, dtype=torch.float64))
    mixed = sum(weights[k] * velocity(x, denoised[k], c) for k in range(3))
    torch.testing.assert_close(velocity(x, (weights * denoised).sum(dim=0), c), mixed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("vp_linear", {"beta": 3}, "schedule.beta must be a parameter of vp_linear (beta_min, beta_max), got 3"),
        (
            "rectified_flow",
            {"shift": 0.1},
            "schedule.shift must be a parameter of rectified_flow (it has none), got 0.1",
        ),
        ("vp_linear", {"beta_min": 0.0}, "schedule.beta_min must be above 0, got 0.0"),
        ("vp_linear", {"beta_max": 0.05}, "schedule.beta_max must be at least schedule.beta_min, got 0.05"),
        ("vp_linear", {"beta_max": "20"}, "schedule.beta_max must be a finite number, got '20'"),
        ("vp_linear", {"beta_max": math.inf}, "schedule.beta_max must be a finite number, got inf"),
        ("vp_cosine", {"shift": math.nan}, "schedule.shift must be a finite number, got nan"),
        ("vp_cosine", {"shift": True}, "schedule.shift must be a finite number, got True"),
        ("vp_cosine", {"shift": -0.1}, "schedule.shift must be above 0, got -0.1"),
    ],
)
def test_parameters_that_make_no_sense_are_refused_by_name(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        schedule(name, **parameters)


def test_an_unknown_schedule_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"^schedule.name must be one of vp_linear .*rectified_flow.*, got 'vp_linera'$"
    ):
        schedule("vp_linera")
