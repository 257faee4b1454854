"""The router's networks: the posterior net alpha_k(x, t), and its time-derivative net, three networks, one a band of t."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddm.blocks import Encoder, check_encoder, group_norm
from ddm.schedules import Schedule


@dataclass
class RouterNetConfig:
    """Sizes of one network of the router, a UNet's encoder half."""

    channels: int = 64
    multipliers: list[int] = field(default_factory=lambda: [1, 2, 2, 2])
    blocks: int = 1  # residual blocks a level
    attention: list[int] = field(default_factory=lambda: [8])  # sides of the feature maps that get self-attention
    dropout: float = 0.0

    def build(self, shape: Sequence[int], clusters: int, schedule: Schedule, section: str = "router.net") -> "Scorer":
        """A fresh network for pictures `[C, H, W]`. Raises `ConfigError` naming the key of a size that cannot be."""
        check_encoder(section, self.channels, self.multipliers, self.blocks, self.dropout, shape)
        return Scorer(shape, clusters, schedule, self)


class Scorer(nn.Module):
    """`(x [B, C, H, W], t [] or [B])` -> one number a cluster, `[B, K]`; zero at the start.

    x is divided by `sqrt(a^2 + s^2)`, so that the network sees numbers of size 1 under every schedule.
    """

    def __init__(self, shape: Sequence[int], clusters: int, schedule: Schedule, config: RouterNetConfig) -> None:
        super().__init__()
        c = config
        self.schedule = schedule
        self.trunk = Encoder(shape, c.channels, c.multipliers, c.blocks, c.attention, c.dropout)
        self.norm = group_norm(self.trunk.widths[-1])
        self.head = nn.Linear(self.trunk.widths[-1], clusters)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x)
        a, s, _, _ = self.schedule(t).beside(x)
        maps, _ = self.trunk(x * torch.rsqrt(a**2 + s**2), t)
        return self.head(F.silu(self.norm(maps[-1])).mean(dim=(2, 3))).to(x.dtype)


class PosteriorNet(nn.Module):
    """alpha_k(x, t), `[B, K]`, rows sum to 1 by softmax; a fresh network answers with the clusters' shares pi."""

    def __init__(self, scorer: Scorer, pi: Tensor) -> None:
        super().__init__()
        self.scorer = scorer
        self.register_buffer("log_pi", pi.log())

    def logits(self, x: Tensor, t: Tensor) -> Tensor:
        """The softmax's argument, `[B, K]`."""
        return self.scorer(x, t) + self.log_pi

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.logits(x, t).softmax(dim=1)


class DerivativeNet(nn.Module):
    """d alpha_k/dt, `[B, K]`, rows sum to 0 because their mean is taken off: one network for each band of t.

    `edges` are the times between bands, rising, inside (0, 1): band b reaches from `edges[b - 1]` to `edges[b]`.
    """

    def __init__(self, scorers: Sequence[Scorer], edges: Sequence[float]) -> None:
        super().__init__()
        assert len(scorers) == len(edges) + 1
        self.scorers = nn.ModuleList(scorers)
        self.edges = list(edges)

    @staticmethod
    def from_trunk(scorer: Scorer, edges: Sequence[float]) -> "DerivativeNet":
        """Networks that start from the same trunk, with heads that start at zero."""
        scorers = [copy.deepcopy(scorer) for _ in range(len(edges) + 1)]
        for fresh in scorers:
            nn.init.zeros_(fresh.head.weight)
            nn.init.zeros_(fresh.head.bias)
        return DerivativeNet(scorers, edges)

    def band(self, b: int, x: Tensor, t: Tensor) -> Tensor:
        """The answer of band b's network, whatever t is."""
        rate = self.scorers[b](x, t)
        return rate - rate.mean(dim=1, keepdim=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if t.ndim == 0:
            return self.band(sum(float(t) >= edge for edge in self.edges), x, t)
        band = torch.bucketize(t, torch.tensor(self.edges, device=t.device, dtype=t.dtype), right=True)
        rate = x.new_zeros(len(x), self.scorers[0].head.out_features)
        for b in range(len(self.scorers)):
            rows = (band == b).nonzero()[:, 0]
            if len(rows):
                rate[rows] = self.band(b, x[rows], t[rows])
        return rate
