"""How one expert learns: from its cluster's pictures and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from ddm.errors import require
from ddm.learning import Batches, FitConfig
from ddm.schedules import Coeffs, Schedule
from experts.denoiser import Denoiser, Parameterization
from experts.unet import UNetConfig

LossWeight = Literal["constant", "snr", "min_snr"]


@dataclass
class ExpertConfig(FitConfig):
    """One expert: its network, what the network predicts, and how it is fitted."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    parameterization: Parameterization = "raw"
    sigma_data: float = 0.5  # the root mean square of a pixel in [-1, 1], for `preconditioned`
    loss_weight: LossWeight = "constant"
    min_snr_gamma: float = 5.0

    def check(self, section: str) -> None:
        """Raise `ConfigError` naming the key `section.…` of a value out of its range."""
        super().check(section)
        require(self.sigma_data > 0, f"{section}.sigma_data", "be above 0", self.sigma_data)
        require(self.min_snr_gamma > 0, f"{section}.min_snr_gamma", "be above 0", self.min_snr_gamma)

    def build(self, shape: Sequence[int], schedule: Schedule) -> Denoiser:
        """A fresh expert for pictures `[C, H, W]`. Raises `ConfigError` naming the key of a size that cannot be."""
        return Denoiser(self.unet.build(shape), schedule, self.parameterization, self.sigma_data)


def loss_weight(kind: LossWeight, c: Coeffs, gamma: float) -> Tensor:
    """The weight of `|D - x0|^2` at each time: 1, `a^2/s^2`, or `min(a^2/s^2, gamma)` (Min-SNR, arXiv 2303.09556, section 3.4)."""
    snr = (c.a / c.s).square()
    match kind:
        case "constant":
            return torch.ones_like(snr)
        case "snr":
            return snr
        case "min_snr":
            return snr.clamp_max(gamma)


def denoising_loss(denoised: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """`mean_b weight_b mean |D_b - x0_b|^2`: a scalar, for `[B, C, H, W]` pictures and weights `[B]`."""
    return (weight * (denoised - x0).square().flatten(1).mean(dim=1)).mean()


class ExpertLearning(pl.LightningModule):
    """Lightning's view of one expert. The loader only counts steps: the batch of step n is a function of (seed, n)."""

    def __init__(self, denoiser: Denoiser, batches: Batches, config: ExpertConfig) -> None:
        super().__init__()
        self.denoiser, self.batches, self.config = denoiser, batches, config

    def on_fit_start(self) -> None:
        self.batches.images = self.batches.images.to(self.device)

    def training_step(self, _: Any, __: int) -> Tensor:
        n, batches = self.global_step, self.batches
        batches.seed_dropout(n)
        x0, _place = batches.pictures(n)
        t = self.config.t_min + (1 - self.config.t_min) * batches.times(n)
        c = self.denoiser.schedule(t)
        a, s, _, _ = c.beside(x0)
        denoised = self.denoiser(a * x0 + s * batches.noise(n), t)
        return denoising_loss(denoised, x0, loss_weight(self.config.loss_weight, c, self.config.min_snr_gamma))

    def configure_optimizers(self) -> Any:
        return self.config.adam(self.denoiser.parameters())
