"""Problems for the tests of samplers: mixtures, noise, and where the ODE takes it."""

import functools

import torch
from torch import Tensor

from ddm.measures import sliced_w2
from ddm.oracle import GaussianMixture
from ddm.rng import RngStream, normal
from ddm.samplers import SAMPLERS
from ddm.schedules import SCHEDULES, Schedule, schedule

STOCHASTIC = ("euler_maruyama", "ddpm", "accelerated_sde")
NEEDS_SIGNAL = ("euler_maruyama", "ddpm", "accelerated_ode", "accelerated_sde")
NEEDS_VARIANCE_ONE = ("accelerated_ode", "accelerated_sde")
ENDS_WITHOUT_SIGNAL = ("vp_cosine", "rectified_flow")
EXPLODING = ("ve_exponential", "ve_polynomial", "edm")
DEFINED = [
    (name, process)
    for name in SAMPLERS
    for process in SCHEDULES
    if not (name in NEEDS_SIGNAL and process in ENDS_WITHOUT_SIGNAL)
    if not (name in NEEDS_VARIANCE_ONE and process in EXPLODING)
]


def mixture(name: str = "vp_linear") -> GaussianMixture:
    return GaussianMixture(
        weights=torch.tensor([0.5, 0.2, 0.3]),
        means=torch.tensor([[-1.0, 0.2], [0.8, 0.9], [0.6, -0.7]]),
        stds=torch.tensor([[0.2, 0.3], [0.15, 0.2], [0.3, 0.1]]),
        schedule=schedule(name),
    )


def start_noise(n: int, process: Schedule | None = None) -> Tensor:
    s = schedule("rectified_flow") if process is None else process
    return (
        s(torch.ones((), dtype=torch.float64)).s
        * normal(0, RngStream.START, torch.arange(n), 0, (2,)).double()
    )


def no_noise(n: int) -> Tensor:
    raise AssertionError("a deterministic sampler draws no noise")


@functools.cache
def truth(path: Schedule, t_min: float) -> tuple[Tensor, float]:
    """Exact draws, and how far other ones are from them."""
    exact, other = (
        GaussianMixture(**{**vars(mixture()), "schedule": path}).marginal(1000, t_min, seed=n)
        for n in (1, 2)
    )
    return exact, sliced_w2(other, exact, projections=64)
