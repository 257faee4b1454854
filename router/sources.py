"""Where alpha comes from while sampling: `(x [B, C, H, W], t [] or [B]) -> alpha [B, K]`, rows on
the simplex.

A plain function of (x, t), such as the posterior net, has no state. What has one is a `Source`: the
state, one row per trajectory, is passed in and returned, so that one batch may mix trajectories at
different times.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

SOURCES = ("prior", "gaussian", "posterior", "derivative", "combined", "analytic")

Alpha = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Source(Protocol):
    """alpha with a state, one row `[M]` per trajectory."""

    def start(self, x: Tensor) -> Tensor:
        """The state `[B, M]` of trajectories that start at x `[B, ...]`."""
        ...

    def step(self, x: Tensor, t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """alpha `[B, K]` at x `[B, ...]`, t `[]` or `[B]`, and the new state."""
        ...


class Stateless:
    """A plain function of (x, t) as a `Source`."""

    def __init__(self, alpha: Alpha) -> None:
        self.alpha = alpha

    def start(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 0)

    def step(self, x: Tensor, t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha(x, t), state


def prior(pi: Tensor) -> Alpha:
    """alpha = pi, `[K]`, for every x and t."""
    return lambda x, t: pi.to(x).expand(len(x), -1)


class Integrated:
    """alpha by integrating its derivative along the trajectory from pi at t = 1: trapezoidal rule,
    projected to the simplex.

    rate: d alpha/dt, `(x, t) -> [B, K]`, as the derivative net gives it. pi: the mixture weights,
    `[K]`.

    Without `posterior`, the source `derivative`: exact along the full ODE, which an image denoised
    by one expert at a time leaves. With it, the source `combined`: between two calls dt apart,
    alpha also relaxes towards the posterior net by the fraction `1 - exp(-relaxation_rate |dt|)`,
    which corrects that, equally fast at any number of steps. The rate is per unit of t.

    The state is alpha, rate and t of the last call, `[B, 2 K + 1]` in float64; t is NaN before the
    first.
    """

    def __init__(
        self, rate: Alpha, pi: Tensor, posterior: Alpha | None = None, relaxation_rate: float = 0.0
    ) -> None:
        self.rate = rate
        self.pi = pi
        self.posterior = posterior
        self.relaxation_rate = relaxation_rate

    def start(self, x: Tensor) -> Tensor:
        pi = self.pi.double()
        never = pi.new_tensor([torch.nan])
        row = torch.cat([pi, torch.zeros_like(pi), never])
        return row.to(x.device).expand(len(x), -1)

    def step(self, x: Tensor, t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        k = len(self.pi)
        last_alpha, last_rate = state[:, :k].to(x), state[:, k : 2 * k].to(x)
        last_t = state[:, 2 * k :]
        rate = self.rate(x, t)
        t_row = t.to(state).reshape(-1, 1).expand_as(last_t)
        dt = (t_row - last_t).nan_to_num(0).to(x)
        alpha = project_to_simplex(last_alpha + dt * (rate + last_rate) / 2)
        if self.posterior is not None:
            fraction = -torch.expm1(-self.relaxation_rate * dt.abs())
            alpha = torch.lerp(alpha, self.posterior(x, t), fraction)
        alpha = torch.where(last_t.isnan(), last_alpha, alpha)
        return alpha, torch.cat([alpha.to(state), rate.to(state), t_row], dim=1)


def project_to_simplex(p: Tensor) -> Tensor:
    """The nearest point of the probability simplex to each row of `[B, K]` (Duchi et al., ICML
    2008, figure 1).
    """
    descending = p.sort(dim=1, descending=True).values
    rank = torch.arange(1, p.shape[1] + 1, device=p.device)
    excess = (descending.cumsum(dim=1) - 1) / rank
    positive = (descending > excess).sum(dim=1, keepdim=True)
    positive = positive.clamp_min(1)  # 0 for NaN, which then stays NaN
    return (p - excess.gather(1, positive - 1)).clamp_min(0)
