"""python -m benchmarks.router_targets [DATA]

The router's exact targets on CIFAR-10 (in DATA, default: data): largest difference to an independent float64 computation
over 10,000 images at many times, and memory and time of one call with 256 queries over all 50,000.
"""

import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from ddm.schedules import Schedule, schedule
from router.targets import exact_posterior, exact_posterior_rate
from train.data import DataConfig


def brute_force(
    x0: Tensor, eps: Tensor, t: Tensor, points: Tensor, member: Tensor, process: Schedule
) -> tuple[Tensor, Tensor]:
    """alpha and dalpha by the textbook formula for g_i, all in float64 and at once."""
    a, s, da, ds = (c[:, None] for c in process(t.double()))
    x, dx = a * x0 + s * eps, da * x0 + ds * eps
    products, rates, square = x @ points.T, dx @ points.T, points.square().sum(dim=1)
    distance = x.square().sum(dim=1, keepdim=True) - 2 * a * products + a**2 * square
    g = (
        -((x * dx).sum(dim=1, keepdim=True) - a * rates - da * products + a * da * square) / s**2
        + distance * ds / s**3
    )
    r = (-distance / 2 / s**2).softmax(dim=1)
    return r @ member, (r * (g - (r * g).sum(dim=1, keepdim=True))) @ member


def main(root: str) -> None:
    """Measure and print."""
    real = DataConfig(name="cifar10", root=root).build()
    assert real.labels is not None
    images, labels, process = real.images, real.labels, schedule("vp_linear")
    few, generator = 10_000, torch.Generator().manual_seed(0)
    points = (images[:few].double() / 127.5 - 1).flatten(1)
    member = torch.nn.functional.one_hot(labels[:few], 10).double()
    worst = torch.zeros(3)
    for t in (1e-3, 1e-2, 0.1, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0):
        x0 = (images[torch.randint(few, (64,), generator=generator)].float() / 127.5 - 1).flatten(1)
        eps = torch.randn(x0.shape, generator=generator)
        times = torch.full((64,), t)
        alpha, dalpha = brute_force(x0.double(), eps.double(), times, points, member, process)
        got = exact_posterior_rate(x0, eps, times, images[:few], labels[:few], process)
        a, s, _, _ = process(times.double())
        at_x = exact_posterior(
            (a[:, None] * x0 + s[:, None] * eps).double(),
            times,
            images[:few],
            labels[:few],
            process,
        )
        found = [
            (at_x - alpha).abs().max(),
            (got[0] - alpha).abs().max(),
            (got[1] - dalpha).abs().max(),
        ]
        worst = torch.maximum(worst, torch.tensor([float(f) for f in found]))
        print(
            f"t = {t:<6g} largest |dalpha| {dalpha.abs().max():8.2e}; difference: alpha {found[1]:.1e}, dalpha {found[2]:.1e}"
        )
    print(
        f"largest difference: posterior {worst[0]:.1e}, alpha beside its rate {worst[1]:.1e}, rate {worst[2]:.1e}"
    )
    del points, member
    x0 = images[:256].float() / 127.5 - 1
    eps, times = torch.randn(x0.shape, generator=generator), torch.linspace(1e-3, 1, 256)
    exact_posterior_rate(x0, eps, times, images, labels, process)
    began = time.perf_counter()
    exact_posterior_rate(x0, eps, times, images, labels, process)
    print(f"256 queries over {len(images)} real: {time.perf_counter() - began:.1f} s")


def memory(root: str) -> None:
    """The peak of a process that makes one call and no other, less what it held before."""
    images = DataConfig(name="cifar10", root=root).build()
    assert images.labels is not None
    x0 = images.images[:256].float() / 127.5 - 1
    eps, times = torch.randn(x0.shape), torch.linspace(1e-3, 1, 256)
    process = schedule("vp_linear")
    # Libraries load:
    exact_posterior_rate(
        x0[:2], eps[:2], times[:2], images.images[:64], images.labels[:64], process
    )
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()  # Linux
    exact_posterior_rate(x0, eps, times, images.images, images.labels, process)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"a call of 256 queries: peak memory beyond the data at most {(peak - before) / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "data"
    memory(folder)
    main(folder)
