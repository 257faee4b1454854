"""Forward processes: the exact number of steps that each process of arXiv 2311.11003 needs for W2
<= eps on Gaussian data.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.lab.laws import Law, Tabled, affine, exact_denoiser, local_slopes, w2_square, walker
from benchmarks.lab.markdown import Rendered, axes, legend_below, steps_axis, table
from ddm.schedules import (
    Schedule,
    VEExponential,
    VEPolynomial,
    VPConstant,
    VPExponential,
    VPPolynomial,
)

MEAN = 1.0  # of every coordinate of the data
STD = 0.5
RATIOS = (6.0, 12.0, 25.0, 50.0, 100.0, 200.0, 400.0)  # sqrt(d) / eps
OURS = ("euler_maruyama", "ddpm as proven")
MOST = 20_000


@dataclass(frozen=True)
class Process:
    """A forward process with fixed parameters, run to the horizon T; `at(T)` rescales it to t in
    [0, 1].
    """

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
    """W2 between the data and a coordinate after `steps` even steps of the paper's scheme from N(0,
    s(1)^2) to t = 0.

    The scheme freezes the score over a step and integrates the rest of
    `dx = (f x + g^2 score) dt + g dW` exactly:

        x' = x / r + k score + sqrt((s/r)^2 - s'^2) Z
        r = a/a',    k = 2 (1/r - 1) if VP, s^2 - s'^2 if VE
    """
    c = process.at(horizon)(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    a, s = c.a[:-1], c.s[:-1]
    r = a / c.a[1:]
    variance = (a * STD) ** 2 + s**2
    k = 2 * (1 / r - 1) if process.preserving else s**2 - c.s[1:] ** 2
    # A step is x' = A x + b + noise; `later` is the product of A over the steps after each.
    A = 1 / r - k / variance
    b = k / variance * a * MEAN
    noise = (s / r) ** 2 - c.s[1:] ** 2
    later = torch.cat([A.flip(0).cumprod(0).flip(0)[1:], A.new_ones(1)])
    whole = later[0] * A[0]
    mean = (later * b).sum()
    end_variance = whole**2 * s[0] ** 2 + (later**2 * noise).sum()
    return float(w2_square(Law(mean[None], end_variance[None]), _data()).sqrt())


def _data() -> Law:
    return Law(*(torch.tensor([value], dtype=torch.float64) for value in (MEAN, STD**2)))


def fewest(error: Callable[[int], float], allowed: float, most: int = MOST) -> int | None:
    """The fewest steps whose error is at most `allowed`, by doubling and bisection; None if `most`
    are not enough.
    """
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
    denoise = exact_denoiser(_data(), schedule)
    affine_map = affine(walker(name), denoise, schedule, times, 1, 1)
    s = schedule(times[0]).s[None]
    return float(w2_square(affine_map(Law(0 * s, s**2)), _data()).sqrt())


def horizons(process: Process, count: int = 40) -> list[float]:
    """Horizons evenly in log T, from where the noise is as wide as the data to where the start is
    exact to 1e-4.
    """

    def left(T: float) -> float:
        """How much of the start's error reaches the data."""
        c = process.at(T)(torch.ones((), dtype=torch.float64))
        return float(c.a * STD**2 / (c.a**2 * STD**2 + c.s**2))

    def where(level: float) -> float:
        low, high = 1e-3, 1e5
        for _ in range(80):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if not left(middle) <= level else (low, middle)
        return high

    first = where(0.3)
    last = where(1e-4)
    return [first * (last / first) ** (i / (count - 1)) for i in range(count)]


def measure(ratios: Sequence[float] = RATIOS, count: int = 40) -> dict[str, Any]:
    """Per process: steps and horizon over sqrt(d)/eps, W2 of this project's samplers, and steps
    over the horizon.
    """
    middle = ratios[len(ratios) // 2]
    rows = []
    for process in PROCESSES:
        tried = horizons(process, count)
        cells = []
        for ratio in ratios:
            steps, T = best(process, 1 / ratio, tried)
            cells.append({"ratio": ratio, "steps": steps, "T": T})
        over = []
        for horizon in tried:
            error = partial(exponential_integrator, process, horizon)
            over.append((horizon, fewest(error, 1 / middle, MOST)))
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


def render(numbers: Mapping[str, Any]) -> Rendered:
    """Tables of the fitted powers and their upper bounds, and of what polynomial VE adds."""
    tables = {"powers": _powers_table(numbers["rows"]), "added": _added_table(numbers["rows"])}
    return Rendered(tables, {"steps": _figure(numbers)})


def _over_ratio(row: Mapping[str, Any]) -> tuple[list[float], list[int]]:
    """sqrt(d)/eps, and the fewest steps at each."""
    return [cell["ratio"] for cell in row["cells"]], [cell["steps"] for cell in row["cells"]]


def _powers_table(measured: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in measured:
        ratios, steps = _over_ratio(row)
        slope, half = power(ratios, steps)
        late = -local_slopes([ratios[-3], ratios[-1]], [steps[-3], steps[-1]])[0]
        rows.append(
            [
                row["process"],
                *(str(n) for n in (steps[0], steps[len(steps) // 2], steps[-1])),
                f"{row['cells'][-1]['T']:.3g}",
                f"{slope:.2f} ± {half:.2f}",
                f"{late:.2f}",
                f"{slope / 2:.2f} ± {half / 2:.2f}",
                f"{row['upper']:.2f}",
                f"{row['upper'] / 2:.2f}",
                *(f"{row['ours'][name]:.2f}" for name in OURS),
            ]
        )
    ratios, _ = _over_ratio(measured[0])
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
    return table(head, rows)


def _added_table(measured: Sequence[Mapping[str, Any]]) -> str:
    """By how much the power of 1/eps of polynomial VE exceeds that of the other processes:
    measured, and in the bound.
    """
    rows = []
    for row, process in zip(measured, PROCESSES, strict=True):
        if not process.preserving and process.upper > 2:
            slope, _ = power(*_over_ratio(row))
            rows.append([row["process"], f"{slope - 1:.2f}", f"{process.upper - 2:.2f}"])
    return table(("process", "measured power - 1", "bound's power - 2"), rows)


def _figure(numbers: Mapping[str, Any]) -> Figure:
    figure, (left, right) = axes(2, height=4.6)
    ratios: list[float] = []
    for row, process in zip(numbers["rows"], PROCESSES, strict=True):
        ratios, steps = _over_ratio(row)
        look: dict[str, Any] = {"color": process.colour, "linestyle": process.dashes}
        left.plot(ratios, steps, "o", markersize=3.5, label=process.name, **look)
        reached = [(T, n) for T, n in row["over_horizon"] if n is not None]
        best_T, _ = min(reached, key=lambda pair: pair[1])
        right.plot([T / best_T for T, _ in reached], [n for _, n in reached], **look)
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
