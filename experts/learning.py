"""How one expert learns: from its cluster's pictures and nothing else."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ddm.learning import Batches
from ddm.schedules import Coeffs
from experts.denoiser import Denoiser, ExpertConfig, LossWeight


def loss_weight(kind: LossWeight, c: Coeffs, gamma: float) -> Tensor:
    """The weight of `|D - x0|^2` at each time: 1, `a^2/s^2`, or `min(a^2/s^2, gamma)` (arXiv 2303.09556, section 3.4)."""
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
