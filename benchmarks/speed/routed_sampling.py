"""Sampling with one expert per step, router included, against the plain DDIM loop of one network of
the same size: K fresh networks, and the program's default router (`posterior`: its network blended
with the clusters' Gaussians) or the Gaussians alone (`gaussian`).
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed.timing import Figures, Variant, alternate, parameters
from ddm.gaussian import Gaussians
from ddm.samplers import sample
from ddm.schedules import Schedule, schedule
from experts.denoiser import Denoiser, ExpertConfig
from experts.unet import UNetConfig
from router.networks import RouterConfig, RouterNetConfig
from router.policies import policy
from router.routing import RoutedDenoiser
from router.sources import Alpha, Stateless
from router.step import Router

SHAPE = (3, 32, 32)
COUNTS = (8, 64, 1, 2)  # of experts


@dataclass(frozen=True)
class Sizes:
    """What is sampled and by what."""

    unet: UNetConfig
    router: RouterNetConfig
    images: int
    steps: int


def sizes(device: str) -> Sizes:
    """Networks of 1.1M parameters on a CPU, of 8.9M on a GPU."""
    if device == "cpu":
        unet = UNetConfig(channels=16, multipliers=[1, 2, 4, 4], blocks=1, attention=[8])
        net = RouterNetConfig(channels=8, multipliers=[1, 2, 4], attention=[])
        return Sizes(unet, net, images=256, steps=10)
    return Sizes(UNetConfig(channels=64), RouterNetConfig(), images=512, steps=10)


def variants(device: str) -> list[Variant]:
    """The rows of the table: every number of experts, with each source of alpha."""
    found = []
    for rank, source in enumerate(("posterior", "gaussian")):
        for k in COUNTS:
            work = partial(measured, device, sizes(device), k, source)
            found.append(
                Variant(
                    f"K = {k}, source {source}",
                    work,
                    3 * rank,
                    needs_s=60 if device == "cpu" else 20,
                )
            )
    return found


def measured(device: str, size: Sizes, k: int, source: str) -> Figures:
    """Images per second of the policies and of the plain loop."""
    process = schedule("vp_linear")
    config = ExpertConfig(unet=size.unet, parameterization="preconditioned")
    torch.manual_seed(0)
    experts = [config.build(SHAPE, process).to(device).eval() for _ in range(k)]
    pi, alpha = router_of(device, size, k, source, process)
    x = torch.randn(size.images, *SHAPE, device=device)
    half = device != "cpu"

    def drawn(denoiser: Denoiser | RoutedDenoiser) -> Tensor:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
            return sample(denoiser, x, process, "ddim", size.steps)

    def routed(name: str) -> Tensor:
        router = Router(Stateless(alpha), policy(name), pi)
        return drawn(RoutedDenoiser(experts, router))

    sides = {
        "plain": lambda: drawn(experts[0]),
        "switching": lambda: routed("switching"),
        "stochastic": lambda: routed("stochastic"),
    }
    timing = alternate(sides, device, most_s=20)
    return {
        "Mparameters": parameters(experts[0]),
        **timing.rates(tuple(sides), size.images, "images/s"),
        **timing.compared("switching", "plain"),
        **timing.compared("stochastic", "plain"),
    }


def router_of(
    device: str,
    size: Sizes,
    k: int,
    source: str,
    process: Schedule,
    shape: tuple[int, int, int] = SHAPE,
) -> tuple[Tensor, Alpha]:
    """pi, and alpha near it: all experts are in use at every step, which is the worst case."""
    pi = torch.full((k,), 1 / k, device=device)
    means = 1e-3 * torch.randn(k, *shape, device=device)
    gaussians = Gaussians(means, torch.full_like(means, 0.25), process)
    if source == "gaussian":
        return pi, lambda x, t: gaussians.posterior(x, t, pi)
    config = RouterConfig(net=size.router)
    posterior, _ = config.build(shape, pi, process, gaussians)
    return pi, posterior.to(device).eval()
