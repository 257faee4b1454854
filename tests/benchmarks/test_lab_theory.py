"""Every constant of the theorem against finite sets of points: never exceeded, and reached where it
can be.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.lab.theory import constants, denoiser_rate, step
from ddm.schedules import Coeffs, Schedule, velocity
from tests.benchmarks.points import (
    COSINE,
    EVERY,
    STRAIGHT,
    VP,
    Points,
    number,
    pair,
    rms,
    seeded,
)

CASES = 24


class Bent:
    """A path whose signal bends (`a'' = -2`) and whose noise does not."""

    def __call__(self, t: Tensor) -> Coeffs:
        return Coeffs(1 - t**2 / 2, t, -t, torch.ones_like(t))


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


def gradients(of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Jacobians `[B, d, d]` by autograd."""
    return torch.func.vmap(torch.func.jacrev(lambda row: of(row[None])[0]))(x)


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
