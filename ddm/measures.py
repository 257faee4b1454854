"""How far two sets of points are apart, and how fast an error falls."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddm.errors import require

_CHUNK_ELEMENTS = 2**24  # of a matrix of distances or kernels: 128 MiB in float64


def trajectory_error(x: Tensor, reference: Tensor) -> float:
    """Mean square distance between two ends of paths from the same noise, a number of the data:
    `mean |x - x_ref|^2 / d`.
    """
    return float((x.double() - reference.double()).square().mean())


def sliced_w2(x: Tensor, y: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Sliced Wasserstein-2 distance between two equally large sets of points `[n, ...]`, over
    random directions.

    `sqrt(E_u W2^2(u.x, u.y))`; in one dimension W2 pairs the sorted values. Raises `ConfigError`
    for unequal sizes.
    """
    require(
        x.shape == y.shape,
        "sliced_w2: the second set",
        f"have the shape {tuple(x.shape)} of the first",
        tuple(y.shape),
    )
    generator = torch.Generator().manual_seed(seed)
    u = torch.nn.functional.normalize(
        torch.randn(x[0].numel(), projections, generator=generator, dtype=torch.float64), dim=0
    )
    on_x, on_y = (points.double().flatten(1).cpu() @ u for points in (x, y))
    return float((on_x.sort(dim=0).values - on_y.sort(dim=0).values).square().mean().sqrt())


class FrechetDistance:
    """How far sets of points are from one Gaussian, given as `mean` `[d]` and `covariance` `[d,
    d]`.

    `|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))` for the mean m' and the covariance S' of the points
    (arXiv 1706.08500, equation 6). With `S = L L^T` and the centred points X `[n, d]` the root's
    trace is the sum of the singular values of `X L / sqrt(n - 1)`, by the eigenvalues of its
    smaller Gram matrix, which is twice as fast as by its SVD. All of it in float64.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean, self.trace = mean.double(), float(covariance.double().trace())
        variances, axes = torch.linalg.eigh(covariance.double())
        self.root = axes * variances.clamp_min(0).sqrt()

    @staticmethod
    def to(points: Tensor) -> "FrechetDistance":
        """The distance to the Gaussian of points `[n, d]`."""
        return FrechetDistance(points.double().mean(dim=0), points.double().T.cov())

    def __call__(self, points: Tensor) -> float:
        """The distance, squared, of the points `[n, d]`, n >= 2."""
        points = points.double().to(self.root.device)
        mean = points.mean(dim=0)
        spread = (points - mean) / (len(points) - 1) ** 0.5
        product = spread @ self.root
        gram = product @ product.T if len(points) < len(self.root) else product.T @ product
        cross = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()
        return (
            float((mean - self.mean).square().sum() + spread.square().sum() - 2 * cross)
            + self.trace
        )


class KernelDistance:
    """How far sets of points are from the points `[n, d]`, n >= 2, by the kernel `(x.y / d + 1)^3`.

    The unbiased estimate of the squared maximum mean discrepancy over all pairs, without subsets
    (KID: arXiv 1801.01401, section 4). In float64 and in chunks.
    """

    def __init__(self, points: Tensor) -> None:
        self.points = points.double()
        self.own = _mean_kernel_of_pairs(self.points)

    def __call__(self, points: Tensor) -> float:
        """The distance of the points `[m, d]`, m >= 2; below 0 by chance where there is none."""
        points = points.double()
        cross = _kernel_sum(self.points, points) / (len(self.points) * len(points))
        return self.own + _mean_kernel_of_pairs(points) - 2 * cross


def _mean_kernel_of_pairs(points: Tensor) -> float:
    """The mean of the kernel over all pairs of two different points."""
    n, d = points.shape
    diagonal = (points.square().sum(dim=1) / d + 1) ** 3
    return (_kernel_sum(points, points) - float(diagonal.sum())) / (n * (n - 1))


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return sum(float(((rows @ y.T / y.shape[1] + 1) ** 3).sum()) for rows in _chunks(x, len(y)))


def _chunks(points: Tensor, columns: int) -> Sequence[Tensor]:
    """The points in chunks of rows, small enough for a matrix of rows by `columns`."""
    return points.split(max(1, _CHUNK_ELEMENTS // columns))


class Neighbours(NamedTuple):
    """How two sets of points cover each other, each a fraction in [0, 1]."""

    precision: float  # of the samples that lie in a real point's ball
    recall: float  # of the real points that lie in a sample's ball
    coverage: float  # of the real points whose own ball holds a sample: a lost mode shows here


def neighbours(real: Tensor, samples: Tensor, k: int = 5) -> Neighbours:
    """Precision and recall (arXiv 1904.06991, equation 2) and coverage (arXiv 2002.09797, equation
    6).

    Points are `[n, d]`. A point's ball reaches to the k-th nearest other point of its own set. Two
    sets of the same size from one distribution have a coverage of `1 - 2^-k`. In float64, and in
    chunks, so that memory grows with n and not with its square. Raises `ConfigError` for a set of k
    points or fewer.
    """
    require(
        min(len(real), len(samples)) > k,
        "neighbours: the points",
        f"be more than k = {k} per set",
        (len(real), len(samples)),
    )
    centre = real.double().mean(dim=0)
    real, samples = real.double() - centre, samples.double() - centre
    # Distances come from matrix products, by whose rounding a point may be apart from its copy.
    slack = 1e-7 * float(real.norm(dim=1).max())
    real_radius, sample_radius = _radii(real, k) + slack, _radii(samples, k) + slack
    in_real_ball = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    recalled, covered = [], []
    for rows, radius in zip(
        _chunks(real, len(samples)), _chunks(real_radius, len(samples)), strict=True
    ):
        apart = torch.cdist(rows, samples)
        inside = apart <= radius[:, None]
        in_real_ball |= inside.any(dim=0)
        covered.append(inside.any(dim=1))
        recalled.append((apart <= sample_radius).any(dim=1))
    hits = (in_real_ball, torch.cat(recalled), torch.cat(covered))
    return Neighbours(*(float(hit.float().mean()) for hit in hits))


def _radii(points: Tensor, k: int) -> Tensor:
    """The distance of each point to the k-th nearest other point, `[n]`."""
    radii = [
        torch.cdist(rows, points).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
        for rows in _chunks(points, len(points))
    ]
    return torch.cat(radii)


class Nearest(NamedTuple):
    """The nearest of some points to each of n others, the nearest first."""

    distance: Tensor  # [n, k]
    place: Tensor  # int64 [n, k], the index of the point that is so near


def nearest(
    points: Tensor, chunks: Iterable[tuple[Tensor, Tensor]], k: int, but: Tensor | None = None
) -> Nearest:
    """The k nearest to each of the points `[n, d]`, fewer if there are fewer, of points that come
    in chunks: pairs of their indices `[m]` and the points `[m, d]`.

    but: `[n]`, the index of a point that does not count, such as the point itself. In float64:
    memory grows with the largest chunk alone.
    """
    points = points.double()
    norms = points.square().sum(dim=1, keepdim=True)
    squared = points.new_empty(len(points), 0)
    place = torch.empty(len(points), 0, dtype=torch.int64, device=points.device)
    for named, chunk in chunks:
        others, places = chunk.to(points), named.to(place)
        found = norms + others.square().sum(dim=1) - 2 * points @ others.T
        if but is not None:
            found[but.to(place)[:, None] == places] = torch.inf
        squared = torch.cat([squared, found], dim=1)
        place = torch.cat([place, places.expand(len(points), -1)], dim=1)
        squared, kept = squared.topk(min(k, squared.shape[1]), largest=False)
        place = place.gather(1, kept)
    return Nearest(squared.clamp_min(0).sqrt(), place)


class PowerLaw(NamedTuple):
    """`E(N) = constant N^-exponent`, and the fraction of the variance of log E that it explains."""

    constant: float
    exponent: float
    r2: float


def power_law_fit(steps: Sequence[float], errors: Sequence[float]) -> PowerLaw:
    """Least squares of log E over log N.

    Raises `ConfigError` for fewer than two points or an error that is not positive.
    """
    require(
        len(steps) == len(errors) >= 2,
        "power_law_fit: steps and errors",
        "be of equal length, at least 2",
        (len(steps), len(errors)),
    )
    require(
        len(set(steps)) >= 2,
        "power_law_fit: steps",
        "hold at least two different numbers",
        list(steps),
    )
    require(min(errors) > 0, "power_law_fit: errors", "be positive", min(errors))
    x = torch.tensor(steps, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    x_c, y_c = x - x.mean(), y - y.mean()
    slope = (x_c @ y_c) / (x_c @ x_c)
    residual = (y_c - slope * x_c).square().sum()
    total = y_c.square().sum()
    r2 = 1.0 if total < 1e-20 else float(1 - residual / total)  # a constant is fitted exactly
    return PowerLaw(float((y.mean() - slope * x.mean()).exp()), float(-slope), r2)
