"""The router's exact targets (`router.targets`): 258 queries over 50,000 made-up images of 3x32x32.
The posterior is one product of queries and images, its rate two; the share is that of a square
matrix product in the same run, and the memory the peak beyond what the process held before.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.speed.measure import Call, Ceiling, Figures, Variant, alternate
from ddm.schedules import schedule
from router.targets import exact_posterior, exact_posterior_rate

SHAPE = (3, 32, 32)
QUERIES = 258
IMAGES = 50_000


def variants(device: str) -> list[Variant]:
    """The rows of the table."""
    memory = partial(_memory, device)
    return [
        Variant("rate", partial(_measured, device, "rate"), 0, needs_s=30),
        Variant("posterior", partial(_measured, device, "posterior"), 1, needs_s=30),
        Variant("rate: memory", partial(memory, IMAGES), 1, needs_s=20),
        Variant("rate: memory, a fifth of the images", partial(memory, IMAGES // 5), 2),
    ]


def _call(device: str, name: str, images: int = IMAGES) -> Call:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (images, *SHAPE), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (images,), generator=generator).to(device)
    x0 = (drawn[:QUERIES].float() / 127.5 - 1).to(device)
    eps = torch.randn(x0.shape, generator=generator).to(device)
    t = torch.linspace(1e-3, 1, QUERIES, device=device)
    points = drawn.to(device)
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


def _memory(device: str, images: int) -> Figures:
    call = _call(device, "rate", images)
    call()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before = _status("VmRSS")
        call()
        peak = _status("VmHWM")
    return {"images": float(images), "peak memory beyond the data GiB": (peak - before) / 2**30}


def _status(key: str) -> int:
    """Bytes, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith(key))
    return 1024 * int(found.split()[1])
