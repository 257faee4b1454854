"""Every constant of the theorem against finite sets of points: never exceeded, and reached where it
can be; then the whole.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.lab.theory import Bound, bound, constants, denoiser_rate, stability, step
from ddm.errors import ConfigError
from ddm.schedules import Coeffs, Schedule, schedule, velocity

VP, COSINE, STRAIGHT, EXPLODING = (
    schedule("vp_linear"),
    schedule("vp_cosine"),
    schedule("rectified_flow"),
    schedule("ve_exponential"),
)
EVERY = [VP, COSINE, STRAIGHT, EXPLODING]
CASES = 24


class Bent:
    """A path whose signal bends (`a'' = -2`) and whose noise does not."""

    def __call__(self, t: Tensor) -> Coeffs:
        return Coeffs(1 - t**2 / 2, t, -t, torch.ones_like(t))


@dataclass
class Points:
    """Weighted points `[n, d]` in K clusters, and all that is known of x_t over them, by softmax in
    float64.
    """

    points: Tensor
    labels: Tensor
    log_weights: Tensor
    path: Schedule

    def logits(self, x: Tensor, t: Tensor) -> Tensor:
        a, s, _, _ = self.path(t)
        return self.log_weights - (x[:, None] - a * self.points).square().sum(2) / 2 / s**2

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        return self.logits(x, t).softmax(1) @ self.points

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return velocity(x, self.denoise(x, t), self.path(t))

    def clusters(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha `[B, K]` and D_k `[B, K, d]`."""
        logits, belongs = (
            self.logits(x, t),
            self.labels == torch.arange(int(self.labels.max()) + 1)[:, None],
        )
        alone = logits[:, None].masked_fill(~belongs, -math.inf).softmax(2)
        return logits.softmax(1) @ belongs.double().T, alone @ self.points

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        return self.points[
            torch.multinomial(self.log_weights.softmax(0), n, True, generator=generator)
        ]

    def at(self, t: Tensor, n: int, generator: torch.Generator) -> Tensor:
        a, s, _, _ = self.path(t)
        x0 = self.clean(n, generator)
        return a * x0 + s * torch.randn(x0.shape, generator=generator, dtype=torch.float64)

    def flow(self, x: Tensor, t: Tensor, t_end: Tensor, steps: int) -> Tensor:
        """The exact flow, by the fourth-order Runge-Kutta method."""
        h = (t_end - t) / steps
        for n in range(steps):
            now = t + n * h
            k1 = self.velocity(x, now)
            k2 = self.velocity(x + h / 2 * k1, now + h / 2)
            k3 = self.velocity(x + h / 2 * k2, now + h / 2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + self.velocity(x + h * k3, now + h))
        return x


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def inside(case: int, K: int = 3) -> tuple[Points, float, Tensor, Tensor]:
    """A random data set in a ball that it touches, its radius, a time, and places x far and near:
    `[16, d]`.
    """
    g = seeded(case)
    n, d = int(torch.randint(K, 8, (), generator=g)), int(torch.randint(1, 4, (), generator=g))
    points = torch.randn(n, d, generator=g, dtype=torch.float64)
    R = 10 ** float(torch.rand((), generator=g) * 2 - 1.3)
    points = R * points / points.norm(dim=1).max()
    weights = 3 * torch.randn(n, generator=g, dtype=torch.float64)
    data = Points(points, torch.arange(n) % K, weights, EVERY[case % 4])
    t = 0.02 + 0.97 * torch.rand((), generator=g, dtype=torch.float64)
    between = (
        torch.rand(16, n, generator=g, dtype=torch.float64).softmax(1) @ points
    )  # where a posterior is undecided
    a, s, _, _ = data.path(t)
    return (
        data,
        R,
        t,
        a * between + s * torch.randn(16, 1, generator=g) * torch.randn(16, d, generator=g),
    )


def pair(R: float, path: Schedule, d: int = 1, skew: float = 0.0) -> Points:
    """Two points at +-R on the first axis, a cluster each."""
    points = torch.zeros(2, d, dtype=torch.float64)
    points[0, 0], points[1, 0] = R, -R
    return Points(
        points, torch.tensor([0, 1]), torch.tensor([0.0, skew], dtype=torch.float64), path
    )


def gradients(of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Jacobians `[B, d, d]` by autograd."""
    return torch.func.vmap(torch.func.jacrev(lambda row: of(row[None])[0]))(x)


def rms(x: Tensor) -> float:
    return float(x.square().sum(1).mean().sqrt())


def along_the_flow(
    data: Points, of: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor
) -> Tensor:
    """The total derivative in t, by central differences."""
    v, tiny = data.velocity(x, t), 1e-6
    return (of(x + tiny * v, t + tiny) - of(x - tiny * v, t - tiny)) / 2 / tiny


def lam_rate(path: Schedule, t: Tensor) -> Tensor:
    """dlam/dt by central differences."""
    (a, s, _, _), (a_, s_, _, _) = path(t + 1e-6), path(t - 1e-6)
    return (a / s - a_ / s_) / 2e-6


# --- the constants, one by one
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(CASES))
def test_lipschitz_constant_bounds_every_velocity_gradient(
    case: int,
) -> None:
    data, R, t, x = inside(case)
    of_all = constants(data.path, R, x.shape[1], 3, t)

    def expert(y: Tensor) -> Tensor:
        return velocity(y, data.clusters(y, t)[1][:, 0], data.path(t))

    for v in (lambda y: data.velocity(y, t), expert):
        eigenvalues = torch.linalg.eigvalsh(gradients(v, x))
        assert eigenvalues.abs().max() <= of_all.lipschitz * (1 + 1e-9)
        assert -eigenvalues.min() <= of_all.expansion + 1e-9 * of_all.lipschitz


@pytest.mark.parametrize("path", EVERY)
@pytest.mark.parametrize("t", [0.05, 0.3, 0.9])
def test_two_points_attain_expansion_and_lipschitz_constant(path: Schedule, t: float) -> None:
    R = 0.7
    data, c = pair(R, path), constants(path, R, 1, 2, number(t))
    far_away = (
        50 * path(number(t)).s ** 2 / path(number(t)).a / R
    )  # where one of the two is e^100 times as likely
    x = torch.stack([number(0), far_away])[:, None]
    midway, far = gradients(lambda y: data.velocity(y, number(t)), x).flatten()
    assert float(-midway) == pytest.approx(float(c.expansion), rel=1e-9)
    assert max(abs(float(midway)), abs(float(far))) == pytest.approx(float(c.lipschitz), rel=1e-9)


def test_midway_gradient_near_the_data_exceeds_half_the_lipschitz_constant() -> None:
    t = number(0.05)
    gradient = gradients(
        lambda y: pair(1, VP).velocity(y, t), torch.zeros(1, 1, dtype=torch.float64)
    )
    assert float(gradient.abs()) > 0.99 * float(constants(VP, 1, 1, 2, t).lipschitz)


@pytest.mark.parametrize("case", range(CASES))
def test_velocity_never_outgrows_its_line(case: int) -> None:
    data, R, t, x = inside(case)
    c = constants(data.path, R, x.shape[1], 3, t)
    assert (
        data.velocity(x, t).norm(dim=1) <= (c.offset + c.slope * x.norm(dim=1)) * (1 + 1e-12)
    ).all()


@pytest.mark.parametrize("path", EVERY)
def test_opposite_point_attains_the_growth_bound(path: Schedule) -> None:
    R, t, x = 0.7, number(0.4), torch.tensor([[2.0]], dtype=torch.float64)
    single = Points(torch.tensor([[-R]], dtype=torch.float64), torch.zeros(1), torch.zeros(1), path)
    c = constants(path, R, 1, 1, t)
    assert float(single.velocity(x, t).abs()) == pytest.approx(
        float(c.offset + 2 * c.slope), rel=1e-12
    )


@pytest.mark.parametrize("case", range(CASES))
def test_denoiser_rate_bounds_every_denoiser(case: int) -> None:
    data, R, t, x = inside(case)
    a, s, _, _ = data.path(t)
    measured = along_the_flow(data, data.denoise, x, t).norm(dim=1) / lam_rate(data.path, t).abs()
    noise = (x - a * data.denoise(x, t)).norm(dim=1) / s
    assert (measured <= denoiser_rate(a / s, R, noise) * (1 + 1e-5) + 1e-7).all()


def test_first_term_of_the_denoiser_rate_is_attained() -> None:
    R, t = 0.3, number(0.95)  # lam is small
    a, s, _, _ = VP(t)
    x = torch.tensor([[40.0]], dtype=torch.float64)
    data = pair(R, VP, skew=float(2 * a * R * x / s**2))  # at x both points are as likely
    measured = along_the_flow(data, data.denoise, x, t).abs() / lam_rate(VP, t).abs()
    assert float(data.denoise(x, t)) == pytest.approx(0, abs=1e-9)
    assert 0.95 < float(measured / denoiser_rate(a / s, R, float(x / s))) <= 1


def test_second_term_of_the_denoiser_rate_is_two_thirds_attained() -> None:
    R, t = 0.7, number(0.1)
    a, s, _, _ = VP(t)
    centre = R / math.sqrt(3)  # where p (1 - p) (1 - 2 p) is largest
    x = (a * centre).reshape(1, 1)
    skew = float(2 * a * R * x / s**2) - math.log((1 + 1 / math.sqrt(3)) / (1 - 1 / math.sqrt(3)))
    data = pair(R, VP, skew=skew)
    measured = along_the_flow(data, data.denoise, x, t).abs() / lam_rate(VP, t).abs()
    assert float(data.denoise(x, t)) == pytest.approx(centre, rel=1e-9)
    assert 0.64 < float(measured / denoiser_rate(a / s, R, 0.0)) <= 1


@pytest.mark.parametrize("case", range(CASES))
def test_time_derivative_bounds_the_velocity_along_the_flow(case: int) -> None:
    data, R, t, _ = inside(case)
    d = data.points.shape[1]
    x = data.at(t, 4000, seeded(case))
    measured = rms(along_the_flow(data, data.velocity, x, t))
    assert measured <= float(constants(data.path, R, d, 3, t).time_derivative) * 1.05  # of sampling


@pytest.mark.parametrize(
    ("path", "R", "spread"), [(Bent(), 1e-4, 0.0), (VP, 1e-4, 1.0), (COSINE, 1e-4, 1.0)]
)
def test_single_point_attains_both_curvatures_of_the_time_derivative(
    path: Any, R: float, spread: float
) -> None:
    t = number(0.6)
    single = Points(
        torch.tensor([[R, 0.0]], dtype=torch.float64), torch.zeros(1), torch.zeros(1), path
    )
    x = single.at(t, 100_000, seeded(0))
    measured = rms(along_the_flow(single, single.velocity, x, t))
    assert measured == pytest.approx(float(constants(path, R, 2, 1, t).time_derivative), rel=0.01)
    assert (measured > 100 * R) == bool(spread)  # from the noise's curvature or from the signal's


@pytest.mark.parametrize("case", range(CASES))
def test_martingale_constant_bounds_the_noise_of_a_draw(
    case: int,
) -> None:
    data, R, t, x = inside(case)
    c = data.path(t)
    alpha, denoised = data.clusters(x, t)
    v_k = torch.stack([velocity(x, denoised[:, k], c) for k in range(3)], 1)
    variance = (alpha * (v_k - data.velocity(x, t)[:, None]).square().sum(2)).sum(1)
    assert variance.max().sqrt() <= constants(data.path, R, x.shape[1], 3, t).martingale


@pytest.mark.parametrize("path", EVERY)
def test_two_equal_clusters_attain_the_martingale_constant(path: Schedule) -> None:
    t, x = number(0.5), torch.zeros(1, 1, dtype=torch.float64)
    alpha, denoised = pair(0.7, path).clusters(x, t)
    v_k = torch.stack([velocity(x, denoised[:, k], path(t)) for k in range(2)], 1)
    variance = (alpha[:, :, None] * v_k.square()).sum()
    assert float(variance.sqrt()) == pytest.approx(
        float(constants(path, 0.7, 1, 2, t).martingale), rel=1e-9
    )
    assert float(constants(path, 0.7, 1, 1, t).martingale) == 0


@pytest.mark.parametrize("case", range(CASES))
def test_router_and_expert_constants_bound_the_velocity_error(
    case: int,
) -> None:
    data, R, t, x = inside(case)
    c, g = constants(data.path, R, x.shape[1], 3, t), seeded(case)
    alpha, denoised = data.clusters(x, t)
    routed = (alpha.clamp_min(1e-12).log() + torch.randn(alpha.shape, generator=g)).softmax(1)
    wrong = denoised + torch.randn(denoised.shape, generator=g)
    eps_router = (routed - alpha).norm(dim=1)
    eps_expert = (routed * (wrong - denoised).square().sum(2)).sum(1).sqrt()
    v = velocity(x, (routed[:, :, None] * wrong).sum(1), data.path(t))
    error = (v - data.velocity(x, t)).norm(dim=1)
    assert (error <= (c.router * eps_router + c.expert * eps_expert) * (1 + 1e-9)).all()


def test_opposite_clusters_attain_the_router_constant() -> None:
    t, x = number(0.5), torch.zeros(1, 1, dtype=torch.float64)
    shift = torch.tensor([[0.1, -0.1]], dtype=torch.float64)
    alpha, denoised = pair(0.7, VP).clusters(x, t)
    moved = velocity(x, ((alpha + shift)[:, :, None] * denoised).sum(1), VP(t)) - pair(
        0.7, VP
    ).velocity(x, t)
    c = constants(VP, 0.7, 1, 2, t)
    assert float(moved.abs()) == pytest.approx(float(c.router * shift.norm()), rel=1e-9)
    assert float(constants(VP, 0.7, 1, 1, t).router) == 0


@pytest.mark.parametrize("path", EVERY)
def test_points_on_the_sphere_attain_the_moment(path: Schedule) -> None:
    t = number(0.4)
    measured = rms(pair(0.7, path, d=3).at(t, 200_000, seeded(0)))
    assert measured == pytest.approx(float(constants(path, 0.7, 3, 2, t).moment), rel=0.01)


# --- one step -------------------------------------------------------------------------------------
# ---------------------


@pytest.mark.parametrize("case", range(CASES))
def test_factor_bounds_the_stretch_of_a_step(case: int) -> None:
    data, R, t, x = inside(case)
    for share in (0.01, 0.5, 1.0):
        h = share * (t - 0.01)
        stretch = gradients(lambda y: y - h * data.velocity(y, t), x)  # noqa: B023
        factor = step(data.path, R, x.shape[1], t, t - h).factor
        assert torch.linalg.matrix_norm(stretch, 2).max() <= factor * (1 + 1e-9)


@pytest.mark.parametrize("case", range(CASES // 2))
def test_truncation_bounds_the_error_of_a_step(case: int) -> None:
    data, R, t, _ = inside(case)
    x = data.at(t, 1000, seeded(case))
    for share in (0.03, 0.4):
        h = share * (t - 0.01)
        measured = rms(x - h * data.velocity(x, t) - data.flow(x, t, t - h, 30))
        assert (
            measured <= float(step(data.path, R, x.shape[1], t, t - h).truncation) * 1.05
        )  # of sampling


@pytest.mark.parametrize("path", [*EVERY, Bent()])
def test_truncation_of_a_short_step_is_second_order(
    path: Schedule,
) -> None:
    t, h = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), 1e-4
    truncation = step(path, 0.7, 2, t, t - h).truncation
    torch.testing.assert_close(
        truncation, h**2 / 2 * constants(path, 0.7, 2, 2, t).time_derivative, rtol=5e-3, atol=0
    )


def test_truncation_of_a_long_step_is_a_double_integral() -> None:
    t, t_next = number(0.8), number(0.3)  # straight: Euler errs neither on a nor on s
    lam, lam_next = (1 - t) / t, (1 - t_next) / t_next
    mu = lam + (lam_next - lam) * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    integral = ((lam_next - mu) * denoiser_rate(mu, 0.7, math.sqrt(2))).mean() * (lam_next - lam)
    assert float(step(STRAIGHT, 0.7, 2, t, t_next).truncation) == pytest.approx(
        float(t_next * integral), rel=1e-8
    )


# --- the theorem ----------------------------------------------------------------------------------
# ---------------------


def routed_error(
    data: Points,
    delta: float,
    steps: int,
    eps_router: float = 0.0,
    eps_expert: float = 0.0,
    n: int = 600,
) -> float:
    """||Y_N - X_delta|| of the theorem's coupling: no less than W2, and what is proved to be within
    the bound.
    """
    g, d = seeded(steps), data.points.shape[1]
    one, end = number(1.0), number(delta)
    (a, s, _, _), noise = data.path(one), torch.randn(n, d, generator=g, dtype=torch.float64)
    exact = data.flow(a * data.clean(n, g) + s * noise, one, end, 100)
    x, times = s * noise, torch.linspace(1, delta, steps + 1, dtype=torch.float64)
    for t, t_next in pairwise(times):
        alpha, denoised = data.clusters(x, t)
        # The farthest corner of the simplex is at most sqrt(2) away.
        corner = torch.nn.functional.one_hot(alpha.argmin(1), alpha.shape[1])
        alpha = alpha + eps_router / math.sqrt(2) * (corner - alpha)
        k = torch.multinomial(alpha, 1, generator=g)[:, 0]
        chosen = denoised[torch.arange(n), k] + eps_expert / math.sqrt(d)
        x = x + (t_next - t) * velocity(x, chosen, data.path(t))
    return rms(x - exact)


def scattered(R: float, d: int, K: int, path: Schedule) -> Points:
    points = torch.randn(8, d, generator=seeded(d), dtype=torch.float64)
    points = R * points / points.norm(dim=1, keepdim=True)
    return Points(points, torch.arange(8) % K, torch.zeros(8, dtype=torch.float64), path)


@pytest.mark.parametrize("errors", [(0.0, 0.0), (0.2, 0.0), (0.0, 0.2)])
@pytest.mark.parametrize(
    ("path", "R", "d", "K", "delta", "steps"),
    [
        (VP, 1, 1, 2, 0.5, 10),
        (VP, 1, 1, 2, 0.5, 50),
        (VP, 1, 2, 4, 0.2, 200),
        (VP, 0.5, 8, 4, 0.1, 50),
        (VP, 0.2, 2, 4, 0.05, 50),
        (VP, 2, 1, 2, 0.1, 50),
        (COSINE, 0.5, 2, 2, 0.3, 50),
        (STRAIGHT, 0.5, 2, 4, 0.3, 10),
        (EXPLODING, 0.5, 2, 2, 0.5, 50),
    ],
)
def test_the_routed_sampler_is_within_the_bound(
    path: Schedule, R: float, d: int, K: int, delta: float, steps: int, errors: tuple[float, float]
) -> None:
    measured = routed_error(scattered(R, d, K, path), delta, steps, *errors)
    assert math.log10(measured) <= bound(path, R, d, K, delta, steps, *errors).sampling


@pytest.mark.parametrize("errors", [(0.0, 0.0), (0.0, 0.5)])
def test_bound_is_within_a_factor_of_four_over_a_short_horizon(
    errors: tuple[float, float],
) -> None:
    measured = math.log10(routed_error(pair(1, VP), 0.5, 50, *errors))
    theorem = bound(VP, 1, 1, 2, 0.5, 50, *errors).sampling
    assert theorem - math.log10(4) < measured <= theorem


def test_each_part_is_reached_where_the_flow_is_linear() -> None:
    # A pair much closer than its noise: D is all but 0 and Phi multiplies by 1 - h b.
    R, delta, steps, eps = 0.002, 0.3, 40, 0.3
    data, parts = pair(R, VP, d=2), bound(VP, R, 2, 2, delta, steps, 0.0, eps)
    exact = bound(VP, R, 2, 2, delta, steps)
    assert parts.truncation == exact.truncation
    truncated = routed_error(data, delta, steps, n=4000)
    assert truncated == pytest.approx(10**exact.truncation, rel=0.02)
    biased = routed_error(data, delta, steps, 0.0, eps, n=4000)
    assert math.sqrt(biased**2 - truncated**2) == pytest.approx(10**parts.approximation, rel=0.02)
    g, trajectory = seeded(0), torch.zeros(10_000, 1, dtype=torch.float64)
    times = torch.linspace(1, delta, steps + 1, dtype=torch.float64)
    for t, t_next in pairwise(times):  # by a fair coin, to R or to -R
        coin = torch.randint(2, trajectory.shape, generator=g) * 2 - 1
        trajectory = trajectory + (t_next - t) * velocity(trajectory, R * coin, VP(t))
    assert rms(trajectory) == pytest.approx(10**exact.martingale, rel=0.02)
    x0 = data.clean(50_000, g)
    a, s, _, _ = VP(number(delta))
    assert rms((a - 1) * x0 + s * torch.randn(x0.shape, generator=g)) == pytest.approx(
        10**exact.early_stop, rel=0.02
    )


def test_parts_follow_the_recursion_of_the_proof() -> None:
    R, d, K, delta, steps, eps_router, eps_expert = 0.8, 2, 3, 0.1, 4, 0.1, 0.2
    times = torch.linspace(1, delta, steps + 1, dtype=torch.float64)
    h, first = (1 - delta) / steps, float(VP(times[0]).a) * R
    initialization, truncation, martingale, approximation = first, 0.0, 0.0, 0.0
    for t, t_next in pairwise(times):
        rho, truncated, _ = map(float, step(VP, R, d, t, t_next))
        c = constants(VP, R, d, K, t)
        initialization *= rho
        truncation = rho * truncation + truncated
        approximation = rho * approximation + h * float(
            c.router * eps_router + c.expert * eps_expert
        )
        martingale = math.hypot(rho * martingale, h * float(c.martingale + c.expert * eps_expert))
    found = bound(VP, R, d, K, delta, steps, eps_router, eps_expert)
    expected = (initialization, truncation, martingale, approximation)
    assert [10**part for part in found[:4]] == pytest.approx(expected, rel=1e-9)
    assert 10**found.sampling == pytest.approx(sum(expected), rel=1e-9)


@pytest.mark.parametrize("path", [VP, COSINE, STRAIGHT])
def test_the_parts_tend_to_the_integrals_of_the_theorem(path: Schedule) -> None:
    R, d, K, delta, steps, eps_router, eps_expert = 0.6, 3, 4, 0.3, 40_000, 0.1, 0.2
    length, t = 1 - delta, torch.linspace(delta, 1, 20_001, dtype=torch.float64)
    (a, s, _, _), c = path(t), constants(path, R, d, K, t)
    S = s[0] / s * (R**2 / 2 * ((a[0] / s[0]) ** 2 - (a / s) ** 2)).exp()
    parts = bound(path, R, d, K, delta, steps, eps_router, eps_expert)
    g = c.expert
    limits = {
        "initialization": S[-1] * a[-1] * R,
        "truncation": length / 2 / steps * torch.trapezoid(S * c.time_derivative, t),
        "martingale": (length / steps * torch.trapezoid((S * g) ** 2, t)).sqrt() * (R + eps_expert),
        "approximation": torch.trapezoid(S * g * (math.sqrt(K) * R * eps_router + eps_expert), t),
        "early_stop": ((1 - a[0]) ** 2 * R**2 + s[0] ** 2 * d).sqrt(),
    }
    for name, limit in limits.items():
        assert 10 ** getattr(parts, name) == pytest.approx(float(limit), rel=5e-3), name
    assert 10**parts.sampling == pytest.approx(
        sum(map(float, limits.values())) - float(limits["early_stop"]), rel=5e-3
    )
    assert 10**parts.total == pytest.approx(sum(map(float, limits.values())), rel=5e-3)


@pytest.mark.parametrize("path", EVERY)
def test_stability_is_the_exponential_of_the_expansion(path: Schedule) -> None:
    t = torch.linspace(0.2, 1, 100_001, dtype=torch.float64)
    integral = torch.trapezoid(constants(path, 0.8, 2, 2, t).expansion, t)
    assert stability(path, 0.8, 0.2) == pytest.approx(float(integral) / math.log(10), rel=1e-6)


def test_rates_of_martingale_and_truncation() -> None:
    coarse, fine = (bound(VP, 1, 2, 4, 0.2, steps) for steps in (4000, 16_000))
    assert coarse.martingale - fine.martingale == pytest.approx(math.log10(2), abs=0.01)
    assert coarse.truncation - fine.truncation == pytest.approx(math.log10(4), abs=0.01)


@pytest.mark.parametrize("which", [0, 1])
def test_the_approximation_is_linear_in_the_errors(which: int) -> None:
    once, twice = (
        bound(VP, 1, 2, 4, 0.2, 100, *(eps * (which == i) for i in (0, 1))) for eps in (0.01, 0.02)
    )
    assert twice.approximation - once.approximation == pytest.approx(math.log10(2), rel=1e-9)
    assert once.truncation == twice.truncation and once.initialization == twice.initialization


def test_one_expert_has_no_router_part_and_no_martingale() -> None:
    alone = bound(VP, 1, 2, 1, 0.2, 100, eps_router=0.5, eps_expert=0.0)
    assert alone.martingale == alone.approximation == -math.inf
    assert bound(VP, 1, 2, 1, 0.2, 100, 0.0, 0.5).martingale == -math.inf


def test_experts_with_outward_errors_attain_the_trivial_bound() -> None:
    R, eps, delta = 0.5, 3.0, 0.1
    data = Points(torch.tensor([[R]], dtype=torch.float64), torch.zeros(1), torch.zeros(1), VP)
    x = (
        torch.ones(1, 1, dtype=torch.float64) * VP(number(1.0)).s
    )  # as far out as the noise is in root mean square
    for t, t_next in pairwise(torch.linspace(1, delta, 21, dtype=torch.float64)):
        x = x + (t_next - t) * velocity(x, data.denoise(x, t) + eps, VP(t))
    farthest = float(x) + rms(data.at(number(delta), 50_000, seeded(0)))
    assert 10 ** bound(VP, R, 1, 1, delta, 20, 0.0, eps).trivial == pytest.approx(
        farthest, rel=0.01
    )


def test_a_hopeless_bound_is_a_number_all_the_same() -> None:
    images: Bound = bound(VP, math.sqrt(3072), 3072, 8, 0.001, 1000)
    assert all(map(math.isfinite, images[:3] + images[4:])) and images.total > 800


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"R": 0.0}, "theory.R must be above 0 and finite, got 0.0"),
        ({"R": math.nan}, "theory.R must be above 0 and finite, got nan"),
        ({"d": 0}, "theory.d must be at least 1, got 0"),
        ({"K": 0}, "theory.K must be at least 1, got 0"),
        ({"steps": 0}, "theory.steps must be at least 1, got 0"),
        ({"steps": 2.5}, "theory.steps must be at least 1, got 2.5"),
        ({"delta": 1.5}, "theory.delta must be in (0, 1), got 1.5"),
        ({"delta": 0.0}, "theory.delta must be in (0, 1), got 0.0"),
        ({"delta": 1.0}, "theory.delta must be in (0, 1), got 1.0"),
        ({"eps_router": -0.1}, "theory.eps_router must be at least 0 and finite, got -0.1"),
        ({"eps_expert": -0.1}, "theory.eps_expert must be at least 0 and finite, got -0.1"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        bound(**{"schedule": VP, "R": 1.0, "d": 2, "K": 2, "delta": 0.1, "steps": 10, **setting})


def test_constants_and_stability_refuse_bad_settings() -> None:
    with pytest.raises(ConfigError, match=re.escape("theory.R must be above 0 and finite, got -1")):
        constants(VP, -1, 1, 1, number(0.5))
    with pytest.raises(ConfigError, match=re.escape("theory.delta must be in (0, 1), got 1.5")):
        stability(VP, 1, 1.5)
