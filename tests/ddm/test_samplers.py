"""Samplers against the oracle, the papers' formulas written out, and the drivers that run them."""

import asyncio
import functools
import itertools
import math
import re
from collections.abc import Callable
from decimal import Decimal, localcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch import Tensor

import ddm.samplers
from ddm.errors import ConfigError
from ddm.grids import GRIDS, time_grid
from ddm.measures import sliced_w2
from ddm.oracle import GaussianMixture
from ddm.rng import RngStream, normal
from ddm.samplers import (
    SAMPLERS,
    Noise,
    Sampler,
    Trajectory,
    drive,
    drive_async,
    plan_steps,
    sample,
    sampler,
    start,
)
from ddm.schedules import SCHEDULES, Schedule, schedule, velocity

T_END = 0.02
STOCHASTIC = ("euler_maruyama", "ddpm", "accelerated_sde")
DETERMINISTIC = tuple(name for name in SAMPLERS if name not in STOCHASTIC)
NEEDS_SIGNAL = ("euler_maruyama", "ddpm", "accelerated_ode", "accelerated_sde")
NEEDS_VARIANCE_ONE = ("accelerated_ode", "accelerated_sde")
ENDS_WITHOUT_SIGNAL = ("vp_cosine", "rectified_flow")
EXPLODING = ("ve_exponential", "ve_polynomial", "edm")
DEFINED = [
    (name, process)
    for name in SAMPLERS
    for process in SCHEDULES
    if not (name in NEEDS_SIGNAL and process in ENDS_WITHOUT_SIGNAL)
    if not (name in NEEDS_VARIANCE_ONE and process in EXPLODING)
]


def mixture(name: str = "vp_linear") -> GaussianMixture:
    return GaussianMixture(
        weights=torch.tensor([0.5, 0.2, 0.3]),
        means=torch.tensor([[-1.0, 0.2], [0.8, 0.9], [0.6, -0.7]]),
        stds=torch.tensor([[0.2, 0.3], [0.15, 0.2], [0.3, 0.1]]),
        schedule=schedule(name),
    )


def start_noise(n: int, process: Schedule | None = None) -> Tensor:
    s = schedule("rectified_flow") if process is None else process
    return (
        s(torch.ones((), dtype=torch.float64)).s
        * normal(0, RngStream.START, torch.arange(n), 0, (2,)).double()
    )


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


# One step or a few, written out in scores from the papers


def answer(x: np.ndarray, t: float) -> np.ndarray:
    """A denoiser that bends in x and in t."""
    return np.tanh(1.3 * x + 0.2) * (1 - 0.4 * t) + 0.1 * t


def written_noise(n: int) -> np.ndarray:
    return np.array([[0.3, -1.1]]) * (-1) ** n + 0.2 * n


def walked(name: str, process: Schedule, times: list[float], order: int = 3) -> np.ndarray:
    x = torch.tensor([[0.9, -0.4]], dtype=torch.float64)
    at = torch.tensor(times, dtype=torch.float64)
    trajectory = sampler(name, order).trajectory(
        x, process, at, lambda n: torch.from_numpy(written_noise(n))
    )
    return drive(trajectory, lambda x, t: torch.from_numpy(answer(x.numpy(), float(t))))[0].numpy()


X = np.array([[0.9, -0.4]])


def signal(t: float) -> float:
    """a(t) of vp_linear."""
    return math.exp(-(0.1 * t + 19.9 * t**2 / 2) / 2)


def score(x: np.ndarray, t: float) -> np.ndarray:
    """Of vp_linear, whose variance is one."""
    return (signal(t) * answer(x, t) - x) / (1 - signal(t) ** 2)


def beta(t: float) -> float:
    return 0.1 + 19.9 * t


def assert_same(end: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(end, expected, rtol=1e-10, atol=1e-12)


def test_an_euler_step_is_the_one_computed_by_hand() -> None:
    # rectified flow at t = 1: v = (ds/s) x + (da - a ds/s) D = x - D = 1.5; x' = 2 - 1.5 (1 - 0.4)
    end = sample(
        lambda x, t: torch.full_like(x, 0.5),
        torch.tensor([[2.0]]),
        schedule("rectified_flow"),
        "euler",
        1,
        t_min=0.4,
    )
    assert float(end) == pytest.approx(1.1)
    half = X + (0.5 - 0.8) * -beta(0.8) / 2 * (X + score(X, 0.8))
    expected = half + (0.3 - 0.5) * -beta(0.5) / 2 * (half + score(half, 0.5))
    assert_same(walked("euler", schedule("vp_linear"), [0.8, 0.5, 0.3]), expected)


def test_a_ddim_step_is_the_one_computed_by_hand() -> None:
    # rectified flow at t = 1 has eps = x = 2; x' = 0.6 D + 0.4 eps
    end = sample(
        lambda x, t: torch.full_like(x, 0.5),
        torch.tensor([[2.0]]),
        schedule("rectified_flow"),
        "ddim",
        1,
        t_min=0.4,
    )
    assert float(end) == pytest.approx(1.1)
    # arXiv 2010.02502, eq. 12: a' (x - s eps)/a + s' eps, eps = -s score
    a, a_next = signal(0.8), signal(0.5)
    s, s_next = math.sqrt(1 - a**2), math.sqrt(1 - a_next**2)
    eps = -s * score(X, 0.8)
    assert_same(
        walked("ddim", schedule("vp_linear"), [0.8, 0.5]), a_next * (X - s * eps) / a + s_next * eps
    )


def test_heun_is_algorithm_1_of_edm() -> None:
    x, sigmas = X, [64.0, 20.0, 3.0, 0.0]
    for sigma, sigma_next in pairwise(sigmas):
        d = (x - answer(x, sigma / 80)) / sigma
        x_next = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            d_next = (x_next - answer(x_next, sigma_next / 80)) / sigma_next
            x_next = x + (sigma_next - sigma) * (d / 2 + d_next / 2)
        x = x_next
    assert_same(walked("heun", schedule("edm"), [sigma / 80 for sigma in sigmas]), x)


def test_heun_is_the_mean_of_both_ends_where_a_changes_as_well() -> None:
    v = -beta(0.8) / 2 * (X + score(X, 0.8))
    guess = X - 0.3 * v
    expected = X - 0.15 * (v - beta(0.5) / 2 * (guess + score(guess, 0.5)))
    assert_same(walked("heun", schedule("vp_linear"), [0.8, 0.5]), expected)


def half_log_snr(t: float) -> float:
    return math.log(signal(t) / math.sqrt(1 - signal(t) ** 2))


@pytest.mark.parametrize("rate", [10.0, 30.0])  # a(1) = 7e-3, and 3e-7
def test_dpmpp_2m_is_algorithm_2_of_its_paper(rate: float) -> None:
    def a(t: float) -> float:
        return math.exp(-rate * t / 2)

    def s(t: float) -> float:
        return math.sqrt(1 - a(t) ** 2)

    times, x, last, h_last = [1.0, 0.7, 0.4, 0.3], X, None, 1.0
    for t, t_next in pairwise(times):
        denoised, h = answer(x, t), math.log(a(t_next) / s(t_next)) - math.log(a(t) / s(t))
        r = h_last / h
        D = denoised if last is None else (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * last
        x, last, h_last = s(t_next) / s(t) * x - a(t_next) * (math.exp(-h) - 1) * D, denoised, h
    assert_same(walked("dpmpp_2m", schedule("vp_constant", beta=rate), times), x)


def line_integral(
    places: list[float], values: list[np.ndarray], here: float, there: float
) -> np.ndarray:
    """`int p(lambda) e^lambda d lambda` from here to there, p the polynomial through the values, by
    Lagrange and scipy.
    """
    total = np.zeros_like(values[0])
    for i, value in enumerate(values):
        others = places[:i] + places[i + 1 :]

        def basis(y: float, own: float = places[i], others: list[float] = others) -> float:
            return math.exp(y) * math.prod((y - other) / (own - other) for other in others)

        total = total + quad(basis, here, there, epsabs=0, epsrel=1e-11)[0] * value
    return total


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_predicts_and_corrects_with_polynomials_in_log_snr(order: int) -> None:
    times = [0.9, 0.8, 0.6, 0.45, 0.35, 0.2]
    places, values = [half_log_snr(times[0])], [answer(X, times[0])]
    x, guess = X, X  # corrected at the last time; predicted at this one
    for n, (t, t_next) in enumerate(pairwise(times)):
        s, s_next = math.sqrt(1 - signal(t) ** 2), math.sqrt(1 - signal(t_next) ** 2)
        here, there = half_log_snr(t), half_log_snr(t_next)
        used = slice(max(0, n + 1 - order), n + 1)
        guess = s_next * (x / s + line_integral(places[used], values[used], here, there))
        places, values = [*places, there], [*values, answer(guess, t_next)]
        used = slice(max(0, n + 1 - order), n + 2)
        x = s_next * (x / s + line_integral(places[used], values[used], here, there))
    # The last step has no answer to correct it:
    assert_same(walked("unipc", schedule("vp_linear"), times, order), guess)


@pytest.mark.parametrize("process", ["vp_linear", "rectified_flow", "edm"])
@pytest.mark.parametrize(("order", "degree"), [(2, 1), (3, 1), (3, 2)])
def test_unipc_is_exact_for_polynomials_in_log_snr(order: int, degree: int, process: str) -> None:
    def place(t: float) -> float:
        a, s, _, _ = schedule(process)(torch.tensor(t, dtype=torch.float64))
        return float((a / s).log())

    def denoised(y: float) -> float:
        return 0.3 + 0.2 * y + (0.15 * y**2 if degree == 2 else 0)

    def line(
        y: float,
    ) -> float:  # through its values at both ends of the first step: all that two answers can tell
        return denoised(first) + (denoised(second) - denoised(first)) * (y - first) / (
            second - first
        )

    times = torch.tensor([0.9, 0.8, 0.6, 0.45, 0.35, 0.2, 0.05], dtype=torch.float64)
    first, second, last = (place(float(t)) for t in times[[0, 1, -1]])
    x = torch.tensor([[1.2, -0.7]], dtype=torch.float64)
    trajectory = sampler("unipc", order).trajectory(x, schedule(process), times, lambda n: x)
    end, _ = drive(trajectory, lambda x, t: torch.full_like(x, denoised(place(float(t)))))
    warm_up, _ = quad(lambda y: line(y) * math.exp(y), first, second, epsabs=0, epsrel=1e-11)
    rest, _ = quad(lambda y: denoised(y) * math.exp(y), second, last, epsabs=0, epsrel=1e-11)
    (_, s, _, _), (_, s_end, _, _) = (schedule(process)(t) for t in times[[0, -1]])
    torch.testing.assert_close(end, s_end * (x / s + warm_up + rest), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("h", [1e-9, 1e-3, 0.5, 1.99, 2.01, 17.0, 100.0, 1e3, 1e6])
def test_the_moments_of_an_exponential_step_are_those_of_150_digits(h: float) -> None:
    with localcontext() as context:
        context.prec = 150
        length = Decimal(h)
        integrals = [(1 - (-length).exp()) / length]  # of z^n e^(h (z - 1)) over [0, 1], by parts
        for n in range(1, 4):
            integrals.append((1 - n * integrals[-1]) / length)
        expected = [float(part / integrals[0]) for part in integrals]
    found = ddm.samplers._exponential_moments(torch.tensor(h, dtype=torch.float64), 4)
    assert found.tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_is_exact_for_a_line_in_log_snr_over_steps_of_any_length(order: int) -> None:
    lengths = [0.5, 1.0, 30.0, 150.0, 400.0]
    places = [0.0, *itertools.accumulate(lengths)]  # of lambda = -log sigma, from sigma = 1
    times = torch.tensor([math.exp(-y) / 80 for y in places], dtype=torch.float64)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, 0.3 - 0.02 * math.log(80 * float(t)))

    x = torch.tensor([[0.7]], dtype=torch.float64)
    end, _ = drive(sampler("unipc", order).trajectory(x, schedule("edm"), times, no_noise), denoise)
    # x/s moves by the integral of D e^lambda; the last step is so long that only its end counts.
    exact = 0.3 + 0.02 * (places[-1] - 1)
    assert float(end) == pytest.approx(exact, rel=1e-12)


def test_unipc_lowers_its_order_toward_the_data() -> None:
    # Three of its steps to t = 0: predicted with 1, 2 and 1 answers, corrected with 2 and 3.
    times = [0.9, 0.6, 0.35, 0.0]
    places = [half_log_snr(t) for t in times[:-1]]
    s = [math.sqrt(1 - signal(t) ** 2) for t in times]
    values, x = [answer(X, 0.9)], X
    for n in (1, 2):

        def to_next(x: np.ndarray, first: int, n: int = n) -> np.ndarray:
            used = slice(first, len(values))
            mean = line_integral(places[used], values[used], places[n - 1], places[n])
            return s[n] * (x / s[n - 1] + mean)

        values.append(answer(to_next(x, max(0, n - 2)), times[n]))
        x = to_next(x, 0)
    assert_same(walked("unipc", schedule("vp_linear"), times), values[-1])


# The coefficients of Adams and Bashforth's methods as textbooks print them, the newest value first.
TEXTBOOK = {1: [1], 2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9]}


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_is_adams_and_bashforths_method_for_eps_over_sigma(order: int) -> None:
    times = [0.95, 0.8, 0.6, 0.45, 0.35, 0.2, 0.0]
    z, eps = X / signal(times[0]), []
    for t, t_next in pairwise(times):
        a, a_next = signal(t), signal(t_next)
        s, s_next = math.sqrt(1 - a**2), math.sqrt(1 - a_next**2)
        eps = [(a * z - a * answer(a * z, t)) / s, *eps]
        weights = TEXTBOOK[min(len(eps), order, 2 if t_next == 0 else order)]
        mean = sum(w * e for w, e in zip(weights, eps, strict=False)) / sum(weights)
        z = z + (s_next / a_next - s / a) * mean
    assert_same(walked("ipndm", schedule("vp_linear"), times, order), z)


def test_ipndm_is_the_one_of_k_diffusions_and_diffusers_numbers() -> None:
    # diffusers 0.42.1: IPNDMScheduler's weights (55, -59, 37, -9)/24 and so on down, by hand on
    # x' = x + (sigma' - sigma) d with d = (x - D)/sigma, sigma = 4, 3, 2, 1 and D = sigma^2/4:
    # d = (8 - 4)/4 = 1, x = 7; d = (7 - 2.25)/3 = 19/12, mean (3 d - d0)/2 = 15/8, x = 41/8;
    # d = (41/8 - 1)/2 = 33/16, mean (23 d - 16 d1 + 5 d0)/12 = 1301/576, x = 1651/576.
    x = torch.tensor([[8.0]], dtype=torch.float64)
    times = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64) / 80
    trajectory = sampler("ipndm", 4).trajectory(x, schedule("edm"), times, no_noise)
    end, _ = drive(trajectory, lambda x, t: torch.full_like(x, float(80 * t) ** 2 / 4))
    assert float(end) == pytest.approx(1651 / 576, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_is_exact_where_eps_is_a_polynomial_in_even_sigma(order: int) -> None:
    # Past its warm-up, whose values at even steps are given: D is chosen so that eps(sigma) holds.
    def integral(y: float) -> float:  # of eps = 1 + sigma + ... + sigma^(order - 1)
        return sum(y**n / n for n in range(1, order + 1))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        y = 3 * float(t)
        return x - y * sum(y**n for n in range(order))

    times = torch.linspace(1, 0.2, 9, dtype=torch.float64)
    process, x = schedule("edm", sigma_max=3.0), torch.zeros(1, 1, dtype=torch.float64)
    ends = [
        float(drive(sampler("ipndm", order).trajectory(x, process, part, no_noise), denoise)[0])
        for part in (times, times[:order])
    ]
    span = integral(3 * float(times[-1])) - integral(3 * float(times[order - 1]))
    assert ends[0] - ends[1] == pytest.approx(span, rel=1e-12)


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


def test_an_euler_maruyama_step_is_the_reverse_sdes() -> None:
    x = X
    for n, (t, t_next) in enumerate([(0.8, 0.5), (0.5, 0.3)]):
        h = t - t_next
        x = (
            x
            + h * (beta(t) / 2 * x + beta(t) * score(x, t))
            + math.sqrt(beta(t) * h) * written_noise(n)
        )
    assert_same(walked("euler_maruyama", schedule("vp_linear"), [0.8, 0.5, 0.3]), x)


def test_an_euler_maruyama_step_of_an_exploding_process() -> None:
    sigma, h = 40.0, 0.1  # sigma = 80 t, g^2 = 2 sigma 80
    expected = (
        X
        + h * 2 * sigma * 80 * (answer(X, 0.5) - X) / sigma**2
        + math.sqrt(2 * sigma * 80 * h) * written_noise(0)
    )
    assert_same(walked("euler_maruyama", schedule("edm"), [0.5, 0.4]), expected)


def test_a_ddpm_step_has_the_steps_own_beta() -> None:
    x = X
    for n, (t, t_next) in enumerate([(0.8, 0.5), (0.5, 0.3)]):
        b = 1 - (signal(t) / signal(t_next)) ** 2
        x = (x + b * score(x, t)) / math.sqrt(1 - b) + math.sqrt(b) * written_noise(n)
    assert_same(walked("ddpm", schedule("vp_linear"), [0.8, 0.5, 0.3]), x)


def ddpm_variances(data: float, times: list[float]) -> list[float]:
    """The variance of x after each step, from its exact one at the first time, for data N(0,
    `data`) on vp_linear.
    """
    x, seen = torch.zeros(1, len(times), dtype=torch.float64), []
    x[0, 0] = math.sqrt(signal(times[0]) ** 2 * data + 1 - signal(times[0]) ** 2)

    def denoise(x: Tensor, t: Tensor) -> Tensor:  # linear in x, which holds a coefficient per noise
        seen.append(float(x.square().sum()))
        a = signal(float(t))
        return a * data / (a**2 * data + 1 - a**2) * x

    noises = torch.eye(len(times), dtype=torch.float64)[1:, None]
    at = torch.tensor(times, dtype=torch.float64)
    end, _ = drive(
        sampler("ddpm").trajectory(x, schedule("vp_linear"), at, lambda n: noises[n]), denoise
    )
    return [*seen[1:], float(end.square().sum())]


@pytest.mark.parametrize("steps", [1, 5, 25, 100])
def test_ddpm_keeps_standard_normal_data_standard_normal(steps: int) -> None:
    times = torch.linspace(1, 0.02, steps + 1, dtype=torch.float64).tolist()
    assert ddpm_variances(1.0, times) == pytest.approx([1.0] * steps, rel=1e-12)


def test_ddpm_follows_its_variance_recursion() -> None:
    few, expected = [1.0, 0.7, 0.4, 0.1, 0.02], []
    v = signal(1) ** 2 * 0.25 + 1 - signal(1) ** 2
    for t, t_next in pairwise(few):
        b = 1 - (signal(t) / signal(t_next)) ** 2
        # score = -x / (a^2 / 4 + 1 - a^2)
        v = (1 - b / (1 - 0.75 * signal(t) ** 2)) ** 2 / (1 - b) * v + b
        expected.append(v)
    assert ddpm_variances(0.25, few) == pytest.approx(expected, rel=1e-12)
    many = torch.linspace(1, 0.02, 4001, dtype=torch.float64).tolist()
    truth = 1 - 0.75 * signal(0.02) ** 2
    assert ddpm_variances(0.25, many)[-1] == pytest.approx(truth, rel=2e-3)


def test_ddpm_on_the_own_grid_of_two_phase_takes_the_schedules_betas() -> None:
    process = schedule("two_phase", steps=4, c0=1.0, c1=1.0)
    eta, x = math.log(4) / 4, X
    betas = [1 / 4] + [eta * min((1 + eta) ** n / 4, 1) for n in (2, 3, 4)]
    for i, n in enumerate((4, 3, 2)):
        square = math.prod(1 - b for b in betas[:n])
        b, grad = betas[n - 1], (math.sqrt(square) * answer(x, n / 4) - x) / (1 - square)
        x = (x + b * grad) / math.sqrt(1 - b) + math.sqrt(b) * written_noise(i)
    times = time_grid("own", 4, process).tolist()
    assert_same(walked("ddpm", process, times[:-1]), x)
    assert_same(walked("ddpm", process, times), answer(x, 1 / 4))


def test_a_ddpm_step_of_an_exploding_process() -> None:
    b = 40.0**2 - 32.0**2
    expected = X + b * (answer(X, 0.5) - X) / 40.0**2 + math.sqrt(b) * written_noise(0)
    assert_same(walked("ddpm", schedule("edm"), [0.5, 0.4]), expected)


def test_accelerated_ode_is_equation_12_after_a_heun_step() -> None:
    times = [0.8, 0.5, 0.35, 0.3]
    y = walked("heun", schedule("vp_linear"), times[:2])
    for before, t, after in zip(times, times[1:], times[2:], strict=False):
        now, next_noisier = (
            (signal(t) / signal(after)) ** 2,
            (signal(before) / signal(t)) ** 2,
        )  # alpha_n, alpha_(n+1)
        y_minus = math.sqrt(next_noisier) * (y - (1 - next_noisier) / 2 * score(y, t))
        change = score(y, t) - math.sqrt(next_noisier) * score(y_minus, before)
        weight = (1 - now) ** 2 / (4 * (1 - next_noisier))
        y = (y + (1 - now) / 2 * score(y, t) + weight * change) / math.sqrt(now)
    assert_same(walked("accelerated_ode", schedule("vp_linear"), times), y)
    assert_same(walked("accelerated_ode", schedule("vp_linear"), [*times, 0.0]), answer(y, 0.3))


def test_the_accelerated_sde_sampler_is_equation_15() -> None:
    times, y = [0.8, 0.5, 0.35], X
    for n, (t, after) in enumerate(pairwise(times)):
        now = (signal(t) / signal(after)) ** 2
        y_plus = y + math.sqrt((1 - now) / 2) * written_noise(2 * n)
        half = math.sqrt((1 - now) / 2) * written_noise(2 * n + 1)
        y = (y_plus + (1 - now) * score(y_plus, t) + half) / math.sqrt(now)
    assert_same(walked("accelerated_sde", schedule("vp_linear"), times), y)
    assert_same(walked("accelerated_sde", schedule("vp_linear"), [*times, 0.0]), answer(y, 0.35))


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


def no_noise(n: int) -> Tensor:
    raise AssertionError("a deterministic sampler draws no noise")


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


@functools.cache
def truth(path: Schedule, t_min: float) -> tuple[Tensor, float]:
    """Exact draws, and how far other ones are from them."""
    exact, other = (
        GaussianMixture(**{**vars(mixture()), "schedule": path}).marginal(1000, t_min, seed=n)
        for n in (1, 2)
    )
    return exact, sliced_w2(other, exact, projections=64)


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
    def only_noise(x: Tensor, schedule: Schedule, times: Tensor, noise: Noise) -> Trajectory:
        yield x, times[0]
        return noise(4)

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
