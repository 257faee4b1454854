"""Few steps: the error of every sampler on every grid at 5 to 50 NFE, on mixtures in 64 dimensions
and, where `DDM_RUN` (default `runs/digits`) is a trained run, with its experts.
"""

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.lab.markdown import Rendered, table
from ddm.grids import time_grid
from ddm.oracle import GaussianMixture
from ddm.rng import RngStream, normal
from ddm.samplers import Denoiser, drive, sample, start
from ddm.schedules import Schedule, schedule
from serve import load
from train.evaluation.plots import STYLE

PROCESSES = ("vp_linear", "vp_cosine", "rectified_flow", "edm")
GRIDS = ("uniform_t", "uniform_log_snr", "quadratic", "cosine", "half", "edm")
NFE = (5, 10, 20, 50)
NETWORK_NFE = (5, 10)
DIMENSION = 64
CLUSTERS = 8
PATHS = 64
REFERENCE_STEPS = 4000
IMAGES = 40  # of the trained experts
NETWORK_REFERENCE_STEPS = 300

log = logging.getLogger("lab")


class Method(NamedTuple):
    """A sampler and its order, where it takes one."""

    name: str
    order: int | None = None

    @property
    def label(self) -> str:
        """`ipndm-3` and the like."""
        return self.name if self.order is None else f"{self.name}-{self.order}"

    def end(
        self, denoiser: Denoiser, x: Tensor, path: Schedule, nfe: int, grid: str
    ) -> tuple[Tensor, int]:
        """The end of the trajectories at t = 0, and the NFE of each: `nfe`, or one less."""
        # Heun's last step, to t = 0, is one call.
        steps = (nfe + 1) // 2 if self.name == "heun" else nfe
        return drive(start(x, path, self.name, steps, grid, order=self.order or 3), denoiser)


METHODS = (
    Method("ddim"),
    Method("heun"),
    Method("dpmpp_2m"),
    Method("unipc", 2),
    Method("unipc", 3),
    Method("ipndm", 2),
    Method("ipndm", 3),
    Method("ipndm", 4),
)
TODAY = ("dpmpp_2m", "uniform_t")
DEFAULT = ("ipndm-3", "cosine")
SHOWN = {
    TODAY: "#999999",
    ("dpmpp_2m", "cosine"): "#0072B2",
    ("unipc-3", "cosine"): "#D55E00",
    ("ipndm-3", "quadratic"): "#E69F00",
    DEFAULT: "#009E73",
}


def _mixtures(path: Schedule) -> dict[str, GaussianMixture]:
    """`even`: means N(0, 1), standard deviations 0.3 to 1 in every coordinate. `decaying`: means
    N(0, 1) and standard deviations 0.1 to 0.6, both times i^(-1/2) in coordinate i, as in images.
    """
    generator = torch.Generator().manual_seed(1)
    normals = torch.randn(CLUSTERS, DIMENSION, generator=generator).double()
    uniforms = torch.rand(CLUSTERS, DIMENSION, generator=generator).double()
    weights = torch.full((CLUSTERS,), 1 / CLUSTERS).double()
    size = torch.arange(1, DIMENSION + 1).double() ** -0.5
    return {
        "even": GaussianMixture(weights, normals, 0.3 + 0.7 * uniforms, path),
        "decaying": GaussianMixture(weights, normals * size, (0.1 + 0.5 * uniforms) * size, path),
    }


def measure() -> dict[str, Any]:
    """The error of every cell: on mixtures, by diffusers if it is installed, and on a trained run
    if there is one.
    """
    cells = []
    peers: list[dict[str, Any]] = []
    for process in PROCESSES:
        path = schedule(process)
        noise = normal(0, RngStream.START, torch.arange(PATHS), 0, (DIMENSION,)).double()
        x = path(torch.ones((), dtype=torch.float64)).s * noise
        for data, oracle in _mixtures(path).items():
            reference = sample(oracle.denoise, x, path, "dpmpp_2m", REFERENCE_STEPS, "cosine")
            found = _cells(oracle.denoise, x, path, reference, NFE)
            cells += [{"data": data, "schedule": process, **cell} for cell in found]
            if process == "vp_linear":
                found = _peers(oracle.denoise, x, path, reference)
                peers += [{"data": data, **cell} for cell in found]
    return {
        "cells": cells,
        "peers": peers,
        "diffusers": _diffusers_version(),
        "network": _network(Path(os.environ.get("DDM_RUN", "runs/digits"))),
    }


def _cells(
    denoiser: Denoiser, x: Tensor, path: Schedule, reference: Tensor, budgets: Sequence[int]
) -> list[dict[str, Any]]:
    """The root mean square error of each sampler on each grid."""
    cells = []
    for grid in GRIDS:
        if grid == "uniform_t" and path == schedule("edm"):
            continue  # refused by `check_grid`
        for method in METHODS:
            for budget in budgets:
                end, nfe = method.end(denoiser, x, path, budget, grid)
                cells.append(
                    {
                        "sampler": method.label,
                        "grid": grid,
                        "budget": budget,
                        "nfe": nfe,
                        "error": _error(end, reference),
                    }
                )
    return cells


def _error(end: Tensor, reference: Tensor) -> float:
    """The root mean square, to four digits."""
    return float(f"{float((end - reference).square().mean().sqrt()):.4g}")


def _diffusers_version() -> str | None:
    if importlib.util.find_spec("diffusers") is None:
        return None
    return str(importlib.import_module("diffusers").__version__)


def _peers(
    denoiser: Denoiser, x: Tensor, path: Schedule, reference: Tensor
) -> list[dict[str, Any]]:
    """The same samplers by diffusers, given the times of our grids; empty without diffusers."""
    if _diffusers_version() is None:
        log.info("samplers: diffusers is not installed: the peers are left out")
        return []
    cells = []
    for grid in GRIDS:
        for budget in NFE:
            times = time_grid(grid, budget, path)
            for name, end in _by_diffusers(denoiser, x, path, times).items():
                error = _error(end, reference)
                cells.append({"sampler": name, "grid": grid, "budget": budget, "error": error})
    return cells


def _by_diffusers(
    denoiser: Denoiser, x: Tensor, path: Schedule, times: Tensor
) -> dict[str, Tensor]:
    """The ends of DPM-Solver++(2M), UniPC-3 and IPNDM-4 of diffusers on a variance preserving
    schedule: its own tables of sigma are replaced by those of the times.
    """
    diffusers: Any = importlib.import_module("diffusers")
    steps = len(times) - 1
    c = path(times)
    usual = {"prediction_type": "sample", "final_sigmas_type": "zero"}
    schedulers = {
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler(solver_order=2, **usual),
        "unipc-3": diffusers.UniPCMultistepScheduler(solver_order=3, **usual),
        "ipndm-4": diffusers.IPNDMScheduler(),
    }
    ends = {}
    for name, scheduler in schedulers.items():
        scheduler.set_timesteps(steps)
        scheduler.timesteps = torch.arange(steps, 0, -1)
        if name == "ipndm-4":
            scheduler.alphas, scheduler.betas = c.a, c.s
        else:
            scheduler.sigmas = c.s / c.a
        y = x
        for n, index in enumerate(scheduler.timesteps):
            denoised = denoiser(y, times[n])
            eps = (y - c.a[n] * denoised) / c.s[n]
            v = c.a[n] * eps - c.s[n] * denoised
            output = v if name == "ipndm-4" else denoised
            y = scheduler.step(output, index, y).prev_sample
        ends[name] = y
    return ends


def _network(run: Path) -> dict[str, Any] | None:
    """The error with a trained run's experts, one for each image throughout."""
    if not run.is_dir():
        log.info("samplers: no run in %s (DDM_RUN): measuring mixtures only", run)
        return None
    model = load(run)
    k = len(model.experts)
    index = torch.arange(IMAGES)

    @torch.inference_mode()
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        denoised = torch.empty_like(x)
        for j, expert in enumerate(model.experts):
            denoised[j::k] = expert(x[j::k].float(), t.float()).to(x)
        return denoised.clamp(-1, 1)

    path = model.schedule
    s = path(torch.ones((), dtype=torch.float64)).s
    x = s * normal(0, RngStream.START, index, 0, model.shape).double()
    reference = sample(denoiser, x, path, "dpmpp_2m", NETWORK_REFERENCE_STEPS, "cosine")
    return {
        "experts": k,
        "schedule": repr(path),
        "cells": _cells(denoiser, x, path, reference, NETWORK_NFE),
    }


def render(numbers: dict[str, Any]) -> Rendered:
    """Tables of every cell on the decaying mixture, of the default beside the best cell, of the
    peers and of the trained experts; the error over NFE.
    """
    cells = numbers["cells"]
    tables = {
        f"errors_{process}": _grid_table(_of(cells, data="decaying", schedule=process))
        for process in PROCESSES
    }
    tables["default"] = _default(numbers)
    tables["peers"] = _peer_table(numbers)
    network = numbers["network"]
    tables["network"] = _grid_table(network["cells"]) if network else "Not measured."
    return Rendered(tables, {"nfe": _figure(cells)})


def _of(cells: Sequence[dict[str, Any]], **wanted: object) -> list[dict[str, Any]]:
    return [cell for cell in cells if all(cell[key] == value for key, value in wanted.items())]


def _grid_table(cells: Sequence[dict[str, Any]]) -> str:
    """Samplers by grids; a cell holds the error at each NFE, the best at 5 or 10 NFE in bold."""
    least = {budget: _best(cells, budget)["error"] for budget in NETWORK_NFE}
    grids = [grid for grid in GRIDS if _of(cells, grid=grid)]
    labels = dict.fromkeys(cell["sampler"] for cell in cells)

    def shown(cell: dict[str, Any]) -> str:
        error = cell["error"]
        number = f"{error:.2g}"
        return f"**{number}**" if error == least.get(cell["budget"]) else number

    rows = [
        [label, *(" / ".join(map(shown, _of(cells, sampler=label, grid=grid))) for grid in grids)]
        for label in labels
    ]
    return table(["sampler", *grids], rows)


def _best(cells: Sequence[dict[str, Any]], budget: int) -> dict[str, Any]:
    return min(_of(cells, budget=budget), key=lambda cell: float(cell["error"]))


def _default(numbers: dict[str, Any]) -> str:
    """The default's error as a multiple of the best cell's, for each data, schedule and NFE."""
    groups = [
        (f"mixture, {data}", process, _of(numbers["cells"], data=data, schedule=process))
        for data in ("even", "decaying")
        for process in PROCESSES
    ]
    if numbers["network"]:
        groups.append(
            ("trained experts", numbers["network"]["schedule"], numbers["network"]["cells"])
        )
    rows = []
    for data, process, cells in groups:
        row = [data, process]
        for budget in NETWORK_NFE:
            best = _best(cells, budget)
            row.append(f"{best['sampler']} on {best['grid']}, {best['error']:.2g}")
            for label, grid in (DEFAULT, TODAY):
                found = _of(cells, sampler=label, grid=grid, budget=budget)
                row.append(f"{found[0]['error'] / best['error']:.2f}" if found else "-")
        rows.append(row)
    head = ["data", "schedule"]
    for budget in NETWORK_NFE:
        head += [
            f"best at {budget} NFE",
            " on ".join(DEFAULT),
            " on ".join(TODAY),
        ]
    return table(head, rows)


def _peer_table(numbers: dict[str, Any]) -> str:
    peers = _of(numbers["peers"], data="decaying")
    if not peers:
        return "Not measured: diffusers is not installed."
    ours = _of(numbers["cells"], data="decaying", schedule="vp_linear")
    rows = []
    for label in ("dpmpp_2m", "unipc-3", "ipndm-4"):
        for whose, cells in (("ddm", ours), ("diffusers", peers)):
            of_label = _of(cells, sampler=label)
            row = [label, whose]
            for grid in GRIDS:
                errors = [f"{cell['error']:.2g}" for cell in _of(of_label, grid=grid)]
                row.append(" / ".join(errors))
            rows.append(row)
    return table(["sampler", "by", *GRIDS], rows)


def _figure(cells: list[dict[str, Any]]) -> Figure:
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=(10.4, 8.2), sharex=True, sharey=True)
    for axes, process in zip(panels.flat, PROCESSES, strict=True):
        of_process = _of(cells, data="decaying", schedule=process)
        least = [_best(of_process, budget)["error"] for budget in NFE]
        axes.plot(NFE, least, color="#000000", linestyle=":", label="best cell")
        for (label, grid), colour in SHOWN.items():
            found = _of(of_process, sampler=label, grid=grid)
            if found:
                errors = [cell["error"] for cell in found]
                axes.plot(NFE, errors, "o-", color=colour, label=f"{label} on {grid}", markersize=4)
        axes.set_title(process)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(NFE, [str(nfe) for nfe in NFE])
        axes.set_xticks([], minor=True)
    for axes in panels[1]:
        axes.set_xlabel("NFE")
    for axes in panels[:, 0]:
        axes.set_ylabel("root mean square error")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure
