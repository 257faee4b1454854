"""Training one expert, from its cluster's images and nothing else."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from ddm.condition import ImageConditions
from ddm.grids import log_sigma, time_grid, times_at
from ddm.rng import RngStream
from ddm.schedules import Coeffs, Schedule
from ddm.training import Batches
from experts.denoiser import Denoiser, ExpertConfig, LossWeight, Times


def loss_weight(kind: LossWeight, c: Coeffs, gamma: float, sigma_data: float) -> Tensor:
    """The weight of `|D - x0|^2` at each time.

    constant: 1. snr: `a^2/s^2`. min_snr: `min(a^2/s^2, gamma)` (arXiv 2303.09556, section 3.4).
    edm: `a^2/s^2 + 1/sigma_data^2` (arXiv 2206.00364, table 1), with which a preconditioned network
    has the same loss at every t before it has learned.
    """
    snr = (c.a / c.s).square()
    match kind:
        case "constant":
            return torch.ones_like(snr)
        case "snr":
            return snr
        case "min_snr":
            return snr.clamp_max(gamma)
        case "edm":
            return snr + sigma_data**-2


def training_times(
    kind: Times,
    t_min: float,
    schedule: Schedule,
    points: int = 1000,
    t_max: float | None = None,
) -> Tensor:
    """`points + 1` evenly spaced quantiles of the distribution of training times, rising in [t_min,
    1], float32.

    `uniform`: uniform in t. `uniform_log_snr`: uniform in log a^2/s^2, so many near the data.
    `logit_normal`: the logit of t is standard normal (arXiv 2403.03206, equation 19), so few at
    either end. `log_normal`: `log s/a` is normal with mean -1.2 and deviation 1.2 within
    [t_min, 1] (arXiv 2206.00364, table 1), so most where images get their detail.

    t_max: the quantiles are those of the distribution given t <= t_max.
    """
    if t_max is not None:
        levels = np.linspace(0, 1, points + 1)
        times = training_times(kind, t_min, schedule, points).double().numpy()
        below = np.interp(t_max, times, levels)  # the fraction of times up to t_max
        return torch.from_numpy(np.interp(below * levels, levels, times)).float()
    level = torch.linspace(0, 1, points + 1, dtype=torch.float64)
    match kind:
        case "uniform":
            return torch.linspace(t_min, 1, points + 1)
        case "uniform_log_snr":
            return time_grid("uniform_log_snr", points, schedule, t_min).flip(0).float()
        case "logit_normal":
            return torch.special.ndtri(level).sigmoid().clamp_min(t_min).float()
        case "log_normal":
            ends = log_sigma(torch.tensor([t_min, 1.0], dtype=torch.float64), schedule)
            low, high = torch.special.ndtr((ends + 1.2) / 1.2)
            normal = torch.special.ndtri(low + (high - low) * level)
            return times_at(-1.2 + 1.2 * normal, schedule, t_min).float()


def denoising_loss(denoised: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """`mean_b weight_b mean |D_b - x0_b|^2`: a scalar, from `[B, C, H, W]` and `[B]`."""
    return denoising_losses(denoised, x0, weight).mean()


def denoising_losses(denoised: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """`weight_b mean |D_b - x0_b|^2` of each image, `[B]`."""
    return weight * (denoised - x0).square().flatten(1).mean(dim=1)


class ExpertLearning(pl.LightningModule):
    """One expert as a LightningModule.

    The data loader only counts steps: the batch of step n is a function of (seed, n).
    conditions: of the images of `batches`, for an expert with one.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        batches: Batches,
        config: ExpertConfig,
        conditions: ImageConditions | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.batches, self.config = denoiser, batches, config
        self.conditions = conditions
        self.levels = nn.Buffer(
            training_times(config.times, config.t_min, denoiser.schedule, t_max=config.t_max),
            persistent=False,
        )
        if config.compile:
            # Compiled once for all experts of a process, which differ in weights alone. On a GPU their
            # launches are one graph, in whose memory the gradient of the next step takes the place
            # of the last: parts of a batch, whose gradients add up, cannot have it.
            mode = "reduce-overhead" if config.accumulate == 1 else "default"
            denoiser.network.compile(dynamic=False, mode=mode)

    def at(self, level: Tensor) -> Tensor:
        """The quantiles of the training times at `level` `[B]` in (0, 1)."""
        place = level * (len(self.levels) - 1)
        low = place.long().clamp_max(len(self.levels) - 2)
        return torch.lerp(self.levels[low], self.levels[low + 1], place - low)

    def on_fit_start(self) -> None:
        self.batches.to(self.device)
        if self.conditions is not None:
            self.conditions = self.conditions.to(self.device)

    def training_step(self, _: Any, count: int) -> Tensor:
        n, batches = self.global_step, self.batches
        part = count % batches.parts
        batches.seed_dropout(n, part)
        x0, place = batches.x0(n, part)
        t, noise = self.at(batches.times(n, part)), batches.noise(n, part)
        return self.losses(x0, t, noise, self.condition(n, part, place)).mean()

    def condition(self, step: int, part: int, place: Tensor) -> Tensor | None:
        """The condition's vectors `[B, C]` of the images at `place` `[B]`, some left out; None for
        an expert without one.

        A part `condition_dropout` of the images have none (arXiv 2207.12598, algorithm 1). Of the
        others' attributes a part is left out that is uniform in [0, 1], so that any number of
        attributes may be given when sampling.
        """
        if self.conditions is None:
            return None
        vectors = self.conditions.vectors(place)
        several = self.conditions.vocabulary.kind == "attributes"
        count = 2 + vectors.shape[1] if several else 1
        u = self.batches.uniforms(RngStream.CONDITION, step, part, count).to(vectors)
        vectors = vectors * (u[:, :1] >= self.config.condition_dropout)
        return vectors * (u[:, 2:] < u[:, 1:2]) if several else vectors

    def losses(
        self, x0: Tensor, t: Tensor, noise: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """The loss of each image, `[B]`, at times `[B]`; condition: vectors `[B, C]`, None for
        none.
        """
        c = self.denoiser.schedule(t)
        a, s, _, _ = c.broadcast_to(x0)
        x = a * x0 + s * noise
        denoised = self.denoiser(x, t) if condition is None else self.denoiser(x, t, condition)
        cfg = self.config
        weight = loss_weight(cfg.loss_weight, c, cfg.min_snr_gamma, cfg.sigma_data)
        return denoising_losses(denoised, x0, weight)

    def configure_optimizers(self) -> Any:
        return self.config.optimization(self.denoiser)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.config.clip(p for group in optimizer.param_groups for p in group["params"])
