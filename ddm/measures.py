"""How far two sets of points are apart, and how fast an error falls."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddm.errors import require


def trajectory_error(x: Tensor, reference: Tensor) -> float:
    """Mean square distance between two ends of paths from the same noise, a number of the data: `mean |x - x_ref|^2 / d`."""
    return float((x.double() - reference.double()).square().mean())


def sliced_w2(x: Tensor, y: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Sliced Wasserstein-2 distance between two equally large sets of points `[n, ...]`, over random directions.

    `sqrt(E_u W2^2(u.x, u.y))`; in one dimension W2 pairs the sorted values. Raises `ConfigError` for unequal sizes.
    """
    require(
        x.shape == y.shape, "sliced_w2: the second set", f"have the shape {tuple(x.shape)} of the first", tuple(y.shape)
    )
    generator = torch.Generator().manual_seed(seed)
    u = torch.nn.functional.normalize(
        torch.randn(x[0].numel(), projections, generator=generator, dtype=torch.float64), dim=0
    )
    on_x, on_y = (points.double().flatten(1).cpu() @ u for points in (x, y))
    return float((on_x.sort(dim=0).values - on_y.sort(dim=0).values).square().mean().sqrt())


class PowerLaw(NamedTuple):
    """`E(N) = constant N^-exponent`, and the share of the variance of log E that it explains."""

    constant: float
    exponent: float
    r2: float


def power_law_fit(steps: Sequence[int], errors: Sequence[float]) -> PowerLaw:
    """Least squares in log E over log N. Raises `ConfigError` for fewer than two points or an error that is not positive."""
    require(
        len(steps) == len(errors) >= 2,
        "power_law_fit: steps and errors",
        "be of equal length, at least 2",
        (len(steps), len(errors)),
    )
    require(len(set(steps)) >= 2, "power_law_fit: steps", "hold at least two different numbers", list(steps))
    require(min(errors) > 0, "power_law_fit: errors", "be positive", min(errors))
    x, y = torch.tensor(steps, dtype=torch.float64).log(), torch.tensor(errors, dtype=torch.float64).log()
    x_c, y_c = x - x.mean(), y - y.mean()
    slope = (x_c @ y_c) / (x_c @ x_c)
    residual, total = (y_c - slope * x_c).square().sum(), y_c.square().sum()
    r2 = 1.0 if total < 1e-20 else float(1 - residual / total)  # a constant is its own law
    return PowerLaw(float((y.mean() - slope * x.mean()).exp()), float(-slope), r2)
