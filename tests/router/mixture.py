"""A Gaussian mixture of four clusters, its routed denoiser, constant experts, and a policy with given uniforms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ddm.oracle import GaussianMixture
from ddm.rng import RngStream, normal
from ddm.schedules import schedule
from router.policies import Policy
from router.routing import RoutedDenoiser
from router.sources import prior

LINEAR = schedule("vp_linear")


PI = torch.tensor([0.4, 0.3, 0.2, 0.1])


def mixture(dtype: torch.dtype = torch.float32) -> GaussianMixture:
    generator = torch.Generator().manual_seed(1)
    means, spread = (
        3 * torch.randn(4, 8, generator=generator),
        torch.rand(4, 8, generator=generator),
    )
    return GaussianMixture(PI.to(dtype), means.to(dtype), (0.3 + 0.7 * spread).to(dtype), LINEAR)


def noise(n: int, seed: int = 5) -> Tensor:
    return normal(seed, RngStream.START, torch.arange(n), 0, (8,))


def routed(oracle: GaussianMixture, rule: str | Policy, **settings: object) -> RoutedDenoiser:
    return RoutedDenoiser([oracle.expert(k) for k in range(4)], oracle.posterior, rule, **settings)  # type: ignore[arg-type]


def fixed_alpha(*alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
    return prior(torch.tensor(alpha))


def constant(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: torch.full_like(x, value)


@dataclass
class Drawing:
    """A policy with the uniforms of its rows given: all of them, instead of some."""

    rule: Policy
    given: Tensor
    keeps: ClassVar[bool] = False

    def uniforms(self, *_: object) -> Tensor:
        return self.given[:, None]

    def start(self, pi: Tensor, u: Tensor) -> Tensor:
        return self.rule.start(pi, u)

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.rule.choose(alpha, state, u)
