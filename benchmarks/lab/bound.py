"""The bound and the truth: the theorem of `ddm.theory` against measurement, for the routed Euler sampler."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.lab.page import Page, axes, table
from ddm.measures import power_law_fit, sliced_w2, trajectory_error
from ddm.oracle import GaussianMixture
from ddm.samplers import sample
from ddm.schedules import schedule
from ddm.theory import bound, constants, stability, step
from router.routing import RoutedDenoiser

PATH = schedule("vp_linear")
STEPS = (10, 20, 50, 100, 200, 500)
DELTAS = (0.5, 0.35, 0.25, 0.18, 0.13, 0.1, 0.07, 0.05, 0.035, 0.025)
SWEEP_STEPS = 200
TRAJECTORIES = 2000
COLOURS = ("#009E73", "#0072B2", "#D55E00", "#CC79A7", "#000000")


@dataclass(frozen=True)
class Setting:
    """Four clusters of four points each on the sphere of radius R in R^d, walked to delta with these errors put in."""

    name: str
    R: float
    d: int
    delta: float
    eps_router: float = 0.0
    eps_expert: float = 0.0
    K: int = 4


SETTINGS = (
    Setting("short horizon", 1.0, 2, 0.5),
    Setting("middle horizon", 1.0, 2, 0.1),
    Setting("middle, with errors", 1.0, 2, 0.1, 0.1, 0.1),
    Setting("small ball", 0.25, 2, 0.02),
    Setting("large ball", 3.0, 8, 0.1),
)


class Data:
    """The points of a setting, one Gaussian of no width each, and the exact denoisers with the setting's errors."""

    def __init__(self, setting: Setting) -> None:
        self.setting, K, d = setting, setting.K, setting.d
        generator = torch.Generator().manual_seed(0)
        centres = torch.nn.functional.normalize(torch.randn(K, 1, d, generator=generator, dtype=torch.float64), dim=2)
        points = centres + 0.3 * torch.randn(K, 4, d, generator=generator, dtype=torch.float64)
        self.points = setting.R * torch.nn.functional.normalize(points, dim=2)  # [K, 4, d]
        self.mixture = self._mixture(self.points.flatten(0, 1))

    def _mixture(self, points: Tensor) -> GaussianMixture:
        return GaussianMixture(torch.full((len(points),), 1 / len(points)), points, torch.zeros_like(points), PATH)

    def alpha(self, x: Tensor, t: Tensor) -> Tensor:
        """The posterior, pulled towards its least likely corner, which is at most sqrt(2) away, by eps_router."""
        alpha = self.mixture.posterior(x, t).unflatten(1, (self.setting.K, -1)).sum(2)
        corner = torch.nn.functional.one_hot(alpha.argmin(1), self.setting.K)
        return alpha + self.setting.eps_router / math.sqrt(2) * (corner - alpha)

    def expert(self, k: int) -> Any:
        """The exact denoiser of cluster k, off by eps_expert, the same way everywhere."""
        exact, off = self._mixture(self.points[k]).denoise, self.setting.eps_expert / math.sqrt(self.setting.d)
        return lambda x, t: exact(x, t) + off

    def measured(self, steps: tuple[int, ...]) -> list[dict[str, float]]:
        """For each number of steps, the theorem's coupling and sliced W2, between Y_N and the exact flow's end X_delta.

        Both are distances of points, so roots of sums over d. Y starts from the noise of `X_1 = a x0 + s eps` without the data.
        """
        setting, generator = self.setting, torch.Generator().manual_seed(1)
        a, s, _, _ = PATH(torch.tensor(1.0, dtype=torch.float64))
        x0 = self.mixture.means[torch.randint(len(self.mixture.means), (TRAJECTORIES,), generator=generator)]
        noise = s * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        exact = sample(self.mixture.denoise, a * x0 + noise, PATH, "heun", 300, "uniform_log_snr", t_min=setting.delta)
        experts, found = [self.expert(k) for k in range(setting.K)], []
        for n in steps:
            routed = RoutedDenoiser(experts, self.alpha, "stochastic", seed=n)
            y = sample(routed, noise, PATH, "euler", n, "uniform_t", t_min=setting.delta)
            coupled = math.sqrt(trajectory_error(y, exact) * setting.d)
            found.append({"coupled": coupled, "sliced_w2": sliced_w2(y, exact) * math.sqrt(setting.d)})
        return found


def _promised(setting: Setting, steps: int) -> dict[str, Any]:
    """The theorem's numbers, log10; and `unstretched`, its errors as each step makes them, stretched by none of the later."""
    q = asdict(setting)
    del q["name"]
    times = torch.linspace(1, setting.delta, steps + 1, dtype=torch.float64)
    t, h = times[:-1], (1 - setting.delta) / steps
    c = constants(PATH, setting.R, setting.d, setting.K, t)
    made = (
        PATH(times[0]).a * setting.R
        + step(PATH, setting.R, setting.d, t, times[1:]).truncation.sum()
        + h * (1 + setting.eps_expert / setting.R) * c.martingale.square().sum().sqrt()
        + h * (c.router * setting.eps_router + c.expert * setting.eps_expert).sum()
    )
    parts = {name: value if math.isfinite(value) else None for name, value in bound(PATH, steps=steps, **q)._asdict().items()}
    return {"steps": steps, **parts, "unstretched": float(made.log10())}


def measure() -> dict[str, Any]:
    """Bound and truth over N for every setting; over delta at one N; and the bound alone for pictures."""
    over_steps = [
        {
            **asdict(setting),
            "stability": stability(PATH, setting.R, setting.delta),
            "cells": [
                {**_promised(setting, n), **truth} for n, truth in zip(STEPS, Data(setting).measured(STEPS), strict=True)
            ],
        }
        for setting in SETTINGS
    ]
    over_delta = []
    for delta in DELTAS:
        setting = Setting("over delta", 1.0, 2, delta)
        a, s, _, _ = PATH(torch.tensor(delta, dtype=torch.float64))
        over_delta.append(
            {
                "delta": delta,
                "s": float(s),
                "stability": stability(PATH, 1.0, delta),
                **_promised(setting, SWEEP_STEPS),
                **Data(setting).measured((SWEEP_STEPS,))[0],
            }
        )
    pictures = Setting("CIFAR-10", math.sqrt(3072), 3072, 0.01, K=8)
    return {
        "trajectories": TRAJECTORIES,
        "over_steps": over_steps,
        "over_delta": over_delta,
        "pictures": {**_promised(pictures, 50), "stability": stability(PATH, pictures.R, pictures.delta)},
    }
