"""Which forward process? Steps that each process of arXiv 2311.11003 needs for W2 <= eps on Gaussian data, exactly."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.lab.laws import Law, Tabled, affine, exact_denoiser, local_slopes, w2_square, walker
from benchmarks.lab.markdown import Page, axes, legend_below, steps_axis, table
from ddm.schedules import (
    Schedule,
    VEExponential,
    VEPolynomial,
    VPConstant,
    VPExponential,
    VPPolynomial,
)

MEAN, STD = 1.0, 0.5  # of every coordinate of the data
RATIOS = (6.0, 12.0, 25.0, 50.0, 100.0, 200.0, 400.0)  # sqrt(d) / eps
OURS = ("euler_maruyama", "ddpm as proven")
MOST = 20_000


@dataclass(frozen=True)
class Process:
    """A forward process with fixed parameters, run to the horizon T; `at(T)` squeezes it into our t in [0, 1]."""

    name: str
    at: Callable[[float], Schedule]
    preserving: bool
    upper: float  # the paper's upper bound is (sqrt(d) / eps)^upper, up to logarithms
    colour: str
    dashes: str = "-"


def _vp(b: float, a: float, rho: float) -> Callable[[float], Schedule]:
    return lambda T: VPPolynomial(T ** (1 / rho) * b, T ** (1 / rho + 1) * a, rho)


def _ve(b: float, a: float, c: float) -> Callable[[float], Schedule]:
    return lambda T: VEPolynomial(T ** (1 / (2 * c)) * b, T ** (1 / (2 * c) + 1) * a, c)


PROCESSES = (
    Process("VP, beta = 1", VPConstant, True, 2, "#000000"),
    Process("VP, beta = 0.2 + t", _vp(0.2, 1, 1), True, 2, "#0072B2"),
    Process("VP, beta = (0.7 + t/2)^5", _vp(0.7, 0.5, 5), True, 2, "#56B4E9"),
    Process("VP, beta = 0.2 e^t", lambda T: VPExponential(0.2 * T, T), True, 2, "#009E73"),
    Process(
        "VE, g = 0.5 e^t", lambda T: VEExponential(0.5 * math.sqrt(T), T), False, 2, "#D55E00", "--"
    ),
    Process("VE, g = (0.5 + t)^2", _ve(0.5, 1, 2), False, 2 + 1 / 5, "#E69F00", "--"),
    Process("VE, g = 0.5 + t", _ve(0.5, 1, 1), False, 2 + 1 / 3, "#CC79A7", "--"),
    Process("VE, g = (0.5 + t)^(1/2)", _ve(0.5, 1, 0.5), False, 2 + 1 / 2, "#999999", "--"),
)


def exponential_integrator(process: Process, horizon: float, steps: int) -> float:
    """W2 of a coordinate to the data after so many even steps of the paper's scheme from N(0, s(1)^2) to t = 0.

    The scheme freezes the score over a step and integrates the rest of `dx = (f x + g^2 score) dt + g dW` exactly:

        x' = x / r + k score + sqrt((s/r)^2 - s'^2) Z,     r = a/a',    k = 2 (1/r - 1) if VP, s^2 - s'^2 if VE
    """
    c = process.at(horizon)(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    a, s = c.a[:-1], c.s[:-1]
    r, variance = a / c.a[1:], (a * STD) ** 2 + s**2
    k = 2 * (1 / r - 1) if process.preserving else s**2 - c.s[1:] ** 2
    A, b, noise = 1 / r - k / variance, k / variance * a * MEAN, (s / r) ** 2 - c.s[1:] ** 2
    later = torch.cat([A.flip(0).cumprod(0).flip(0)[1:], A.new_ones(1)])
    whole = later[0] * A[0]
    law = Law((later * b).sum()[None], (whole**2 * s[0] ** 2 + (later**2 * noise).sum())[None])
    return float(w2_square(law, _data()).sqrt())


def _data() -> Law:
    return Law(*(torch.tensor([value], dtype=torch.float64) for value in (MEAN, STD**2)))


def fewest(error: Callable[[int], float], allowed: float, most: int = MOST) -> int | None:
    """The fewest steps whose error is within what is allowed, by doubling and bisection; None if `most` are not enough."""
    low, high = 1, 2
    while error(high) > allowed:
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= allowed else (middle, high)
    return high


def best(process: Process, allowed: float, horizons: Sequence[float]) -> tuple[int, float]:
    """The fewest steps over all horizons, and the horizon."""
    found: tuple[int, float] = (MOST, math.nan)
    for T in horizons:
        steps = fewest(partial(exponential_integrator, process, T), allowed, found[0])
        if steps is not None and steps < found[0]:
            found = (steps, T)
    return found


def sampled(name: str, process: Process, horizon: float, steps: int) -> float:
    """W2 of a coordinate by a sampler of the project, whose last step is the denoised image."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    schedule = Tabled(process.at(horizon), times)
    walked = affine(walker(name), exact_denoiser(_data(), schedule), schedule, times, 1, 1)
    s = schedule(times[0]).s[None]
    return float(w2_square(walked(Law(0 * s, s**2)), _data()).sqrt())


def horizons(process: Process, count: int = 40) -> list[float]:
    """Horizons from where s is as wide as the data to where its start is exact to 1e-4, evenly in log T."""

    def left(T: float) -> float:
        c = process.at(T)(torch.ones((), dtype=torch.float64))
        return float(
            c.a * STD**2 / (c.a**2 * STD**2 + c.s**2)
        )  # how much of the start's error reaches the data

    def where(level: float) -> float:
        low, high = 1e-3, 1e5
        for _ in range(80):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if not left(middle) <= level else (low, middle)
        return high

    first, last = where(0.3), where(1e-4)
    return [first * (last / first) ** (i / (count - 1)) for i in range(count)]


def measure(ratios: Sequence[float] = RATIOS, count: int = 40) -> dict[str, Any]:
    """Per process: steps and horizon over sqrt(d)/eps; W2 of our samplers at the last; steps over the horizon in the middle."""
    rows, middle = [], ratios[len(ratios) // 2]
    for process in PROCESSES:
        tried = horizons(process, count)
        cells, over = [], []
        for ratio in ratios:
            steps, T = best(process, 1 / ratio, tried)
            cells.append({"ratio": ratio, "steps": steps, "T": T})
        for horizon in tried:
            over.append(
                (
                    horizon,
                    fewest(partial(exponential_integrator, process, horizon), 1 / middle, MOST),
                )
            )
        ours = {name: sampled(name, process, T, steps) * ratio for name in OURS}
        rows.append(
            {
                "process": process.name,
                "upper": process.upper,
                "cells": cells,
                "over_horizon": over,
                "ours": ours,
            }
        )
    return {"mean": MEAN, "std": STD, "middle": middle, "rows": rows}


def power(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """The least squares slope of log y over log x, and the half width of its 95% interval."""
    u, v = (torch.tensor(values, dtype=torch.float64).log() for values in (x, y))
    u = u - u.mean()
    slope = (u @ v) / (u @ u)
    rest = v - v.mean() - slope * u
    return float(slope), 1.96 * float(((rest @ rest) / (len(u) - 2) / (u @ u)).sqrt())


def page(numbers: Mapping[str, Any]) -> Page:
    """Fitted powers between the lower and the upper bounds."""
    rows = []
    for row in numbers["rows"]:
        cells = row["cells"]
        ratios, steps = [c["ratio"] for c in cells], [c["steps"] for c in cells]
        slope, half = power(ratios, steps)
        late = -local_slopes([ratios[-3], ratios[-1]], [steps[-3], steps[-1]])[0]
        rows.append(
            [
                row["process"],
                *(str(n) for n in (steps[0], steps[len(steps) // 2], steps[-1])),
                f"{cells[-1]['T']:.3g}",
                f"{slope:.2f} ± {half:.2f}",
                f"{late:.2f}",
                f"{slope / 2:.2f} ± {half / 2:.2f}",
                f"{row['upper']:.2f}",
                f"{row['upper'] / 2:.2f}",
                *(f"{row['ours'][name]:.2f}" for name in OURS),
            ]
        )
    head = (
        "process",
        *(f"N at {ratio:g}" for ratio in (ratios[0], ratios[len(ratios) // 2], ratios[-1])),
        f"T at {ratios[-1]:g}",
        "power of 1/eps",
        f"from {ratios[-3]:g} on",
        "power of d",
        "bound's, 1/eps",
        "bound's, d",
        *(f"`{name}`" for name in OURS),
    )
    text = f"""
# Which forward process?

arXiv 2311.11003 bounds, for one forward process after the other, the steps N that bring a sampler within W2 <= eps of
strongly log-concave data. Here the data are N({numbers["mean"]:g}, {numbers["std"]:g}^2) in each of d
coordinates, and the laws are exact: the paper's scheme, which freezes the score over a step and integrates the
rest of the reverse SDE, in even steps of [0, T], from N(0, s(T)^2) to t = 0. The horizon T is free, and N is the least over T.

W2^2 of the product is d times that of a coordinate, so N depends on sqrt(d)/eps alone: one sweep of that ratio, "N at" below,
is every d from 1 to 1024 at every eps, and the power of d is half that of 1/eps, exactly. Powers are least squares with 95%
intervals, the bounds' are up to logarithms. The last two columns are W2/eps of `euler_maruyama` and of DDPM in the form of
its proof ([laws](laws.md)) with the same T and N, at {ratios[-1]:g}; they end on the denoised image, by which alone DDPM
differs from the scheme on VE.

{table(head, rows)}

![Steps over accuracy, and over the horizon](processes-steps.png)

**Beside the bounds.** For Gaussian data the paper proves that sqrt(d)/eps steps are needed: power 1 of 1/eps, 1/2 of d. The
VP processes attain it but for the logarithms of the horizon; their upper bound, 2 and 1, is one power of sqrt(d)/eps too high
on Gaussians. VE with g growing polynomially has to run until its own noise outgrows the data, `s(T)^2 ~ sqrt(d)/eps`, so
`T ~ (sqrt(d)/eps)^(1/(2c+1))`; even steps of that horizon cost that factor more, and the bound's additional 1/(2c+1)
{_verdict(numbers)}.
So the bounds are one power high throughout, and put the VE processes in the order that is measured. What they do not tell
apart differs: a VP process whose beta grows needs a quarter of the steps of beta = 1, which even exponential VE beats here,
because a beta that is small near the data spends even steps where they matter.

**The horizon** is the price: too short and the start is wrong whatever N is, too long and steps are spent on noise. VE pays
more for it, since `s(T)` must be large where VP need only let a(T) vanish.

**What could be verified.** That the VP processes share d/eps^2, the form d^(1/(2(2c+1)) + 1) / eps^(1/(2c+1) + 2) for polynomial
VE, and the lower bound sqrt(d)/eps are the paper's as reported; its table itself was not at hand. The horizon above over
steps of length eps^2/d reproduces that form, and gives d/eps^2 for exponential VE, whose horizon is a logarithm.
"""
    return Page(text, {"steps": _figure(numbers)})


def _verdict(numbers: Mapping[str, Any]) -> str:
    found = []
    for row, process in zip(numbers["rows"], PROCESSES, strict=True):
        if not process.preserving and process.upper > 2:
            ratios, steps = [c["ratio"] for c in row["cells"]], [c["steps"] for c in row["cells"]]
            found.append(f"{power(ratios, steps)[0] - 1:.2f} against {process.upper - 2:.2f}")
    return "is in the measured powers: beyond 1 they have " + ", ".join(found)


def _figure(numbers: Mapping[str, Any]) -> Figure:
    figure, (left, right) = axes(2, height=4.6)
    ratios: list[float] = []
    for row, process in zip(numbers["rows"], PROCESSES, strict=True):
        ratios, steps = [c["ratio"] for c in row["cells"]], [c["steps"] for c in row["cells"]]
        look: dict[str, Any] = {"color": process.colour, "linestyle": process.dashes}
        left.plot(ratios, steps, "o", markersize=3.5, label=process.name, **look)
        T, over = zip(*((T, n) for T, n in row["over_horizon"] if n is not None), strict=True)
        right.plot([value / T[over.index(min(over))] for value in T], over, **look)
    for slope, at, name in (
        (1, 2.5, r"lower bound's slope, $\sqrt{d}/\varepsilon$"),
        (2, 20, r"VP's upper bound's slope, $d/\varepsilon^2$"),
    ):
        line = [at * (ratio / ratios[0]) ** slope for ratio in ratios]
        left.plot(ratios, line, color="#BBBBBB", linewidth=4, zorder=0)
        place: dict[str, Any] = {
            "xytext": (0, 14 if slope > 1 else -14),
            "ha": "right" if slope > 1 else "left",
        }
        left.annotate(
            name,
            (ratios[3], line[3]),
            color="#666666",
            fontsize=9,
            textcoords="offset points",
            **place,
        )
    left.set(xscale="log", yscale="log", ylabel="fewest steps N")
    steps_axis(left, ratios, r"$\sqrt{d}\,/\,\varepsilon$")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="horizon T over the best",
        ylabel=rf"steps N at $\sqrt{{d}} / \varepsilon$ = {numbers['middle']:g}",
    )
    legend_below(figure, left, 4)
    return figure
