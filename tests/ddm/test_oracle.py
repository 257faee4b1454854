"""The Gaussian mixture against torch.distributions, autograd, finite differences and scipy."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Normal

from ddm.oracle import GaussianMixture
from ddm.rng import RngStream, normal
from ddm.schedules import SCHEDULES, Discrete, schedule

TIMES = [0.02, 0.2, 0.5, 0.9]


def mixture(name: str = "vp_linear") -> GaussianMixture:
    return GaussianMixture(
        weights=torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),
        means=torch.tensor([[-1.0, 0.2], [0.8, 0.9], [0.6, -0.7]], dtype=torch.float64),
        stds=torch.tensor([[0.2, 0.3], [0.5, 0.2], [0.3, 0.4]], dtype=torch.float64),
        schedule=schedule(name),
    )


def points(n: int = 6) -> Tensor:
    return torch.linspace(-1.2, 1.1, 2 * n, dtype=torch.float64).reshape(2, n).T.contiguous()


def log_joint(m: GaussianMixture, x: Tensor, t: Tensor) -> Tensor:
    """`log pi_k p_k(x, t)`, `[B, K]`, by torch.distributions."""
    a, s, _, _ = m.schedule(t)
    deviation = (a**2 * m.stds**2 + s**2).sqrt()
    return Normal(a * m.means, deviation).log_prob(x[:, None]).sum(dim=2) + m.weights.log()


def score(m: GaussianMixture, x: Tensor, t: Tensor, k: int | None = None) -> Tensor:
    """The gradient of the log density of the mixture, or of its component k, by autograd."""
    x = x.detach().requires_grad_()
    joint = log_joint(m, x, t)
    log_p = joint.logsumexp(dim=1) if k is None else joint[:, k]
    return torch.autograd.grad(log_p.sum(), x)[0]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("time", TIMES)
def test_posterior_is_bayes_rule(name: str, time: float) -> None:
    m, t = mixture(name), torch.tensor(time, dtype=torch.float64)
    torch.testing.assert_close(
        m.posterior(points(), t), log_joint(m, points(), t).softmax(dim=1), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("time", TIMES)
def test_denoise_and_experts_obey_tweedies_formula(name: str, time: float) -> None:
    m, t, x = mixture(name), torch.tensor(time, dtype=torch.float64), points()
    a, s, _, _ = m.schedule(t)
    torch.testing.assert_close(
        m.denoise(x, t), (x + s**2 * score(m, x, t)) / a, rtol=1e-9, atol=1e-9
    )
    for k in range(3):
        torch.testing.assert_close(
            m.expert(k)(x, t), (x + s**2 * score(m, x, t, k)) / a, rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("time", TIMES)
def test_experts_mixed_by_the_posterior_are_the_denoiser(time: float) -> None:
    m, t, x = mixture(), torch.tensor(time, dtype=torch.float64), points()
    alpha = m.posterior(x, t)
    mixed = sum(alpha[:, k, None] * m.expert(k)(x, t) for k in range(3))
    torch.testing.assert_close(m.denoise(x, t), mixed, rtol=1e-12, atol=1e-12)


def along_the_ode(m: GaussianMixture, x: Tensor, t: float, h: float) -> Tensor:
    """x a time h later on the probability-flow ODE: one Runge-Kutta step, the velocity from the
    score.
    """

    def v(x: Tensor, t: float) -> Tensor:
        at = torch.tensor(t, dtype=torch.float64)
        a, s, da, ds = m.schedule(at)
        return da / a * x - (s * ds - s**2 * da / a) * score(m, x, at)

    k1 = v(x, t)
    k2 = v(x + h / 2 * k1, t + h / 2)
    k3 = v(x + h / 2 * k2, t + h / 2)
    k4 = v(x + h * k3, t + h)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("time", TIMES)
def test_posterior_rate_is_the_finite_difference_along_the_ode(name: str, time: float) -> None:
    m, x, h = mixture(name), points(), 2e-4
    time += 5e-4 * isinstance(schedule(name), Discrete)  # inside a step: at its ends the rate jumps

    def alpha(steps: int) -> Tensor:
        t = torch.tensor(time + steps * h, dtype=torch.float64)
        return m.posterior(along_the_ode(m, x, time, steps * h), t)

    expected = (8 * (alpha(1) - alpha(-1)) - (alpha(2) - alpha(-2))) / (12 * h)
    rate = m.posterior_rate(x, torch.tensor(time, dtype=torch.float64))
    size = float(expected.abs().max())
    assert size > 1e-4  # where s is 80 alpha hardly moves
    torch.testing.assert_close(rate, expected, rtol=1e-6, atol=1e-6 * size)
    torch.testing.assert_close(
        rate.sum(dim=1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_a_time_for_each_point_is_the_same_as_one_after_another() -> None:
    m, x = mixture(), points(4)
    t = torch.tensor(TIMES)  # float32 beside float64 points
    for answer in (m.posterior, m.posterior_rate, m.denoise, m.expert(1)):
        alone = torch.cat([answer(x[i : i + 1], t[i]) for i in range(4)])
        torch.testing.assert_close(answer(x, t), alone, rtol=1e-12, atol=1e-12)


def test_experts_at_time_zero_return_the_image() -> None:
    m = mixture()
    torch.testing.assert_close(
        m.expert(2)(points(), torch.tensor(0.0)), points(), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_and_rate_are_finite_in_float32(
    name: str,
) -> None:
    m, t = mixture(name), torch.logspace(-5, 0, 201)
    c = m.schedule(t).broadcast_to(points(201))
    noisy = (
        c.a * points(201) + c.s * normal(0, RngStream.NOISE, torch.arange(201), 0, (2,))
    ).float()
    for x in (noisy, noisy + 3):  # off the data as well, where every component is improbable
        alpha, rate = m.posterior(x, t), m.posterior_rate(x, t)
        assert alpha.dtype == rate.dtype == torch.float32
        torch.testing.assert_close(
            alpha.double(), m.posterior(x.double(), t.double()), rtol=0, atol=1e-4
        )
        expected = m.posterior_rate(x.double(), t.double())
        torch.testing.assert_close(
            rate.double(), expected, rtol=1e-3, atol=1e-3 * float(1 + expected.abs().max())
        )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("time", [0.0, 0.3, 0.8])
def test_draws_follow_the_mixture_at_their_time(name: str, time: float) -> None:
    m, n = mixture(name), 20_000
    x = (m.marginal(n, time, seed=4) if time > 0 else m.sample(n, seed=4)).double()
    a, s, _, _ = m.schedule(torch.tensor(time, dtype=torch.float64))
    deviation = (a**2 * m.stds**2 + s**2).sqrt()
    for d in range(2):
        law = Normal(a * m.means[:, d], deviation[:, d])
        test = stats.kstest(
            x[:, d].numpy(),
            lambda z, law=law: (m.weights * law.cdf(torch.as_tensor(z)[:, None])).sum(1).numpy(),
        )
        assert test.pvalue > 0.01
    mean = m.weights @ m.means
    covariance = torch.einsum(
        "k,kd,ke->de", m.weights, m.means - mean, m.means - mean
    ) + torch.diag(m.weights @ m.stds**2)
    expected = a**2 * covariance + s**2 * torch.eye(2)
    largest = float(expected.diagonal().max())
    torch.testing.assert_close(x.mean(dim=0), a * mean, rtol=0, atol=5 * math.sqrt(largest / n))
    torch.testing.assert_close(
        torch.cov(x.T), expected, rtol=0, atol=5 * math.sqrt(2 * largest**2 / n)
    )


def test_draw_i_does_not_depend_on_how_many_are_drawn() -> None:
    assert torch.equal(mixture().sample(3, seed=1), mixture().sample(10, seed=1)[:3])
    assert not torch.equal(mixture().sample(3, seed=1), mixture().sample(3, seed=2))


def test_the_marginal_at_time_one_has_the_noise_that_starts_a_path() -> None:
    m = mixture("rectified_flow")
    assert torch.equal(
        m.marginal(5, 1.0, seed=3), normal(3, RngStream.START, torch.arange(5), 0, (2,))
    )


def test_a_mixture_of_one_is_that_gaussian() -> None:
    m = GaussianMixture(
        torch.ones(1),
        torch.tensor([[2.0, -1.0]]),
        torch.tensor([[0.5, 0.1]]),
        schedule("vp_linear"),
    )
    z = normal(7, RngStream.NOISE, torch.arange(4), 0, (2,))
    torch.testing.assert_close(
        m.sample(4, seed=7), torch.tensor([2.0, -1.0]) + torch.tensor([0.5, 0.1]) * z
    )
    assert m.posterior(points().float(), torch.tensor(0.5)).eq(1).all()
    assert m.posterior_rate(points().float(), torch.tensor(0.5)).eq(0).all()
