"""Where routing is tried: mixtures of which everything is known exactly, and real images with exact finite-set experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ddm.gaussian import Gaussians, cosine, moments
from ddm.oracle import GaussianMixture
from ddm.rng import RngStream, normal
from ddm.samplers import Denoiser, drive, plan_steps, sample, start
from ddm.schedules import Schedule, schedule
from ddm.training import to_float
from router.policies import Policy
from router.routing import ControlVariate, RoutedDenoiser, Router
from router.sources import Alpha, Source
from train.data import DataConfig


@dataclass(frozen=True)
class Bed:
    """K exact experts, their exact posterior, what stands in for them, and the noise that the paths start from."""

    name: str
    experts: Sequence[Denoiser]
    alpha: Alpha
    pi: Tensor
    gaussians: Gaussians
    noise: Tensor
    schedule: Schedule
    draw: Callable[[int], Tensor] | None = None  # exact draws of a seed, as many as there are paths
    rate: Alpha | None = None  # the posterior's exact rate

    def trajectory(
        self,
        steps: int,
        policy: str | Policy = "full",
        *,
        alpha: Alpha | Source | None = None,
        control_variate: bool = False,
        sampler: str = "ddim",
        order: int = 3,
        grid: str | Tensor = "uniform_t",
        seed: int = 3,
    ) -> tuple[Tensor, float]:
        """Where the paths end, `[B, ...]`, and the expert calls that each took."""
        method, _ = plan_steps(sampler, steps, grid, self.schedule, 0.0, order)
        routed = RoutedDenoiser(
            self.experts,
            self.router(policy, alpha),
            seed=seed,
            calls_per_step=method.calls_per_step,
            control_variate=self.control_variate if control_variate else None,
        )
        ends, _ = drive(
            start(self.noise, self.schedule, sampler, steps, grid, seed=seed, order=order), routed
        )
        return ends, routed.calls / len(ends)

    def router(self, policy: str | Policy, alpha: Alpha | Source | None = None) -> Router:
        """The router of a policy, by the exact posterior or another source of alpha."""
        return Router.of(alpha or self.alpha, policy, self.pi)

    @property
    def control_variate(self) -> ControlVariate:
        """The Gaussians that stand in for the experts."""
        return self.gaussians.mix

    @property
    def means(self) -> Tensor:
        """The clusters' means, `[K, ...]`."""
        return cosine(self.gaussians.means, inverse=True)

    def stand_ins(self, x: Tensor, t: Tensor) -> Tensor:
        """What each Gaussian says, `[B, K, ...]`."""
        rows = torch.eye(len(self.experts))
        return torch.stack(
            [self.control_variate(x, t, row.expand(len(x), -1)) for row in rows], dim=1
        )

    def full(self, x: Tensor, t: Tensor) -> Tensor:
        """The mixture itself."""
        alpha = self.alpha(x, t)
        return sum(
            (
                alpha[:, k].reshape(-1, *[1] * (x.ndim - 1)) * e(x, t)
                for k, e in enumerate(self.experts)
            ),
            0 * x,
        )

    def reference(self) -> Tensor:
        """Where the full mixture's own path ends."""
        return sample(self.full, self.noise, self.schedule, "unipc", 500, "uniform_log_snr")


def mixture(
    k: int, d: int, separation: float, components: int = 1, paths: int = 400, seed: int = 1
) -> Bed:
    """K clusters in d dimensions, each of that many Gaussians whose means are `separation` times normal draws."""
    generator = torch.Generator().manual_seed(seed)
    means = separation * torch.randn(k * components, d, generator=generator)
    stds = 0.3 + 0.7 * torch.rand(k * components, d, generator=generator)
    pi = torch.arange(k, 0, -1) / (k * (k + 1) / 2) if k <= 4 else torch.full((k,), 1 / k)
    weights = (pi / components).repeat_interleave(components)
    process = schedule("vp_linear")
    whole = GaussianMixture(weights, means, stds, process)
    parts = [
        GaussianMixture(torch.full((components,), 1 / components), m, s, process)
        for m, s in zip(means.split(components), stds.split(components), strict=True)
    ]
    grouped = means.reshape(k, components, d)
    spread = (stds**2).reshape(k, components, d).mean(dim=1) + grouped.var(dim=1, correction=0)

    def by_cluster(of: Alpha, x: Tensor, t: Tensor) -> Tensor:
        return of(x, t).reshape(len(x), k, components).sum(dim=2)

    return Bed(
        f"K = {k}, d = {d}, means {separation:g}"
        + (f", {components} Gaussians a cluster" if components > 1 else ""),
        [part.denoise for part in parts],
        partial(by_cluster, whole.posterior),
        pi,
        Gaussians(grouped.mean(dim=1), spread, process),
        normal(5, RngStream.START, torch.arange(paths), 0, (d,)),
        process,
        partial(whole.sample, paths),
        partial(by_cluster, whole.posterior_rate),
    )


def cifar10(root: Path, real: int = 3000, paths: int = 48) -> Bed:
    """Ten clusters by label of real real; an expert is the softmax average of its cluster's real, exact and untrained."""
    data = DataConfig(name="cifar10", root=str(root)).build()
    assert data.labels is not None
    order = data.labels[:real].argsort(stable=True)
    images, counts = data.images[:real][order], torch.bincount(data.labels[:real], minlength=10)
    process = schedule("vp_linear")
    clusters = images.split(counts.tolist())
    means, variances = (
        torch.stack(part) for part in zip(*(moments(cluster) for cluster in clusters), strict=True)
    )
    points = [to_float(cluster).flatten(1) for cluster in clusters]
    squares = [part.square().sum(dim=1) for part in points]

    # Beside `router.targets`, which counts in float64, converting the real at each call: paths do not need that.
    def log_weights(x: Tensor, t: Tensor, k: int) -> Tensor:
        a, s, _, _ = process(t.to(x))
        return a / s**2 * (x.flatten(1) @ points[k].T - a / 2 * squares[k])

    def expert(k: int, x: Tensor, t: Tensor) -> Tensor:
        return (log_weights(x, t, k).softmax(dim=1) @ points[k]).reshape(x.shape)

    def alpha(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack(
            [log_weights(x, t, k).logsumexp(dim=1) for k in range(10)], dim=1
        ).softmax(dim=1)

    return Bed(
        f"{real:,} real of CIFAR-10, 10 clusters by label",
        [partial(expert, k) for k in range(10)],
        alpha,
        counts / counts.sum(),
        Gaussians(means, variances, process),
        normal(0, RngStream.START, torch.arange(paths), 0, (3, 32, 32)),
        process,
    )
