"""The seed model above t*: who moves the images, and that the law stays the mixture's."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddm.oracle import GaussianMixture
from ddm.samplers import sample
from ddm.seed_model import is_above
from router.policies import POLICIES, first_uniforms, policy
from router.routing import RoutedDenoiser
from router.step import Router, choose
from tests.router.mixture import LINEAR, PI, mixture, noise

ABOVE = 0.6
Expert = Callable[[Tensor, Tensor], Tensor]


def seeded_experts(oracle: GaussianMixture, above: float = ABOVE) -> list[Expert]:
    """The exact experts of a bundle whose seed model is the exact mixture."""

    def of(k: int) -> Expert:
        own = oracle.expert(k)
        return lambda x, t: oracle.denoise(x, t) if is_above(t, above) else own(x, t)

    return [of(k) for k in range(len(oracle.weights))]


def seeded(
    oracle: GaussianMixture, rule: str, above: float = ABOVE, **settings: object
) -> RoutedDenoiser:
    router = replace(Router.of(oracle.posterior, rule, oracle.weights), above=above)
    return RoutedDenoiser(seeded_experts(oracle, above), router, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", POLICIES)
def test_every_policy_calls_one_expert_above_as_the_mixture_itself(rule: str) -> None:
    oracle, x = mixture(torch.float64), 3 * noise(64).double()
    routed = seeded(oracle, rule, trace=True)
    for t in (1.0, 0.8, 0.61):
        time = torch.tensor(t, dtype=torch.float64)
        torch.testing.assert_close(routed(x, time), oracle.denoise(x, time))
    assert (routed.calls, routed.router_calls) == (3 * 64, 0)
    assert all(step.chosen.equal(routed.steps[0].chosen) for step in routed.steps)


def test_the_control_variate_adds_nothing_above() -> None:
    oracle, x = mixture(), 3 * noise(8)
    asked: list[Tensor] = []

    def control(x: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        asked.append(weight)
        return weight.sum(dim=1, keepdim=True).expand_as(x)

    routed = seeded(oracle, "balanced", control_variate=control)
    high, low = torch.tensor(0.9), torch.tensor(0.55)  # where alpha is undecided
    torch.testing.assert_close(routed(x, high), oracle.denoise(x, high))
    routed(x, low)
    assert asked[0].eq(0).all() and asked[1].abs().max() > 0.01


def test_full_with_a_seed_model_is_full_without() -> None:
    oracle, x = mixture(torch.float64), noise(32).double()
    plain = RoutedDenoiser([oracle.expert(k) for k in range(4)], oracle.posterior, "full")
    both = [
        sample(denoiser, x, LINEAR, sampler="heun", steps=20)
        for denoiser in (seeded(oracle, "full"), plain)
    ]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("rule", ["fixed", "switching", "stochastic", "balanced", "adaptive"])
def test_the_first_expert_below_is_drawn_from_alpha(rule: str) -> None:
    oracle, n = mixture(torch.float64), 4096
    router = replace(Router.of(oracle.posterior, rule, PI.double()), above=ABOVE)
    x = oracle.marginal(1, 0.5, seed=3).double().expand(n, -1)
    u = first_uniforms(0, torch.arange(n))
    state = router.start(x, u)
    nan = torch.full_like(u, torch.nan)
    _, state = router.route(x, torch.tensor(0.9), state, nan)
    assert not state.evaluated.any()
    before = state.chosen.double().mean(dim=0)
    torch.testing.assert_close(before, PI.double(), rtol=0, atol=2e-3)
    # Within a step as well: the second call of Heun's may be the first below.
    _, state = router.route(x, torch.tensor(0.5), state, nan, keep=True)
    alpha = oracle.posterior(x[:1], torch.tensor(0.5))[0]
    assert (alpha - PI).abs().max() > 0.1
    torch.testing.assert_close(state.chosen.double().mean(dim=0), alpha, rtol=0, atol=2e-3)
    _, after = router.route(x, torch.tensor(0.4), state, nan)
    assert after.chosen.equal(state.chosen)


@pytest.mark.parametrize("rule", POLICIES)
def test_from_data_to_noise_the_seed_model_is_called_once_for_an_image(rule: str) -> None:
    oracle, x = mixture(torch.float64), noise(8).double()
    routed = seeded(oracle, rule, trace=True)
    for t in (0.3, 0.5):
        routed(x, torch.tensor(t, dtype=torch.float64))
    below = routed.calls
    for t in (0.7, 0.9):
        time = torch.tensor(t, dtype=torch.float64)
        torch.testing.assert_close(routed(x, time), oracle.denoise(x, time))
    assert routed.calls - below == 2 * 8


def line() -> GaussianMixture:
    """Three Gaussians on a line, apart, of different weights and widths."""
    weights, means = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[-2.0], [0.5], [3.0]])
    stds = torch.tensor([[0.5], [0.3], [0.8]])
    return GaussianMixture(weights.double(), means.double(), stds.double(), LINEAR)


def distance(oracle: GaussianMixture, routed: RoutedDenoiser, n: int) -> float:
    """The Wasserstein-1 distance of the images from the data's, at equal quantiles of the noise:
    no random number but the golden ratio's multiples.
    """
    place = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    x = torch.special.ndtri(place)[:, None]
    images = sample(routed, x, LINEAR, sampler="heun", steps=60, grid="cosine")[:, 0]
    level = torch.linspace(-6, 8, 20001, dtype=torch.float64)
    normal = torch.distributions.Normal(oracle.means[:, 0], oracle.stds[:, 0])
    law = (oracle.weights * normal.cdf(level[:, None])).sum(dim=1)
    found = torch.searchsorted(images.sort().values, level) / n
    return float((found - law).abs().sum() * (level[1] - level[0]))


def test_images_have_the_law_of_the_data() -> None:
    oracle, n = line(), 4096
    right = {
        rule: distance(oracle, seeded(oracle, rule, 0.35, calls_per_step=2), n)
        for rule in ("fixed", "switching")
    }
    assert max(right.values()) < 0.03, right
    from_pi = Router.of(oracle.posterior, "fixed", oracle.weights)  # and never drawn again
    experts = seeded_experts(oracle, 0.35)
    wrong = distance(oracle, RoutedDenoiser(experts, from_pi, calls_per_step=2), n)
    assert wrong > 4 * max(right.values())


def test_a_batch_may_be_above_and_below() -> None:
    oracle, x = mixture(torch.float64), 2 * noise(6).double()
    router = replace(Router.of(oracle.posterior, policy("switching"), PI.double()), above=ABOVE)
    u = first_uniforms(0, torch.arange(6))
    first, _ = choose(router, None, x, torch.tensor(0.9), router.start(x, u), u)
    state = router.route(x, torch.tensor(0.9), router.start(x, u), u)[1]
    times = torch.tensor([0.9, 0.2, 0.6, 0.61, 0.1, 1.0])
    routed, after = choose(router, None, x, times, state, torch.full_like(u, torch.nan))
    assert after.seeded.tolist() == [True, False, False, True, False, True]
    assert after.evaluated.equal(~after.seeded)
    assert routed.weight[after.seeded].equal(first.weight[after.seeded])
    alone = choose(router, None, x[1:2], times[1:2], state_row(state, 1), u[1:2])[1]
    assert after.chosen[1].equal(alone.chosen[0])


def state_row(state: object, row: int) -> object:
    return type(state)(*(part[row : row + 1] for part in state))  # type: ignore[call-arg, attr-defined]
