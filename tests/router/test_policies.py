"""Every policy's choice by hand, its frequencies, and the state of `balanced` and `adaptive`."""

import math
import re

import pytest
import torch
from torch import Tensor

from ddm.errors import ConfigError
from router.policies import (
    Adaptive,
    Policy,
    Switching,
    first_uniforms,
    policy,
    sample_categorical,
    weights,
)

PI = torch.tensor([0.5, 0.3, 0.2])
ALPHA = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.0, 0.5], [0.0, 0.05, 0.95]])


def even_draws(n: int) -> Tensor:
    """n draws that stand for all: one in the middle of each of n equal parts of (0, 1)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def choice(rule: Policy, alpha: Tensor, draw: float = 0.5) -> list[list[int]]:
    """The experts that a fresh policy chooses for each row."""
    draws = torch.full((len(alpha),), draw, dtype=torch.float64)
    even = torch.full_like(alpha, 1 / alpha.shape[1])
    chosen, _ = rule.choose(alpha, rule.start(even, draws), draws)
    assert chosen.dtype == torch.bool
    return [row.nonzero()[:, 0].tolist() for row in chosen]


def test_full_chooses_all() -> None:
    assert choice(policy("full"), ALPHA) == [[0, 1, 2]] * 3


def test_top_k_chooses_the_k_largest() -> None:
    assert choice(policy("top_k", top_k=1), ALPHA[[0, 2]]) == [[1], [2]]
    assert choice(policy("top_k", top_k=2), ALPHA) == [[1, 2], [0, 2], [1, 2]]
    assert choice(policy("top_k", top_k=7), ALPHA) == [[0, 1, 2]] * 3  # more than there are: all


def test_top_k_chooses_k_of_the_tied_and_all_that_are_larger() -> None:
    chosen = choice(
        policy("top_k", top_k=2), torch.tensor([[0.2, 0.4, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]])
    )
    assert [len(row) for row in chosen] == [2, 2] and 1 in chosen[0]


def test_nucleus_chooses_the_fewest_that_carry_the_mass() -> None:
    alpha = torch.tensor(
        [[0.5, 0.25, 0.125, 0.125], [0.125, 0.0, 0.0, 0.875], [0.25, 0.25, 0.25, 0.25]]
    )
    half = choice(policy("nucleus", nucleus_p=0.5), alpha)
    assert half[:2] == [[0], [3]] and len(half[2]) == 2
    assert choice(policy("nucleus", nucleus_p=0.51), alpha)[:2] == [[0, 1], [3]]
    assert choice(policy("nucleus", nucleus_p=0.875), alpha)[1] == [3]
    assert choice(policy("nucleus", nucleus_p=0.9), alpha)[1:] == [[0, 3], [0, 1, 2, 3]]
    # Never one that carries nothing:
    assert choice(policy("nucleus", nucleus_p=1.0), alpha)[:2] == [[0, 1, 2, 3], [0, 3]]
    assert all(len(row) == 1 for row in choice(policy("nucleus", nucleus_p=1e-6), alpha))


@pytest.mark.parametrize("name", ["full", "top_k", "nucleus", "fixed", "switching", "stochastic"])
def test_a_step_costs_at_most_what_a_request_is_charged_for_it(name: str) -> None:
    even = policy(name, nucleus_p=1.0, top_k=3)
    assert all(len(row) <= even.nfe_per_step(8) for row in choice(even, torch.full((4, 8), 1 / 8)))


def test_nucleus_is_the_smallest_set_of_enough_mass() -> None:
    generator = torch.Generator().manual_seed(0)
    alpha = torch.distributions.Dirichlet(torch.full((4,), 0.7)).sample((100,)).double()
    alpha = alpha[:, torch.randperm(4, generator=generator)]
    sets = torch.tensor(
        [[(code >> k) & 1 for k in range(4)] for code in range(1, 16)], dtype=torch.float64
    )
    carried = alpha @ sets.T
    fewest = torch.where(carried >= 0.8, sets.sum(dim=1), torch.inf).min(dim=1).values
    for row, chosen in enumerate(choice(policy("nucleus", nucleus_p=0.8), alpha)):
        best_of_size = carried[row][sets.sum(dim=1) == fewest[row]].max()
        assert len(chosen) == fewest[row]
        assert (
            float(alpha[row, chosen].sum()) == pytest.approx(float(best_of_size))
            and best_of_size >= 0.8
        )


def draws(rate: float, n: int, times: Tensor, seed: int = 0) -> Tensor:
    """The uniform numbers of n images at each step."""
    step = torch.arange(len(times))
    last = torch.cat([times[:1], times[:-1]])
    return Switching(rate).uniforms(seed, torch.arange(n), step, last, times)


def test_fixed_never_chooses_again() -> None:
    rule = policy("fixed")
    assert rule.keeps
    times = torch.linspace(1, 0, 5)
    u = rule.uniforms(3, torch.arange(4), torch.arange(5), times, times)
    assert u.isnan().all() and u.shape == (4, 5)


def test_redraws_of_switching_are_a_poisson_process() -> None:
    n, rate = 4000, 3.0
    times = torch.linspace(1, 0, 2001, dtype=torch.float64)
    redrawn = ~draws(rate, n, times).isnan()
    assert not redrawn[:, 0].any()  # at t = 1 the first expert is the one drawn from pi
    count = redrawn.sum(dim=1).double()
    assert float(count.mean()) == pytest.approx(rate, abs=0.1)
    assert float(count.var()) == pytest.approx(rate, abs=0.25)
    by_tenth = redrawn[:, 1:].double().reshape(n, 10, 200).sum(dim=2)
    assert (by_tenth.mean(dim=0) - rate / 10).abs().max() < 0.04
    assert torch.corrcoef(by_tenth.T).fill_diagonal_(0).abs().max() < 0.07
    choices = draws(rate, n, times)[redrawn]
    assert float(choices.mean()) == pytest.approx(0.5, abs=0.01)


def test_redraws_of_an_image_are_the_same_at_any_number_of_steps() -> None:
    fine, coarse = (torch.linspace(1, 0, n + 1, dtype=torch.float64) for n in (100, 10))
    many, few = draws(4.0, 50, fine), draws(4.0, 50, coarse)
    for i in range(1, 11):  # the last of ten fine steps that redraws is the coarse step's redraw
        for row in range(50):
            within = many[row, 10 * i - 9 : 10 * i + 1]
            numbers = within[~within.isnan()]
            assert few[row, i].isnan() if not len(numbers) else few[row, i] == numbers[-1]


def test_redraws_are_the_same_step_by_step_and_for_each_seed_of_a_batch() -> None:
    times = torch.linspace(1, 0, 9, dtype=torch.float64)
    whole = torch.cat([draws(4.0, 3, times, seed) for seed in (1, 2)])
    seeds = torch.tensor([1, 1, 1, 2, 2, 2])
    index = torch.arange(3).repeat(2)
    for n in range(1, 9):
        last, now = times[n - 1].expand(6, 1), times[n].expand(6, 1)
        one = Switching(4.0).uniforms(seeds, index, torch.tensor([n]), last, now)
        torch.testing.assert_close(one[:, 0], whole[:, n], equal_nan=True, rtol=0, atol=0)


def test_an_infinite_rate_is_stochastic_in_law() -> None:
    times = torch.linspace(1, 0, 11, dtype=torch.float64)
    assert not draws(900.0, 200, times)[:, 1:].isnan().any()


def test_any_16_first_experts_in_a_row_are_in_proportion_to_pi() -> None:
    pi = torch.tensor([0.5, 0.25, 0.25])
    for seed, first in ((0, 0), (1, 7), (2**62, 2**55)):
        index = first + torch.arange(16)
        u = first_uniforms(seed, index)
        assert ((u > 0) & (u < 1)).all()
        count = sample_categorical(pi.expand(16, -1), u).sum(dim=0)
        assert (count - 16 * pi).abs().max() <= 1.5
        rows = first_uniforms(torch.full((16,), seed), index)
        assert rows.equal(u)


def test_a_first_expert_is_uniform_over_the_seeds() -> None:
    seeds = torch.arange(4000)
    for i in (0, 5):
        u = first_uniforms(seeds, torch.full((4000,), i)).sort().values
        even = (torch.arange(4000) + 0.5) / 4000
        assert (u - even).abs().max() < 0.03  # Kolmogorov and Smirnov's distance


def test_stochastic_samples_by_inversion() -> None:
    rule, n = policy("stochastic"), 10_000
    state = rule.start(PI.expand(n, -1), even_draws(n))
    for row in ALPHA:
        chosen, after = rule.choose(row.expand(n, -1), state, even_draws(n))
        assert (chosen.sum(dim=1) == 1).all() and after.equal(state)
        assert (chosen.sum(dim=0) - n * row).abs().max() <= 1
    assert choice(rule, ALPHA, draw=0.04) == [[0], [0], [1]]
    assert choice(rule, ALPHA, draw=0.65) == [[1], [2], [2]]


def test_stochastic_never_samples_probability_zero() -> None:
    rule = policy("stochastic")
    alpha = torch.tensor(
        [[0.0, 0.7, 0.3, 0.0], [0.0, 0.0, 0.9999999, 0.0], [0.5, 0.0, 0.0, 0.49999]]
    )
    for draw in (0.5 / 2**32, 1e-30, 0.5, 1 - 0.5 / 2**32, 1 - 2.0**-53):
        for row, chosen in zip(alpha, choice(rule, alpha, draw), strict=True):
            assert len(chosen) == 1 and row[chosen[0]] > 0
    assert choice(rule, alpha, 1 - 2.0**-53) == [[2], [2], [3]]


def play_balanced(alphas: Tensor, draws: Tensor) -> Tensor:
    """The choices `[N, B, K]` over N steps of alpha `[N, B, K]`, with pi the first of them."""
    rule = policy("balanced")
    state, turns = rule.start(alphas[0], draws), []
    for alpha in alphas:
        chosen, state = rule.choose(alpha, state, torch.full_like(draws, 0.5))
        turns.append(chosen)
    return torch.stack(turns)


def test_balanced_by_hand() -> None:
    alpha = torch.tensor([0.5, 0.3125, 0.1875], dtype=torch.float64)
    # draw 0.6 starts it with expert 1, which leaves all credits 0; then, before each choice: (.5,
    # .3125, .1875) (0, .625, .375) (.5, -.0625, .5625) (1, .25, -.25) (.5, .5625, -.0625) (1,
    # -.125, .125)
    turns = play_balanced(alpha.expand(7, 1, -1), torch.tensor([0.6], dtype=torch.float64))
    assert turns[:, 0].int().argmax(dim=1).tolist() == [1, 0, 1, 2, 0, 1, 0]


def test_the_first_choice_of_balanced_is_distributed_as_pi() -> None:
    n = 1000
    first = play_balanced(PI.double().expand(1, n, -1), even_draws(n))[0]
    assert (first.sum(dim=1) == 1).all() and first.sum(dim=0).tolist() == [500, 300, 200]


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_credit_of_balanced_is_bounded(
    k: int,
) -> None:
    """The bound, for any sequence of alpha whatever, constant ones included.

    After the first step, which goes to k0, all credits are 0. Let m_j be the largest mean credit of
    any j experts; they sum to 0, so m_K = 0. If the j richest of a step do not include the one who
    moved, they were no richer before it than it was, and the j + 1 of them shared 1 more: m_j <=
    m_{j+1} + 1 / (j + 1). So no credit passes 1/2 + 1/3 + ... + 1/K. And the mover, the richest of
    K who share 1, had at least 1/K, of which one turn was taken.
    """
    n, b = 300, 400
    generator = torch.Generator().manual_seed(k)
    constant = (
        torch.distributions.Dirichlet(torch.full((k,), 0.7, dtype=torch.float64))
        .sample((b,))
        .expand(n, -1, -1)
    )
    wild = torch.softmax(3 * torch.randn(n, b, k, generator=generator, dtype=torch.float64), dim=2)
    wild[0] = 1 / k
    for alphas in (constant, wild):
        turns = play_balanced(alphas, even_draws(b)).double()
        owed = alphas[1:].cumsum(dim=0) - turns[1:].cumsum(dim=0)
        assert owed.max() <= sum(1 / j for j in range(2, k + 1)) + 1e-9
        assert owed.min() >= 1 / k - 1 - 1e-9
        # the random start is one turn of its own: against all of alpha the bound widens by less
        # than one
        assert (alphas.cumsum(dim=0) - turns.cumsum(dim=0)).abs().max() < sum(
            1 / j for j in range(1, k + 1)
        )
    assert owed.max() > 0.3 and owed.min() < -0.3


def play_adaptive(rule: Policy, alphas: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The choices `[N, B, K]` and the credits after them `[N, B, K]` over N steps of alpha `[N, B,
    K]`, with pi the first.
    """
    state, turns, credits = rule.start(alphas[0], draws), [], []
    for alpha in alphas:
        chosen, state = rule.choose(alpha, state, torch.full_like(draws, 0.5))
        turns.append(chosen)
        credits.append(state[:, : alphas.shape[2]])
    return torch.stack(turns), torch.stack(credits)


def wild(n: int, b: int, k: int, sharpness: float = 3.0) -> Tensor:
    """alpha `[N, B, K]` without any order in it, float64; the first is even."""
    generator = torch.Generator().manual_seed(k)
    alphas = torch.softmax(
        sharpness * torch.randn(n, b, k, generator=generator, dtype=torch.float64), dim=2
    )
    alphas[0] = 1 / k
    return alphas


def test_the_weights_are_alpha_renormalized_over_the_chosen() -> None:
    alpha = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.0, 1.0, 0.0]])
    chosen = torch.tensor([[1, 1, 0], [0, 0, 1], [1, 1, 1], [1, 1, 0]]).bool()
    expected = torch.tensor(
        [[0.625, 0.375, 0.0], [0.0, 0.0, 1.0], [0.5, 0.3, 0.2], [0.0, 1.0, 0.0]]
    )
    for dtype in (torch.float32, torch.float64):
        found = weights(alpha.to(dtype), chosen)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-6, atol=1e-7)


def test_weights_are_equal_where_alpha_is_zero() -> None:
    alpha = torch.tensor(
        [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0], [1e-30, 0.0, 3e-30, 1.0]]
    )
    chosen = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]]).bool()
    expected = torch.tensor(
        [[0, 0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3, 0], [1, 0, 0, 0], [0.25, 0, 0.75, 0]]
    )
    torch.testing.assert_close(weights(alpha, chosen), expected)
    torch.testing.assert_close(weights(alpha, chosen).sum(dim=1), torch.ones(4))


def test_adaptive_by_hand() -> None:
    alpha = torch.tensor([0.5, 0.3125, 0.1875], dtype=torch.float64)
    # draw 0.6 starts it with expert 1, which leaves all credits 0 and half a call saved. Before
    # each choice after that: (.5, .3125, .1875) and 1 saved: 0 and 1 pay 8/13 and 5/13; (5/13,
    # 25/104, 3/8) and .5: 0 pays 1; (-3/26, 115/208, 9/16) and 1: 1 and 2 pay 5/8 and 3/8; and
    # again the credits of two steps before
    turns, credits = play_adaptive(
        policy("adaptive", budget=1.5),
        alpha.expand(6, 1, -1),
        torch.tensor([0.6], dtype=torch.float64),
    )
    assert [row.nonzero()[:, 0].tolist() for row in turns[:, 0]] == [
        [1],
        [0, 1],
        [0],
        [1, 2],
        [0],
        [1, 2],
    ]
    two = torch.tensor([-3 / 26, -15 / 208, 3 / 16], dtype=torch.float64)
    torch.testing.assert_close(credits[[0, 1, 3, 5], 0], torch.stack([0 * two, two, two, two]))


def test_adaptive_spends_only_where_alpha_is_undecided() -> None:
    certain, even = torch.tensor([0.9375, 0.0625]), torch.tensor([0.5, 0.5])
    alphas = torch.stack([*[certain] * 4, *[even] * 6])[:, None].double()
    draws = torch.tensor([0.5], dtype=torch.float64)
    turns, _ = play_adaptive(Adaptive(budget=1.5, decided=0.9), alphas, draws)
    assert turns.sum(dim=2)[:, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 1, 2]
    edge, _ = play_adaptive(
        Adaptive(budget=1.5, decided=0.9375), alphas, draws
    )  # decided itself is decided enough
    assert edge.equal(turns)
    keen, _ = play_adaptive(Adaptive(budget=1.5, decided=0.95), alphas, draws)
    assert keen.sum(dim=2)[:, 0].tolist() == [1, 2, 1, 2, 1, 2, 1, 2, 1, 2]
    assert (
        policy("adaptive", budget=1.25) == Adaptive(budget=1.25, decided=0.9)
        and Adaptive().budget == 1.5
    )


@pytest.mark.parametrize("budget", [1.0, 1.1, 1.25, 1.3, 1.5, 1.9, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adaptive_stays_within_its_budget(budget: float, dtype: torch.dtype) -> None:
    n, b, k, rounding = 120, 30, 5, 1e-4
    may = torch.tensor([math.floor(budget * step + rounding) for step in range(1, n + 1)])[:, None]
    for alphas, spends_all in ((wild(n, b, k), False), (wild(n, b, k, 0.5), True)):
        turns, _ = play_adaptive(policy("adaptive", budget=budget), alphas.to(dtype), even_draws(b))
        calls = turns.sum(dim=2)
        assert calls.min() >= 1 and calls.max() <= 2
        assert (calls.cumsum(dim=0) <= may).all()
        if spends_all:  # no alpha is ever decided
            assert alphas.max() < 0.9 and calls.sum(dim=0).min() >= math.floor(
                min(budget, 2.0) * n - rounding
            )


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_with_a_budget_of_one_call_adaptive_is_balanced(k: int) -> None:
    alphas = wild(200, 40, k)
    turns, credits = play_adaptive(policy("adaptive", budget=1.0), alphas, even_draws(40))
    expected, owed = play_adaptive(policy("balanced"), alphas, even_draws(40))
    assert turns.equal(expected)
    torch.testing.assert_close(credits, owed, rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [2, 3, 5, 8])
@pytest.mark.parametrize("budget", [1.25, 2.0])
def test_the_credits_of_adaptive_sum_to_0_and_stay_bounded(k: int, budget: float) -> None:
    n, b = 250, 20
    sparse = wild(n, b, k, 12.0)
    constant = wild(2, b, k)[1].expand(n, -1, -1)
    for alphas in (wild(n, b, k), sparse, constant):
        turns, credits = play_adaptive(policy("adaptive", budget=budget), alphas, even_draws(b))
        torch.testing.assert_close(
            credits.sum(dim=2), torch.zeros(n, b, dtype=torch.float64), rtol=0, atol=1e-9
        )
        assert credits.abs().max() < 1.5
        # what was promised less what was paid, over any stretch: the difference of two credits
        shares = torch.stack(
            [weights(alpha, turn) for alpha, turn in zip(alphas, turns, strict=True)]
        )
        torch.testing.assert_close(
            (alphas - shares)[1:].cumsum(dim=0), credits[1:] - credits[:1], rtol=0, atol=1e-9
        )


def test_one_expert_alone_is_asked_once_a_step_whatever_the_budget() -> None:
    turns, credits = play_adaptive(
        policy("adaptive", budget=2.0), torch.ones(20, 3, 1), even_draws(3)
    )
    assert turns.shape == (20, 3, 1) and turns.all() and credits.abs().max() == 0


def test_a_row_of_adaptive_is_the_same_alone_and_among_others() -> None:
    alphas, draws = wild(60, 6, 4), even_draws(6)
    turns, _ = play_adaptive(policy("adaptive"), alphas, draws)
    for row in range(6):
        alone, _ = play_adaptive(policy("adaptive"), alphas[:, row : row + 1], draws[row : row + 1])
        assert alone[:, 0].equal(turns[:, row])
    assert (
        len({tuple(calls) for calls in turns.sum(dim=2).T.tolist()}) > 1
    )  # each spends where it needs to


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "best"},
            "policy must be one of full top_k nucleus fixed switching stochastic balanced adaptive, got 'best'",
        ),
        ({"name": "top_k", "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"name": "top_k", "top_k": 1.5}, "top_k must be at least 1, got 1.5"),
        ({"name": "nucleus", "nucleus_p": 0.0}, "nucleus_p must be in (0, 1], got 0.0"),
        ({"name": "nucleus", "nucleus_p": 1.1}, "nucleus_p must be in (0, 1], got 1.1"),
        (
            {"name": "adaptive", "budget": 0.5},
            "budget must be at least 1 call a step, got 0.5",
        ),
        (
            {"name": "adaptive", "budget": math.nan},
            "budget must be at least 1 call a step, got nan",
        ),
        (
            {"name": "switching", "switch_rate": -1.0},
            "switch_rate must be finite and at least 0, got -1.0",
        ),
        (
            {"name": "switching", "switch_rate": math.inf},
            "switch_rate must be finite and at least 0, got inf",
        ),
        (
            {"name": "switching", "switch_rate": math.nan},
            "switch_rate must be finite and at least 0, got nan",
        ),
    ],
)
def test_a_policy_that_cannot_be_is_refused_by_key_rule_and_value(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        policy(**arguments)  # type: ignore[arg-type]


def test_the_evaluations_per_step_are_about_those_that_are_made() -> None:
    alpha = torch.rand(4000, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alpha = (6 * alpha).softmax(dim=1)
    cases = [(name, {}) for name in ("full", "fixed", "switching", "stochastic", "balanced")]
    for name, more in [*cases, ("top_k", {"top_k": 3}), ("top_k", {"top_k": 9})]:
        chosen = policy(name, **more)
        u = first_uniforms(0, torch.arange(len(alpha)))
        found, _ = chosen.choose(alpha, chosen.start(alpha, u), u)
        assert float(found.sum(dim=1).double().mean()) == chosen.nfe_per_step(6), name
    assert policy("adaptive", budget=1.25).nfe_per_step(6) == 1.25
    assert policy("adaptive", budget=1.25).nfe_per_step(1) == policy("nucleus").nfe_per_step(1) == 1
