"""Sources of alpha: the simplex against another solver, integration against closed forms."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ddm.oracle import GaussianMixture
from ddm.schedules import schedule
from router.sources import Integrated, Stateless, prior, project_to_simplex

PI = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def oracle() -> GaussianMixture:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    return GaussianMixture(
        PI, means, torch.full((3, 2), 0.5, dtype=torch.float64), schedule("vp_linear")
    )


def full_path(
    mixture: GaussianMixture, x: Tensor, steps: int, t_min: float
) -> tuple[Tensor, list[Tensor]]:
    """Times and places on the probability-flow ODE, by Runge and Kutta's method with the score of
    the mixture.

    `dx/dt = -beta/2 (x + score)` and `score = (a D - x) / s^2`, not by the repository's velocity.
    """

    def v(x: Tensor, t: Tensor) -> Tensor:
        a, s, _, _ = mixture.schedule(t)
        return -(0.1 + 19.9 * t) / 2 * (x + (a * mixture.denoise(x, t) - x) / s**2)

    times = torch.linspace(1, t_min, steps + 1, dtype=torch.float64)
    places = [x]
    for t, t_next in pairwise(times):
        h, middle = t_next - t, (t + t_next) / 2
        k1 = v(x, t)
        k2 = v(x + h / 2 * k1, middle)
        k3 = v(x + h / 2 * k2, middle)
        k4 = v(x + h * k3, t_next)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        places.append(x)
    return times, places


def test_the_prior_is_pi_for_every_image_at_every_time() -> None:
    source = prior(PI)
    for t in (1.0, 0.2):
        alpha = source(torch.randn(4, 1, 2, 2), torch.tensor(t))
        torch.testing.assert_close(alpha, PI.float().expand(4, -1), rtol=0, atol=0)


def test_projection_to_the_simplex_equals_bisection_on_its_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    p = (
        torch.randn(200, 5, generator=generator, dtype=torch.float64)
        * torch.logspace(-2, 1, 200)[:, None]
        + 0.2
    )
    low, high = p.min(dim=1).values - 1, p.max(dim=1).values
    for _ in range(80):  # sum max(p - threshold, 0) falls with the threshold and has to be 1
        middle = (low + high) / 2
        too_low = (p - middle[:, None]).clamp_min(0).sum(dim=1) > 1
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    projected = project_to_simplex(p)
    torch.testing.assert_close(projected, (p - low[:, None]).clamp_min(0), rtol=0, atol=1e-9)
    assert (
        (projected > 0).sum(dim=1).unique() == torch.arange(1, 6)
    ).all()  # faces of every dimension


def test_projection_is_by_hand_in_two_dimensions() -> None:
    inside = torch.distributions.Dirichlet(torch.ones(4)).sample((20,))
    torch.testing.assert_close(project_to_simplex(inside), inside)
    corner = torch.tensor([[1.0, 0.0, 0.0]])
    torch.testing.assert_close(project_to_simplex(corner), corner, rtol=0, atol=0)
    p = torch.tensor([[0.9, 0.5], [2.0, 0.1], [-0.2, -0.4]])
    torch.testing.assert_close(
        project_to_simplex(p), torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.6, 0.4]])
    )


def test_integrating_the_exact_rate_is_second_order() -> None:
    mixture = oracle()
    errors = []
    starts = torch.tensor([[0.4, -0.2], [-1.0, 0.8], [0.1, 1.3]], dtype=torch.float64)
    times, places = full_path(mixture, starts, 400, t_min=0.05)
    for every in (4, 2, 1):
        worst = 0.0
        for row in range(len(starts)):
            x_start = places[0][row : row + 1]
            source = Followed(mixture.posterior_rate, mixture.posterior(x_start, times[0])[0])
            for t, x in zip(times[::every], places[::every], strict=True):
                alpha = source(x[row : row + 1], t)
                worst = max(
                    worst, float((alpha - mixture.posterior(x[row : row + 1], t)).abs().max())
                )
        errors.append(worst)
    assert errors[-1] < 1e-4
    for coarse, fine in pairwise(errors):
        assert 3.5 < coarse / fine < 4.5
    ends = mixture.posterior(places[-1], times[-1])
    assert (
        ends - mixture.posterior(places[0], times[0])
    ).abs().max() > 0.3  # there was something to follow


def test_a_rate_linear_in_t_is_integrated_exactly_and_downwards_from_pi() -> None:
    slope = torch.tensor([0.4, -0.1, -0.3], dtype=torch.float64)
    source = Followed(lambda x, t: (t * slope).expand(len(x), -1), PI)
    x = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    for t in (1.0, 0.9, 0.5, 0.0):  # steps of any size
        alpha = source(x, torch.tensor(t, dtype=torch.float64))
        torch.testing.assert_close(alpha, (PI + slope * (t**2 - 1) / 2).expand(2, -1))


def test_alpha_slides_along_a_face_of_the_simplex() -> None:
    slope = torch.tensor([8.0, -5.0, -3.0])
    rates = iter(
        [slope, slope, 0 * slope, -slope / 16]
    )  # t falls: a positive rate lowers the first
    source = Followed(lambda x, t: next(rates).expand(len(x), -1), torch.tensor([0.5, 0.3, 0.2]))
    found = torch.cat([source(torch.zeros(1, 2), torch.tensor(t)) for t in (1.0, 0.9, 0.9, 0.5)])
    # (.5, .3, .2) - .1 (8, -5, -3) = (-.3, .8, .5), of which (0, .65, .35) is the nearest point;
    # then half of .4 (.5, ...)
    expected = [[0.5, 0.3, 0.2], [0.0, 0.65, 0.35], [0.0, 0.65, 0.35], [0.1, 0.5875, 0.3125]]
    torch.testing.assert_close(found, torch.tensor(expected))


class Followed(Integrated):
    """One batch of trajectories from start to end: the state goes from call to call."""

    state: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, self.state = self.step(x, t, self.start(x) if self.state is None else self.state)
        return alpha


def varying_sources() -> tuple[GaussianMixture, Tensor, list[float]]:
    return oracle(), torch.randn(3, 2, dtype=torch.float64), [1.0, 0.8, 0.45, 0.2]


def test_with_pull_0_combined_is_derivative() -> None:
    mixture, x, times = varying_sources()
    combined = Followed(mixture.posterior_rate, PI, mixture.posterior, relaxation_rate=0.0)
    derivative = Followed(mixture.posterior_rate, PI)
    for t in torch.tensor(times, dtype=torch.float64):
        torch.testing.assert_close(combined(x, t), derivative(x, t), rtol=0, atol=0)
    assert (derivative(x, t) - mixture.posterior(x, t)).abs().max() > 0.01


def test_combined_with_a_huge_rate_is_the_posterior() -> None:
    mixture, x, times = varying_sources()
    combined = Followed(mixture.posterior_rate, PI, mixture.posterior, relaxation_rate=1e9)
    for step, t in enumerate(torch.tensor(times, dtype=torch.float64)):
        expected = mixture.posterior(x, t) if step > 0 else PI.expand(3, -1)
        torch.testing.assert_close(combined(x, t), expected)


def test_an_infinite_relaxation_rate_is_finite_at_the_first_call() -> None:
    mixture, x, times = varying_sources()
    combined = Followed(mixture.posterior_rate, PI, mixture.posterior, relaxation_rate=math.inf)
    first, *later = torch.tensor(times, dtype=torch.float64)
    alpha = combined(x, first)
    assert alpha.isfinite().all() and (alpha >= 0).all()
    torch.testing.assert_close(alpha.sum(dim=1), torch.ones(3, dtype=torch.float64))
    for t in later:
        torch.testing.assert_close(combined(x, t), mixture.posterior(x, t))


def test_the_pull_is_equal_in_equal_time_whatever_the_number_of_steps() -> None:
    """Against a closed form: without a rate, the distance to a constant posterior decays as
    exp(-relaxation_rate (1 - t)).
    """
    target, relaxation_rate, end = torch.tensor([0.1, 0.1, 0.8], dtype=torch.float64), 3.0, 0.4
    x = torch.zeros(2, 2, dtype=torch.float64)
    expected = target + (PI - target) * math.exp(-relaxation_rate * (1 - end))
    for steps in (1, 4, 60):
        source = Followed(
            lambda x, t: torch.zeros(len(x), 3).to(x),
            PI,
            lambda x, t: target.expand(len(x), -1),
            relaxation_rate,
        )
        for t in torch.linspace(1, end, steps + 1, dtype=torch.float64):
            alpha = source(x, t)
        torch.testing.assert_close(alpha, expected.expand(2, -1))


def test_sources_are_independent_of_the_batch() -> None:
    """Rows of one state, each with a time of its own and one at its start, against one trajectory
    after another.
    """
    mixture = oracle()
    source = Integrated(mixture.posterior_rate, PI, mixture.posterior, relaxation_rate=7.0)
    x = torch.randn(3, 2, dtype=torch.float64)
    ways = [[1.0, 0.7, 0.4], [1.0, 0.9], [1.0]]
    alone, states = [], []
    for row, times_so_far in enumerate(ways):
        state = source.start(x[row : row + 1])
        for t in times_so_far[:-1]:
            _, state = source.step(x[row : row + 1], torch.tensor(t, dtype=torch.float64), state)
        states.append(state)
        alone.append(
            source.step(
                x[row : row + 1], torch.tensor(times_so_far[-1], dtype=torch.float64), state
            )
        )
    times = torch.tensor([times_so_far[-1] for times_so_far in ways], dtype=torch.float64)
    before = torch.cat(states)
    kept = before.clone()
    alpha, state = source.step(x, times, before)
    torch.testing.assert_close(alpha, torch.cat([one for one, _ in alone]))
    torch.testing.assert_close(state, torch.cat([one for _, one in alone]))
    torch.testing.assert_close(
        before, kept, equal_nan=True, rtol=0, atol=0
    )  # what was handed in stays as it was
    torch.testing.assert_close(alpha[2], PI)
    assert (alpha[0] - alpha[1]).abs().max() > 0.01


def test_a_plain_function_has_no_state() -> None:
    source = Stateless(oracle().posterior)
    x, t = (
        torch.randn(4, 2, dtype=torch.float64),
        torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=torch.float64),
    )
    alpha, state = source.step(x, t, source.start(x))
    assert state.numel() == 0 and len(state) == 4
    torch.testing.assert_close(
        alpha, torch.cat([oracle().posterior(x[i : i + 1], t[i]) for i in range(4)])
    )
