"""A forward process given by its SDE, integrated numerically."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ddm.schedules import Coeffs


@dataclass(frozen=True)
class LinearSDE:
    """The schedule of `dx = -f(t) x dt + g(t) dW` (arXiv 2311.11003, eq. 2), from f and g by
    quadrature.

    `a = exp(-F)`, `F = int_0^t f`, `s^2 = int_0^t e^(-2 (F(t) - F(u))) g(u)^2 du`, each by
    Gauss-Legendre quadrature with 64 points: exact to rounding where f and g are smooth. An
    independent check of the closed forms of `ddm.schedules`.
    """

    f: Callable[[Tensor], Tensor]
    g: Callable[[Tensor], Tensor]

    def __call__(self, t: Tensor) -> Coeffs:
        z, w = (part.to(t) for part in _gauss_legendre(64))

        def total(until: Tensor) -> Tensor:
            return until * (w * self.f(until[..., None] * z)).sum(-1)

        u = t[..., None] * z
        decay = (-2 * (total(t)[..., None] - total(u))).exp()
        s = (t * (w * decay * self.g(u) ** 2).sum(-1)).sqrt()
        a = (-total(t)).exp()
        return Coeffs(a, s, -self.f(t) * a, (self.g(t) ** 2 / 2 - self.f(t) * s**2) / s)


@lru_cache
def _gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights, float64 `[n]`, of Gauss-Legendre quadrature over [0, 1]."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(n))
    return (nodes + 1) / 2, weights / 2
