"""A step of each sampler against its paper's formula, written out."""

import itertools
import math
from decimal import Decimal, localcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

import ddm.samplers
from ddm.grids import time_grid
from ddm.samplers import (
    drive,
    sample,
    sampler,
)
from ddm.schedules import Schedule, schedule
from tests.ddm.sampler_problems import no_noise

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
