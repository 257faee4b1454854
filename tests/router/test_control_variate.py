"""A control variate changes the spread of a step, and neither its mean nor its cost."""

import pytest
import torch
from torch import Tensor

from ddm.gaussian import Gaussians
from ddm.measures import trajectory_error
from ddm.oracle import GaussianMixture
from ddm.samplers import sample
from router.policies import policy
from router.routing import RoutedDenoiser
from router.sources import Stateless
from router.step import ControlVariate, Router
from tests.router.mixture import LINEAR, PI, Drawing, constant, fixed_alpha, mixture, noise, routed


def experts_themselves(oracle: GaussianMixture) -> ControlVariate:
    """A control variate equal to the experts."""
    return lambda x, t, weight: sum(
        (weight[:, k, None] * oracle.expert(k)(x, t) for k in range(4)), torch.zeros_like(x)
    )


def any_control(x: Tensor, t: Tensor, weight: Tensor) -> Tensor:
    """Four functions that have nothing to do with the experts."""
    generator = torch.Generator().manual_seed(7)
    slope, height = (
        5 * torch.randn(4, 8, generator=generator, dtype=torch.float64).to(x) for _ in range(2)
    )
    return weight @ height + (weight @ slope) * x.sin() * (1 + t)


def test_with_all_experts_the_control_changes_nothing() -> None:
    oracle = mixture(torch.float64)
    x, t = 2 * noise(6).double(), torch.tensor(0.6, dtype=torch.float64)
    expected = routed(oracle, "full")(x, t)
    for control_variate in (any_control, experts_themselves(oracle)):
        torch.testing.assert_close(
            routed(oracle, "full", control_variate=control_variate)(x, t),
            expected,
            rtol=0,
            atol=1e-12,
        )
    assert (
        routed(oracle, "balanced", control_variate=any_control)(x, t)
        - routed(oracle, "balanced")(x, t)
    ).abs().max() > 1


@pytest.mark.parametrize("rule", ["stochastic", "balanced", "adaptive", "top_k", "fixed"])
def test_an_exact_control_variate_gives_the_full_mixture(
    rule: str,
) -> None:
    oracle = mixture(torch.float64)
    for t in (1.0, 0.7, 0.2):
        x, time = oracle.marginal(6, t, seed=1).double(), torch.tensor(t, dtype=torch.float64)
        model = RoutedDenoiser(
            [oracle.expert(k) for k in range(4)],
            Router(Stateless(oracle.posterior), policy(rule), PI.double()),
            control_variate=experts_themselves(oracle),
        )
        torch.testing.assert_close(model(x, time), oracle.denoise(x, time))
        assert model.calls == 6


def test_a_control_variate_keeps_the_mean_of_a_step() -> None:
    oracle, n = mixture(torch.float64), 40_000
    x = oracle.marginal(1, 0.6, seed=2).double().expand(n, -1)
    uniforms = Drawing(policy("stochastic"), (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    t = torch.tensor(0.6, dtype=torch.float64)
    plain, controlled = (
        routed(oracle, uniforms, control_variate=control_variate)(x, t)
        for control_variate in (None, any_control)
    )
    torch.testing.assert_close(controlled.mean(0), oracle.denoise(x[:1], t)[0], rtol=0, atol=1e-3)
    assert (controlled.var(0) - plain.var(0)).abs().max() > 1  # it was at work


def test_the_control_variate_gets_alpha_minus_weights() -> None:
    alpha, given = (0.5, 0.3, 0.2), []

    def spy(x: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        given.append((x, t, weight))
        return torch.zeros_like(x)

    x, t = torch.randn(2, 3), torch.tensor(0.5)
    experts = [constant(v) for v in (1.0, 2.0, 4.0)]
    for rule, left in (
        (policy("full"), [0.0, 0.0, 0.0]),
        (policy("top_k", top_k=1), [-0.5, 0.3, 0.2]),
        (policy("top_k", top_k=2), [0.5 - 0.625, 0.3 - 0.375, 0.2]),
        (
            Drawing(policy("stochastic"), torch.full((2,), 0.9, dtype=torch.float64)),
            [0.5, 0.3, -0.8],
        ),
    ):
        RoutedDenoiser(experts, fixed_alpha(*alpha), rule, control_variate=spy)(x, t)
        seen, time, weight = given.pop()
        assert seen.equal(x) and time == t
        torch.testing.assert_close(weight, torch.tensor([left] * 2))
        torch.testing.assert_close(weight.sum(dim=1), torch.zeros(2))
    assert not given  # once a call


def test_the_result_is_clipped_after_the_control_and_neither_alone() -> None:
    x, t = torch.zeros(1, 2), torch.tensor(0.5)
    for mixed, control_variate in (
        (0.5, 0.3),
        (0.5, 0.9),
        (0.5, -3.0),
        (2.0, -1.5),
        (-4.0, 3.5),
        (0.5, -1.25),
    ):
        for clip in (True, False):
            model = RoutedDenoiser(
                [constant(mixed), constant(0.0)],
                fixed_alpha(0.75, 0.25),
                "top_k",
                control_variate=lambda x, t, weight, control_variate=control_variate: (
                    torch.full_like(x, control_variate)
                ),  # type: ignore[misc]
                clip=clip,
            )
            expected = (
                min(max(mixed + control_variate, -1.0), 1.0) if clip else mixed + control_variate
            )
            torch.testing.assert_close(model(x, t), torch.full((1, 2), expected))


@pytest.mark.parametrize("rule", ["stochastic", "balanced", "adaptive", "full"])
def test_a_control_adds_no_calls_and_chooses_nobody(rule: str) -> None:
    oracle = mixture()
    x, t = noise(5), torch.tensor(0.5)
    models = [
        routed(oracle, rule, control_variate=control_variate, trace=True)
        for control_variate in (None, any_control)
    ]
    for model in models:
        for _ in range(6):
            model(x, t)
    plain, controlled = models
    assert controlled.calls == plain.calls
    for one, other in zip(controlled.steps, plain.steps, strict=True):
        assert one.chosen.equal(other.chosen)


def test_gaussians_halve_the_error_of_balanced() -> None:
    """Four clusters of three Gaussians each in 8 dimensions; the Gaussians know each cluster's mean
    and variances alone.

    Measured at 25 steps of DDIM, against the full mixture's own path: 0.68 without, 0.32 with, 0.31
    with all experts.
    """
    generator = torch.Generator().manual_seed(0)
    centre = 2 * torch.randn(4, 1, 8, generator=generator)
    means = centre + 2 * torch.randn(4, 3, 8, generator=generator)
    stds = 0.2 + 0.3 * torch.rand(4, 3, 8, generator=generator)
    shares = torch.rand(4, 3, generator=generator) + 0.2
    shares /= shares.sum()
    whole = GaussianMixture(shares.flatten(), means.flatten(0, 1), stds.flatten(0, 1), LINEAR)
    inside = shares / shares.sum(dim=1, keepdim=True)
    experts = [GaussianMixture(inside[k], means[k], stds[k], LINEAR).denoise for k in range(4)]
    mean = (inside[:, :, None] * means).sum(dim=1)
    variance = (inside[:, :, None] * (means**2 + stds**2)).sum(dim=1) - mean**2

    def alpha(x: Tensor, t: Tensor) -> Tensor:
        return whole.posterior(x, t).unflatten(1, (4, 3)).sum(dim=2)

    x = noise(300)
    reference = sample(whole.denoise, x, LINEAR, "ddim", steps=500)

    def error(control_variate: ControlVariate | None, rule: str = "balanced") -> float:
        router = Router(Stateless(alpha), policy(rule), shares.sum(dim=1))
        model = RoutedDenoiser(experts, router, control_variate=control_variate)
        return trajectory_error(sample(model, x, LINEAR, "ddim", steps=25), reference)

    gaussian = Gaussians(mean, variance, LINEAR).mix
    assert error(gaussian) < 0.7 * error(None)
    assert error(gaussian, "stochastic") < 0.5 * error(None, "stochastic")
    assert error(gaussian) < 1.5 * error(None, "full")
