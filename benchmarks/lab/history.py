"""History: what the past answers of a sampler that looks back mean when the expert changes between steps."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.lab.markdown import Page, axes, legend_below, steps_axis, table
from benchmarks.lab.selection import errors_of, fitted, law
from benchmarks.lab.testbeds import Bed, mixture
from ddm.samplers import Trajectory, drive, plan_steps
from router.routing import RoutedDenoiser

STEPS = (8, 16, 32, 64, 128)
WAYS = {  # a way: the sampler, its order, whether the history is an estimate of the mixture, the colour
    "ddim": ("ddim", 3, False, "#000000"),
    "2M, raw history": ("dpmpp_2m", 3, False, "#D55E00"),
    "2M, restarted": ("restarted", 3, False, "#CC79A7"),
    "2M, the mixture's estimate": ("dpmpp_2m", 3, True, "#E69F00"),
    "UniPC-2, raw history": ("unipc", 2, False, "#56B4E9"),
    "UniPC-3, raw history": ("unipc", 3, False, "#0072B2"),
    "UniPC-3, the mixture's estimate": ("unipc", 3, True, "#009E73"),
    "accelerated ODE, half the steps": ("accelerated_ode", 3, False, "#999999"),
}


def restarted(bed: Bed, steps: int, policy: str) -> Tensor:
    """DPM-Solver++(2M) whose history begins anew, with a step of DDIM's, for each image whose expert has changed."""
    routed = RoutedDenoiser(bed.experts, bed.router(policy), seed=3, trace=True)
    _, times = plan_steps("dpmpp_2m", steps, "uniform_t", bed.schedule)

    def trajectory(x: Tensor) -> Trajectory:
        last: tuple[Tensor, Tensor] | None = None
        for t, t_next in pairwise(times):
            c, c_next = bed.schedule(t), bed.schedule(t_next)
            denoised, here, middle = (yield x, t), (c.a / c.s).log(), None
            if last is not None and c_next.s > 0:
                same = (routed.steps[-1].chosen == routed.steps[-2].chosen).all(dim=1)[:, None]
                ratio = ((c_next.a / c_next.s).log() - here) / (2 * (here - last[1]))
                middle = torch.where(same, denoised + ratio * (denoised - last[0]), denoised)
            middle = denoised if middle is None else middle
            x, last = c_next.a * middle + c_next.s / c.s * (x - c.a * middle), (denoised, here)
        return x

    return drive(trajectory(bed.noise), routed)[0]


def measure() -> dict[str, Any]:
    """E(N) of every way, for the full mixture and for two rules of one expert a step."""
    rows = []
    beds = [mixture(4, 8, 1.0, paths=600), mixture(4, 8, 3.0, components=3, paths=600)]
    for bed in beds:
        reference = bed.reference()
        for policy in ("full", "balanced", "stochastic"):
            for way, (sampler, order, control_variate, _) in WAYS.items():
                if sampler == "restarted":
                    ends = [restarted(bed, n, policy) for n in STEPS]
                else:
                    half = 2 if sampler == "accelerated_ode" else 1
                    ends = [
                        bed.trajectory(
                            n // half,
                            policy,
                            sampler=sampler,
                            order=order,
                            control_variate=control_variate,
                        )[0]
                        for n in STEPS
                    ]
                errors = torch.stack([errors_of(end, reference) for end in ends])
                row = {
                    "bed": bed.name,
                    "policy": policy,
                    "way": way,
                    "error": errors.mean(dim=1).tolist(),
                }
                rows.append(row | {"fit": fitted(list(STEPS), errors)})
    return {"calls": list(STEPS), "rows": rows}


def page(numbers: dict[str, Any]) -> Page:
    """A table a mixture and policy, and a plot of the first mixture."""
    calls, rows = numbers["calls"], numbers["rows"]
    beds = list(dict.fromkeys(row["bed"] for row in rows))
    text = [
        """# History: samplers that look back, when the expert changes between steps

2M and UniPC pass a polynomial through their last answers. When one expert answers a step, those answers come from different
experts. Three meanings of history were measured: **raw**, the answers as they came; **restarted**, where an image whose
expert has changed takes a step of DDIM's; **the mixture's estimate**, where every answer is first corrected by the Gaussians
that stand in for the experts not asked (`control_variate=gaussian`). E is the mean square distance to the end of the full
mixture's
own path; one call a step, so columns are calls and steps alike; the accelerated ODE sampler, which asks the same expert
twice a step and remembers nothing between steps, takes half as many. vp_linear, uniform in t; intervals are 95 %. On the first
mixture the clusters are Gaussian, so the estimate is exact; on the second they are not. `full` asks all four experts.
`python -m benchmarks.lab history` makes this page.
"""
    ]
    for bed in beds:
        for policy in ("full", "balanced", "stochastic"):
            mine = [row for row in rows if row["bed"] == bed and row["policy"] == policy]
            head = [f"{policy}", *(f"E at {n}" for n in calls), "p of N^-p"]
            body = [
                [row["way"], *(f"{e:.2g}" for e in row["error"]), law(row["fit"])] for row in mine
            ]
            text.append(f"## {bed}: {policy}\n\n{table(head, body)}\n")
    text.append("![E over calls](history-e.png)\n")
    text.append(_verdict(rows, beds))
    figure, plots = axes(3, height=3.6)
    for plot, policy in zip(plots, ("full", "balanced", "stochastic"), strict=True):
        for row in rows:
            if row["bed"] == beds[0] and row["policy"] == policy:
                plot.plot(
                    calls,
                    row["error"],
                    "o-",
                    markersize=3.5,
                    linewidth=1.2,
                    color=WAYS[row["way"]][3],
                    label=row["way"],
                )
        plot.set_xscale("log")
        plot.set_yscale("log")
        plot.set_title(policy, fontsize=10)
        steps_axis(plot, calls, "NFE per image")
    plots[0].set_ylabel("E, mean square distance")
    legend_below(figure, plots[0], columns=4)
    return Page("\n".join(text), {"e": figure})


def _verdict(rows: list[dict[str, Any]], beds: list[str]) -> str:
    """How many times closer than restarting each meaning is, by the geometric mean over the step counts."""
    body = []
    for bed in beds:
        for policy in ("balanced", "stochastic"):
            mine = {
                row["way"]: torch.tensor(row["error"]).log()
                for row in rows
                if row["bed"] == bed and row["policy"] == policy
            }
            base = mine["2M, restarted"]
            ways = ("ddim", "2M, raw history", "2M, the mixture's estimate")
            body.append(
                [bed, policy, *(f"{float((mine[way] - base).mean().exp()):.2g}" for way in ways)]
            )
    return f"""## What is kept

E as a share of that of 2M restarted (geometric mean over the columns): below 1 is better than restarting.

{table(["mixture", "policy", "ddim", "raw", "the mixture's estimate"], body)}

Samplers keep **raw** history: they know nothing of experts, and need not. Where `control_variate=gaussian`, the default,
the answers are
the mixture's estimate already, and history with them. The reason that raw history does no harm: a multistep sampler's result is
a sum of answers with weights that change little from step to step, so the noise of the choices cancels in it as in DDIM's.
"""
