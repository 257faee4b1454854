"""The router's exact targets on CIFAR-10: accuracy, memory and time.

Prints the largest difference from an independent float64 computation over 10,000 images at many
times, and the memory and time of one call with 256 queries over all 50,000 images.
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cli import Parser, run
from ddm.schedules import Schedule, schedule
from ddm.training import to_float
from router.targets import exact_posterior, exact_posterior_rate
from train.data import DataConfig

TIMES = (1e-3, 1e-2, 0.1, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0)
COUNT = 10_000  # images that the independent computation holds in float64


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("router_targets", __doc__)
    help_text = "the folder that holds cifar-10-batches-py; default data"
    parser.add_argument("data", nargs="?", default="data", help=help_text)
    return run(parser, _measure, words)


def _measure(arguments: argparse.Namespace) -> None:
    data = DataConfig(name="cifar10", root=arguments.data).build()
    assert data.labels is not None
    memory(data.images, data.labels)  # first, before anything else raises the peak
    accuracy(data.images[:COUNT], data.labels[:COUNT])
    duration(data.images, data.labels)


def independent(
    x0: Tensor, eps: Tensor, t: Tensor, points: Tensor, member: Tensor, process: Schedule
) -> tuple[Tensor, Tensor]:
    """alpha and dalpha by the textbook formula for g_i, in float64 and without chunks."""
    a, s, da, ds = (c[:, None] for c in process(t.double()))
    x = a * x0 + s * eps
    dx = da * x0 + ds * eps
    products = x @ points.T
    rates = dx @ points.T
    square = points.square().sum(dim=1)
    distance = x.square().sum(dim=1, keepdim=True) - 2 * a * products + a**2 * square
    x_dx = (x * dx).sum(dim=1, keepdim=True)
    inner = x_dx - a * rates - da * products + a * da * square  # (x - a x_i) . (dx - da x_i)
    g = -inner / s**2 + distance * ds / s**3
    r = (-distance / 2 / s**2).softmax(dim=1)
    return r @ member, (r * (g - (r * g).sum(dim=1, keepdim=True))) @ member


def accuracy(images: Tensor, labels: Tensor) -> None:
    """Print the largest differences from `independent` at each time."""
    process = schedule("vp_linear")
    generator = torch.Generator().manual_seed(0)
    points = to_float(images).double().flatten(1)
    member = torch.nn.functional.one_hot(labels, 10).double()
    worst = torch.zeros(3)
    for t in TIMES:
        rows = torch.randint(len(images), (64,), generator=generator)
        x0 = to_float(images[rows]).flatten(1)
        eps = torch.randn(x0.shape, generator=generator)
        times = torch.full((64,), t)
        alpha, dalpha = independent(x0.double(), eps.double(), times, points, member, process)
        alpha_beside, rate = exact_posterior_rate(x0, eps, times, images, labels, process)
        a, s, _, _ = process(times.double())
        x = (a[:, None] * x0 + s[:, None] * eps).double()
        posterior = exact_posterior(x, times, images, labels, process)
        found = [posterior - alpha, alpha_beside - alpha, rate - dalpha]
        largest = torch.tensor([float(difference.abs().max()) for difference in found])
        worst = torch.maximum(worst, largest)
        print(
            f"t = {t:<6g} largest |dalpha| {dalpha.abs().max():8.2e}; "
            f"difference: alpha {largest[1]:.1e}, dalpha {largest[2]:.1e}"
        )
    print(
        f"largest difference: posterior {worst[0]:.1e}, "
        f"alpha returned with its rate {worst[1]:.1e}, rate {worst[2]:.1e}"
    )


def _queries(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x0, eps and t of 256 queries."""
    x0 = to_float(images[:256])
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    return x0, eps, torch.linspace(1e-3, 1, 256)


def duration(images: Tensor, labels: Tensor) -> None:
    """Print the time of a call over all images, the second of two."""
    process = schedule("vp_linear")
    queries = _queries(images)
    exact_posterior_rate(*queries, images, labels, process)
    began = time.perf_counter()
    exact_posterior_rate(*queries, images, labels, process)
    print(f"256 queries over {len(images):,} images: {time.perf_counter() - began:.1f} s")


def memory(images: Tensor, labels: Tensor) -> None:
    """Print the peak memory of the process's first call over all images, beyond what it held before
    (Linux).
    """
    process = schedule("vp_linear")
    x0, eps, times = _queries(images)
    # A small call first, so that libraries are loaded.
    exact_posterior_rate(x0[:2], eps[:2], times[:2], images[:64], labels[:64], process)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize()
    exact_posterior_rate(x0, eps, times, images, labels, process)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    beyond = (peak - before) / 2**30
    print(f"a call of 256 queries: peak memory beyond the data at most {beyond:.2f} GiB")


if __name__ == "__main__":
    sys.exit(main())
