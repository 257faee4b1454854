"""Sampler history: what the earlier denoised images of a multistep sampler are worth when the
expert changes between steps.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.lab.markdown import Rendered, axes, legend_below, steps_axis, table
from benchmarks.lab.selection import exponent_fit, shown_fit, square_errors
from benchmarks.lab.testbeds import Testbed, mixture
from ddm.samplers import Trajectory, drive, plan_steps
from router.routing import RoutedDenoiser

STEPS = (8, 16, 32, 64, 128)
POLICIES = ("full", "balanced", "stochastic")


class History(NamedTuple):
    """A sampler, its order, whether the control variate corrects its denoised images, and the
    colour of its curve.
    """

    sampler: str
    order: int
    control_variate: bool
    colour: str


HISTORIES = {
    "ddim": History("ddim", 3, False, "#000000"),
    "2M, raw history": History("dpmpp_2m", 3, False, "#D55E00"),
    "2M, restarted": History("restarted", 3, False, "#CC79A7"),
    "2M, control variate": History("dpmpp_2m", 3, True, "#E69F00"),
    "UniPC-2, raw history": History("unipc", 2, False, "#56B4E9"),
    "UniPC-3, raw history": History("unipc", 3, False, "#0072B2"),
    "UniPC-3, control variate": History("unipc", 3, True, "#009E73"),
    "accelerated ODE, half the steps": History("accelerated_ode", 3, False, "#999999"),
}
COMPARED = ("ddim", "2M, raw history", "2M, control variate")  # with a restart


def restarted(testbed: Testbed, steps: int, policy: str) -> Tensor:
    """The ends of DPM-Solver++(2M) with the history discarded (a DDIM step) for each image whose
    expert has changed.
    """
    routed = RoutedDenoiser(testbed.experts, testbed.router(policy), seed=3, trace=True)
    _, times = plan_steps("dpmpp_2m", steps, "uniform_t", testbed.schedule)

    def trajectory(x: Tensor) -> Trajectory:
        last: tuple[Tensor, Tensor] | None = None
        for t, t_next in pairwise(times):
            c = testbed.schedule(t)
            c_next = testbed.schedule(t_next)
            denoised = yield x, t
            log_snr = (c.a / c.s).log()
            middle = denoised
            if last is not None and c_next.s > 0:
                last_denoised, last_log_snr = last
                same = (routed.steps[-1].chosen == routed.steps[-2].chosen).all(dim=1)[:, None]
                ahead = (c_next.a / c_next.s).log() - log_snr
                ratio = ahead / (2 * (log_snr - last_log_snr))
                extrapolated = denoised + ratio * (denoised - last_denoised)
                middle = torch.where(same, extrapolated, denoised)
            x = c_next.a * middle + c_next.s / c.s * (x - c.a * middle)
            last = (denoised, log_snr)
        return x

    return drive(trajectory(testbed.noise), routed)[0]


def _ends(testbed: Testbed, history: History, nfe: int, policy: str) -> Tensor:
    if history.sampler == "restarted":
        return restarted(testbed, nfe, policy)
    calls_per_step = 2 if history.sampler == "accelerated_ode" else 1
    ends, _ = testbed.trajectory(
        nfe // calls_per_step,
        policy,
        sampler=history.sampler,
        order=history.order,
        control_variate=history.control_variate,
    )
    return ends


def measure() -> dict[str, Any]:
    """E(N) of every history, for the full mixture and for two policies with one expert per step."""
    rows = []
    for testbed in (mixture(4, 8, 1.0, paths=600), mixture(4, 8, 3.0, components=3, paths=600)):
        reference = testbed.reference()
        for policy in POLICIES:
            for name, history in HISTORIES.items():
                ends = [_ends(testbed, history, nfe, policy) for nfe in STEPS]
                errors = torch.stack([square_errors(end, reference) for end in ends])
                rows.append(
                    {
                        "testbed": testbed.name,
                        "policy": policy,
                        "history": name,
                        "error": errors.mean(dim=1).tolist(),
                        "fit": exponent_fit(list(STEPS), errors),
                    }
                )
    return {"nfe": list(STEPS), "rows": rows}


def render(numbers: dict[str, Any]) -> Rendered:
    """A table for each mixture and policy, the ratios to a restart, and a plot of the first
    mixture.
    """
    rows = numbers["rows"]
    testbeds = list(dict.fromkeys(row["testbed"] for row in rows))
    tables = {}
    for i, testbed in enumerate(testbeds):
        for policy in POLICIES:
            of_policy = _rows_of(rows, testbed, policy)
            tables[f"testbed_{i}_{policy}"] = _errors_table(policy, numbers["nfe"], of_policy)
    tables["ratios"] = _ratios(rows, testbeds)
    return Rendered(tables, {"e": _plot(rows, testbeds[0], numbers["nfe"])})


def _rows_of(rows: list[dict[str, Any]], testbed: str, policy: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["testbed"], row["policy"]) == (testbed, policy)]


def _errors_table(policy: str, nfe: list[int], rows: list[dict[str, Any]]) -> str:
    body = []
    for row in rows:
        errors = [f"{error:.2g}" for error in row["error"]]
        body.append([row["history"], *errors, shown_fit(row["fit"])])
    return table([policy, *(f"E at {n}" for n in nfe), "p of N^-p"], body)


def _ratios(rows: list[dict[str, Any]], testbeds: list[str]) -> str:
    """E as a multiple of that of 2M restarted: the geometric mean over the step counts."""
    body = []
    for testbed in testbeds:
        for policy in ("balanced", "stochastic"):
            of_policy = _rows_of(rows, testbed, policy)
            logs = {row["history"]: torch.tensor(row["error"]).log() for row in of_policy}
            restart = logs["2M, restarted"]
            ratios = [float((logs[name] - restart).mean().exp()) for name in COMPARED]
            body.append([testbed, policy, *(f"{ratio:.2g}" for ratio in ratios)])
    return table(["mixture", "policy", *COMPARED], body)


def _plot(rows: list[dict[str, Any]], testbed: str, nfe: list[int]) -> Figure:
    figure, plots = axes(3, height=3.6)
    for plot, policy in zip(plots, POLICIES, strict=True):
        _panel(plot, policy, _rows_of(rows, testbed, policy), nfe)
    plots[0].set_ylabel("E, mean square distance")
    legend_below(figure, plots[0], columns=4)
    return figure


def _panel(plot: Axes, policy: str, rows: list[dict[str, Any]], nfe: list[int]) -> None:
    for row in rows:
        colour = HISTORIES[row["history"]].colour
        style: dict[str, Any] = {"markersize": 3.5, "linewidth": 1.2, "color": colour}
        plot.plot(nfe, row["error"], "o-", label=row["history"], **style)
    plot.set(xscale="log", yscale="log")
    plot.set_title(policy, fontsize=10)
    steps_axis(plot, nfe, "NFE per image")
