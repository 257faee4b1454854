"""The routed denoiser against the oracle, its independence of the batch, and its evaluations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from ddm.gaussian import Gaussians
from ddm.grids import time_grid
from ddm.measures import sliced_w2, trajectory_error
from ddm.oracle import GaussianMixture
from ddm.rng import RngStream, normal
from ddm.samplers import sample
from ddm.schedules import schedule
from router.policies import POLICIES, Policy, Switching, policy
from router.routing import RoutedDenoiser
from router.sources import Integrated, Stateless, prior
from router.step import ControlVariate, Router, RoutingState

LINEAR = schedule("vp_linear")
PI = torch.tensor([0.4, 0.3, 0.2, 0.1])


def mixture(dtype: torch.dtype = torch.float32) -> GaussianMixture:
    generator = torch.Generator().manual_seed(1)
    means, spread = (
        3 * torch.randn(4, 8, generator=generator),
        torch.rand(4, 8, generator=generator),
    )
    return GaussianMixture(PI.to(dtype), means.to(dtype), (0.3 + 0.7 * spread).to(dtype), LINEAR)


def noise(n: int, seed: int = 5) -> Tensor:
    return normal(seed, RngStream.START, torch.arange(n), 0, (8,))


def routed(oracle: GaussianMixture, rule: str | Policy, **settings: object) -> RoutedDenoiser:
    return RoutedDenoiser([oracle.expert(k) for k in range(4)], oracle.posterior, rule, **settings)  # type: ignore[arg-type]


def constant(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: torch.full_like(x, value)


def fixed_alpha(*alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
    return prior(torch.tensor(alpha))


@dataclass
class Drawing:
    """A policy with the uniforms of its rows given: all of them, instead of some."""

    rule: Policy
    given: Tensor
    keeps: ClassVar[bool] = False

    def uniforms(self, *_: object) -> Tensor:
        return self.given[:, None]

    def start(self, pi: Tensor, u: Tensor) -> Tensor:
        return self.rule.start(pi, u)

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.rule.choose(alpha, state, u)


def test_with_all_experts_the_mixture_is_the_oracle_s_denoiser() -> None:
    oracle = mixture(torch.float64)
    x = 2 * noise(6).double()
    for t in (1.0, 0.5, 0.2, 1e-3):
        time = torch.tensor(t, dtype=torch.float64)
        # written out: D = sum_k alpha_k (m_k + a v_k / (a^2 v_k + s^2) (x - a m_k))
        a, s, _, _ = LINEAR(time)
        v = oracle.stds**2
        spread, apart = a**2 * v + s**2, x[:, None] - a * oracle.means
        alpha = torch.softmax(
            oracle.weights.log() - 0.5 * (apart**2 / spread + spread.log()).sum(2), dim=1
        )
        denoised = (alpha[:, :, None] * (oracle.means + a * v / spread * apart)).sum(1)
        for found in (routed(oracle, "full")(x, time), oracle.denoise(x, time)):
            torch.testing.assert_close(found, denoised)


def test_the_mean_of_the_stochastic_step_over_all_draws_is_the_full_step() -> None:
    oracle, n = mixture(torch.float64), 40_000
    x = oracle.marginal(1, 0.6, seed=2).double().expand(n, -1)
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    t = torch.tensor(0.6, dtype=torch.float64)
    assert oracle.posterior(x[:1], t).max() < 0.9  # more than one expert is likely
    steps = routed(oracle, Drawing(policy("stochastic"), uniforms))(x, t)
    torch.testing.assert_close(steps.mean(0), oracle.denoise(x[:1], t)[0], rtol=0, atol=1e-3)
    assert steps.var(0).max() > 0.1  # each of them is another


def test_the_chosen_are_weighted_by_alpha_renormalized_over_the_chosen() -> None:
    experts, x, t = [constant(v) for v in (1.0, 2.0, 4.0)], torch.zeros(2, 3), torch.tensor(0.5)
    for rule, expected in (
        (policy("full"), 0.5 + 0.6 + 0.8),
        (policy("top_k", top_k=2), (0.5 * 1 + 0.3 * 2) / 0.8),
        (policy("top_k", top_k=1), 1.0),
        (policy("nucleus", nucleus_p=0.6), (0.5 * 1 + 0.3 * 2) / 0.8),
        (Drawing(policy("stochastic"), torch.full((2,), 0.9, dtype=torch.float64)), 4.0),
    ):
        out = RoutedDenoiser(experts, fixed_alpha(0.5, 0.3, 0.2), rule)(x, t)
        torch.testing.assert_close(out, torch.full((2, 3), expected))


def test_a_chosen_expert_is_used_where_its_alpha_is_zero() -> None:
    alphas = iter([[0.25, 0.75], [1.0, 0.0], [0.0, 1.0]])
    source = Stateless(lambda x, t: torch.tensor(next(alphas)).expand(len(x), -1))
    router = Router(source, policy("fixed"), torch.tensor([0.25, 0.75]))
    model = RoutedDenoiser([constant(1.0), constant(2.0)], router)
    first = model(torch.zeros(4, 1), torch.tensor(1.0))
    assert sorted(first[:, 0].tolist()) == [1.0, 2.0, 2.0, 2.0]
    for t in (0.5, 0.1):
        assert model(torch.zeros(4, 1), torch.tensor(t)).equal(first)
    assert model.router_calls == 0


def test_fixed_draws_from_pi_where_given_and_else_from_the_first_alpha() -> None:
    experts, n = [constant(0.0), constant(1.0)], 2000
    for pi, share in ((None, 0.9), (torch.tensor([0.8, 0.2]), 0.2)):
        router = Router(Stateless(fixed_alpha(0.1, 0.9)), policy("fixed"), pi)
        model = RoutedDenoiser(experts, router)
        assert float(model(torch.zeros(n, 1), torch.tensor(1.0)).mean()) == pytest.approx(
            share, abs=0.03
        )


@pytest.mark.parametrize(
    "rule", ["stochastic", "balanced", "adaptive", "top_k", "nucleus", "fixed", "full"]
)
def test_only_chosen_experts_are_called_with_their_images(
    rule: str,
) -> None:
    oracle, n = mixture(), 7
    log: list[tuple[int, Tensor, Tensor]] = []

    def spy(k: int) -> Callable[[Tensor, Tensor], Tensor]:
        def expert(x: Tensor, t: Tensor) -> Tensor:
            log.append((k, x, t))
            return oracle.expert(k)(x, t)

        return expert

    model = RoutedDenoiser([spy(k) for k in range(4)], oracle.posterior, rule, seed=1, trace=True)
    calls, x = 0, noise(n)
    for step, t in enumerate((1.0, 0.6, 0.3, 0.1)):
        log.clear()
        x = oracle.marginal(n, t, seed=step)
        time = torch.tensor(t)
        model(x, time)
        chosen = model.steps[step].chosen
        assert [k for k, _, _ in log] == [k for k in range(4) if chosen[:, k].any()]
        for k, asked, asked_t in log:
            assert asked.equal(x[chosen[:, k]])
            assert asked_t.ndim == 0 or len(asked_t) == len(asked)
            assert (asked_t == time).all()
        calls += int(chosen.sum())
        assert model.steps[step].t == pytest.approx(t)
        first = model.router.pi
        alpha = first if rule == "fixed" else oracle.posterior(x, time)
        torch.testing.assert_close(model.steps[step].alpha, alpha)
    assert model.calls == calls
    assert model.router_calls == (0 if rule == "fixed" else 4 * n)
    assert (chosen.sum(dim=1) >= 1).all()


@pytest.mark.parametrize("rule", ["stochastic", "balanced", "fixed"])
def test_calls_count_expert_evaluations(
    rule: str,
) -> None:
    oracle = mixture()
    one, every = routed(oracle, rule), routed(oracle, "full")
    for model in (one, every):
        sample(model, noise(5), LINEAR, "ddim", steps=6)
    assert (one.calls, every.calls) == (30, 120)


@pytest.mark.parametrize("rule", ["stochastic", "balanced", "adaptive", "fixed", "switching"])
def test_an_image_is_moved_by_the_same_experts_alone_and_in_a_batch(rule: str) -> None:
    oracle = mixture()

    def trajectory(index: Tensor, seed: int = 4) -> tuple[Tensor, Tensor]:
        model = routed(oracle, rule, seed=seed, index=index, trace=True)
        end = sample(model, normal(5, RngStream.START, index, 0, (8,)), LINEAR, "ddim", steps=12)
        return end, torch.stack([step.chosen for step in model.steps])

    batch, moved = trajectory(torch.arange(6))
    for index in (torch.tensor([3]), torch.tensor([5, 3, 40])):
        end, chosen = trajectory(index)
        row = index.tolist().index(3)
        assert chosen[:, row].equal(moved[:, 3])
        torch.testing.assert_close(end[row], batch[3], rtol=1e-4, atol=1e-4)
    default = routed(oracle, rule, seed=4, trace=True)
    sample(default, normal(5, RngStream.START, torch.arange(6), 0, (8,)), LINEAR, "ddim", steps=12)
    assert torch.stack([step.chosen for step in default.steps]).equal(moved)
    assert not trajectory(torch.arange(6), seed=6)[1].equal(moved)
    assert not trajectory(torch.arange(6, 12))[1].equal(moved)


def test_the_draws_of_an_image_are_independent_from_step_to_step() -> None:
    n, steps = 1500, 4
    model = RoutedDenoiser(
        [constant(0.0)] * 2, fixed_alpha(0.3, 0.7), "stochastic", seed=2, trace=True
    )
    for _ in range(steps):
        model(torch.zeros(n, 1), torch.tensor(0.5))
    first = torch.stack([step.chosen[:, 0] for step in model.steps]).double()  # [steps, n]
    assert (first.mean(dim=1) - 0.3).abs().max() < 0.04
    assert (torch.corrcoef(first) - torch.eye(steps)).abs().max() < 0.1


def test_experts_stay_the_same_within_a_step_of_two_calls() -> None:
    alphas = [(0.9, 0.1), (0.1, 0.9), (0.2, 0.8), (0.8, 0.2)]

    def firsts(calls_per_step: int) -> list[float]:
        rows = iter(alphas)
        source = Stateless(lambda x, t: torch.tensor([next(rows)]))
        router = Router(source, policy("top_k"), torch.tensor([0.5, 0.5]))
        experts = [constant(1.0), constant(2.0)]
        model = RoutedDenoiser(experts, router, calls_per_step=calls_per_step)
        return [float(model(torch.zeros(1, 1), torch.tensor(0.5))) for _ in alphas]

    assert firsts(1) == [1.0, 2.0, 2.0, 1.0]
    assert firsts(2) == [1.0, 1.0, 2.0, 2.0]


def test_two_calls_per_step_choose_the_experts_of_one() -> None:
    def chosen(rule: str, calls_per_step: int) -> Tensor:
        model = RoutedDenoiser(
            [constant(0.0)] * 3,
            fixed_alpha(0.2, 0.3, 0.5),
            rule,
            seed=8,
            calls_per_step=calls_per_step,
            trace=True,
        )
        for _ in range(10 * calls_per_step):
            model(torch.zeros(4, 1), torch.tensor(0.5))
        return torch.stack([step.chosen for step in model.steps])

    for rule in ("stochastic", "balanced"):
        assert chosen(rule, 2).equal(chosen(rule, 1).repeat_interleave(2, dim=0))
        assert not chosen(rule, 1)[1:].equal(chosen(rule, 1)[:-1])


def test_clip_bounds_the_mixture_and_no_expert_alone() -> None:
    x, t = torch.zeros(1, 2), torch.tensor(0.5)
    for values, clipped, plain in (
        ((3.0, -2.0), 0.5, 0.5),
        ((3.0, 0.0), 1.0, 1.5),
        ((0.0, -4.0), -1.0, -2.0),
    ):
        experts = [constant(value) for value in values]
        for clip, expected in ((True, clipped), (False, plain)):
            out = RoutedDenoiser(experts, fixed_alpha(0.5, 0.5), "full", clip=clip)(x, t)
            torch.testing.assert_close(out, torch.full((1, 2), expected))


def test_each_image_may_have_its_own_time() -> None:
    oracle = mixture(torch.float64)
    x, t = noise(5).double(), torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7], dtype=torch.float64)
    together = routed(oracle, "top_k")(x, t)
    alone = torch.cat([routed(oracle, "top_k")(x[i : i + 1], t[i]) for i in range(5)])
    torch.testing.assert_close(together, alone)


def test_alpha_may_be_more_exact_than_the_images() -> None:
    """`alpha` is any (x, t) -> [B, K]; one that counts in float64 moves float32 images as well."""
    experts = [constant(1.0), constant(2.0)]
    alpha = prior(torch.tensor([0.25, 0.75], dtype=torch.float64))
    x = torch.zeros(2, 3)
    out = RoutedDenoiser(experts, lambda x, t: alpha(x.double(), t), "full")(x, torch.tensor(0.5))
    torch.testing.assert_close(out, torch.full((2, 3), 1.75))


def test_balanced_follows_the_full_trajectory_closer_than_stochastic() -> None:
    """Exact experts on a mixture of 4 in 8 dimensions, 50 steps of DDIM, one expert a step."""
    oracle, n = mixture(), 1000
    x = noise(n)
    reference = sample(oracle.denoise, x, LINEAR, "ddim", steps=1000)
    exact = oracle.sample(n, seed=9)
    ends = {
        rule: sample(routed(oracle, rule, seed=3), x, LINEAR, "ddim", steps=50)
        for rule in ("full", "stochastic", "balanced")
    }
    error = {rule: trajectory_error(end, reference) for rule, end in ends.items()}
    distance = {rule: sliced_w2(end, exact) for rule, end in ends.items()}
    assert error["full"] < error["balanced"] < error["stochastic"] / 4
    assert distance["balanced"] < 1.1 * distance["full"]


def test_the_error_of_stochastic_falls_as_one_over_the_number_of_steps() -> None:
    """Against the full mixture on the same grid, so that what is measured is the uniforms alone:
    `O(1/N)` in mean square.
    """
    oracle = mixture()
    x = noise(1000)
    errors = []
    for steps in (25, 100):
        full = sample(oracle.denoise, x, LINEAR, "ddim", steps=steps)
        errors.append(
            trajectory_error(
                sample(routed(oracle, "stochastic"), x, LINEAR, "ddim", steps=steps), full
            )
        )
    assert len(time_grid("uniform_t", 100, LINEAR)) == 101
    assert 2 < errors[0] / errors[1] < 8


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


# Switching


def test_switching_evaluates_alpha_only_where_an_image_redraws() -> None:
    oracle, n = mixture(), 50
    asked: list[int] = []

    def spy(x: Tensor, t: Tensor) -> Tensor:
        asked.append(len(x))
        return oracle.posterior(x, t)

    model = RoutedDenoiser([oracle.expert(k) for k in range(4)], spy, Switching(2.0), trace=True)
    model.router = Router.of(spy, Switching(2.0), PI)
    sample(model, noise(n), LINEAR, "dpmpp_2m", steps=20)
    assert sum(asked) == model.router_calls
    assert 0.7 * 2 * n < model.router_calls < 1.1 * 2 * n  # some redraws share a step
    assert model.calls == 20 * n
    chosen = torch.stack([step.chosen for step in model.steps])
    changes = (chosen[1:] != chosen[:-1]).any(dim=2).sum()
    assert 0 < changes < model.router_calls


@pytest.mark.parametrize("rate", [0.0, 1.0, 4.0, 16.0])
def test_the_law_of_switching_is_the_mixture_s_at_any_rate(rate: float) -> None:
    oracle, n = mixture(), 1500
    router = Router.of(oracle.posterior, Switching(rate), PI)
    model = RoutedDenoiser([oracle.expert(k) for k in range(4)], router, seed=3)
    ends = sample(model, noise(n), LINEAR, "dpmpp_2m", steps=60)
    exact, other = oracle.sample(n, seed=1), oracle.sample(n, seed=2)
    assert sliced_w2(ends, exact) < 1.5 * sliced_w2(other, exact) + 0.02


def test_a_switch_goes_to_another_expert_where_the_kept_one_is_away() -> None:
    router = Router.of(fixed_alpha(0.5, 0.3, 0.2), Switching(0.0), torch.tensor([0.5, 0.3, 0.2]))
    x, t = torch.zeros(6, 1), torch.tensor(0.5)
    state = router.start(x, torch.tensor([0.1, 0.2, 0.6, 0.7, 0.9, 0.95], dtype=torch.float64))
    kept = torch.full((6,), torch.nan, dtype=torch.float64)
    _, away = router.route(x, t, state, kept, available=torch.tensor([False, True, True]))
    assert away.chosen.int().argmax(dim=1).tolist() == [1, 1, 1, 1, 2, 2]
    assert away.evaluated.tolist() == [True, True, False, False, False, False]
    _, back = router.route(x, t, away, kept)  # it stays with the new one
    assert back.chosen.equal(away.chosen)


# The router alone: a pure function over rows

RULES = list(POLICIES)


def router_of(rule: str, weights: list[float] | None = None) -> tuple[Router, GaussianMixture]:
    oracle = mixture(torch.float64)
    source = Integrated(oracle.posterior_rate, PI.double(), oracle.posterior, relaxation_rate=5.0)
    return Router(
        source, policy(rule), PI.double(), None if weights is None else torch.tensor(weights)
    ), oracle


@pytest.mark.parametrize("rule", RULES)
def test_routing_is_stateless_and_independent_of_the_batch(
    rule: str,
) -> None:
    router, _ = router_of(rule)
    x, uniforms = 2 * noise(5).double(), torch.rand(5, 6, dtype=torch.float64)
    times = torch.linspace(1, 0.2, 6, dtype=torch.float64)
    lengths = [1, 2, 3, 4, 5]  # calls that a row has behind it

    def alone(row: int, calls: int) -> tuple[Tensor, RoutingState]:
        one = x[row : row + 1]
        state = router.start(one, uniforms[row : row + 1, 0])
        alpha = torch.empty(0)
        for call in range(calls):
            alpha, state = router.route(one, times[call], state, uniforms[row : row + 1, call])
        return alpha, state

    before = RoutingState(
        *map(torch.cat, zip(*(alone(row, n)[1] for row, n in enumerate(lengths)), strict=True))
    )
    kept = [part.clone() for part in before]
    draw = torch.stack([uniforms[row, n] for row, n in enumerate(lengths)])
    alpha, after = router.route(x, times[lengths], before, draw)
    for row, n in enumerate(lengths):
        expected, state = alone(row, n + 1)
        torch.testing.assert_close(alpha[row : row + 1], expected)
        assert after.chosen[row].equal(state.chosen[0])
        for part, cfg in zip(after[:2], state[:2], strict=True):
            torch.testing.assert_close(part[row : row + 1], cfg)
    for part, copy in zip(before, kept, strict=True):
        torch.testing.assert_close(part, copy, rtol=0, atol=0, equal_nan=True)


def test_weights_multiply_shares_and_alpha_by_bayes_rule() -> None:
    weights = [2.0, 0.0, 1.0, 0.5]
    _, oracle = router_of("full")
    router = Router(
        Stateless(oracle.posterior), policy("full"), PI.double(), torch.tensor(weights).double()
    )
    w = torch.tensor(weights, dtype=torch.float64)
    other = GaussianMixture(
        PI.double() * w / (PI.double() * w).sum(), oracle.means, oracle.stds, LINEAR
    )
    for t in (0.9, 0.5, 0.1):
        x, time = oracle.marginal(6, t, seed=1).double(), torch.tensor(t, dtype=torch.float64)
        alpha, _ = router.route(
            x, time, router.start(x, torch.full((6,), 0.5)), torch.full((6,), 0.5)
        )
        torch.testing.assert_close(alpha, other.posterior(x, time))


def test_the_start_is_drawn_from_the_weighted_shares() -> None:
    router = Router(
        Stateless(fixed_alpha(0.4, 0.3, 0.2, 0.1)),
        policy("fixed"),
        PI,
        torch.tensor([1.0, 0.0, 1.0, 4.0]),
    )
    n = 1000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    state = router.start(torch.zeros(n, 1), uniforms)
    torch.testing.assert_close(
        state.chosen.float().mean(dim=0), torch.tensor([0.4, 0.0, 0.2, 0.4]), rtol=0, atol=2e-3
    )


def test_where_the_weights_leave_nothing_of_alpha_they_stand_alone() -> None:
    router = Router(
        Stateless(fixed_alpha(1.0, 0.0, 0.0)),
        policy("full"),
        torch.ones(3) / 3,
        torch.tensor([0.0, 3.0, 1.0]),
    )
    x, half = torch.zeros(2, 1), torch.full((2,), 0.5)
    alpha, state = router.route(x, torch.tensor(0.5), router.start(x, half), half)
    torch.testing.assert_close(alpha, torch.tensor([[0.0, 0.75, 0.25]] * 2))
    assert state.chosen.tolist() == [[False, True, True]] * 2


@pytest.mark.parametrize("rule", RULES)
def test_unavailable_and_zero_weight_experts_are_never_selected(
    rule: str,
) -> None:
    router, _ = router_of(rule, [1.0, 1.0, 0.0, 1.0])
    plain = Router(router.source, router.policy, router.pi)
    available = torch.tensor([False, True, True, True])
    n = 40
    x, uniforms = 2 * noise(n).double(), torch.rand(n, 9, dtype=torch.float64)
    state = router.start(x, uniforms[:, 8])
    for call, t in enumerate(torch.linspace(1, 0.1, 8, dtype=torch.float64)):
        unweighted, _ = plain.route(x, t, state, uniforms[:, call])
        alpha, state = router.route(x, t, state, uniforms[:, call], available=available)
        left = unweighted * torch.tensor([0.0, 1.0, 0.0, 1.0])
        torch.testing.assert_close(alpha, left / left.sum(dim=1, keepdim=True))
        assert not state.chosen[:, [0, 2]].any()
        assert state.chosen.any(dim=1).all()
        if rule == "full":
            assert state.chosen[:, [1, 3]].all()


def test_the_most_likely_eligible_expert_replaces_an_unavailable_one() -> None:
    router = Router(
        Stateless(fixed_alpha(0.5, 0.2, 0.3)), policy("fixed"), torch.tensor([0.5, 0.2, 0.3])
    )
    x, draw = torch.zeros(3, 1), torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64)
    state = router.start(x, draw)
    for available, expected in (
        ([True, True, True], [0, 1, 2]),
        ([False, True, True], [2, 1, 2]),
        ([True, False, False], [0, 0, 0]),
    ):
        kept = torch.full_like(draw, torch.nan)
        _, after = router.route(
            x, torch.tensor(0.5), state, kept, available=torch.tensor(available)
        )
        assert after.chosen.int().argmax(dim=1).tolist() == expected
        assert (after.chosen.sum(dim=1) == 1).all()


def test_only_trajectories_to_keep_keep_choice_and_policy_state() -> None:
    router, _ = router_of("balanced")
    x, draw = 2 * noise(4).double(), torch.rand(4, dtype=torch.float64)
    _, state = router.route(x, torch.tensor(1.0).double(), router.start(x, draw), draw)
    t, keep = torch.tensor(0.6).double(), torch.tensor([True, False, True, False])
    _, free = router.route(x, t, state, draw)
    alpha, mixed = router.route(x, t, state, draw, keep=keep)
    for row in range(4):
        expected = state if keep[row] else free
        assert mixed.chosen[row].equal(expected.chosen[row])
        assert mixed.policy[row].equal(expected.policy[row])
        assert mixed.source[row].equal(free.source[row])  # alpha goes on
    assert (free.policy - state.policy).abs().amax(dim=1).min() > 0.01
    _, all_kept = router.route(x, t, state, draw, keep=True)
    assert all_kept.chosen.equal(state.chosen)
    assert router.route(x, t, state, draw, keep=True)[0].equal(alpha)


# Temperature


def undecided() -> Tensor:
    """alpha `[200, 4]` over the simplex, some of it 0, one row certain and one even."""
    alpha = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) ** 3
    alpha[::5, 1] = 0
    alpha[7], alpha[8] = torch.tensor([0.0, 0.0, 1.0, 0.0]), torch.full((4,), 0.25)
    return alpha / alpha.sum(dim=1, keepdim=True)


def cooled(
    temperature: float, weights: list[float] | None = None, available: list[bool] | None = None
) -> Tensor:
    """What a router makes of `undecided()`."""
    given = undecided()
    weight = None if weights is None else torch.tensor(weights)
    router = Router(Stateless(lambda x, t: given), policy("full"), PI, weight, temperature)
    x, half = torch.zeros(len(given), 1), torch.full((len(given),), 0.5)
    there = None if available is None else torch.tensor(available)
    return router.route(x, torch.tensor(0.5), router.start(x, half), half, available=there)[0]


def test_a_temperature_of_1_is_bit_identical_to_none() -> None:
    assert cooled(1.0).equal(undecided())
    assert cooled(1.0, [1.0, 2.0, 0.0, 1.0]).equal(cooled(1, [1.0, 2.0, 0.0, 1.0]))
    oracle, x, t = mixture(), noise(20), torch.tensor(0.9)
    experts, source = [oracle.expert(k) for k in range(4)], Stateless(oracle.posterior)
    for rule in ("full", "stochastic"):
        plain = routed(oracle, rule)(x, t)
        same, warm = (
            RoutedDenoiser(experts, Router(source, policy(rule), temperature=temperature))(x, t)
            for temperature in (1.0, 9.0)
        )
        assert plain.equal(same)
        assert not plain.equal(warm)


@pytest.mark.parametrize("temperature", [0.01, 0.3, 0.9, 2.0, 100.0])
def test_temperature_is_a_power_of_alpha(
    temperature: float,
) -> None:
    power = undecided().double().numpy() ** (1 / temperature)
    found = cooled(temperature)
    expected = torch.from_numpy(power / power.sum(axis=1, keepdims=True))
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-3, atol=1e-6
    )  # 1e-7 of log alpha, times 1 / 0.01
    assert found[undecided() == 0].eq(0).all()
    assert found[7].tolist() == [0, 0, 1, 0]
    assert (found.argmax(dim=1) == undecided().argmax(dim=1)).all()


def test_extreme_temperatures_are_argmax_and_uniform() -> None:
    two = undecided().topk(2, dim=1).values
    clear = two[:, 0] > 1.2 * two[:, 1]  # 1.2^-100 is 1e-8
    assert clear.sum() > 150
    torch.testing.assert_close(cooled(0.01).amax(dim=1)[clear], torch.ones(int(clear.sum())))
    some = (undecided() > 0.01).all(dim=1)
    torch.testing.assert_close(
        cooled(100.0)[some], torch.full((int(some.sum()), 4), 0.25), rtol=0, atol=0.01
    )


def test_weights_and_availability_come_after_the_temperature() -> None:
    weights, available = [2.0, 0.5, 1.0, 0.0], [True, True, False, True]
    power = undecided().double() ** 2 * torch.tensor(weights)
    torch.testing.assert_close(
        cooled(0.5, weights).double(), power / power.sum(dim=1, keepdim=True), rtol=1e-4, atol=0
    )
    left = undecided().double() ** 2 * torch.tensor(available)
    rows = left.sum(dim=1) > 0  # where only one who is away is likely, the others stand alone
    torch.testing.assert_close(
        cooled(0.5, available=available)[rows].double(),
        (left / left.sum(dim=1, keepdim=True))[rows],
        rtol=1e-4,
        atol=0,
    )


@pytest.mark.parametrize("rule", ["full", "balanced"])
def test_temperature_leaves_the_source_unchanged(
    rule: str,
) -> None:
    plain, _ = router_of(rule)
    cold = Router(plain.source, plain.policy, plain.pi, temperature=0.5)
    x, half = 2 * noise(5).double(), torch.full((5,), 0.5, dtype=torch.float64)
    before, after = plain.start(x, half), cold.start(x, half)
    for t in torch.linspace(1, 0.2, 5, dtype=torch.float64):
        alpha, before = plain.route(x, t, before, half)
        colder, after = cold.route(x, t, after, half)
        torch.testing.assert_close(colder, alpha**2 / (alpha**2).sum(dim=1, keepdim=True))
        torch.testing.assert_close(after.source, before.source, rtol=0, atol=0)
