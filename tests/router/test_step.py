"""The router alone, a pure function of rows: availability, weights, temperature."""

import pytest
import torch
from torch import Tensor

from ddm.oracle import GaussianMixture
from router.policies import POLICIES, policy
from router.routing import RoutedDenoiser
from router.sources import Integrated, Stateless
from router.step import Router, RoutingState
from tests.router.mixture import LINEAR, PI, fixed_alpha, mixture, noise, routed

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
