"""How fast each deterministic sampler closes in on the ODE: error over steps and over expert calls, and the fitted order."""

import math
from functools import partial
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from scipy.stats import linregress
from scipy.stats import t as student
from torch import Tensor

from benchmarks.lab.markdown import Page, table
from ddm.measures import trajectory_error
from ddm.oracle import GaussianMixture
from ddm.rng import RngStream, normal
from ddm.samplers import drive, sample, sampler, start
from ddm.schedules import Schedule, schedule, velocity
from train.evaluation.plots import STYLE

PROCESSES = ("vp_linear", "vp_cosine", "rectified_flow", "edm")
STEPS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 144)
FITTED_FROM = 32  # steps: what is fitted is the law for many
POINTS = 128
NOISE_LEFT = 0.02  # s/a where a path ends
BUDGETS = (8, 16, 32)  # expert calls


class Method(NamedTuple):
    """A sampler, and the order asked of unipc."""

    name: str
    order: int = 3

    @property
    def label(self) -> str:
        """`unipc-3` and the like."""
        return f"unipc-{self.order}" if self.name == "unipc" else self.name


METHODS = (
    Method("euler"),
    Method("ddim"),
    Method("heun"),
    Method("accelerated_ode"),
    Method("dpmpp_2m"),
    Method("unipc", 2),
    Method("unipc", 3),
)
COLOURS = dict(
    zip(
        (method.label for method in METHODS),
        ("#999999", "#000000", "#E69F00", "#CC79A7", "#0072B2", "#56B4E9", "#D55E00"),
        strict=True,
    )
)


def _mixture(path: Schedule) -> GaussianMixture:
    """Three clusters in the plane; the full mixture of their exact experts is the denoiser."""
    return GaussianMixture(
        weights=torch.tensor([0.5, 0.2, 0.3]).double(),
        means=torch.tensor([[-1.0, 0.2], [0.8, 0.9], [0.6, -0.7]]).double(),
        stds=torch.tensor([[0.2, 0.3], [0.15, 0.2], [0.3, 0.1]]).double(),
        schedule=path,
    )


def _exact_end(oracle: GaussianMixture, x: Tensor, t_end: float) -> Tensor:
    def v(t: float, flat: Any) -> Any:
        at, points = torch.tensor(t, dtype=torch.float64), torch.from_numpy(flat).reshape(x.shape)
        return velocity(points, oracle.denoise(points, at), oracle.schedule(at)).flatten().numpy()

    path = solve_ivp(v, (1.0, t_end), x.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12)
    return torch.from_numpy(path.y[:, -1]).reshape(x.shape)


def _distances(x: Tensor, exact: Tensor) -> Tensor:
    """Of each path's end to the exact one, a number of a coordinate: `sqrt(|x - x_ref|^2 / d)`."""
    return (x - exact).square().mean(dim=1).sqrt()


def _defined(method: Method, process: str) -> bool:
    times = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    return not sampler(method.name).lacks(schedule(process), times)


def _fit(cells: list[dict[str, Any]], floor: float) -> dict[str, float] | None:
    """The order: minus the slope of the median path's log error over log steps, its standard error and 95% interval."""
    fitted = [cell for cell in cells if cell["steps"] >= FITTED_FROM and cell["median"] > floor]
    if len(fitted) < 4:
        return None
    line = linregress(
        np.log([cell["steps"] for cell in fitted]), np.log([cell["median"] for cell in fitted])
    )
    width = float(student.ppf(0.975, len(fitted) - 2)) * float(line.stderr)
    order = -float(line.slope)
    return {
        "order": order,
        "standard_error": float(line.stderr),
        "low": order - width,
        "high": order + width,
        "points": len(fitted),
    }


def measure() -> dict[str, Any]:
    """For every schedule, grid and sampler the error at the path's end by steps and calls, and the order fitted to it."""
    curves, references = [], []
    for process in PROCESSES:
        path = schedule(process)
        oracle = _mixture(path)

        def noise_left(t: float, path: Schedule = path) -> float:
            c = path(torch.tensor([t], dtype=torch.float64))
            return float(c.s / c.a) - NOISE_LEFT

        t_end = float(brentq(noise_left, 1e-6, 0.5))
        x = (
            path(torch.ones((), dtype=torch.float64)).s
            * normal(0, RngStream.START, torch.arange(POINTS), 0, (2,)).double()
        )
        exact = _exact_end(oracle, x, t_end)
        fine = sample(oracle.denoise, x, path, "unipc", 512, "uniform_log_snr", t_min=t_end)
        apart = float(_distances(fine, exact).median())
        references.append({"schedule": process, "t_end": t_end, "unipc_512": apart})
        for grid in ("edm" if process == "edm" else "uniform_t", "uniform_log_snr"):
            for method in METHODS:
                if not _defined(method, process):
                    continue
                cells = []
                for steps in STEPS:
                    trajectory = start(
                        x, path, method.name, steps, grid, t_min=t_end, order=method.order
                    )
                    end, calls = drive(trajectory, oracle.denoise)
                    error, middle = (
                        math.sqrt(trajectory_error(end, exact)),
                        float(_distances(end, exact).median()),
                    )
                    cells.append({"steps": steps, "calls": calls, "error": error, "median": middle})
                curves.append(
                    {
                        "schedule": process,
                        "grid": grid,
                        "sampler": method.label,
                        "declared": sampler(method.name, method.order).order,
                        "cells": cells,
                        "fit": _fit(cells, floor=10 * apart),
                    }
                )
    return {"points": POINTS, "noise_left": NOISE_LEFT, "references": references, "curves": curves}


def page(numbers: dict[str, Any]) -> Page:
    """The page that is drawn from them."""
    curves = numbers["curves"]
    apart = max(reference["unipc_512"] for reference in numbers["references"])
    text = f"""
# Orders: what a step buys

Every deterministic sampler walks the exact denoiser of a mixture of three Gaussians in the plane (the full mixture of three
exact experts) from t = 1 to where s/a = {numbers["noise_left"]}. Its error is the distance, per coordinate, to the ends of the
same {numbers["points"]} paths by scipy's DOP853 at a relative tolerance of 1e-11; UniPC with 512 steps comes within
{apart:.0e} of those ends in the median (where a(1) = 0, the first step of `uniform_log_snr` is never shorter than 1e-3, and this
is the error that it leaves).

Of these paths some start near the watershed between two clusters, and a coarse sampler takes them to the other one. Such a path
is wrong by the distance of clusters, whatever the order, and one of {numbers["points"]} rules a root mean square. So the figure
and the orders are of the median path; what few calls give is in the root mean square.

![error of the median path over calls](orders-calls.png)

Solid: the grid `uniform_log_snr`. Dashed: `uniform_t`, and for the schedule `edm` the grid `edm`. On `rectified_flow` and
`edm`, where a and s are straight lines in t, Euler and DDIM are the same sampler and lie on each other.

## The order of accuracy

Minus the slope of the median path's log error over log steps, {FITTED_FROM} to {STEPS[-1]} steps, and half its 95% interval; over
expert calls the slope is the same. Nothing here is drawn anew: the interval says how straight the line is.

{_orders(curves)}

On `uniform_log_snr` UniPC of order p measures above p: its corrector, which costs no call, adds one order, as its paper says
(arXiv 2302.04867). On `uniform_t` the multistep samplers do not have their order yet where log SNR is steep, as on `vp_linear`.
The accelerated ODE sampler is still on its way to 2.

## Few calls

The root mean square error after {", ".join(map(str, BUDGETS[:-1]))} and {BUDGETS[-1]} expert calls, and its lowest of each
schedule. Heun and the accelerated ODE sampler call twice a step, so they have half the steps.

{_few_calls(curves)}

{_notes(curves)}
"""
    return Page(text, {"calls": _figure(curves)})


def _grids(curves: list[dict[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """The two rows of grids: their name, and each schedule's grid."""
    coarse = {
        curve["schedule"]: curve["grid"] for curve in curves if curve["grid"] != "uniform_log_snr"
    }
    return [("uniform_log_snr", dict.fromkeys(coarse, "uniform_log_snr")), ("uniform_t", coarse)]


def _find(
    curves: list[dict[str, Any]], process: str, grid: str, label: str
) -> dict[str, Any] | None:
    for curve in curves:
        if (curve["schedule"], curve["grid"], curve["sampler"]) == (process, grid, label):
            return dict(curve)
    return None


def _head(process: str) -> str:
    return "edm (second grid: edm)" if process == "edm" else process


def _orders(curves: list[dict[str, Any]]) -> str:
    rows = []
    for method in METHODS:
        for grid_name, grid in _grids(curves):
            found = [_find(curves, process, grid[process], method.label) for process in PROCESSES]
            cells = [_order(curve["fit"]) if curve else "not defined" for curve in found]
            rows.append(
                [method.label, str(sampler(method.name, method.order).order), grid_name, *cells]
            )
    return table(["sampler", "declared", "grid", *map(_head, PROCESSES)], rows)


def _order(fit: dict[str, float] | None) -> str:
    return f"{fit['order']:.2f} ± {(fit['high'] - fit['low']) / 2:.2f}" if fit else "too few points"


def _error(curve: dict[str, Any], calls: int) -> float:
    return float(next(cell["error"] for cell in curve["cells"] if cell["calls"] == calls))


def _few_calls(curves: list[dict[str, Any]]) -> str:
    rows = []
    for method in METHODS:
        for grid_name, grid in _grids(curves):
            cells = []
            for process in PROCESSES:
                curve = _find(curves, process, grid[process], method.label)
                cells.append(
                    " / ".join(f"{_error(curve, n):.2g}" for n in BUDGETS)
                    if curve
                    else "not defined"
                )
            rows.append([method.label, grid_name, *cells])
    return table(["sampler", "grid", *map(_head, PROCESSES)], rows)


def _notes(curves: list[dict[str, Any]]) -> str:
    best, harmed = [], []
    for process in PROCESSES:
        words = []
        for calls in BUDGETS:
            of_process = [curve for curve in curves if curve["schedule"] == process]
            winner = min(of_process, key=partial(_error, calls=calls))
            words.append(
                f"{calls} calls `{winner['sampler']}` on `{winner['grid']}` ({_error(winner, calls):.2g})"
            )
        best.append(f"- `{process}`: {', '.join(words)}.")
        one, other = (
            _find(curves, process, grid[process], "unipc-3") for _, grid in _grids(curves)
        )
        if one and other:
            harmed.append(
                f"{_error(other, BUDGETS[1]) / _error(one, BUDGETS[1]):.1f} on `{process}`"
            )
    return f"""{chr(10).join(best)}

The multistep samplers extrapolate in log SNR, and over a grid that is uneven in it they extrapolate far: with {BUDGETS[1]} calls
the error of `unipc-3` on the other grid is, as a multiple of that on `uniform_log_snr`, {", ".join(harmed)}.
Euler, DDIM and Heun do not depend on such a grid: on `vp_cosine` and `rectified_flow` they do better on `uniform_t`. All of this
is for an exact, smooth denoiser in two dimensions; the error of a trained network is a floor under every line."""


def _figure(curves: list[dict[str, Any]]) -> Figure:
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(10.4, 8.6), sharex=True, sharey=True)
    for axes, process in zip(grid.flat, PROCESSES, strict=True):
        _panel(axes, process, [curve for curve in curves if curve["schedule"] == process])
    for axes in grid[1]:
        axes.set_xlabel("expert calls")
    for axes in grid[:, 0]:
        axes.set_ylabel("error of the median path")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="lower center",
        ncols=len(labels),
        frameon=False,
        bbox_to_anchor=(0.5, -0.01),
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def _panel(axes: Axes, process: str, curves: list[dict[str, Any]]) -> None:
    for curve in curves:
        solid = curve["grid"] == "uniform_log_snr"
        axes.plot(
            [cell["calls"] for cell in curve["cells"]],
            [cell["median"] for cell in curve["cells"]],
            "o-" if solid else "--",
            color=COLOURS[curve["sampler"]],
            label=curve["sampler"] if solid else None,
            linewidth=1.6 if solid else 1,
            markersize=3.5,
        )
    axes.set_title(process)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
