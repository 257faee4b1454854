"""An expert: a network made into a denoiser `(x, t) -> E[x0 | x_t = x]`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ddm.conversion import Conversion
from ddm.errors import require, within
from ddm.schedules import Schedule
from ddm.seed_model import is_above
from ddm.training import FitConfig
from experts.unet import UNetConfig

Parameterization = Literal["raw", "preconditioned", "epsilon", "v"]
LossWeight = Literal["constant", "snr", "min_snr", "edm"]
Times = Literal["uniform", "uniform_log_snr", "logit_normal", "log_normal"]

_EMA_ALSO = "hold decays in (0, 1), and none where ema_decay is 0"


@dataclass
class ExpertConfig(FitConfig):
    """One expert: its network, what the network predicts, and how it is trained.

    unet: sizes of the network.
    parameterization: `raw` predicts x0; `preconditioned` is EDM's; `epsilon` predicts the noise and
    `v` the velocity of a variance preserving process (see `Denoiser`).
    sigma_data: the root mean square of a pixel in [-1, 1], for `preconditioned`; above 0.
    loss_weight: of the squared error over t: constant, snr, min_snr or edm.
    min_snr_gamma: the bound of min_snr, above 0.
    times: the distribution of training times: uniform, uniform_log_snr, logit_normal or log_normal.
    t_max: no later times are learned: of the same distribution, those in [t_min, t_max], where the
    bundle's seed model moves images at the others; in (t_min, 1), or null for 1.
    ema_also: further decays, in (0, 1), whose averages are kept as well. After training the average
    with the least loss on held-out images is taken; that of ema_decay where none are held out.
    condition: what of an image the network is told as well: none, its label, or its attributes.
    condition_dropout: how often it is told nothing in training, in (0, 1), so that it can sample
    without a condition and by guidance.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    parameterization: Parameterization = "raw"
    sigma_data: float = 0.5
    loss_weight: LossWeight = "constant"
    min_snr_gamma: float = 5.0
    times: Times = "uniform"
    t_max: float | None = None
    ema_also: list[float] = field(default_factory=list)
    condition: Literal["none", "label", "attributes"] = "none"
    condition_dropout: float = 0.1

    def check(self) -> None:
        """Raise `ConfigError` naming the key of a value out of its range."""
        super().check()
        require(0 < self.sigma_data <= 1000, "sigma_data", "be in (0, 1000]", self.sigma_data)
        whole = self.batch % self.accumulate == 0
        require(whole, "accumulate", f"divide batch = {self.batch}", self.accumulate)
        for decay in self.ema_also:
            require(0 < decay < 1 and self.ema_decay > 0, "ema_also", _EMA_ALSO, decay)
        require(self.min_snr_gamma > 0, "min_snr_gamma", "be above 0", self.min_snr_gamma)
        t_min, t_max = self.t_min, self.t_max
        rule = f"be in (t_min = {t_min:g}, 1), or null"
        require(t_max is None or t_min < t_max < 1, "t_max", rule, t_max)
        dropout = self.condition_dropout
        require(0 < dropout < 1, "condition_dropout", "be in (0, 1)", dropout)

    def build(
        self,
        shape: Sequence[int],
        schedule: Schedule,
        conversion: Conversion | None = None,
        condition: int = 0,
    ) -> "Denoiser":
        """A fresh expert for images `[C, H, W]`; `conversion` and `condition` as in `Denoiser`.

        Raises `ConfigError` naming the key of a size that cannot be.
        """
        with within("unet"):
            network = self.unet.build(shape, condition)
        return Denoiser(
            network, schedule, self.parameterization, self.sigma_data, conversion, condition
        )


class Denoiser(nn.Module):
    """x0-prediction by a network, `x [B, C, H, W], t [] or [B] -> [B, C, H, W]`.

    `raw`: the network's output is x0, as in the paper. `preconditioned`: `D = c_skip x + c_out
    F(c_in x, t)` with EDM's coefficients (arXiv 2206.00364, table 1) for x = a x0 + s eps, so that
    F sees and gives numbers of size 1 at every t and its errors cannot reach x0 where the noise is
    small:

        v = sigma_data^2    c_in = 1 / sqrt(a^2 v + s^2)    c_skip = a v / (a^2 v + s^2)
                            c_out = s sqrt(v) / sqrt(a^2 v + s^2)

    `epsilon`: F is eps (arXiv 2006.11239), so `D = (x - s F) / a`. `v`: F is `a eps - s x0` where
    a^2 + s^2 = 1 (arXiv 2202.00512, appendix D), so `D = a x - s F`. Both see x / sqrt(a^2 + s^2).

    schedule: the process that the network is trained on. conversion: to it from the process of x
    and t, where that is another one. condition: the length of the condition's vector, 0 for a
    network without one. With one, `forward(x, t, vector [B, condition])` is `E[x0 | x_t = x, c]`;
    without a vector it is no condition.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        parameterization: Parameterization,
        sigma_data: float,
        conversion: Conversion | None = None,
        condition: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization
        self.sigma_data = sigma_data
        self.conversion = conversion
        self.condition = condition

    def forward(self, x: Tensor, t: Tensor, vector: Tensor | None = None) -> Tensor:
        if self.conversion is not None:
            x, t = self.conversion(x, t)
        t = t.to(x)
        if self.parameterization == "raw":
            return self._network(x, t, vector).to(x.dtype)
        c_in, c_skip, c_out = self._coefficients(*self.schedule(t).broadcast_to(x)[:2])
        return c_skip * x + c_out * self._network(c_in * x, t, vector).to(x.dtype)

    def _coefficients(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_in, c_skip and c_out."""
        match self.parameterization:
            case "epsilon":
                return torch.rsqrt(a**2 + s**2), 1 / a, -s / a
            case "v":
                total = a**2 + s**2
                return torch.rsqrt(total), a / total, -s * torch.rsqrt(total)
        variance = self.sigma_data**2
        total = a**2 * variance + s**2
        c_in = torch.rsqrt(total)
        return c_in, a * variance / total, s * self.sigma_data * c_in

    def _network(self, x: Tensor, t: Tensor, vector: Tensor | None) -> Tensor:
        if self.condition == 0:
            return self.network(x, t)
        if vector is None:
            vector = x.new_zeros(len(x), self.condition)
        return self.network(x, t, vector)


class SeededDenoiser(nn.Module):
    """An expert of a bundle with a seed model, which moves the images at t > `above`: that, and the
    expert at other times. See `ddm.seed_model`; all experts of a process share one seed model.
    """

    def __init__(self, expert: Denoiser, seed_model: Denoiser, above: float) -> None:
        super().__init__()
        self.expert = expert
        self.seed_model = seed_model
        self.above = above

    def forward(self, x: Tensor, t: Tensor, vector: Tensor | None = None) -> Tensor:
        high = is_above(t, self.above)
        if not high.any():
            return self.expert(x, t, vector)
        if high.all():
            return self.seed_model(x, t, vector)
        denoised = torch.empty_like(x)
        for denoiser, mask in ((self.expert, ~high), (self.seed_model, high)):
            rows = mask.nonzero()[:, 0].to(x.device)
            if len(rows) == 1:  # for which a network would be compiled apart
                rows = rows.repeat(2)
            given = None if vector is None else vector[rows]
            denoised[rows] = denoiser(x[rows], t[rows.to(t.device)], given)
        return denoised
