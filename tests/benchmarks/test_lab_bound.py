"""The theorem as a whole: the routed sampler is within the bound, and each part of it is reached."""

import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch

from benchmarks.lab.theory import Bound, bound, constants, stability, step
from ddm.errors import ConfigError
from ddm.schedules import Schedule, velocity
from tests.benchmarks.points import (
    COSINE,
    EVERY,
    EXPLODING,
    STRAIGHT,
    VP,
    Points,
    number,
    pair,
    rms,
    seeded,
)


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
