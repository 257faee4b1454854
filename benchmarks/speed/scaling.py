"""How time and memory grow: fitted exponents p of size^p, by least squares over the sizes, each twice
the one before, from a median of three calls and the peak of memory beyond what was held before, above
1 MiB. `last` is the exponent between the last two sizes. A row ends at its largest size, or where a call would take
too long or too much memory, which `ended by` says. One expert moves an image at a step (switching,
the Gaussians' posterior); networks as in `routing`. Small sizes cost what one call costs at least.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed.expert_training import Training
from benchmarks.speed.memory import available, peak_beyond
from benchmarks.speed.routed_sampling import router_of, sizes
from benchmarks.speed.timing import Call, Figures, Variant, brief, synchronize
from ddm.samplers import sample
from ddm.schedules import schedule
from ddm.training import to_float
from experts.denoiser import ExpertConfig
from router.policies import policy
from router.routing import RoutedDenoiser
from router.sources import Stateless
from router.step import Router
from router.targets import exact_posterior_rate
from train.clustering import PartitionConfig, assign
from train.data import ImageSet

CALL_S = {"cpu": 4.0, "cuda": 2.0}  # no call takes longer
ROUNDS = 3
_MEMORY = 0.4  # of what is available, for one call

Build = Callable[[int], Call]  # a call at a size


def variants(device: str) -> list[Variant]:
    """The rows of the table."""
    many = device != "cpu"
    rows: dict[str, tuple[Build, int, int]] = {
        "sampling, images": (partial(sampling, device), 4, 4096 if many else 512),
        "sampling, K": (lambda k: sampling(device, 64, k=k), 1, 256),
        "sampling, steps": (lambda n: sampling(device, 16, steps=n), 4, 1000),
        "sampling, side of an image": (lambda n: sampling(device, 4, side=n), 8, 512),
        "training step, images": (partial(training, device), 4, 4096 if many else 512),
        "training step, side of an image": (lambda n: training(device, 4, side=n), 8, 512),
        "targets, images": (partial(targets, device), 1000, 2**20),
        "targets, side of an image": (lambda n: targets(device, 4000, side=n), 4, 256),
        "partition by k-means, images": (partition, 250, 2**20),
    }
    return [
        Variant(name, partial(measured, device, build, first, last), 4, needs_s=40)
        for name, (build, first, last) in rows.items()
    ]


def sampling(device: str, images: int, k: int = 8, steps: int = 5, side: int = 32) -> Call:
    """Sample images with K fresh experts."""
    process = schedule("vp_linear")
    size = sizes(device)
    shape = (3, side, side)
    config = ExpertConfig(unet=size.unet, parameterization="preconditioned")
    torch.manual_seed(0)
    experts = [config.build(shape, process).to(device).eval() for _ in range(k)]
    pi, alpha = router_of(device, size, k, "gaussian", process, shape)
    x = torch.randn(images, *shape, device=device)

    @torch.no_grad()
    def call() -> Tensor:
        router = Router(Stateless(alpha), policy("switching"), pi)
        return sample(RoutedDenoiser(experts, router), x, process, "ddim", steps)

    return call


def training(device: str, batch: int, side: int = 32) -> Call:
    """A step of training of one expert."""
    config = ExpertConfig(unet=sizes(device).unet, batch=batch)
    return Training(config, device, images=64, shape=(3, side, side)).step()


def targets(device: str, images: int, side: int = 32) -> Call:
    """The exact posterior and its rate of 64 queries."""
    process = schedule("vp_linear")
    points = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8).to(device)
    labels = torch.arange(images, device=device) % 8
    x0 = to_float(points[torch.arange(64, device=device) % images])
    eps, t = torch.randn_like(x0), torch.linspace(1e-3, 1, 64, device=device)
    return lambda: exact_posterior_rate(x0, eps, t, points, labels, process, 8)


def partition(images: int) -> Call:
    """Cut images into eight clusters by their pixels."""
    points = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8)
    data = ImageSet(points)
    return lambda: assign(data, PartitionConfig(by="kmeans", k=8), seed=0)


def measured(device: str, build: Build, first: int, last: int) -> Figures:
    """Double the size from `first` up to `last`, or until a call takes too long or too much."""
    found: list[tuple[int, float, float]] = []  # size, seconds, bytes
    ended_by = "the largest size"
    size = first
    while size <= last:
        try:
            call = build(size)
            call()
            memory = peak_beyond(call, device)
            found.append((size, _median_s(call, device), memory))
        except (RuntimeError, MemoryError) as error:  # out of memory, mostly
            ended_by = brief(error)
            break
        ended_by = _next_is_too_much(found, device) or ended_by
        if ended_by != "the largest size":
            break
        size *= 2
    if not found:
        raise RuntimeError(ended_by)
    times = [(size, seconds) for size, seconds, _ in found]
    peaks = [(size, memory) for size, _, memory in found if memory >= 2**20]
    return {
        "from": float(first),
        "to": float(times[-1][0]),
        **_exponents("time", times),
        "s at the end": times[-1][1],
        **_exponents("memory", peaks),
        "MiB at the end": found[-1][2] / 2**20,
        "ended by": ended_by,
    }


def _median_s(call: Call, device: str) -> float:
    took = []
    for _ in range(ROUNDS):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def _next_is_too_much(found: Sequence[tuple[int, float, float]], device: str) -> str:
    """Why the next size is not measured; empty if it is."""
    _, seconds, memory = found[-1]
    if 2 * seconds > CALL_S[device]:
        return f"{CALL_S[device]:g} s a call"
    if 2 * memory > _MEMORY * available(device):
        return "memory"
    return ""


def _exponents(what: str, points: Sequence[tuple[float, float]]) -> Figures:
    """Over all sizes and between the last two; nothing for a single one."""
    if len(points) < 2:
        return {}
    return {f"{what} exponent": exponent(points), f"last {what} exponent": exponent(points[-2:])}


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """p of the size^p that fits (size, value) best on logarithmic scales, for two sizes or more."""
    x, y = torch.tensor(points, dtype=torch.float64).log().T
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())
