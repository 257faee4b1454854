"""Distances against closed forms and scipy; the fit of a power law."""

import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import linregress

from ddm.errors import ConfigError
from ddm.measures import power_law_fit, sliced_w2, trajectory_error


def test_trajectory_error_is_the_mean_square_of_the_differences() -> None:
    x, reference = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert trajectory_error(x, reference) == (0 + 4 + 9 + 1) / 4


def test_trajectory_error_is_taken_in_float64() -> None:
    x = torch.full((4,), 1e-30)
    assert trajectory_error(x, torch.zeros(4)) == pytest.approx(1e-60, rel=1e-6, abs=0)


def test_sliced_w2_of_a_shifted_set_is_the_shift_seen_from_all_sides() -> None:
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([1.0, -2.0, 2.0])
    # E_u (u . shift)^2 = |shift|^2 / d
    assert sliced_w2(points, points + shift, projections=20_000) == pytest.approx(3 / math.sqrt(3), rel=0.02)


def test_sliced_w2_in_one_dimension_is_the_cheapest_pairing() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 1, generator=generator), 2 * torch.rand(40, 1, generator=generator)
    cost = (x - y.T).double().square().numpy()
    rows, columns = linear_sum_assignment(cost)
    assert sliced_w2(x, y) == pytest.approx(math.sqrt(cost[rows, columns].mean()), rel=1e-6)


def test_sliced_w2_between_centred_gaussians_is_the_difference_of_their_deviations() -> None:
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    # y = 3 x: W2(u.x, 3 u.x)^2 = 4 mean (u.x)^2, and the mean over u is 4 mean |x|^2 / d
    expected = math.sqrt(4 * float(x.square().mean()))
    assert sliced_w2(x, 3 * x, projections=20_000) == pytest.approx(expected, rel=0.02)


def test_sliced_w2_knows_sets_not_orders_and_is_symmetric() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 2, 3, 3, generator=generator), torch.randn(30, 2, 3, 3, generator=generator)
    assert sliced_w2(x, x.flip(0)) == 0
    assert sliced_w2(x, y) == pytest.approx(sliced_w2(y.flip(0), x), rel=1e-12)
    assert sliced_w2(x, y, seed=1) != sliced_w2(x, y, seed=2)


def test_sliced_w2_refuses_sets_of_unequal_sizes() -> None:
    message = "sliced_w2: the second set must have the shape (4, 2) of the first, got (5, 2)"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        sliced_w2(torch.zeros(4, 2), torch.zeros(5, 2))


def test_power_law_fit_recovers_an_exact_law() -> None:
    steps = [10, 20, 50, 100]
    law = power_law_fit(steps, [3.5 * n**-1.25 for n in steps])
    assert law == pytest.approx((3.5, 1.25, 1.0), rel=1e-12)


def test_power_law_fit_is_linear_regression_of_the_logarithms() -> None:
    steps, errors = [5, 10, 25, 50, 100], [0.9, 0.3, 0.25, 0.05, 0.06]
    line = linregress(np.log(steps), np.log(errors))
    expected = (math.exp(line.intercept), -line.slope, line.rvalue**2)
    assert power_law_fit(steps, errors) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "error"), [(2, 0.3), (3, 0.25), (3, 5e-4), (6, 5e-4)])
def test_a_constant_error_is_a_law_of_exponent_zero_that_explains_all(n: int, error: float) -> None:
    assert power_law_fit(range(1, n + 1), [error] * n) == pytest.approx((error, 0, 1), abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "errors", "message"),
    [
        ([10], [1.0], "power_law_fit: steps and errors must be of equal length, at least 2, got (1, 1)"),
        ([10, 20], [1.0], "power_law_fit: steps and errors must be of equal length, at least 2, got (2, 1)"),
        ([10, 20], [1.0, 0.0], "power_law_fit: errors must be positive, got 0.0"),
        ([10, 20], [1.0, -1.0], "power_law_fit: errors must be positive, got -1.0"),
    ],
)
def test_power_law_fit_refuses_what_has_no_law(steps: Sequence[int], errors: Sequence[float], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        power_law_fit(steps, errors)


def test_power_law_fit_refuses_errors_at_a_single_number_of_steps() -> None:
    with pytest.raises(ConfigError, match="steps"):
        power_law_fit([10, 10], [1.0, 2.0])
