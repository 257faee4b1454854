"""Training the router, in two stages.

Stage 1: the posterior net, by cross-entropy on the cluster label plus squared error to the exact
posterior. Stage 2: the posterior net by squared error alone, and three derivative nets, each on its
own band of t, by squared error to the exact derivative along the path. The squared error is least
at the target's mean given x_t, which is what sampling integrates.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddm.training import Batches
from router.networks import DerivativeNet, PosteriorNet, RouterConfig, Scorer
from router.owners import Owners
from router.targets import exact_posterior, exact_posterior_rate


def posterior_loss(
    logits: Tensor, alpha: Tensor, label: Tensor, label_weight: float, posterior_weight: float
) -> Tensor:
    """`label_weight CE(logits, label) + posterior_weight mean_b |softmax(logits) - alpha|^2`, for
    `[B, K]` and `[B]`.
    """
    error = (logits.softmax(dim=1) - alpha).square().sum(dim=1).mean()
    return label_weight * F.cross_entropy(logits, label) + posterior_weight * error


def rate_loss(rate: Tensor, target: Tensor) -> Tensor:
    """`mean_b |dalpha_theta - dalpha/dt|^2`: a scalar, for `[B, K]`."""
    return (rate - target).square().sum(dim=1).mean()


class _RouterLearning(pl.LightningModule):
    """What both stages share: the training set on the device or with its owners, the noisy images
    of step n, and the targets.

    weights: as of `weights_of_images`. done: the steps of the stage before.
    """

    done = 0
    weights: Tensor | None

    def __init__(
        self,
        posterior: PosteriorNet,
        batches: Batches,
        cluster: Tensor,
        config: RouterConfig,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.posterior, self.batches, self.config = posterior, batches, config
        self.register_buffer("weights", weights, persistent=False)
        self.cluster = nn.Buffer(cluster, persistent=False)
        if config.compile:
            posterior.scorer.compile(dynamic=False)

    def on_fit_start(self) -> None:
        self.batches.to(self.device)

    def noisy(self, step: int, part: int, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0, its cluster label, eps and x_t of a part of a step, at the times `[B / parts]`."""
        self.batches.seed_dropout(step, part)
        x0, place = self.batches.x0(step, part)
        eps = self.batches.noise(step, part)
        a, s, _, _ = self.posterior.scorer.schedule(t).broadcast_to(x0)
        return x0, self.cluster[place], eps, a * x0 + s * eps

    def alpha(self, x: Tensor, t: Tensor) -> Tensor:
        """The exact posterior at x `[B, C, H, W]` and t `[B]`: `[B, K]`."""
        images, k = self.batches.images, len(self.posterior.log_pi)
        if isinstance(images, Owners):
            return images.posterior(x, t, self.weights)
        schedule = self.posterior.scorer.schedule
        return exact_posterior(x, t, images, self.cluster, schedule, k, self.weights)

    def alpha_and_rate(self, x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The exact posterior and its derivative at `x_t = a x0 + s eps`: `[B, K]` each."""
        images, k = self.batches.images, len(self.posterior.log_pi)
        if isinstance(images, Owners):
            return images.rate(x0, eps, t, self.weights)
        schedule = self.posterior.scorer.schedule
        return exact_posterior_rate(x0, eps, t, images, self.cluster, schedule, k, self.weights)

    def configure_optimizers(self) -> Any:
        return self.config.optimization(self, self.done)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.config.clip(p for group in optimizer.param_groups for p in group["params"])


class PosteriorLearning(_RouterLearning):
    """Stage 1: the posterior net, from labels and the exact posterior, t uniform in [t_min, 1]."""

    def training_step(self, _: Any, count: int) -> Tensor:
        step, part = self.global_step, count % self.batches.parts
        t = self.config.t_min + (1 - self.config.t_min) * self.batches.times(step, part)
        _x0, label, _eps, x = self.noisy(step, part, t)
        alpha = self.alpha(x, t)
        weights = self.config.label_weight, self.config.posterior_weight
        logits = self.posterior.logits(x, t)
        return torch.stack([posterior_loss(each, alpha, label, *weights) for each in logits]).sum()


class RouterLearning(_RouterLearning):
    """Stage 2: the posterior net and the derivative nets, a third of the times in each band."""

    def __init__(
        self,
        posterior: PosteriorNet,
        derivative: DerivativeNet,
        batches: Batches,
        cluster: Tensor,
        config: RouterConfig,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__(posterior, batches, cluster, config, weights)
        self.done = config.switch_step
        self.derivative = derivative
        self.edges = nn.Buffer(torch.tensor([config.t_min, *config.bands, 1.0]), persistent=False)
        if config.compile:
            derivative.scorers.apply(
                lambda part: part.compile(dynamic=False) if isinstance(part, Scorer) else None
            )

    def training_step(self, _: Any, count: int) -> Tensor:
        # Step numbers go on from stage 1, so that its batches do not come again.
        step = self.done + self.global_step
        part = count % self.batches.parts
        place = 3 * self.batches.times(step, part)
        band = place.long().clamp_max(2)
        t = self.edges[band] + (self.edges[band + 1] - self.edges[band]) * (place - band)
        x0, label, eps, x = self.noisy(step, part, t)
        alpha, alpha_rate = self.alpha_and_rate(x0, eps, t)
        # The times are stratified and rise with the rows, in each part of a batch as well: the
        # first third of the rows is band 0.
        thirds = zip(x.chunk(3), t.chunk(3), alpha_rate.chunk(3), strict=True)
        rates = [
            rate_loss(rate, target)
            for b, (x_b, t_b, target) in enumerate(thirds)
            for rate in self.derivative.band(b, x_b, t_b)
        ]
        logits = self.posterior.logits(x, t)
        losses = [posterior_loss(each, alpha, label, 0.0, 1.0) for each in logits]
        rate_weight = self.config.rate_weight / 3
        return torch.stack(losses).sum() + rate_weight * torch.stack(rates).sum()
