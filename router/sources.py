"""Where alpha comes from while sampling: `(x [B, C, H, W], t [] or [B]) -> alpha [B, K]`, rows on the simplex.

A plain function of (x, t), such as the posterior net, has no memory. What has one is a `Source`: it hands a row a trajectory in
and out, so that it serves trajectories of any company, each anywhere on its way.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

SOURCES = ("prior", "posterior", "derivative", "combined", "analytic")

Alpha = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Source(Protocol):
    """alpha with a memory, a row `[M]` a trajectory."""

    def start(self, x: Tensor) -> Tensor:
        """The memory `[B, M]` of trajectories that start at x `[B, ...]`."""
        ...

    def step(self, x: Tensor, t: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """alpha `[B, K]` at x `[B, ...]`, t `[]` or `[B]`, and the memory afterwards."""
        ...


class Stateless:
    """A plain function of (x, t) as a `Source`."""

    def __init__(self, alpha: Alpha) -> None:
        self.alpha = alpha

    def start(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 0)

    def step(self, x: Tensor, t: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha(x, t), memory


def prior(pi: Tensor) -> Alpha:
    """alpha = pi, `[K]`, whatever the image."""
    return lambda x, t: pi.to(x).expand(len(x), -1)


class Integrated:
    """alpha by integrating its derivative from pi at t = 1 along the path, by the trapezoidal rule, kept on the simplex.

    Without `posterior`, the source `derivative`: true along the full ODE, which an image moved by one expert at a time
    leaves. With it, the source `combined`: between two calls dt apart alpha also moves the share `1 - exp(-pull |dt|)` of its
    distance to the posterior net, which corrects that, equally fast at any number of steps. `pull` is a rate, a unit of t.

    Its memory is alpha, the rate and t at the last call, `[B, 2 K + 1]` in float64; t is NaN before the first.
    """

    def __init__(
        self, rate: Alpha, pi: Tensor, posterior: Alpha | None = None, relaxation_rate: float = 0.0
    ) -> None:
        self.rate, self.pi, self.posterior, self.relaxation_rate = (
            rate,
            pi,
            posterior,
            relaxation_rate,
        )

    def start(self, x: Tensor) -> Tensor:
        row = torch.cat(
            [
                self.pi.double(),
                torch.zeros_like(self.pi).double(),
                self.pi.new_tensor([torch.nan]).double(),
            ]
        )
        return row.to(x.device).expand(len(x), -1)

    def step(self, x: Tensor, t: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        k = len(self.pi)
        before, last_rate, last_t = (
            memory[:, :k].to(x),
            memory[:, k : 2 * k].to(x),
            memory[:, 2 * k :],
        )
        rate, t_row = self.rate(x, t), t.to(memory).reshape(-1, 1).expand_as(last_t)
        dt = (t_row - last_t).nan_to_num(0).to(x)
        alpha = project_to_simplex(before + dt * (rate + last_rate) / 2)
        if self.posterior is not None:
            alpha = torch.lerp(
                alpha, self.posterior(x, t), -torch.expm1(-self.relaxation_rate * dt.abs())
            )
        alpha = torch.where(last_t.isnan(), before, alpha)
        return alpha, torch.cat([alpha.to(memory), rate.to(memory), t_row], dim=1)


def project_to_simplex(p: Tensor) -> Tensor:
    """The nearest point of the probability simplex to each row of `[B, K]` (Duchi et al., ICML 2008, figure 1)."""
    falling = p.sort(dim=1, descending=True).values
    rank = torch.arange(1, p.shape[1] + 1, device=p.device)
    excess = (falling.cumsum(dim=1) - 1) / rank
    kept = (falling > excess).sum(dim=1, keepdim=True)
    return (p - excess.gather(1, kept - 1)).clamp_min(0)
