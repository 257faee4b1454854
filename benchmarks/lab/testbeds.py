"""Testbeds for routing: mixtures with exact experts and posterior, and real images with exact
finite-set experts.
"""

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
from router.routing import RoutedDenoiser
from router.sources import Alpha, Source
from router.step import ControlVariate, Router
from train.data import DataConfig


@dataclass(frozen=True)
class Testbed:
    """K exact experts, their exact posterior and Gaussian approximations, and the noise that
    trajectories start from.
    """

    name: str
    experts: Sequence[Denoiser]
    alpha: Alpha
    pi: Tensor
    gaussians: Gaussians
    noise: Tensor
    schedule: Schedule
    draw: Callable[[int], Tensor] | None = None  # exact samples of a seed, one per trajectory
    rate: Alpha | None = None  # the exact rate of the posterior

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
        """The ends of the trajectories, `[B, ...]`, and the NFE of each."""
        method, _ = plan_steps(sampler, steps, grid, self.schedule, 0.0, order)
        routed = RoutedDenoiser(
            self.experts,
            self.router(policy, alpha),
            seed=seed,
            calls_per_step=method.calls_per_step,
            control_variate=self.control_variate if control_variate else None,
        )
        generator = start(self.noise, self.schedule, sampler, steps, grid, seed=seed, order=order)
        ends, _ = drive(generator, routed)
        return ends, routed.calls / len(ends)

    def router(self, policy: str | Policy, alpha: Alpha | Source | None = None) -> Router:
        """The router of a policy, by the exact posterior or another source of alpha."""
        return Router.of(alpha or self.alpha, policy, self.pi)

    @property
    def control_variate(self) -> ControlVariate:
        """The Gaussian approximations of the experts."""
        return self.gaussians.mix

    @property
    def means(self) -> Tensor:
        """The clusters' means, `[K, ...]`."""
        return cosine(self.gaussians.means, inverse=True)

    def gaussian_denoised(self, x: Tensor, t: Tensor) -> Tensor:
        """The denoised image of each Gaussian approximation, `[B, K, ...]`."""
        one_hot = torch.eye(len(self.experts))
        denoised = [self.control_variate(x, t, row.expand(len(x), -1)) for row in one_hot]
        return torch.stack(denoised, dim=1)

    def full(self, x: Tensor, t: Tensor) -> Tensor:
        """The denoised image of the full mixture."""
        alpha = self.alpha(x, t)
        total = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            total = total + _per_image(alpha[:, k], x) * expert(x, t)
        return total

    def reference(self) -> Tensor:
        """The ends of the full mixture's trajectories."""
        return sample(self.full, self.noise, self.schedule, "unipc", 500, "uniform_log_snr")


def _per_image(values: Tensor, x: Tensor) -> Tensor:
    """One value `[B]` per image, ready to multiply x `[B, ...]`."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def mixture(
    k: int, d: int, separation: float, components: int = 1, paths: int = 400, seed: int = 1
) -> Testbed:
    """K clusters in d dimensions, each of `components` Gaussians with means `separation` times
    normal random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    means = separation * torch.randn(k * components, d, generator=generator)
    stds = 0.3 + 0.7 * torch.rand(k * components, d, generator=generator)
    pi = torch.arange(k, 0, -1) / (k * (k + 1) / 2) if k <= 4 else torch.full((k,), 1 / k)
    weights = (pi / components).repeat_interleave(components)
    process = schedule("vp_linear")
    whole = GaussianMixture(weights, means, stds, process)
    even = torch.full((components,), 1 / components)
    clusters = [
        GaussianMixture(even, cluster_means, cluster_stds, process)
        for cluster_means, cluster_stds in zip(
            means.split(components), stds.split(components), strict=True
        )
    ]
    grouped = means.reshape(k, components, d)
    within = (stds**2).reshape(k, components, d).mean(dim=1)
    variance = within + grouped.var(dim=1, correction=0)

    def by_cluster(of: Alpha, x: Tensor, t: Tensor) -> Tensor:
        return of(x, t).reshape(len(x), k, components).sum(dim=2)

    name = f"K = {k}, d = {d}, means {separation:g}"
    if components > 1:
        name += f", {components} Gaussians per cluster"
    return Testbed(
        name,
        [cluster.denoise for cluster in clusters],
        partial(by_cluster, whole.posterior),
        pi,
        Gaussians(grouped.mean(dim=1), variance, process),
        normal(5, RngStream.START, torch.arange(paths), 0, (d,)),
        process,
        partial(whole.sample, paths),
        partial(by_cluster, whole.posterior_rate),
    )


def cifar10(root: Path, count: int = 3000, paths: int = 48) -> Testbed:
    """The first `count` images of CIFAR-10 in ten clusters by label.

    An expert is the softmax average of its cluster's images: exact and untrained.
    """
    data = DataConfig(name="cifar10", root=str(root)).build()
    assert data.labels is not None
    labels = data.labels[:count]
    sizes = torch.bincount(labels, minlength=10)
    clusters = data.images[:count][labels.argsort(stable=True)].split(sizes.tolist())
    of_clusters = [moments(cluster) for cluster in clusters]
    means = torch.stack([mean for mean, _ in of_clusters])
    variances = torch.stack([variance for _, variance in of_clusters])
    process = schedule("vp_linear")
    points = [to_float(cluster).flatten(1) for cluster in clusters]
    squares = [cluster.square().sum(dim=1) for cluster in points]

    # In float32, unlike `router.targets`, which converts all images to float64 at each call.
    def log_weights(x: Tensor, t: Tensor, k: int) -> Tensor:
        a, s, _, _ = process(t.to(x))
        return a / s**2 * (x.flatten(1) @ points[k].T - a / 2 * squares[k])

    def expert(k: int, x: Tensor, t: Tensor) -> Tensor:
        return (log_weights(x, t, k).softmax(dim=1) @ points[k]).reshape(x.shape)

    def alpha(x: Tensor, t: Tensor) -> Tensor:
        evidence = [log_weights(x, t, k).logsumexp(dim=1) for k in range(10)]
        return torch.stack(evidence, dim=1).softmax(dim=1)

    return Testbed(
        f"{count:,} images of CIFAR-10, 10 clusters by label",
        [partial(expert, k) for k in range(10)],
        alpha,
        sizes / sizes.sum(),
        Gaussians(means, variances, process),
        normal(0, RngStream.START, torch.arange(paths), 0, (3, 32, 32)),
        process,
    )
