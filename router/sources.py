"""Where alpha comes from while sampling. A source is `(x [B, C, H, W], t []) -> alpha [B, K]`, rows on the simplex.

`prior` and the networks have no memory. `Integrated` has: make one for each batch of trajectories.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SOURCES = ("prior", "posterior", "derivative", "combined", "analytic")

Alpha = Callable[[Tensor, Tensor], Tensor]


def prior(pi: Tensor) -> Alpha:
    """alpha = pi, `[K]`, whatever the picture."""
    return lambda x, t: pi.to(x).expand(len(x), -1)


class Integrated:
    """alpha by integrating its derivative from pi at t = 1 along the path, by the trapezoidal rule, kept on the simplex.

    Without `posterior`, the source `derivative`: true along the full ODE, which a picture moved by one expert at a time
    leaves. With it, the source `combined`: between two calls dt apart alpha also moves the share `1 - exp(-pull |dt|)` of its
    distance to the posterior net, which corrects that, equally fast at any number of steps. `pull` is a rate, a unit of t.
    """

    def __init__(self, rate: Alpha, pi: Tensor, posterior: Alpha | None = None, pull: float = 0.0) -> None:
        self.rate, self.pi, self.posterior, self.pull = rate, pi, posterior, pull
        self.alpha: Tensor | None = None
        self.last_rate: Tensor | None = None
        self.last_t: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        rate = self.rate(x, t)
        if self.alpha is None or self.last_rate is None or self.last_t is None:
            alpha = self.pi.to(x).expand(len(x), -1)
        else:
            dt = (t - self.last_t).to(x)
            alpha = project_to_simplex(self.alpha + dt * (rate + self.last_rate) / 2)
            if self.posterior is not None:
                alpha = torch.lerp(alpha, self.posterior(x, t), -torch.expm1(-self.pull * dt.abs()))
        self.alpha, self.last_rate, self.last_t = alpha, rate, t
        return alpha


def project_to_simplex(p: Tensor) -> Tensor:
    """The nearest point of the probability simplex to each row of `[B, K]` (Duchi et al., ICML 2008, figure 1)."""
    falling = p.sort(dim=1, descending=True).values
    rank = torch.arange(1, p.shape[1] + 1, device=p.device)
    excess = (falling.cumsum(dim=1) - 1) / rank
    kept = (falling > excess).sum(dim=1, keepdim=True)
    return (p - excess.gather(1, kept - 1)).clamp_min(0)
