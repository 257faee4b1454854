"""The router's networks: the posterior net alpha_k(x, t), and the time-derivative net, with a
network for each band of t.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddm.blocks import Encoder, check_encoder, group_norm
from ddm.errors import require, within
from ddm.gaussian import Gaussians
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
    patch: side of the squares of pixels that the network takes for one; it divides the image's side.
    """

    channels: int = 64
    multipliers: list[int] = field(default_factory=lambda: [1, 2, 2, 2])
    blocks: int = 1
    attention: list[int] = field(default_factory=lambda: [8])
    dropout: float = 0.0
    patch: int = 1

    def check(self, shape: Sequence[int]) -> None:
        """Raise `ConfigError` naming the key of a size that cannot be for images `[C, H, W]`."""
        check_encoder(self.channels, self.multipliers, self.blocks, self.dropout, shape, self.patch)

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
    batch: images per step, at least; rounded up to a multiple of 3, a third for each band, and of
    the parts of `accumulate`.
    switch_step: stage 1 ends here; in [1, steps).
    label_weight: stage 1: of the cross-entropy, at least 0.
    posterior_weight: stage 1: of the squared error to the exact posterior, at least 0.
    rate_weight: stage 2: of the derivative nets' squared error, at least 0.
    bands: the two times between the three bands, rising in (t_min, 1).
    gaussians: blend the logits and rates of the clusters' Gaussians with the networks', by
    learned functions of t; a fresh router is then that of the Gaussians.
    data: what it is trained on: `pooled`, the images of all clusters; `shards`, the same by asking
    each owner for sums over its own (`router.owners`); or `experts`, images sampled from the
    experts, so that it needs no owner's images.
    samples: how many images the experts sample together, at least one each.
    """

    net: RouterNetConfig = field(default_factory=RouterNetConfig)
    batch: int = 129
    switch_step: int = 500
    label_weight: float = 1.0
    posterior_weight: float = 1.0
    rate_weight: float = 1.0
    bands: list[float] = field(default_factory=lambda: [0.3, 0.7])
    gaussians: bool = True
    data: Literal["pooled", "shards", "experts"] = "pooled"
    samples: int = 10_000

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
        known = self.precision != "auto"
        require(known, "precision", "be one of 32-true bf16-mixed 16-mixed", self.precision)
        require(self.samples >= 1, "samples", "be at least 1", self.samples)
        rising = len(self.bands) == 2 and self.t_min < self.bands[0] < self.bands[1] < 1
        require(rising, "bands", "be two rising times in (t_min, 1)", self.bands)

    @property
    def images_per_step(self) -> int:
        """`batch`, rounded up: each band of t gets a third of each of the `accumulate` parts."""
        least = 3 * self.accumulate
        return -(-self.batch // least) * least

    def build(
        self, shape: Sequence[int], pi: Tensor, schedule: Schedule, gaussians: Gaussians
    ) -> "tuple[PosteriorNet, DerivativeNet]":
        """A fresh router for images `[C, H, W]`, mixture weights `pi` `[K]` and the clusters'
        Gaussians, which are used if `gaussians`.

        Raises `ConfigError` naming a bad size.
        """
        with within("net"):
            scorer = self.net.build(shape, len(pi), schedule)
        posterior = PosteriorNet(scorer, pi, gaussians if self.gaussians else None)
        return posterior, DerivativeNet.from_trunk(posterior, self.bands)


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
        self.trunk = Encoder(
            shape, c.channels, c.multipliers, c.blocks, c.attention, c.dropout, c.patch
        )
        self.norm = group_norm(self.trunk.widths[-1])
        self.head = nn.Linear(self.trunk.widths[-1], clusters)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x)
        a, s, _, _ = self.schedule(t).broadcast_to(x)
        maps, _ = self.trunk(x * torch.rsqrt(a**2 + s**2), t)
        return self.head(F.silu(self.norm(maps[-1])).mean(dim=(2, 3))).to(x.dtype)


class Blend(nn.Module):
    """`w(t) network + g(t) Gaussians`, w and g learned; both are 1 at initialization, and linear
    between equally spaced times.

    Adam moves every parameter by about the learning rate, which is the network's; what is learned
    is therefore (w - 1)/25 and (g - 1)/25, so that w and g find their place in tens of steps.
    """

    def __init__(self, knots: int = 11) -> None:
        super().__init__()
        self.knots = nn.Parameter(torch.zeros(knots, 2))

    def forward(self, network: Tensor, gaussians: Tensor, t: Tensor) -> Tensor:
        """The blend of two `[B, K]` at t `[]` or `[B]`."""
        last = len(self.knots) - 1
        place = t.to(network).reshape(-1, 1) * last
        left = place.floor().clamp(0, last - 1)
        low = left[:, 0].long()
        factors = 1 + 25 * torch.lerp(self.knots[low], self.knots[low + 1], place - left)
        return factors[:, :1] * network + factors[:, 1:] * gaussians.to(network)


class PosteriorNet(nn.Module):
    """alpha_k(x, t), `[B, K]`; rows sum to 1 by softmax.

    A fresh network returns the posterior of the clusters' Gaussians, or without these the mixture
    weights pi.
    """

    def __init__(self, scorer: Scorer, pi: Tensor, gaussians: Gaussians | None = None) -> None:
        super().__init__()
        self.scorer = scorer
        self.log_pi = nn.Buffer(pi.log())
        self.gaussians = gaussians
        self.blend = Blend() if gaussians else None

    def logits(self, x: Tensor, t: Tensor) -> list[Tensor]:
        """The softmax's argument, `[B, K]`; where it blends the Gaussians in, also the network's
        own. Both are trained: a network that learns only what the Gaussians miss learns slower.
        """
        network = self.scorer(x, t)
        alone = network + self.log_pi
        if self.gaussians is None or self.blend is None:
            return [alone]
        density = self.gaussians.log_densities(x, t)
        odds = density - density.amax(dim=1, keepdim=True)
        return [self.blend(network, odds, t) + self.log_pi, alone]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.logits(x, t)[0].softmax(dim=1)


class DerivativeNet(nn.Module):
    """d alpha_k/dt, `[B, K]`; rows sum to 0 because their mean is subtracted.

    One network for each band of t. A fresh one returns the rate of the clusters' Gaussians along
    their mixture's flow, or without these 0.

    `edges` are the times between bands, rising, inside (0, 1): band b reaches from `edges[b - 1]`
    to `edges[b]`. `pi` `[K]` are the Gaussians' mixture weights.
    """

    def __init__(
        self,
        scorers: Sequence[Scorer],
        edges: Sequence[float],
        pi: Tensor,
        gaussians: Gaussians | None = None,
    ) -> None:
        super().__init__()
        assert len(scorers) == len(edges) + 1
        self.scorers = nn.ModuleList(scorers)
        self.edges = list(edges)
        self.pi = pi
        self.gaussians = gaussians
        self.blend = Blend() if gaussians else None

    @staticmethod
    def from_trunk(posterior: PosteriorNet, edges: Sequence[float]) -> "DerivativeNet":
        """Networks that start from the posterior net's trunk, with heads that start at zero."""
        scorers = [copy.deepcopy(posterior.scorer) for _ in range(len(edges) + 1)]
        for fresh in scorers:
            nn.init.zeros_(fresh.head.weight)
            nn.init.zeros_(fresh.head.bias)
        return DerivativeNet(scorers, edges, posterior.log_pi.exp(), posterior.gaussians)

    def band(self, b: int, x: Tensor, t: Tensor) -> list[Tensor]:
        """The output of band b's network at any t, and the network's own, as in
        `PosteriorNet.logits`.
        """
        network = self.scorers[b](x, t)
        alone = network - network.mean(dim=1, keepdim=True)
        if self.gaussians is None or self.blend is None:
            return [alone]
        return [self.blend(alone, self.gaussians.posterior_rate(x, t, self.pi), t), alone]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if t.ndim == 0:
            return self.band(int(sum(t >= edge for edge in self.edges)), x, t)[0]
        edges = torch.tensor(self.edges, device=t.device, dtype=t.dtype)
        band = torch.bucketize(t.contiguous(), edges, right=True)
        rows = [(band == b).nonzero()[:, 0] for b in range(len(self.scorers))]
        rates = [self.band(b, x[r.to(x.device)], t[r])[0] for b, r in enumerate(rows) if len(r)]
        order = torch.cat(rows).to(x.device)
        return torch.empty_like(torch.cat(rates)).index_copy_(0, order, torch.cat(rates))
