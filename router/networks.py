"""The router's networks: the posterior net alpha_k(x, t), and the time-derivative net, with a
network for each band of t.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddm.blocks import Encoder, check_encoder, group_norm
from ddm.errors import require, within
from ddm.schedules import Schedule
from ddm.training import FitConfig


@dataclass
class RouterNetConfig:
    """Sizes of one network of the router, the encoder half of a UNet.

    channels: of the first level, a positive multiple of 4.
    multipliers: of the channels, one per level; each level halves the image's side.
    blocks: residual blocks per level, at least 1.
    attention: sides, in pixels, of the feature maps that get self-attention.
    dropout: in [0, 1).
    """

    channels: int = 64
    multipliers: list[int] = field(default_factory=lambda: [1, 2, 2, 2])
    blocks: int = 1
    attention: list[int] = field(default_factory=lambda: [8])
    dropout: float = 0.0

    def check(self, shape: Sequence[int]) -> None:
        """Raise `ConfigError` naming the key of a size that cannot be for images `[C, H, W]`."""
        check_encoder(self.channels, self.multipliers, self.blocks, self.dropout, shape)

    def build(self, shape: Sequence[int], clusters: int, schedule: Schedule) -> "Scorer":
        """A fresh network for images `[C, H, W]`.

        Raises `ConfigError` naming the key of a size that cannot be.
        """
        self.check(shape)
        return Scorer(shape, clusters, schedule, self)


@dataclass
class RouterConfig(FitConfig):
    """The router: its networks, their two training stages and the bands of t.

    `steps` counts both stages.

    net: sizes of each network.
    batch: images per step, at least; rounded up to a multiple of 3, a third for each band.
    switch_step: stage 1 ends here; in [1, steps).
    label_weight: stage 1: of the cross-entropy, at least 0.
    posterior_weight: stage 1: of the squared error to the exact posterior, at least 0.
    rate_weight: stage 2: of the derivative nets' squared error, at least 0.
    bands: the two times between the three bands, rising in (t_min, 1).
    """

    net: RouterNetConfig = field(default_factory=RouterNetConfig)
    batch: int = 129
    switch_step: int = 500
    label_weight: float = 1.0
    posterior_weight: float = 1.0
    rate_weight: float = 1.0
    bands: list[float] = field(default_factory=lambda: [0.3, 0.7])

    def check(self) -> None:
        """Raise `ConfigError` naming the key of a value out of its range."""
        super().check()
        require(
            1 <= self.switch_step < self.steps,
            "switch_step",
            f"be in [1, steps = {self.steps})",
            self.switch_step,
        )
        for key in ("label_weight", "posterior_weight", "rate_weight"):
            require(getattr(self, key) >= 0, key, "be at least 0", getattr(self, key))
        require(
            self.label_weight + self.posterior_weight > 0,
            "label_weight",
            "be above 0 where posterior_weight is 0",
            0,
        )
        rising = len(self.bands) == 2 and self.t_min < self.bands[0] < self.bands[1] < 1
        require(rising, "bands", "be two rising times in (t_min, 1)", self.bands)

    @property
    def images_per_step(self) -> int:
        """`batch`, rounded up to a multiple of 3: each band of t gets a third."""
        return -(-self.batch // 3) * 3

    def build(
        self, shape: Sequence[int], pi: Tensor, schedule: Schedule
    ) -> "tuple[PosteriorNet, DerivativeNet]":
        """A fresh router for images `[C, H, W]` and mixture weights `pi` `[K]`.

        Raises `ConfigError` naming a bad size.
        """
        with within("net"):
            scorer = self.net.build(shape, len(pi), schedule)
        return PosteriorNet(scorer, pi), DerivativeNet.from_trunk(scorer, self.bands)


class Scorer(nn.Module):
    """`(x [B, C, H, W], t [] or [B])` -> one number per cluster, `[B, K]`; zero at initialization.

    x is divided by `sqrt(a^2 + s^2)`, so that the network's input has size 1 under every schedule.
    """

    def __init__(
        self, shape: Sequence[int], clusters: int, schedule: Schedule, config: RouterNetConfig
    ) -> None:
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
        a, s, _, _ = self.schedule(t).broadcast_to(x)
        maps, _ = self.trunk(x * torch.rsqrt(a**2 + s**2), t)
        return self.head(F.silu(self.norm(maps[-1])).mean(dim=(2, 3))).to(x.dtype)


class PosteriorNet(nn.Module):
    """alpha_k(x, t), `[B, K]`; rows sum to 1 by softmax.

    A fresh network returns the mixture weights pi.
    """

    def __init__(self, scorer: Scorer, pi: Tensor) -> None:
        super().__init__()
        self.scorer = scorer
        self.log_pi = nn.Buffer(pi.log())

    def logits(self, x: Tensor, t: Tensor) -> Tensor:
        """The softmax's argument, `[B, K]`."""
        return self.scorer(x, t) + self.log_pi

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.logits(x, t).softmax(dim=1)


class DerivativeNet(nn.Module):
    """d alpha_k/dt, `[B, K]`; rows sum to 0 because their mean is subtracted.

    One network for each band of t.

    `edges` are the times between bands, rising, inside (0, 1): band b reaches from `edges[b - 1]`
    to `edges[b]`.
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
        """The output of band b's network at any t."""
        rate = self.scorers[b](x, t)
        return rate - rate.mean(dim=1, keepdim=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if t.ndim == 0:
            return self.band(int(sum(t >= edge for edge in self.edges)), x, t)
        t = t.to(x.device)  # where the rows are picked
        band = torch.bucketize(
            t.contiguous(), torch.tensor(self.edges, device=t.device, dtype=t.dtype), right=True
        )
        rows = [(band == b).nonzero()[:, 0] for b in range(len(self.scorers))]
        rates = [self.band(b, x[r], t[r]) for b, r in enumerate(rows) if len(r)]
        return torch.empty_like(torch.cat(rates)).index_copy_(0, torch.cat(rows), torch.cat(rates))
