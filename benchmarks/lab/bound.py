"""The bound: the theorem of `benchmarks.lab.theory` against measurement, for the routed Euler
sampler.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.lab.markdown import Rendered, axes, table
from benchmarks.lab.theory import bound, constants, stability, step
from ddm.measures import power_law_fit, sliced_w2, trajectory_error
from ddm.oracle import GaussianMixture
from ddm.samplers import sample
from ddm.schedules import schedule
from router.routing import RoutedDenoiser

PATH = schedule("vp_linear")
STEPS = (10, 30, 100, 300)
DELTAS = (0.5, 0.32, 0.2, 0.14, 0.1, 0.07, 0.05, 0.035)
SWEEP_STEPS = 100
PARTS = ("initialization", "truncation", "martingale", "approximation")
TRAJECTORIES = 1000
NEAR = 1e-6  # the distance of two neighbours whose stretch is measured


@dataclass(frozen=True)
class Setting:
    """Four clusters of four points each on the sphere of radius R in R^d, sampled to t = delta with
    these errors added.
    """

    name: str
    R: float
    d: int
    delta: float
    eps_router: float = 0.0
    eps_expert: float = 0.0
    K: int = 4


SETTINGS = (
    Setting("short horizon", 1.0, 2, 0.5),
    Setting("middle horizon", 1.0, 2, 0.1),
    Setting("middle, with errors", 1.0, 2, 0.1, 0.1, 0.1),
    Setting("small ball", 0.25, 2, 0.02),
    Setting("large ball", 3.0, 8, 0.1),
)


class Data:
    """The points of a setting, each a Gaussian of width 0, and the exact denoisers with the
    setting's errors.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        K = setting.K
        d = setting.d
        generator = torch.Generator().manual_seed(0)
        centres = normalize(torch.randn(K, 1, d, generator=generator, dtype=torch.float64), dim=2)
        points = centres + 0.3 * torch.randn(K, 4, d, generator=generator, dtype=torch.float64)
        self.points = setting.R * normalize(points, dim=2)  # [K, 4, d]
        self.mixture = self._mixture(self.points.flatten(0, 1))

    def _mixture(self, points: Tensor) -> GaussianMixture:
        even = torch.full((len(points),), 1 / len(points))
        return GaussianMixture(even, points, torch.zeros_like(points), PATH)

    def alpha(self, x: Tensor, t: Tensor) -> Tensor:
        """The posterior, moved by at most eps_router towards its least likely corner, which is at
        most sqrt(2) away.
        """
        alpha = self.mixture.posterior(x, t).unflatten(1, (self.setting.K, -1)).sum(2)
        corner = torch.nn.functional.one_hot(alpha.argmin(1), self.setting.K)
        return alpha + self.setting.eps_router / math.sqrt(2) * (corner - alpha)

    def expert(self, k: int) -> Any:
        """The exact denoiser of cluster k plus a constant error of norm eps_expert."""
        exact = self._mixture(self.points[k]).denoise
        error = self.setting.eps_expert / math.sqrt(self.setting.d)
        return lambda x, t: exact(x, t) + error

    def measured(self, steps: tuple[int, ...]) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Measurements at each number of steps, and the stretch of the exact flow.

        `W2(Y_N, x_delta)` lies between the two distances, up to sampling error; both are in R^d.
        coupled: the root mean square of `Y_N - X_delta`, where Y starts from the noise of
        `X_1 = a x0 + s eps`. floor: sqrt(d) times sliced W2, because the mean square of a vector
        along a random direction is 1/d of its own.
        stretch_rms, stretch_max: by how much the exact flow separates two neighbours, in random
        directions from the same X_1.
        """
        setting = self.setting
        generator = torch.Generator().manual_seed(1)
        a, s, _, _ = PATH(torch.tensor(1.0, dtype=torch.float64))
        points = self.mixture.means
        x0 = points[torch.randint(len(points), (TRAJECTORIES,), generator=generator)]
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        direction = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        first = a * x0 + s * noise
        pairs = torch.cat([first, first + NEAR * normalize(direction)])
        denoise = self.mixture.denoise
        ends = sample(denoise, pairs, PATH, "heun", 150, "uniform_log_snr", t_min=setting.delta)
        exact, neighbour = ends.chunk(2)
        stretch = (neighbour - exact).norm(dim=1) / NEAR
        experts = [self.expert(k) for k in range(setting.K)]
        root_d = math.sqrt(setting.d)
        found = []
        for n in steps:
            routed = RoutedDenoiser(experts, self.alpha, "stochastic", seed=n)
            y = sample(routed, s * noise, PATH, "euler", n, "uniform_t", t_min=setting.delta)
            coupled = root_d * math.sqrt(trajectory_error(y, exact))
            found.append({"coupled": coupled, "floor": root_d * sliced_w2(y, exact)})
        return found, {
            "stretch_rms": float(stretch.square().mean().sqrt()),
            "stretch_max": float(stretch.max()),
        }


def _bounded(setting: Setting, steps: int) -> dict[str, Any]:
    """log10 of the theorem's numbers, and of `unstretched`: the sum of the errors of the steps
    without any later factor.
    """
    q = asdict(setting)
    del q["name"]
    times = torch.linspace(1, setting.delta, steps + 1, dtype=torch.float64)
    t, h = times[:-1], (1 - setting.delta) / steps
    c = constants(PATH, setting.R, setting.d, setting.K, t)
    made = (
        PATH(times[0]).a * setting.R
        + step(PATH, setting.R, setting.d, t, times[1:]).truncation.sum()
        + h * (1 + setting.eps_expert / setting.R) * c.martingale.square().sum().sqrt()
        + h * (c.router * setting.eps_router + c.expert * setting.eps_expert).sum()
    )
    parts = bound(PATH, steps=steps, **q)._asdict()
    finite = {name: value if math.isfinite(value) else None for name, value in parts.items()}
    return {"steps": steps, **finite, "unstretched": float(made.log10())}


def measure() -> dict[str, Any]:
    """Bound and measured distance over N for every setting, and over delta at one N; and the bound
    alone for images.
    """

    def run(setting: Setting, steps: tuple[int, ...]) -> dict[str, Any]:
        truths, stretch = Data(setting).measured(steps)
        cells = [{**_bounded(setting, n), **truth} for n, truth in zip(steps, truths, strict=True)]
        s = float(PATH(torch.tensor(setting.delta, dtype=torch.float64)).s)
        S = stability(PATH, setting.R, setting.delta)
        return {**asdict(setting), "s": s, "stability": S, **stretch, "cells": cells}

    images = Setting("CIFAR-10", math.sqrt(3072), 3072, 0.01, K=8)
    return {
        "trajectories": TRAJECTORIES,
        "over_steps": [run(setting, STEPS) for setting in SETTINGS],
        "over_delta": [
            run(Setting("over delta", 1.0, 2, delta), (SWEEP_STEPS,)) for delta in DELTAS
        ],
        "images": {**_bounded(images, 50), "stability": stability(PATH, images.R, images.delta)},
    }


def _log(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _number(value: float) -> str:
    """Two digits, or a power of ten from 10,000 on."""
    if value < 100:
        return f"{value:.2g}"
    return f"{value:,.0f}" if value < 1e4 else f"10^{math.log10(value):.1f}"


def _ratio(cell: dict[str, Any]) -> float:
    """The bound in units of the coupling."""
    return float(10 ** cell["sampling"] / cell["coupled"])


def _unstretched(cell: dict[str, Any]) -> float:
    """The sum of the errors of the steps in units of the coupling."""
    return float(10 ** cell["unstretched"] / cell["coupled"])


def render(numbers: dict[str, Any]) -> Rendered:
    """Tables of the bound and the measured distances over N and over delta, of the bound's parts,
    and for CIFAR-10.
    """
    runs = numbers["over_steps"]
    sweep = numbers["over_delta"]
    tables = {
        "over_steps": _steps_table(runs),
        "parts": _parts_table(runs),
        "over_delta": _delta_table(sweep),
        "images": _images_table(numbers["images"]),
    }
    return Rendered(tables, {"truth": _figure(runs, sweep)})


def _steps_table(runs: list[dict[str, Any]]) -> str:
    rows = []
    for run in runs:
        cells = run["cells"]
        fit = power_law_fit([c["steps"] for c in cells], [c["coupled"] for c in cells])
        rows.append([run["name"], *map(_interval, cells), f"{fit.exponent:.2f}"])
    columns = [f"N = {cell['steps']}" for cell in runs[0]["cells"]]
    return table(["setting", *columns, "exponent"], rows)


def _interval(cell: dict[str, Any]) -> str:
    return f"{cell['floor']:.2g} to {cell['coupled']:.2g} < {_number(10 ** cell['sampling'])}"


def _parts_table(runs: list[dict[str, Any]]) -> str:
    """log10 of the bound's parts at the largest N, and the ratios of bound and unstretched errors
    to the coupling.
    """
    rows = []
    for run in runs:
        last = run["cells"][-1]
        name = f"{run['name']}: R = {run['R']:g}, d = {run['d']}, delta = {run['delta']:g}"
        if run["eps_router"]:
            name += f", eps {run['eps_router']:g} and {run['eps_expert']:g}"
        logs = [_log(last[part]) for part in (*PARTS, "sampling", "unstretched")]
        coupling = _log(math.log10(last["coupled"]))
        ratios = [_number(_ratio(last)), _number(_unstretched(last))]
        rows.append([name, *logs, coupling, _log(run["stability"]), *ratios])
    logs_of = [*PARTS, "bound", "unstretched", "coupling", "S"]
    return table(["setting", *logs_of, "bound / coupling", "unstretched / coupling"], rows)


def _delta_table(sweep: list[dict[str, Any]]) -> str:
    rows = []
    for run in sweep:
        cell = run["cells"][0]
        rows.append(
            [
                f"{run['delta']:g}",
                f"{run['s']:.2f}",
                f"{cell['coupled']:.2g}",
                _number(10 ** cell["sampling"]),
                _number(_ratio(cell)),
                _number(_unstretched(cell)),
                f"{10 ** cell['trivial']:.2g}",
                f"{run['stretch_rms']:.2f}",
                f"{run['stretch_max']:.2f}",
                _number(10 ** run["stability"]),
            ]
        )
    head = [
        "delta",
        "s / R",
        "coupling",
        "bound",
        "bound / coupling",
        "unstretched / coupling",
        "trivial",
        "stretch",
        "largest",
        "S",
    ]
    return table(head, rows)


def _images_table(images: dict[str, Any]) -> str:
    row = [
        f"{images['steps']}",
        f"10^{images['sampling']:.0f}",
        f"10^{images['stability']:,.0f}",
        f"{10 ** images['trivial']:.0f}",
    ]
    return table(["N", "bound", "S", "trivial"], [row])


def _figure(runs: list[dict[str, Any]], sweep: list[dict[str, Any]]) -> Figure:
    """Left, over N, the settings whose bounds fit one scale; right, over delta, at one N."""
    figure, (over_steps, over_delta) = axes(2)
    for run, colour in zip(runs[:3], ("#009E73", "#0072B2", "#D55E00"), strict=True):
        n = [c["steps"] for c in run["cells"]]
        over_steps.plot(
            n,
            [c["coupled"] for c in run["cells"]],
            "o-",
            color=colour,
            markersize=4,
            label=run["name"],
        )
        over_steps.plot(n, [10 ** c["sampling"] for c in run["cells"]], "--", color=colour)
    over_steps.plot([], [], "o-", color="#555555", markersize=4, label="measured (coupling)")
    over_steps.plot([], [], "--", color="#555555", label="bound")
    over_steps.set(
        xscale="log",
        yscale="log",
        xlabel="steps N",
        ylabel="distance from $x_\\delta$",
        ylim=(0.01, 200),
    )
    over_steps.set_xticks(STEPS, [str(n) for n in STEPS])
    over_steps.legend(loc="upper right", fontsize=8, ncols=2, frameon=False)

    delta, cells = [run["delta"] for run in sweep], [run["cells"][0] for run in sweep]
    for label, values, style, colour in (
        ("bound", [10 ** c["sampling"] for c in cells], "--", "#0072B2"),
        ("trivial bound", [10 ** c["trivial"] for c in cells], ":", "#555555"),
        ("errors as made, unstretched", [10 ** c["unstretched"] for c in cells], "-.", "#56B4E9"),
        ("measured (coupling)", [c["coupled"] for c in cells], "o-", "#0072B2"),
        ("measured (floor of W2)", [c["floor"] for c in cells], "v-", "#999999"),
    ):
        over_delta.plot(delta, values, style, color=colour, markersize=4, label=label)
    over_delta.set(xscale="log", yscale="log", xlabel="end time delta: the data are to the right")
    over_delta.set_xticks(delta, [f"{x:g}" for x in delta])
    over_delta.invert_xaxis()
    over_delta.legend(loc="upper left", fontsize=8, frameon=False)
    over_steps.set_title("R = 1, d = 2, delta = 0.5 (short) and 0.1 (middle)", fontsize=10)
    over_delta.set_title(f"R = 1, d = 2, N = {cells[0]['steps']}", fontsize=10)
    for panel in (over_steps, over_delta):
        panel.minorticks_off()
    figure.tight_layout(w_pad=3)
    return figure
