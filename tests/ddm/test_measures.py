"""Distances against closed forms and scipy; the fit of a power law."""

import math
import re
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment
from scipy.stats import linregress
from torch import Tensor, nn

from ddm.errors import ConfigError
from ddm.measures import (
    FrechetDistance,
    KernelDistance,
    Neighbours,
    neighbours,
    power_law_fit,
    sliced_w2,
    trajectory_error,
)


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
    assert sliced_w2(points, points + shift, projections=20_000) == pytest.approx(
        3 / math.sqrt(3), rel=0.02
    )


def test_sliced_w2_in_one_dimension_is_the_cheapest_pairing() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 1, generator=generator), 2 * torch.rand(40, 1, generator=generator)
    cost = (x - y.T).double().square().numpy()
    rows, columns = linear_sum_assignment(cost)
    assert sliced_w2(x, y) == pytest.approx(math.sqrt(cost[rows, columns].mean()), rel=1e-6)


def test_sliced_w2_of_scaled_points_is_by_hand() -> None:
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    # y = 3 x: W2(u.x, 3 u.x)^2 = 4 mean (u.x)^2, and the mean over u is 4 mean |x|^2 / d
    expected = math.sqrt(4 * float(x.square().mean()))
    assert sliced_w2(x, 3 * x, projections=20_000) == pytest.approx(expected, rel=0.02)


def test_sliced_w2_knows_sets_not_orders_and_is_symmetric() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(30, 2, 3, 3, generator=generator),
        torch.randn(30, 2, 3, 3, generator=generator),
    )
    assert sliced_w2(x, x.flip(0)) < 1e-15
    assert sliced_w2(x, y) == pytest.approx(sliced_w2(y.flip(0), x), rel=1e-12)
    assert sliced_w2(x, y, seed=1) != sliced_w2(x, y, seed=2)


def test_sliced_w2_refuses_sets_of_unequal_sizes() -> None:
    message = "sliced_w2: the second set must have the shape (4, 2) of the first, got (5, 2)"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        sliced_w2(torch.zeros(4, 2), torch.zeros(5, 2))


def cloud(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    """Points of a Gaussian whose axes are neither even nor those of the space."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator) * torch.linspace(0.1, 2, d)
    return torch.randn(n, d, generator=generator) @ mixing + shift


def closed_form(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other: np.ndarray
) -> float:
    """`|m - m'|^2 + tr(S + S' - 2 (S^(1/2) S' S^(1/2))^(1/2))`, with scipy's root of S."""
    root = sqrtm(covariance).real
    cross = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(0)).sum()
    return float(
        ((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other) - 2 * cross
    )


@pytest.mark.parametrize("n", [200, 12, 2], ids=["n above d", "n below d", "two points"])
def test_frechet_distance_agrees_with_torchmetrics(n: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance  # slow to import

    real, drawn = cloud(300, 20, seed=0), cloud(n, 20, seed=1, shift=0.5)
    found = FrechetDistance.to(real)(drawn)
    moments = [
        part
        for x in (real, drawn)
        for part in (x.double().numpy().mean(0), np.cov(x.double().numpy().T))
    ]
    assert found == pytest.approx(closed_form(*moments), rel=1e-6)

    class Given(nn.Module):
        num_features = 20

        def forward(self, features: Tensor) -> Tensor:
            return features

    metric = FrechetInceptionDistance(Given()).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    assert found == pytest.approx(
        float(metric.compute()), rel=1e-4
    )  # it takes roots of what rounding left of zeros


def test_frechet_distance_in_one_dimension_is_by_hand() -> None:
    # N(1, 4) and points of mean 3 and variance 9: (1 - 3)^2 + (2 - 3)^2
    distance = FrechetDistance(torch.tensor([1.0]), torch.tensor([[4.0]]))
    assert distance(torch.tensor([[0.0], [3.0], [6.0]])) == pytest.approx(5.0, rel=1e-12)


@pytest.mark.parametrize("n", [500, 30])
def test_frechet_distance_of_a_set_to_itself_is_zero(
    n: int,
) -> None:
    points = cloud(n, 50, seed=3, shift=7)
    size = float(points.var(dim=0).sum())
    assert abs(FrechetDistance.to(points)(points)) < 1e-6 * size
    mean, covariance = np.mean(points.double().numpy(), 0), np.cov(points.double().numpy().T)
    given = FrechetDistance(torch.from_numpy(mean), torch.from_numpy(covariance))
    other = cloud(n, 50, seed=4)
    assert abs(given(points)) < 1e-6 * size
    assert given(other) == pytest.approx(FrechetDistance.to(points)(other), rel=1e-9)


def by_loops(real: np.ndarray, drawn: np.ndarray, k: int) -> Neighbours:
    """The three shares, a point at a time."""

    def radius(points: np.ndarray, i: int) -> float:
        return sorted(math.dist(points[i], other) for j, other in enumerate(points) if j != i)[
            k - 1
        ]

    reach_real = [radius(real, i) for i in range(len(real))]
    reach_drawn = [radius(drawn, j) for j in range(len(drawn))]
    precision = [
        any(math.dist(x, y) <= reach for x, reach in zip(real, reach_real, strict=True))
        for y in drawn
    ]
    recall = [
        any(math.dist(x, y) <= reach for y, reach in zip(drawn, reach_drawn, strict=True))
        for x in real
    ]
    coverage = [
        any(math.dist(x, y) <= reach for y in drawn)
        for x, reach in zip(real, reach_real, strict=True)
    ]
    return Neighbours(*(float(np.mean(share)) for share in (precision, recall, coverage)))


@pytest.mark.parametrize(("k", "counts"), [(1, (40, 40)), (3, (50, 30)), (5, (25, 60))])
def test_precision_recall_and_coverage_agree_with_loops(k: int, counts: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    real, drawn = (torch.randn(n, 3, generator=generator) for n in counts)
    drawn = 0.9 * drawn + 0.7
    found = neighbours(real, drawn, k)
    assert [*found] == pytest.approx(
        [*by_loops(real.double().numpy(), drawn.double().numpy(), k)], abs=1e-6
    )
    assert len({*found}) == 3  # or the test could not tell them apart


def test_neighbours_far_from_the_origin_are_found_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    real, samples = (1e4 + torch.randn(60, 3, generator=generator) for _ in range(2))
    expected = by_loops(real.double().numpy(), samples.double().numpy(), 5)
    assert [*neighbours(real, samples)] == pytest.approx([*expected], abs=1e-6)


def test_copies_of_repeated_points_are_covered() -> None:
    points = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    copies = points.repeat(8, 1)
    assert neighbours(copies, copies.flip(0)) == (1, 1, 1)
    moved = neighbours(copies, copies + 1e-3)
    assert moved == (0, 0, 0)


@pytest.mark.parametrize("elements", [1, 100, 2**24])
def test_chunks_change_neither_neighbours_nor_kernel_distances(
    monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    real, samples = (torch.randn(n, 3, generator=generator).double() for n in (41, 29))
    expected = by_loops(real.numpy(), samples.numpy(), 5), KernelDistance(real)(samples)
    monkeypatch.setattr("ddm.measures._CHUNK_ELEMENTS", elements)
    assert [*neighbours(real, samples)] == pytest.approx([*expected[0]], abs=1e-6)
    assert KernelDistance(real)(samples) == pytest.approx(expected[1], rel=1e-12)


def kernel_distance_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """Means over pairs of two different points of a set, and over all pairs across, one at a time."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    def own(points: np.ndarray) -> float:
        n = range(len(points))
        return float(np.mean([kernel(points[i], points[j]) for i in n for j in n if i != j]))

    return own(x) + own(y) - 2 * float(np.mean([kernel(a, b) for a in x for b in y]))


def test_the_kernel_distance_is_the_unbiased_one_over_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 4, generator=generator) for n in (20, 13))
    expected = kernel_distance_by_loops(x.double().numpy(), (0.7 * y + 1).double().numpy())
    assert KernelDistance(x)(0.7 * y + 1) == pytest.approx(expected, rel=1e-6)
    assert expected > 0.1


def test_the_kernel_distance_of_one_distribution_is_zero_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [
        KernelDistance(torch.randn(30, 4, generator=generator))(
            torch.randn(30, 4, generator=generator)
        )
        for _ in range(400)
    ]
    error = statistics.stdev(found) / 20
    assert abs(statistics.mean(found)) < 3 * error
    assert min(found) < 0  # unbiased, so it must fall on both sides


@pytest.mark.parametrize("k", [1, 3, 5])
def test_two_sets_drawn_alike_have_a_coverage_of_1_less_2_to_the_minus_k(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    real, drawn = (
        torch.randn(2000, 4, generator=generator),
        torch.randn(2000, 4, generator=generator),
    )
    assert neighbours(real, drawn, k).coverage == pytest.approx(1 - 2**-k, abs=0.02)


def test_a_lost_mode_lowers_recall_and_coverage_and_not_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    real, drawn = torch.randn(600, 3, generator=generator), torch.randn(600, 3, generator=generator)
    whole = neighbours(real, drawn)
    third = torch.arange(600) % 3 == 0  # of the real images, a mode far away that is never drawn
    lost = neighbours(real + 50 * third[:, None], drawn)
    assert lost.precision == pytest.approx(whole.precision, abs=0.02)
    assert lost.recall == pytest.approx(whole.recall * 2 / 3, abs=0.02)
    assert lost.coverage == pytest.approx(whole.coverage * 2 / 3, abs=0.02)


@pytest.mark.parametrize("counts", [(5, 20), (20, 5)])
def test_neighbours_refuse_a_set_of_k_points_or_fewer(counts: tuple[int, int]) -> None:
    message = f"neighbours: the points must be more than k = 5 per set, got {counts}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        neighbours(torch.zeros(counts[0], 2), torch.zeros(counts[1], 2))
    assert len(neighbours(torch.randn(6, 2), torch.randn(6, 2))) == 3


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
        (
            [10],
            [1.0],
            "power_law_fit: steps and errors must be of equal length, at least 2, got (1, 1)",
        ),
        (
            [10, 20],
            [1.0],
            "power_law_fit: steps and errors must be of equal length, at least 2, got (2, 1)",
        ),
        ([10, 20], [1.0, 0.0], "power_law_fit: errors must be positive, got 0.0"),
        ([10, 20], [1.0, -1.0], "power_law_fit: errors must be positive, got -1.0"),
    ],
)
def test_power_law_fit_refuses_what_has_no_law(
    steps: Sequence[int], errors: Sequence[float], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        power_law_fit(steps, errors)


def test_power_law_fit_refuses_errors_at_a_single_number_of_steps() -> None:
    with pytest.raises(ConfigError, match="steps"):
        power_law_fit([10, 10], [1.0, 2.0])
