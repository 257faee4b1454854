"""The router's exact targets (`router.targets`): 258 queries over 50,000 made-up images of 3x32x32.
The posterior is one product of queries and images, its rate two; the share is that of a square
matrix product in the same run, and the memory the peak beyond what the process held before. The
accuracy is the largest difference from an independent float64 computation over 10,000 images, those
of CIFAR-10 if the folder of $DDM_DATA (default: data) has them, at 14 times from 1e-3 to 1.
`apart`: float32 products of digits, as where float64 is slow; they cost five products, and their
share is of one. `ten owners`: the same images with ten owners in this process, each asked for its
sums (`router.owners`); the difference is the largest from the pooled targets.
"""

import os
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor

import router.targets
from benchmarks.speed.memory import peak_beyond
from benchmarks.speed.timing import Call, Ceiling, Figures, Variant, alternate
from ddm.errors import DdmError
from ddm.schedules import Schedule, schedule
from ddm.training import to_float
from router.owners import Owner, Owners, here
from router.targets import exact_posterior, exact_posterior_rate

SHAPE = (3, 32, 32)
QUERIES = 258
IMAGES = 50_000
TIMES = (1e-3, 1e-2, 0.1, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0)
COMPARED = 10_000  # images that the independent computation holds in float64


def variants(device: str) -> list[Variant]:
    """The rows of the table."""
    memory = partial(_memory, device)
    rows = [
        Variant("rate", partial(_measured, device, "rate"), 0, needs_s=30),
        Variant("posterior", partial(_measured, device, "posterior"), 1, needs_s=30),
        Variant("rate: memory", partial(memory, IMAGES), 1, needs_s=20),
        Variant("rate: memory, a fifth of the images", partial(memory, IMAGES // 5), 2),
        Variant("accuracy", partial(_accuracy, device), 2, needs_s=20),
        Variant("rate: ten owners", _owners, 1, needs_s=30),
        Variant("apart: accuracy", _apart(partial(_accuracy, device)), 2, needs_s=30),
    ]
    if device != "cpu":
        apart = _apart(partial(_measured, device, "rate"))
        rows.append(Variant("apart: rate", apart, 1, needs_s=30))
    return rows


def _apart(measure: Callable[[], Figures]) -> Callable[[], Figures]:
    """Measure with products taken apart, whatever the device."""

    def measured() -> Figures:
        with mock.patch.object(router.targets, "_slow_float64", return_value=True):
            return measure()

    return measured


def _made_up(count: int) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def _call(device: str, name: str, images: int = IMAGES) -> Call:
    points, labels = (part.to(device) for part in _made_up(images))
    x0 = to_float(points[:QUERIES])
    eps = torch.randn_like(x0)
    t = torch.linspace(1e-3, 1, QUERIES, device=device)
    process = schedule("vp_linear")

    def posterior() -> Tensor:
        return exact_posterior(x0, t, points, labels, process, 10)

    def rate() -> tuple[Tensor, Tensor]:
        return exact_posterior_rate(x0, eps, t, points, labels, process, 10)

    return rate if name == "rate" else posterior


def _measured(device: str, name: str) -> Figures:
    precisions = ("float64", "float32") if device == "cpu" else ("float64", "float32", "tf32")
    ceilings = {precision: Ceiling(precision, device) for precision in precisions}
    sides = {precision: ceiling.call() for precision, ceiling in ceilings.items()}
    timing = alternate({name: _call(device, name), **sides}, device, most_s=20)
    flop = (2 if name == "rate" else 1) * 2.0 * QUERIES * IMAGES * torch.Size(SHAPE).numel()
    rate = flop / timing.median(name)
    figures: Figures = {"ms": 1000 * timing.median(name), "TFLOP/s": rate / 1e12}
    for precision, ceiling in ceilings.items():
        limit = ceiling.flop / timing.median(precision)
        figures[f"{precision} ceiling TFLOP/s"] = limit / 1e12
        figures[f"share of {precision}"] = rate / limit
    return figures


def _owners() -> Figures:
    images, labels = _made_up(IMAGES)
    process = schedule("vp_linear")
    clusters = [images[labels == k] for k in range(10)]
    asked = here([Owner(cluster, process) for cluster in clusters])
    owners = Owners(asked, 10, process)
    x0, t = to_float(images[:QUERIES]), torch.linspace(1e-3, 1, QUERIES)
    eps = torch.randn_like(x0)
    owners.bytes_out = owners.bytes_in = 0
    found, rate = owners.rate(x0, eps, t)
    sent, received = owners.bytes_out / 10 / QUERIES, owners.bytes_in / 10 / QUERIES
    pooled, pooled_rate = exact_posterior_rate(x0, eps, t, images, labels, process, 10)
    sides = {"owners": lambda: owners.rate(x0, eps, t), "pooled": _call("cpu", "rate")}
    timing = alternate(sides, "cpu", most_s=20)
    return {
        "ms": 1000 * timing.median("owners"),
        "pooled ms": 1000 * timing.median("pooled"),
        "bytes to an owner per query": sent,
        "bytes from it": received,
        "largest: alpha with its rate": float((found - pooled).abs().max()),
        "largest: rate": float((rate - pooled_rate).abs().max()),
        "largest: |rate|": float(pooled_rate.abs().max()),
    }


def _memory(device: str, images: int) -> Figures:
    call = _call(device, "rate", images)
    call()
    gib = peak_beyond(call, device) / 2**30
    return {"images": float(images), "peak memory beyond the data GiB": gib}


def _accuracy(device: str) -> Figures:
    made_of, images, labels = _real_or_made_up()
    process = schedule("vp_linear")
    generator = torch.Generator().manual_seed(0)
    images, labels = images[:COMPARED].to(device), labels[:COMPARED].to(device)
    worst = dict.fromkeys(("posterior", "alpha with its rate", "rate", "|rate|"), 0.0)
    for t in TIMES:
        rows = torch.randint(len(images), (64,), generator=generator)
        x0 = to_float(images[rows.to(device)])
        eps = torch.randn(x0.shape, generator=generator).to(device)
        times = torch.full((64,), t, device=device)
        alpha, dalpha = independent(x0, eps, times, images, labels, process)
        a, s, _, _ = process(times.double()).broadcast_to(x0)
        found = exact_posterior(a * x0.double() + s * eps.double(), times, images, labels, process)
        beside, rate = exact_posterior_rate(x0, eps, times, images, labels, process)
        differences = (found - alpha, beside - alpha, rate - dalpha, dalpha)
        for name, difference in zip(worst, differences, strict=True):
            worst[name] = max(worst[name], float(difference.abs().max()))
    return {"images": made_of, **{f"largest: {name}": value for name, value in worst.items()}}


def _real_or_made_up() -> tuple[str, Tensor, Tensor]:
    from train.data import DataConfig  # scikit-learn and more

    try:
        data = DataConfig(name="cifar10", root=os.environ.get("DDM_DATA", "data")).build()
    except DdmError:
        return "made up", *_made_up(COMPARED)
    assert data.labels is not None
    return "CIFAR-10", data.images, data.labels


def independent(
    x0: Tensor, eps: Tensor, t: Tensor, images: Tensor, labels: Tensor, process: Schedule
) -> tuple[Tensor, Tensor]:
    """alpha and dalpha by the textbook formula for g_i, in float64 and without chunks."""
    x0, eps, points = (part.double().flatten(1) for part in (x0, eps, to_float(images)))
    member = torch.nn.functional.one_hot(labels).double()
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
