"""Who moves the picture: every policy's choice by hand, its frequencies, and the bound on what `balanced` owes."""

import re

import pytest
import torch
from torch import Tensor

from ddm.errors import ConfigError
from router.policies import Policy, policy

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
    chosen = choice(policy("top_k", top_k=2), torch.tensor([[0.2, 0.4, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]]))
    assert [len(row) for row in chosen] == [2, 2] and 1 in chosen[0]


def test_nucleus_chooses_the_fewest_that_carry_the_mass() -> None:
    alpha = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.125, 0.0, 0.0, 0.875], [0.25, 0.25, 0.25, 0.25]])
    half = choice(policy("nucleus", nucleus_p=0.5), alpha)
    assert half[:2] == [[0], [3]] and len(half[2]) == 2
    assert choice(policy("nucleus", nucleus_p=0.51), alpha)[:2] == [[0, 1], [3]]
    assert choice(policy("nucleus", nucleus_p=0.875), alpha)[1] == [3]
    assert choice(policy("nucleus", nucleus_p=0.9), alpha)[1:] == [[0, 3], [0, 1, 2, 3]]
    assert choice(policy("nucleus", nucleus_p=1.0), alpha)[:2] == [
        [0, 1, 2, 3],
        [0, 3],
    ]  # never one that carries nothing
    assert all(len(row) == 1 for row in choice(policy("nucleus", nucleus_p=1e-6), alpha))


def test_nucleus_is_the_smallest_set_that_carries_the_mass_among_all_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    alpha = torch.distributions.Dirichlet(torch.full((4,), 0.7)).sample((100,)).double()
    alpha = alpha[:, torch.randperm(4, generator=generator)]
    sets = torch.tensor([[(code >> k) & 1 for k in range(4)] for code in range(1, 16)], dtype=torch.float64)
    carried = alpha @ sets.T
    fewest = torch.where(carried >= 0.8, sets.sum(dim=1), torch.inf).min(dim=1).values
    for row, chosen in enumerate(choice(policy("nucleus", nucleus_p=0.8), alpha)):
        best_of_size = carried[row][sets.sum(dim=1) == fewest[row]].max()
        assert len(chosen) == fewest[row]
        assert float(alpha[row, chosen].sum()) == pytest.approx(float(best_of_size)) and best_of_size >= 0.8


def test_fixed_draws_from_pi_and_keeps_its_expert_whatever_alpha() -> None:
    rule, n = policy("fixed"), 1000
    state = rule.start(PI.expand(n, -1), even_draws(n))
    first, state = rule.choose(torch.tensor([0.0, 0.0, 1.0]).expand(n, -1), state, even_draws(n))
    assert first.sum(dim=0).tolist() == [500, 300, 200] and (first.sum(dim=1) == 1).all()
    again, _ = rule.choose(torch.tensor([1.0, 0.0, 0.0]).expand(n, -1), state, even_draws(n).flip(0))
    assert again.equal(first)


def test_stochastic_chooses_one_as_often_as_alpha_says_in_the_order_of_its_draw() -> None:
    rule, n = policy("stochastic"), 10_000
    state = rule.start(PI.expand(n, -1), even_draws(n))
    for row in ALPHA:
        chosen, after = rule.choose(row.expand(n, -1), state, even_draws(n))
        assert (chosen.sum(dim=1) == 1).all() and after.equal(state)
        assert (chosen.sum(dim=0) - n * row).abs().max() <= 1
    assert choice(rule, ALPHA, draw=0.04) == [[0], [0], [1]]
    assert choice(rule, ALPHA, draw=0.65) == [[1], [2], [2]]


def test_stochastic_never_draws_probability_zero_even_at_the_ends_of_its_draws() -> None:
    rule = policy("stochastic")
    alpha = torch.tensor([[0.0, 0.7, 0.3, 0.0], [0.0, 0.0, 0.9999999, 0.0], [0.5, 0.0, 0.0, 0.49999]])
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
    # draw 0.6 starts it with expert 1, which leaves all credits 0; then, before each choice:
    # (.5, .3125, .1875) (0, .625, .375) (.5, -.0625, .5625) (1, .25, -.25) (.5, .5625, -.0625) (1, -.125, .125)
    turns = play_balanced(alpha.expand(7, 1, -1), torch.tensor([0.6], dtype=torch.float64))
    assert turns[:, 0].int().argmax(dim=1).tolist() == [1, 0, 1, 2, 0, 1, 0]


def test_the_first_choice_of_balanced_is_distributed_as_pi() -> None:
    n = 1000
    first = play_balanced(PI.double().expand(1, n, -1), even_draws(n))[0]
    assert (first.sum(dim=1) == 1).all() and first.sum(dim=0).tolist() == [500, 300, 200]


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_balanced_owes_an_expert_less_than_1_over_2_to_1_over_k_and_has_overpaid_it_less_than_one(k: int) -> None:
    """The bound, for any sequence of alpha whatever, constant ones included.

    After the first step, which goes to k0, all credits are 0. Let m_j be the largest mean credit of any j experts; they sum to 0,
    so m_K = 0. If the j richest of a step do not include the one who moved, they were no richer before it than it was, and the
    j + 1 of them shared 1 more: m_j <= m_{j+1} + 1 / (j + 1). So no credit passes 1/2 + 1/3 + ... + 1/K. And the mover,
    the richest of K who share 1, had at least 1/K, of which one turn was taken.
    """
    n, b = 300, 400
    generator = torch.Generator().manual_seed(k)
    constant = torch.distributions.Dirichlet(torch.full((k,), 0.7, dtype=torch.float64)).sample((b,)).expand(n, -1, -1)
    wild = torch.softmax(3 * torch.randn(n, b, k, generator=generator, dtype=torch.float64), dim=2)
    wild[0] = 1 / k
    for alphas in (constant, wild):
        turns = play_balanced(alphas, even_draws(b)).double()
        owed = alphas[1:].cumsum(dim=0) - turns[1:].cumsum(dim=0)
        assert owed.max() <= sum(1 / j for j in range(2, k + 1)) + 1e-9
        assert owed.min() >= 1 / k - 1 - 1e-9
        # the random start is one turn of its own: against all of alpha the bound widens by less than one
        assert (alphas.cumsum(dim=0) - turns.cumsum(dim=0)).abs().max() < sum(1 / j for j in range(1, k + 1))
    assert owed.max() > 0.3 and owed.min() < -0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "best"},
            "sample.policy must be one of full top_k nucleus fixed stochastic balanced, got 'best'",
        ),
        ({"name": "top_k", "top_k": 0}, "sample.top_k must be at least 1, got 0"),
        ({"name": "top_k", "top_k": 1.5}, "sample.top_k must be at least 1, got 1.5"),
        ({"name": "nucleus", "nucleus_p": 0.0}, "sample.nucleus_p must be in (0, 1], got 0.0"),
        ({"name": "nucleus", "nucleus_p": 1.1}, "sample.nucleus_p must be in (0, 1], got 1.1"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_by_key_rule_and_value(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        policy(**arguments)  # type: ignore[arg-type]
