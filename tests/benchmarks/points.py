"""Weighted points, over which the exact posterior, denoisers and flow are known."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddm.schedules import Schedule, schedule, velocity

VP, COSINE, STRAIGHT, EXPLODING = (
    schedule("vp_linear"),
    schedule("vp_cosine"),
    schedule("rectified_flow"),
    schedule("ve_exponential"),
)
EVERY = [VP, COSINE, STRAIGHT, EXPLODING]


@dataclass
class Points:
    """Weighted points `[n, d]` in K clusters, and all that is known of x_t over them, by softmax in
    float64.
    """

    points: Tensor
    labels: Tensor
    log_weights: Tensor
    path: Schedule

    def logits(self, x: Tensor, t: Tensor) -> Tensor:
        a, s, _, _ = self.path(t)
        return self.log_weights - (x[:, None] - a * self.points).square().sum(2) / 2 / s**2

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        return self.logits(x, t).softmax(1) @ self.points

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return velocity(x, self.denoise(x, t), self.path(t))

    def clusters(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha `[B, K]` and D_k `[B, K, d]`."""
        logits, belongs = (
            self.logits(x, t),
            self.labels == torch.arange(int(self.labels.max()) + 1)[:, None],
        )
        alone = logits[:, None].masked_fill(~belongs, -math.inf).softmax(2)
        return logits.softmax(1) @ belongs.double().T, alone @ self.points

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        return self.points[
            torch.multinomial(self.log_weights.softmax(0), n, True, generator=generator)
        ]

    def at(self, t: Tensor, n: int, generator: torch.Generator) -> Tensor:
        a, s, _, _ = self.path(t)
        x0 = self.clean(n, generator)
        return a * x0 + s * torch.randn(x0.shape, generator=generator, dtype=torch.float64)

    def flow(self, x: Tensor, t: Tensor, t_end: Tensor, steps: int) -> Tensor:
        """The exact flow, by the fourth-order Runge-Kutta method."""
        h = (t_end - t) / steps
        for n in range(steps):
            now = t + n * h
            k1 = self.velocity(x, now)
            k2 = self.velocity(x + h / 2 * k1, now + h / 2)
            k3 = self.velocity(x + h / 2 * k2, now + h / 2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + self.velocity(x + h * k3, now + h))
        return x


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def pair(R: float, path: Schedule, d: int = 1, skew: float = 0.0) -> Points:
    """Two points at +-R on the first axis, a cluster each."""
    points = torch.zeros(2, d, dtype=torch.float64)
    points[0, 0], points[1, 0] = R, -R
    return Points(
        points, torch.tensor([0, 1]), torch.tensor([0.0, skew], dtype=torch.float64), path
    )


def rms(x: Tensor) -> float:
    return float(x.square().sum(1).mean().sqrt())
