"""The bound and the truth: the theorem of `benchmarks.lab.theory` against measurement, for the routed Euler sampler."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.lab.markdown import Page, axes, table
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


@dataclass(frozen=True)
class Setting:
    """Four clusters of four points each on the sphere of radius R in R^d, walked to delta with these errors put in."""

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
    """The points of a setting, one Gaussian of no width each, and the exact denoisers with the setting's errors."""

    def __init__(self, setting: Setting) -> None:
        self.setting, K, d = setting, setting.K, setting.d
        generator = torch.Generator().manual_seed(0)
        centres = torch.nn.functional.normalize(
            torch.randn(K, 1, d, generator=generator, dtype=torch.float64), dim=2
        )
        points = centres + 0.3 * torch.randn(K, 4, d, generator=generator, dtype=torch.float64)
        self.points = setting.R * torch.nn.functional.normalize(points, dim=2)  # [K, 4, d]
        self.mixture = self._mixture(self.points.flatten(0, 1))

    def _mixture(self, points: Tensor) -> GaussianMixture:
        return GaussianMixture(
            torch.full((len(points),), 1 / len(points)), points, torch.zeros_like(points), PATH
        )

    def alpha(self, x: Tensor, t: Tensor) -> Tensor:
        """The posterior, pulled towards its least likely corner, which is at most sqrt(2) away, by eps_router."""
        alpha = self.mixture.posterior(x, t).unflatten(1, (self.setting.K, -1)).sum(2)
        corner = torch.nn.functional.one_hot(alpha.argmin(1), self.setting.K)
        return alpha + self.setting.eps_router / math.sqrt(2) * (corner - alpha)

    def expert(self, k: int) -> Any:
        """The exact denoiser of cluster k, off by eps_expert, the same way everywhere."""
        exact, off = (
            self._mixture(self.points[k]).denoise,
            self.setting.eps_expert / math.sqrt(self.setting.d),
        )
        return lambda x, t: exact(x, t) + off

    def measured(self, steps: tuple[int, ...]) -> tuple[list[dict[str, float]], dict[str, float]]:
        """For each number of steps, two numbers between which `W2(Y_N, x_delta)` lies, up to sampling; and the flow's stretch.

        coupled: the root mean square of `Y_N - X_delta`, where Y starts from the noise of `X_1 = a x0 + s eps`. floor: sqrt(d)
        times sliced W2, as the mean square of a vector along a random direction is a d-th of its own. Both are distances in R^d.
        stretch_rms, stretch_max: by how much the exact flow parts two neighbours, over the same X_1 and a random direction each.
        """
        setting, generator, near = self.setting, torch.Generator().manual_seed(1), 1e-6
        a, s, _, _ = PATH(torch.tensor(1.0, dtype=torch.float64))
        x0 = self.mixture.means[
            torch.randint(len(self.mixture.means), (TRAJECTORIES,), generator=generator)
        ]
        noise, way = (
            torch.randn(x0.shape, generator=generator, dtype=torch.float64) for _ in range(2)
        )
        first = a * x0 + s * noise
        pairs = torch.cat([first, first + near * torch.nn.functional.normalize(way)])
        ends = sample(
            self.mixture.denoise, pairs, PATH, "heun", 150, "uniform_log_snr", t_min=setting.delta
        )
        exact, broadcast_to = ends.chunk(2)
        stretch = (broadcast_to - exact).norm(dim=1) / near
        experts, root_d, found = (
            [self.expert(k) for k in range(setting.K)],
            math.sqrt(setting.d),
            [],
        )
        for n in steps:
            routed = RoutedDenoiser(experts, self.alpha, "stochastic", seed=n)
            y = sample(routed, s * noise, PATH, "euler", n, "uniform_t", t_min=setting.delta)
            coupled = root_d * math.sqrt(trajectory_error(y, exact))
            found.append({"coupled": coupled, "floor": root_d * sliced_w2(y, exact)})
        return found, {
            "stretch_rms": float(stretch.square().mean().sqrt()),
            "stretch_max": float(stretch.max()),
        }


def _promised(setting: Setting, steps: int) -> dict[str, Any]:
    """The theorem's numbers, log10; and `unstretched`, its errors as the steps make them, without any of the later factors."""
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
    """Bound and truth over N for every setting; over delta at one N; and the bound alone for images."""

    def run(setting: Setting, steps: tuple[int, ...]) -> dict[str, Any]:
        truths, stretch = Data(setting).measured(steps)
        cells = [{**_promised(setting, n), **truth} for n, truth in zip(steps, truths, strict=True)]
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
        "images": {**_promised(images, 50), "stability": stability(PATH, images.R, images.delta)},
    }


TEXT = """
# The bound and the truth

The theorem of `benchmarks.lab.theory` against measurement, for the routed Euler sampler. Data in a ball of radius R in d
dimensions,
in K clusters; N even steps from t = 1 to delta, each by one expert drawn from the router's weights (the policy `stochastic`).
Where the router is within eps_router of the posterior (Euclidean, over its K weights) and the experts within eps_expert of
exact, in root mean square over the sampler's own points,

    W2(Y_N, x_delta) <= initialization + truncation + martingale + approximation
                            S a(1) R       O(1/N)     O(1/sqrt N)    O(eps)
    W2(x_delta, x0)  <= sqrt((1 - a_delta)^2 R^2 + s_delta^2 d)                              the early stop

with every constant explicit; the proof is in the docstrings of `benchmarks/lab/theory.py`. A part adds up the errors that
the steps make,
each times what the later steps may stretch it by. From t = 1 on, that is the stability factor, as N grows:

    S = (s_delta / s_1) exp(R^2/2 (a_delta^2/s_delta^2 - a_1^2/s_1^2))

Measured is the distance from x_delta, in {trajectories} runs with exact denoisers on sixteen points of the sphere of radius R,
four in each of four clusters, under `vp_linear`. The theorem's own coupling is the root mean square distance between the
routed end and the end of the exact flow from the same noise. W2 is at most that, and at least the floor, sqrt(d) times
sliced W2.

![Over the number of steps, and over delta](bound-truth.png)

## Over the number of steps

A cell holds floor to coupling, then the bound.

{steps_table}

The exponent is that of the coupling, fitted over all N. The theorem promises 1/2 as N grows; with errors of router and
experts, a limit that is not 0. {rising}

## Which part is loose

At N = {steps}, as log10. `unstretched` is the sum of the errors as the theorem has the steps make them, without the later
factors.

{parts_table}

{reading}

## How near to the data it says anything

R = 1, d = 2, N = {sweep_steps}. Bounded denoisers alone keep the distance below `trivial`, whoever moves the image. The
stretch is that of the exact flow from t = 1 to delta, of which S is the bound: its root mean square over {trajectories} paths,
and the largest.

{delta_table}

{verdict}
"""


def _log(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _number(value: float) -> str:
    """Two digits, or a power of ten from 10,000 on."""
    return (
        f"{value:.2g}"
        if value < 100
        else f"{value:,.0f}"
        if value < 1e4
        else f"10^{math.log10(value):.1f}"
    )


def _ratio(cell: dict[str, Any]) -> float:
    return float(10 ** cell["sampling"] / cell["coupled"])


def page(numbers: dict[str, Any]) -> Page:
    """The page `bound` from what `measure` returned."""
    runs, sweep = numbers["over_steps"], numbers["over_delta"]
    text = TEXT.format(
        trajectories=f"{numbers['trajectories']:,}",
        steps=runs[0]["cells"][-1]["steps"],
        sweep_steps=sweep[0]["cells"][0]["steps"],
        steps_table=table(
            ["setting", *(f"N = {c['steps']}" for c in runs[0]["cells"]), "exponent"],
            [[run["name"], *map(_interval, run["cells"]), _exponent(run["cells"])] for run in runs],
        ),
        parts_table=table(
            ["setting", *PARTS, "bound", "unstretched", "coupling", "S"],
            [
                [
                    f"{run['name']}: R = {run['R']:g}, d = {run['d']}, delta = {run['delta']:g}"
                    + (
                        f", eps {run['eps_router']:g} and {run['eps_expert']:g}"
                        if run["eps_router"]
                        else ""
                    ),
                    *(_log(run["cells"][-1][part]) for part in (*PARTS, "sampling", "unstretched")),
                    _log(math.log10(run["cells"][-1]["coupled"])),
                    _log(run["stability"]),
                ]
                for run in runs
            ],
        ),
        delta_table=table(
            [
                "delta",
                "s / R",
                "coupling",
                "bound",
                "bound / coupling",
                "trivial",
                "stretch",
                "largest",
                "S",
            ],
            [
                [
                    f"{run['delta']:g}",
                    f"{run['s']:.2f}",
                    f"{c['coupled']:.2g}",
                    _number(10 ** c["sampling"]),
                    _number(_ratio(c)),
                    f"{10 ** c['trivial']:.2g}",
                    f"{run['stretch_rms']:.2f}",
                    f"{run['stretch_max']:.2f}",
                    _number(10 ** run["stability"]),
                ]
                for run in sweep
                for c in run["cells"]
            ],
        ),
        rising=_rising(runs),
        reading=_reading(runs).strip(),
        verdict=_verdict(sweep, numbers["images"]).strip(),
    )
    return Page(text, {"truth": _figure(runs, sweep)})


def _unstretched(run: dict[str, Any]) -> float:
    """The errors as made at the largest N, in units of the coupling."""
    return float(10 ** run["cells"][-1]["unstretched"] / run["cells"][-1]["coupled"])


def _interval(cell: dict[str, Any]) -> str:
    return f"{cell['floor']:.2g} to {cell['coupled']:.2g} < {_number(10 ** cell['sampling'])}"


def _exponent(cells: list[dict[str, Any]]) -> str:
    return (
        f"{power_law_fit([c['steps'] for c in cells], [c['coupled'] for c in cells]).exponent:.2f}"
    )


def _rising(runs: list[dict[str, Any]]) -> str:
    grown = [
        run["name"] for run in runs if run["cells"][-1]["sampling"] > run["cells"][0]["sampling"]
    ]
    if not grown:
        return ""
    return (
        f"Within these N the bound itself rises in {len(grown)} of {len(runs)} settings\n({'; '.join(grown)}): "
        "more steps compound more of the stretch, up to S, before 1/N and 1/sqrt N take over."
    )


def _reading(runs: list[dict[str, Any]]) -> str:
    made = [_unstretched(run) for run in runs]
    (best, tightest), *_, (worst, loosest) = sorted(
        (_ratio(run["cells"][-1]), run["name"]) for run in runs
    )
    return f"""
The bound is {_number(best)} times the coupling at best ({tightest}), {_number(worst)} times at worst ({loosest}).
The errors as made, unstretched, are {min(made):.1f} to {max(made):.1f} times the coupling: the local constants cost a
small factor, and stability all the rest. Beside this, W2 may be a further factor below its coupling, down to the floor: in
distribution much of the draws' noise cancels.
"""


def _verdict(sweep: list[dict[str, Any]], images: dict[str, Any]) -> str:
    told = [run for run in sweep if run["cells"][0]["sampling"] < run["cells"][0]["trivial"]]
    last, nearest = (min(some, key=lambda run: run["s"]) for some in (told, sweep))
    return f"""
The bound says more than `trivial` down to delta = {last["delta"]:g}, where s / R = {last["s"]:.2f}; from there it leaves
the truth as exp(R^2 / 2 s^2). The errors as made grow too, and are {_unstretched(nearest):.0f} times
the coupling at delta = {nearest["delta"]:g}, but the bound is {_number(_ratio(nearest["cells"][0]))} times it. S is not slack
as a bound on the flow: two points at +-R attain it on the path that stays midway between them. But of the
{TRAJECTORIES:,} paths, to {len(sweep)} ends each, none was stretched by more than {max(run["stretch_max"] for run in sweep):.2g}.
The theorem charges every path, at every step, for a place that hardly any path visits.

For images as a whole it says nothing. CIFAR-10's lie in a ball of R = sqrt(3072), and with delta = 0.01 and
{images["steps"]} steps the bound is 10^{images["sampling"]:.0f} (S = 10^{images["stability"]:,.0f}) against
a trivial {10 ** images["trivial"]:.0f}. What the theorem establishes for them is the rate, and which errors add up and which
average out. For a number one would need the stretch of the paths that are taken, not of the worst.
"""


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
    over_delta.set(
        xscale="log", yscale="log", xlabel="end of the walk, delta: the data are to the right"
    )
    over_delta.set_xticks(delta, [f"{x:g}" for x in delta])
    over_delta.invert_xaxis()
    over_delta.legend(loc="upper left", fontsize=8, frameon=False)
    over_steps.set_title("R = 1, d = 2, delta = 0.5 (short) and 0.1 (middle)", fontsize=10)
    over_delta.set_title(f"R = 1, d = 2, N = {cells[0]['steps']}", fontsize=10)
    for panel in (over_steps, over_delta):
        panel.minorticks_off()
    figure.tight_layout(w_pad=3)
    return figure
