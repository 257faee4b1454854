"""The routed denoiser against the oracle, its independence of the batch, and its evaluations."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddm.grids import time_grid
from ddm.measures import sliced_w2, trajectory_error
from ddm.rng import RngStream, normal
from ddm.samplers import sample
from router.policies import Switching, policy
from router.routing import RoutedDenoiser
from router.sources import Stateless, prior
from router.step import Router
from tests.router.mixture import LINEAR, PI, Drawing, constant, fixed_alpha, mixture, noise, routed


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
        return [float(model(torch.zeros(1, 1), torch.tensor(t))) for t in times]

    times = [0.9, 0.8, 0.8, 0.7]
    assert firsts(1) == [1.0, 2.0, 2.0, 1.0]
    assert firsts(2) == [1.0, 1.0, 2.0, 2.0]
    times = [0.9, 0.8, 0.8, 0.8]  # the third call's step has one call, and is taken again
    assert firsts(2) == [1.0, 1.0, 2.0, 1.0]


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
        for step in range(10):
            for t in (1 - step / 10, 0.9 - step / 10)[:calls_per_step]:
                model(torch.zeros(4, 1), torch.tensor(t))
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
