"""The forward processes and the one conversion from a denoiser to a velocity."""

import math
import re
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from scipy.integrate import quad

from benchmarks.lab.linear_sde import LinearSDE
from ddm.errors import ConfigError
from ddm.schedules import SCHEDULES, Coeffs, Discrete, TwoPhase, schedule, velocity

TIMES = torch.tensor(
    [1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999999], dtype=torch.float64
)
INSIDE_STEPS = torch.tensor(
    [0.0003, 0.0107, 0.2504, 0.4796, 0.5055, 0.9999], dtype=torch.float64
)  # of 1,000
DISCRETE = [name for name in SCHEDULES if isinstance(schedule(name), Discrete)]
VARIANCE_PRESERVING = [name for name in SCHEDULES if name.startswith("vp_")] + DISCRETE
SMOOTH = [name for name in SCHEDULES if name not in DISCRETE]

# f and g^2 of `dx = -f x dt + g dW` as functions of u and of the module, math or torch, that they
# are computed with
_RATE = math.pi / 2 / 1.008  # of the cosine schedule's angle
SDES: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "vp_constant": (lambda u, m: 5 + 0 * u, lambda u, m: 10 + 0 * u),
    "vp_linear": (lambda u, m: (0.1 + 19.9 * u) / 2, lambda u, m: 0.1 + 19.9 * u),
    "vp_polynomial": (lambda u, m: (0.3 + 5.2 * u) ** 2 / 2, lambda u, m: (0.3 + 5.2 * u) ** 2),
    "vp_exponential": (lambda u, m: 0.05 * m.exp(6.5 * u), lambda u, m: 0.1 * m.exp(6.5 * u)),
    "vp_cosine": (
        lambda u, m: _RATE * m.tan(_RATE * (u + 0.008)),
        lambda u, m: 2 * _RATE * m.tan(_RATE * (u + 0.008)),
    ),
    "ve_exponential": (lambda u, m: 0 * u, lambda u, m: (0.041 * m.exp(8.5 * u)) ** 2),
    "ve_polynomial": (lambda u, m: 0 * u, lambda u, m: (0.3 + 10.3 * u) ** 4),
    "rectified_flow": (lambda u, m: 1 / (1 - u), lambda u, m: 2 * u / (1 - u)),
    "edm": (lambda u, m: 0 * u, lambda u, m: 2 * 80**2 * u),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_da_and_ds_are_the_derivatives_of_a_and_s(name: str) -> None:
    t = torch.cat([TIMES, INSIDE_STEPS]).requires_grad_()
    a, s, da, ds = schedule(name)(t)
    for value, derivative in ((a, da), (s, ds)):
        (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SMOOTH)
def test_closed_forms_agree_with_their_linear_sde_by_gauss_and_legendre(name: str) -> None:
    f, g_square = SDES[name]
    process, t = LinearSDE(lambda u: f(u, torch), lambda u: g_square(u, torch) ** 0.5), TIMES[:-2]
    for closed, numerical in zip(schedule(name)(t), process(t), strict=True):
        torch.testing.assert_close(numerical, closed, rtol=1e-6, atol=1e-15)
    for batched, alone in zip(process(t), process(t[6]), strict=True):
        torch.testing.assert_close(batched[6], alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SMOOTH)
def test_closed_forms_agree_with_their_linear_sde_by_scipy(name: str) -> None:
    f, g_square = SDES[name]

    def decay(u: float, t: float) -> float:
        return (
            math.exp(-quad(lambda w: f(w, math), u, t, epsabs=0, epsrel=1e-10)[0])
            if "ve" not in name
            else 1.0
        )

    for t in (0.01, 0.4, 0.9):
        variance, _ = quad(
            lambda u, t=t: decay(u, t) ** 2 * g_square(u, math), 0, t, epsabs=0, epsrel=1e-9
        )
        a, s, da, ds = (
            float(part) for part in schedule(name)(torch.tensor(t, dtype=torch.float64))
        )
        assert a == pytest.approx(decay(0, t), rel=1e-7)
        assert s == pytest.approx(math.sqrt(variance), rel=1e-7)
        # E x = a x0 obeys (E x)' = -f E x, and the variance (s^2)' = -2 f s^2 + g^2
        assert da == pytest.approx(-f(t, math) * decay(0, t), rel=1e-7)
        assert 2 * s * ds == pytest.approx(g_square(t, math) - 2 * f(t, math) * variance, rel=1e-6)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_vp_schedules_preserve_variance(name: str) -> None:
    a, s, da, ds = schedule(name)(TIMES)
    torch.testing.assert_close(a**2 + s**2, torch.ones_like(a), rtol=0, atol=1e-14)
    torch.testing.assert_close(a * da + s * ds, torch.zeros_like(a), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_at_the_data_and_ends_in_noise(name: str) -> None:
    a, s, _, _ = schedule(name)(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert (a[0], s[0]) == (1, 0)
    assert abs(a[1]) < 0.021 * s[1]
    assert s[1] > 0.99


@pytest.mark.parametrize(
    ("name", "s_end"),
    [
        ("ve_exponential", math.sqrt(0.041**2 / 17 * (math.exp(17) - 1))),
        ("ve_polynomial", math.sqrt((10.6**5 - 0.3**5) / 51.5)),
        ("edm", 80.0),
    ],
)
def test_exploding_schedules_keep_the_data_and_end_in_much_noise(name: str, s_end: float) -> None:
    c = schedule(name)(torch.cat([TIMES, torch.ones(1)]))
    assert c.a.eq(1).all()
    assert c.da.eq(0).all()
    assert float(c.s[-1]) == pytest.approx(s_end, rel=1e-12)


def written_out_betas(T: int, c0: float, c1: float) -> list[float]:
    """arXiv 2408.02320, eq. 7, n = 1 ... T."""
    betas = [T**-c0]
    for n in range(2, T + 1):
        growing = T**-c0 * (1 + c1 * math.log(T) / T) ** n
        betas.append(c1 * math.log(T) / T * min(growing, 1.0))
    return betas


@pytest.mark.parametrize(
    ("T", "c0", "c1"), [(1000, 2.0, 4.0), (50, 1.5, 3.0), (7, 1.0, 2.0), (2, 0.5, 1.0)]
)
def test_two_phase_takes_the_papers_betas_and_multiplies_them(T: int, c0: float, c1: float) -> None:
    process, betas = TwoPhase(T, c0, c1), written_out_betas(T, c0, c1)
    torch.testing.assert_close(
        process.betas, torch.tensor(betas, dtype=torch.float64), rtol=1e-12, atol=0
    )
    product = 1.0
    for n, beta in enumerate(betas, start=1):
        product *= 1 - beta
        a, s, _, _ = process(torch.tensor(n / T, dtype=torch.float64))
        assert float(a) ** 2 == pytest.approx(product, rel=1e-10)
        assert float(s) ** 2 == pytest.approx(1 - product, rel=1e-10)


def test_two_phase_grows_and_then_stays() -> None:
    betas = TwoPhase(1000).betas
    highest = 4 * math.log(1000) / 1000
    assert (betas[1:500].diff() > 0).all()
    assert betas[510:].eq(highest).all()


def test_log_a_of_two_phase_is_linear_inside_a_step() -> None:
    T, betas = 50, written_out_betas(50, 1.5, 3.0)
    process = TwoPhase(T, 1.5, 3.0)
    for n in (0, 3, 20, 49):
        before = math.prod(1 - beta for beta in betas[:n])
        for part in (0.1, 0.5, 0.95):
            a, _, da, _ = process(torch.tensor((n + part) / T, dtype=torch.float64))
            assert float(a) ** 2 == pytest.approx(before * (1 - betas[n]) ** part, rel=1e-10)
            assert float(da / a) == pytest.approx(T / 2 * math.log1p(-betas[n]), rel=1e-10)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_ddpm_multiplies_its_betas(power: float) -> None:
    process, product = schedule("ddpm", steps=50, beta_start=1e-3, beta_end=0.1, power=power), 1.0
    first, last = 1e-3 ** (1 / power), 0.1 ** (1 / power)
    for n in range(1, 51):
        product *= 1 - (first + (last - first) * (n - 1) / 49) ** power
        a, s, _, _ = process(torch.tensor(n / 50, dtype=torch.float64))
        assert float(a) ** 2 == pytest.approx(product, rel=1e-10)
        assert float(s) ** 2 == pytest.approx(1 - product, rel=1e-10)


def test_ddpm_cosine_is_vp_cosine_until_beta_is_at_its_bound() -> None:
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000
    found, smooth = schedule("ddpm_cosine")(t), schedule("vp_cosine")(t)
    torch.testing.assert_close(found.a, smooth.a, rtol=1e-9, atol=0)
    last = schedule("ddpm_cosine")(torch.ones((), dtype=torch.float64)).a
    assert float(last**2) == pytest.approx(float(found.a[-1] ** 2) * 0.001, rel=1e-9)


@pytest.mark.parametrize("name", ["ddpm", "ddpm_cosine"])
def test_zero_terminal_snr_shifts_a_to_0_and_keeps_its_first_step(name: str) -> None:
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    before, after = schedule(name)(t).a, schedule(name, zero_terminal_snr=1)(t).a
    assert float(after[-1]) == 0
    assert float(after[0]) == pytest.approx(float(before[0]), rel=1e-12)
    factor = after[:-1] / (before[:-1] - before[-1])
    torch.testing.assert_close(factor, factor[:1].expand(999), rtol=1e-9, atol=0)


def test_vp_linear_integrates_beta() -> None:
    for t in TIMES.tolist():
        integral, _ = quad(lambda u: 0.2 + (9.0 - 0.2) * u, 0, t)
        a = schedule("vp_linear", beta_min=0.2, beta_max=9.0)(
            torch.tensor(t, dtype=torch.float64)
        ).a
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
        linear = mpmath.exp(
            -(mpmath.mpf("0.1") * exact_t + mpmath.mpf("19.9") * exact_t**2 / 2) / 2
        )
        expected = {
            "vp_linear": float(mpmath.sqrt(1 - linear**2)),
            "vp_cosine": float(mpmath.sqrt(1 - cosine**2)),
        }
    for name, s in expected.items():
        assert float(schedule(name)(torch.tensor(t)).s) == pytest.approx(s, rel=2e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_coefficients_have_the_dtype_of_t(name: str) -> None:
    in_double = schedule(name)(
        TIMES.float().double()
    )  # the same times: two_phase's derivatives jump
    for single, double in zip(schedule(name)(TIMES.float()), in_double, strict=True):
        assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


def test_coefficients_beside_images_multiply_row_by_row() -> None:
    images = torch.arange(24.0).reshape(2, 1, 3, 4)
    c = Coeffs(*(torch.tensor([2.0, 3.0]) * n for n in (1, 2, 3, 4)))
    for n, coefficient in enumerate(c.broadcast_to(images), start=1):
        expected = torch.stack([2.0 * n * images[0], 3.0 * n * images[1]])
        torch.testing.assert_close(coefficient * images, expected, rtol=0, atol=0)
    scalar = Coeffs(*(torch.tensor(n) for n in (1.0, 2.0, 3.0, 4.0))).broadcast_to(images)
    torch.testing.assert_close(scalar.ds * images, 4 * images, rtol=0, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_velocity_of_a_known_image_is_that_of_its_path(name: str) -> None:
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
            torch.testing.assert_close(
                velocity(x, denoised, c)[row, 0].detach(), expected, rtol=1e-8, atol=1e-8
            )


def test_velocity_of_vp_linear_is_half_beta_times_x_plus_score() -> None:
    x, denoised = torch.tensor([[0.5, -2.0]]).double(), torch.tensor([[0.9, 0.1]]).double()
    for t in TIMES:
        c = schedule("vp_linear")(t)
        beta, score = 0.1 + 19.9 * t, (c.a * denoised - x) / c.s**2
        torch.testing.assert_close(
            velocity(x, denoised, c), -beta / 2 * (x + score), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("name", SCHEDULES)
def test_velocity_is_finite_in_float32_from_a_hundred_thousandth_to_one(name: str) -> None:
    t = torch.logspace(-5, 0, 201)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 201, 4, generator=generator)
    c = schedule(name)(t)
    v = velocity(c.broadcast_to(x0).a * x0 + c.broadcast_to(eps).s * eps, x0, c)
    assert v.dtype == torch.float32
    expected = (
        Coeffs(*(part.float() for part in schedule(name)(t.double()))).broadcast_to(x0).da * x0
        + c.broadcast_to(eps).ds * eps
    )
    size = 1 + (c.ds / c.s).abs()[:, None]  # x is rounded, and its rounding magnified by ds/s
    assert ((v - expected).abs() < 2e-6 * (size + c.ds.abs()[:, None])).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_mixing_denoisers_is_mixing_velocities(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, denoised = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 2), (3, 5, 2))
    )
    weights = torch.tensor([0.7, 0.5, -0.2], dtype=torch.float64)[
        :, None, None
    ]  # they need only sum to one
    c = schedule(name)(torch.linspace(0.1, 0.9, 5, dtype=torch.float64))
    mixed = sum(weights[k] * velocity(x, denoised[k], c) for k in range(3))
    torch.testing.assert_close(
        velocity(x, (weights * denoised).sum(dim=0), c), mixed, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "vp_linear",
            {"beta": 3},
            "beta must be a parameter of vp_linear (beta_min, beta_max), got 3",
        ),
        (
            "rectified_flow",
            {"shift": 0.1},
            "shift must be a parameter of rectified_flow (it has none), got 0.1",
        ),
        (
            "two_phase",
            {"T": 100},
            "T must be a parameter of two_phase (steps, c0, c1), got 100",
        ),
        ("vp_constant", {"beta": 0.0}, "beta must be above 0, got 0.0"),
        ("vp_polynomial", {"rho": 0.0}, "rho must be above 0, got 0.0"),
        ("vp_exponential", {"c": 0.0}, "c must be above 0, got 0.0"),
        ("ve_exponential", {"b": -1.0}, "b must be above 0, got -1.0"),
        ("ve_polynomial", {"c": 0}, "c must be above 0, got 0"),
        ("edm", {"sigma_max": -80.0}, "sigma_max must be above 0, got -80.0"),
        ("two_phase", {"steps": 1}, "steps must be a whole number in [2, 1000000], got 1"),
        ("two_phase", {"c0": 0.0}, "c0 must be above 0, got 0.0"),
        (
            "two_phase",
            {"steps": 100, "c1": 22},
            "c1 must be in (0, T / log T = 21.71), got 22",
        ),
        ("two_phase", {"c1": 0.0}, "c1 must be in (0, T / log T = 144.8), got 0.0"),
        ("vp_linear", {"beta_min": 0.0}, "beta_min must be above 0, got 0.0"),
        (
            "vp_linear",
            {"beta_max": 0.05},
            "beta_max must be at least beta_min, got 0.05",
        ),
        ("vp_linear", {"beta_max": "20"}, "beta_max must be a finite number, got '20'"),
        ("vp_linear", {"beta_max": math.inf}, "beta_max must be a finite number, got inf"),
        ("vp_cosine", {"shift": math.nan}, "shift must be a finite number, got nan"),
        ("vp_cosine", {"shift": True}, "shift must be a finite number, got True"),
        ("vp_cosine", {"shift": -0.1}, "shift must be above 0, got -0.1"),
        ("ddpm", {"beta_end": 1e-5}, "beta_end must be in [beta_start = 0.0001, 1), got 1e-05"),
        ("ddpm", {"power": 0}, "power must be above 0, got 0"),
        ("ddpm", {"steps": 1}, "steps must be a whole number in [2, 1000000], got 1"),
        ("ddpm_cosine", {"zero_terminal_snr": 2}, "zero_terminal_snr must be 0 or 1, got 2"),
    ],
)
def test_parameters_that_make_no_sense_are_refused_by_name(
    name: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        schedule(name, **parameters)


def test_an_unknown_schedule_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match=rf"^name must be one of {' '.join(SCHEDULES)}, got 'vp_linera'$"
    ):
        schedule("vp_linera")
