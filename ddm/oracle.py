"""A Gaussian mixture, whose posterior, experts and marginals are known exactly: the reference of
the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddm.rng import RngStream, normal, uniform
from ddm.schedules import Coeffs, Schedule, velocity


@dataclass(frozen=True)
class GaussianMixture:
    """K Gaussians with diagonal covariance: `weights` `[K]`, `means` `[K, d]`, `stds` `[K, d]`,
    under a forward process.

    x is `[B, d]`, t `[]` or `[B]`. At time t component k is `N(a m_k, a^2 std_k^2 + s^2)`, and
    cluster k of a partition is component k, so `posterior` is the router's alpha and `expert(k)`
    the ideal expert.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    schedule: Schedule

    def posterior(self, x: Tensor, t: Tensor) -> Tensor:
        """`alpha_k(x, t) = pi_k p_k(x, t) / p(x, t)`, `[B, K]`."""
        _, residual, variance = self._moments(x, t)
        log_p = -0.5 * (residual**2 / variance + variance.log()).sum(dim=2)
        return (log_p + self.weights.to(x).log()).softmax(dim=1)

    def posterior_rate(self, x: Tensor, t: Tensor) -> Tensor:
        """`d alpha/dt = d_t alpha + grad alpha . v` along the probability-flow ODE, `[B, K]`, for t
        > 0.
        """
        c, residual, variance = self._moments(x, t)
        v = velocity(x, self.denoise(x, t), self.schedule(t.to(x)))[:, None]
        d_variance = 2 * c.a * c.da * self.stds.to(x) ** 2 + 2 * c.s * c.ds
        d_residual = v - c.da * self.means.to(x)
        d_log_p = (
            residual**2 * d_variance / 2 / variance**2
            - residual * d_residual / variance
            - d_variance / 2 / variance
        )
        alpha, rate = self.posterior(x, t), d_log_p.sum(dim=2)
        return alpha * (rate - (alpha * rate).sum(dim=1, keepdim=True))

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """`E[x0 | x_t = x]`, `[B, d]`: the full mixture of the exact experts."""
        return (self.posterior(x, t)[:, :, None] * self._denoised(x, t)).sum(dim=1)

    def expert(self, k: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The exact denoiser of component k alone, `(x, t) -> E[x0 | x_t = x, cluster k]`."""
        return lambda x, t: self._denoised(x, t)[:, k]

    def sample(self, n: int, seed: int) -> Tensor:
        """n exact samples of x0, float32 `[n, d]`."""
        index = torch.arange(n)
        edges = self.weights.double().cumsum(0)[:-1].contiguous()
        k = torch.bucketize(uniform(seed, RngStream.BATCH, index)[:, 0], edges)
        return self.means[k].float() + self.stds[k].float() * normal(
            seed, RngStream.NOISE, index, 0, self.means.shape[1:]
        )

    def marginal(self, n: int, t: float, seed: int) -> Tensor:
        """n exact samples of x_t, float32 `[n, d]`; the noise is that from which image i of the
        seed starts.
        """
        a, s, _, _ = self.schedule(torch.tensor(t))
        return a * self.sample(n, seed) + s * normal(
            seed, RngStream.START, torch.arange(n), 0, self.means.shape[1:]
        )

    def _moments(self, x: Tensor, t: Tensor) -> tuple[Coeffs, Tensor, Tensor]:
        """Coefficients shaped for `[B, K, d]`, `x - a m_k`, and `a^2 std_k^2 + s^2`."""
        c = self.schedule(t.to(x)).broadcast_to(x[:, None])
        return c, x[:, None] - c.a * self.means.to(x), (c.a * self.stds.to(x)) ** 2 + c.s**2

    def _denoised(self, x: Tensor, t: Tensor) -> Tensor:
        c, residual, variance = self._moments(x, t)
        return self.means.to(x) + c.a * self.stds.to(x) ** 2 / variance * residual
