"""The order of accuracy of each deterministic sampler: its error over steps and over NFE, and the
fitted order.
"""

import math
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

from benchmarks.lab.markdown import Rendered, table
from ddm.measures import trajectory_error
from ddm.oracle import GaussianMixture
from ddm.rng import RngStream, normal
from ddm.samplers import drive, sample, sampler, start
from ddm.schedules import Schedule, schedule, velocity
from train.evaluation.plots import STYLE

PROCESSES = ("vp_linear", "vp_cosine", "rectified_flow", "edm")
STEPS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 144)
FITTED_FROM = 32  # steps: the order is asymptotic
POINTS = 128
NOISE_LEFT = 0.02  # s/a at the end of a trajectory
BUDGETS = (8, 16, 32)  # NFE


class Method(NamedTuple):
    """A sampler, and the order of UniPC."""

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
    def v(time: float, flat: Any) -> Any:
        t = torch.tensor(time, dtype=torch.float64)
        points = torch.from_numpy(flat).reshape(x.shape)
        return velocity(points, oracle.denoise(points, t), oracle.schedule(t)).flatten().numpy()

    start_point = x.flatten().numpy()
    solved = solve_ivp(v, (1.0, t_end), start_point, method="DOP853", rtol=1e-11, atol=1e-12)
    return torch.from_numpy(solved.y[:, -1]).reshape(x.shape)


def _distances(x: Tensor, exact: Tensor) -> Tensor:
    """The distance of each trajectory's end from the exact one, per coordinate:
    `sqrt(|x - x_ref|^2 / d)`.
    """
    return (x - exact).square().mean(dim=1).sqrt()


def _defined(method: Method, process: str) -> bool:
    times = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    return not sampler(method.name).lacks(schedule(process), times)


def _fit(cells: list[dict[str, Any]], floor: float) -> dict[str, float] | None:
    """The order: minus the slope of the median trajectory's log error over log steps, with standard
    error and 95% interval.
    """
    fitted = [cell for cell in cells if cell["steps"] >= FITTED_FROM and cell["median"] > floor]
    if len(fitted) < 4:
        return None
    log_steps = np.log([cell["steps"] for cell in fitted])
    log_errors = np.log([cell["median"] for cell in fitted])
    line = linregress(log_steps, log_errors)
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
    """The error at the end by steps and NFE for every schedule, grid and sampler, and the order
    fitted to it.
    """
    curves: list[dict[str, Any]] = []
    references = []
    for process in PROCESSES:
        reference, of_process = _measure(process)
        references.append(reference)
        curves += of_process
    return {"points": POINTS, "noise_left": NOISE_LEFT, "references": references, "curves": curves}


def _measure(process: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    path = schedule(process)
    oracle = _mixture(path)
    t_end = _end_time(path)
    noise = normal(0, RngStream.START, torch.arange(POINTS), 0, (2,)).double()
    x = path(torch.ones((), dtype=torch.float64)).s * noise
    exact = _exact_end(oracle, x, t_end)
    fine = sample(oracle.denoise, x, path, "unipc", 512, "uniform_log_snr", t_min=t_end)
    apart = float(_distances(fine, exact).median())
    curves = []
    for grid in ("edm" if process == "edm" else "uniform_t", "uniform_log_snr"):
        for method in METHODS:
            if not _defined(method, process):
                continue
            cells = []
            for steps in STEPS:
                trajectory = start(
                    x, path, method.name, steps, grid, t_min=t_end, order=method.order
                )
                end, nfe = drive(trajectory, oracle.denoise)
                error = math.sqrt(trajectory_error(end, exact))
                median = float(_distances(end, exact).median())
                cells.append({"steps": steps, "nfe": nfe, "error": error, "median": median})
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
    return {"schedule": process, "t_end": t_end, "unipc_512": apart}, curves


def _end_time(path: Schedule) -> float:
    """The time where s/a = NOISE_LEFT."""

    def excess(t: float) -> float:
        c = path(torch.tensor([t], dtype=torch.float64))
        return float(c.s / c.a) - NOISE_LEFT

    return float(brentq(excess, 1e-6, 0.5))


def render(numbers: dict[str, Any]) -> Rendered:
    """Tables of the orders, of the error at few NFE, and of the best sampler for each schedule."""
    curves = numbers["curves"]
    tables = {
        "orders": _orders(curves),
        "few_nfe": _few_nfe(curves),
        "best": _best(curves),
        "grid_ratio": _grid_ratio(curves),
    }
    return Rendered(tables, {"nfe": _figure(curves)})


def _grids(curves: list[dict[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """The two rows of grids: a name, and the grid of each schedule."""
    other = [curve for curve in curves if curve["grid"] != "uniform_log_snr"]
    of_schedule = {curve["schedule"]: curve["grid"] for curve in other}
    even = dict.fromkeys(of_schedule, "uniform_log_snr")
    return [("uniform_log_snr", even), ("uniform_t", of_schedule)]


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
            declared = sampler(method.name, method.order).order
            rows.append([method.label, str(declared), grid_name, *cells])
    return table(["sampler", "declared", "grid", *map(_head, PROCESSES)], rows)


def _order(fit: dict[str, float] | None) -> str:
    return f"{fit['order']:.2f} ± {(fit['high'] - fit['low']) / 2:.2f}" if fit else "too few points"


def _error(curve: dict[str, Any], nfe: int) -> float:
    return float(next(cell["error"] for cell in curve["cells"] if cell["nfe"] == nfe))


def _errors(curve: dict[str, Any]) -> str:
    return " / ".join(f"{_error(curve, nfe):.2g}" for nfe in BUDGETS)


def _few_nfe(curves: list[dict[str, Any]]) -> str:
    rows = []
    for method in METHODS:
        for grid_name, grid in _grids(curves):
            found = [_find(curves, process, grid[process], method.label) for process in PROCESSES]
            cells = [_errors(curve) if curve else "not defined" for curve in found]
            rows.append([method.label, grid_name, *cells])
    return table(["sampler", "grid", *map(_head, PROCESSES)], rows)


def _best(curves: list[dict[str, Any]]) -> str:
    """The sampler and grid with the smallest error, for each schedule and NFE."""
    rows = []
    for process in PROCESSES:
        of_process = [curve for curve in curves if curve["schedule"] == process]
        row = [f"`{process}`"]
        for nfe in BUDGETS:
            errors = [_error(curve, nfe) for curve in of_process]
            least = min(errors)
            winner = of_process[errors.index(least)]
            row.append(f"`{winner['sampler']}` on `{winner['grid']}` ({least:.2g})")
        rows.append(row)
    return table(["schedule", *(f"{nfe} NFE" for nfe in BUDGETS)], rows)


def _grid_ratio(curves: list[dict[str, Any]]) -> str:
    """The error of UniPC-3 on the other grid as a multiple of that on `uniform_log_snr`."""
    (_, even), (_, other) = _grids(curves)
    ratios = []
    for process in PROCESSES:
        on_even = _find(curves, process, even[process], "unipc-3")
        on_other = _find(curves, process, other[process], "unipc-3")
        assert on_even is not None
        assert on_other is not None
        ratio = _error(on_other, BUDGETS[1]) / _error(on_even, BUDGETS[1])
        ratios.append(f"{ratio:.1f}")
    return table([f"unipc-3 at {BUDGETS[1]} NFE", *map(_head, PROCESSES)], [["ratio", *ratios]])


def _figure(curves: list[dict[str, Any]]) -> Figure:
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(10.4, 8.6), sharex=True, sharey=True)
    for axes, process in zip(grid.flat, PROCESSES, strict=True):
        _panel(axes, process, [curve for curve in curves if curve["schedule"] == process])
    for axes in grid[1]:
        axes.set_xlabel("NFE")
    for axes in grid[:, 0]:
        axes.set_ylabel("error of the median trajectory")
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
            [cell["nfe"] for cell in curve["cells"]],
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
