"""Gaussian clusters in closed form: their denoisers, the control variate of the experts, and their
posterior, which routes where no router was trained. Neither evaluates a network.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ddm.schedules import Coeffs, Schedule, velocity
from ddm.training import to_float

MOMENTS = ("gaussian.mean", "gaussian.variance")  # their names in an expert's artifact
_CHUNK = 1024  # images at a time


@dataclass(frozen=True)
class Gaussians:
    """K Gaussians, each with its cluster's mean and a covariance that is diagonal in the cosine
    basis of images.

    Cosines are close to the principal components of natural images, whose statistics hardly depend
    on position. `means` and `variances` are `[K, C, H, W]` in that basis; data that are not images,
    `[K, d]`, keep their own basis.
    """

    means: Tensor
    variances: Tensor
    schedule: Schedule

    def mix(self, x: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        """`sum_k weight_k E[x0 | x_t = x, Gaussian k]`, `[B, ...]`: x `[B, ...]`, t `[]` or `[B]`,
        weights `[B, K]` of any sign.

        Term k is `m + f (x - a m)`, `f = a v / (a^2 v + s^2)`: linear in x, so the sum needs one
        transform each way.
        """
        m, v = (part.to(x).flatten(1) for part in (self.means, self.variances))  # [K, n]
        # A single time stays on the CPU, so that no step waits for a device.
        c = self.schedule(t.to(x) if t.ndim else t)
        a, s, _, _ = c.broadcast_to(m[None])  # [] or [B, 1, 1]
        f = a * v / (a**2 * v + s**2)  # [K, n] or [B, K, n]
        weight = weight.to(x)[:, None]
        # The networks may run in bfloat16; the control variate must not.
        with torch.autocast(x.device.type, enabled=False):
            mixed = (weight @ (m - a * f * m) + weight @ f * cosine(x).flatten(1)[:, None])[:, 0]
            return cosine(mixed.reshape(x.shape), inverse=True)

    def posterior(self, x: Tensor, t: Tensor, pi: Tensor) -> Tensor:
        """`alpha_k = pi_k N(x; a m_k, a^2 v_k + s^2) / sum_j ...`, `[B, K]`: x `[B, ...]`, t `[]` or
        `[B]`, mixture weights `[K]`.
        """
        return (self.log_densities(x, t) + pi.to(x.device).log()).softmax(dim=1).to(x.dtype)

    def log_densities(self, x: Tensor, t: Tensor) -> Tensor:
        """`log N(x; a m_k, a^2 v_k + s^2)` up to a constant, float64 `[B, K]`; x, t as in
        `posterior`.
        """
        y = cosine(x.double()).flatten(1)
        c = self._coefficients(y, t).broadcast_to(y)
        terms = []
        for m, v in self._flat(y):
            variance = c.a**2 * v + c.s**2
            terms.append(-0.5 * ((y - c.a * m) ** 2 / variance + variance.log()).sum(dim=1))
        return torch.stack(terms, dim=1)

    def posterior_rate(self, x: Tensor, t: Tensor, pi: Tensor) -> Tensor:
        """The total derivative of `posterior` along the probability-flow ODE of the Gaussians'
        mixture, `[B, K]`; rows sum to 0.

        It is `alpha_k (g_k - sum_j alpha_j g_j)` with `g_k = d_t log p_k + grad log p_k . v`, v the
        mixture's velocity.
        """
        alpha = self.posterior(x, t, pi)
        y = cosine(x.double()).flatten(1)
        denoised = cosine(self.mix(x, t, alpha).double()).flatten(1)
        coefficients = self._coefficients(y, t)
        v_mixture = velocity(y, denoised, coefficients)
        c = coefficients.broadcast_to(y)
        rates = []
        for m, v in self._flat(y):
            variance, growth = c.a**2 * v + c.s**2, 2 * (c.a * c.da * v + c.s * c.ds)
            z = (y - c.a * m) / variance  # - grad log p_k
            change = z * (c.da * m - v_mixture) + growth / 2 * (z**2 - 1 / variance)
            rates.append(change.sum(dim=1))
        g = torch.stack(rates, dim=1).to(x.dtype)
        return alpha * (g - (alpha * g).sum(dim=1, keepdim=True))

    def _coefficients(self, y: Tensor, t: Tensor) -> Coeffs:
        return self.schedule(t.to(y) if t.ndim else t.double())

    def _flat(self, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Mean and variance of each cluster, `[n]`, like y."""
        for m, v in zip(self.means, self.variances, strict=True):
            yield m.to(y).flatten(), v.to(y).flatten()

    @staticmethod
    def of_clusters(
        clusters: Sequence[Tensor], schedule: Schedule, flip: bool = False
    ) -> "Gaussians":
        """The Gaussians of K clusters' images; arguments as in `moments`."""
        found = [moments(images, flip) for images in clusters]
        means, variances = (torch.stack(parts) for parts in zip(*found, strict=True))
        return Gaussians(means, variances, schedule)


def moments(images: Tensor, flip: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance of a cluster in the cosine basis, float32, of an image's shape; `flip` adds
    the mirror images.

    images `[N, C, H, W]`, uint8 or float in [-1, 1].
    """
    first = torch.zeros(images.shape[1:], dtype=torch.float64, device=images.device)
    second = first.clone()
    for chunk in images.split(_CHUNK):
        for batch in (chunk, chunk.flip(3)) if flip else (chunk,):
            y = cosine(to_float(batch).double())
            first, second = first + y.sum(dim=0), second + y.square().sum(dim=0)
    count = len(images) * (2 if flip else 1)
    mean = first / count
    return mean.float(), (second / count - mean**2).clamp_min(0).float()


def cosine(x: Tensor, inverse: bool = False) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of the last two axes of `[..., C, H, W]`; `[B, d]`
    stays as it is.
    """
    if x.ndim < 4:
        return x
    rows, columns = (_basis(n, x.dtype, x.device) for n in x.shape[-2:])
    return rows.T @ x @ columns if inverse else rows @ x @ columns.T


@lru_cache
def _basis(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[n, n]`, row k the k-th cosine; cached by size, dtype and device."""
    k, place = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi * (place + 0.5) * k / n) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis.to(device, dtype)
