"""Policies beyond the papers: what was tried at one expert call a step, what won, and what did not."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lab.markdown import Page, axes, legend_below, steps_axis, table
from benchmarks.lab.selection import errors_of, fitted, law
from benchmarks.lab.testbeds import Bed, cifar10, mixture
from ddm.grids import time_grid
from ddm.measures import sliced_w2
from ddm.samplers import sample
from router.policies import Balanced
from router.routing import RoutedDenoiser

CALLS = (10, 25, 50, 100)

log = logging.getLogger(__name__)


class Weighted(Balanced):
    """`balanced` whose credit counts a step by its weight, and is kept from one step to the next by a factor."""

    def __init__(self, bed: Bed, times: Tensor, kind: str) -> None:
        c = bed.schedule(times[:-1])
        c_next = bed.schedule(times[1:])
        one = torch.ones(len(times) - 1)
        rho = (c_next.a / c_next.s.clamp_min(1e-2)).log() - (c.a / c.s).log()
        self.weight, self.kept = {
            "share of x": (c_next.a - c.a * c_next.s / c.s, c_next.s / c.s),
            "log SNR": (rho / rho.mean(), one),
            "forgetting": (one, 0.9 * one),
        }[kind]
        self.step = 0

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        weight, kept = float(self.weight[self.step]), float(self.kept[self.step])
        self.step += 1
        credit = kept * state + weight * alpha
        chosen = torch.zeros_like(alpha, dtype=torch.bool).scatter_(
            1, credit.argmax(dim=1, keepdim=True), True
        )
        return chosen, credit - weight * chosen


class Remembering(RoutedDenoiser):
    """One expert a step, and for each of the others what it said at its last call less what its stand-in said then.

    That rest counts less the longer ago it was, by the ratio of a/s then and now; without Gaussians the stand-in is the
    cluster's mean.
    """

    def __init__(self, bed: Bed, gaussian: bool) -> None:
        super().__init__(bed.experts, bed.router("balanced"), seed=3)
        self.bed, self.gaussian = bed, gaussian
        self.rest: Tensor | None = None
        self.rho = torch.full((len(bed.noise), len(bed.experts)), 1e-9)

    def _mix(self, x: Tensor, t: Tensor, alpha: Tensor, chosen: Tensor) -> Tensor:
        c, rows, k = self.bed.schedule(t), torch.arange(len(x)), chosen.int().argmax(dim=1)
        stand_ins = (
            self.bed.stand_ins(x, t)
            if self.gaussian
            else self.bed.means.expand(len(x), *self.bed.means.shape)
        )
        self.rest = torch.zeros_like(stand_ins) if self.rest is None else self.rest
        faded = (self.rho / float(c.a / c.s)).reshape(
            *self.rho.shape, *[1] * (x.ndim - 1)
        ) * self.rest
        guesses, said = stand_ins + faded, super()._mix(x, t, alpha, chosen)
        self.rest[rows, k], self.rho[rows, k] = said - stand_ins[rows, k], float(c.a / c.s)
        mean = (alpha.reshape(*alpha.shape, *[1] * (x.ndim - 1)) * guesses).sum(dim=1)
        return said + mean - guesses[rows, k]


def where_alpha_moves(bed: Bed, steps: int) -> Tensor:
    """A grid with half its steps even in t, and half where alpha of the mixture's own paths moves."""
    fine = time_grid("uniform_t", 200, bed.schedule)
    seen: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(bed.alpha(x, t))
        return bed.full(x, t)

    sample(denoise, bed.noise, bed.schedule, steps=200)
    moved = torch.stack(seen).diff(dim=0).abs().sum(dim=2).mean(dim=1).double()
    density = torch.cat([moved / moved.sum(), moved.new_zeros(1)]) + 1 / len(fine)
    mass = torch.cat([density.new_zeros(1), density.cumsum(0) / density.sum()])
    wanted = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    right = torch.searchsorted(mass, wanted).clamp(1, len(fine) - 1)
    share = (wanted - mass[right - 1]) / (mass[right] - mass[right - 1])
    times = fine[right - 1] + share * (fine[right] - fine[right - 1])
    times[0], times[-1] = 1, 0
    return times


def _weighted(kind: str) -> Callable[[Bed, int], Tensor]:
    return lambda bed, n: bed.trajectory(
        n, Weighted(bed, time_grid("uniform_t", n, bed.schedule), kind)
    )[0]


def _alpha_grid(bed: Bed, n: int) -> Tensor:
    return bed.trajectory(n, "balanced", grid=where_alpha_moves(bed, n))[0]


def _remembering(gaussian: bool) -> Callable[[Bed, int], Tensor]:
    return lambda bed, n: sample(Remembering(bed, gaussian), bed.noise, bed.schedule, steps=n)


TRIED: dict[str, tuple[Callable[[Bed, int], Tensor], str]] = {
    "full, K calls a step": (lambda bed, n: bed.trajectory(n, "full")[0], "#009E73"),
    "stochastic": (lambda bed, n: bed.trajectory(n, "stochastic")[0], "#56B4E9"),
    "balanced": (lambda bed, n: bed.trajectory(n, "balanced")[0], "#D55E00"),
    "balanced, control_variate=gaussian": (
        lambda bed, n: bed.trajectory(n, "balanced", control_variate=True)[0],
        "#E69F00",
    ),
    "balanced, last words": (_remembering(False), "#CC79A7"),
    "balanced, Gaussians and last words": (_remembering(True), "#0072B2"),
    "stochastic, control_variate=gaussian": (
        lambda bed, n: bed.trajectory(n, "stochastic", control_variate=True)[0],
        "",
    ),
    "adaptive, 1.5 calls a step": (
        lambda bed, n: bed.trajectory(round(n / 1.5), "adaptive")[0],
        "#882255",
    ),
    "balanced, credit by share of x": (_weighted("share of x"), ""),
    "balanced, credit by log SNR": (_weighted("log SNR"), ""),
    "balanced, credit that forgets": (_weighted("forgetting"), ""),
    "balanced, steps where alpha moves": (_alpha_grid, ""),
    "balanced, even in log SNR": (
        lambda bed, n: bed.trajectory(n, "balanced", grid="uniform_log_snr")[0],
        "",
    ),
}
ON_IMAGES = tuple(TRIED)[:8]


def measure() -> dict[str, Any]:
    """E of everything that was tried; on CIFAR-10 of what was worth it, where `DDM_DATA` (default `data`) holds it."""
    found = []
    for bed in (mixture(4, 8, 3.0), mixture(4, 8, 3.0, components=3)):
        assert bed.draw is not None
        truths = [bed.draw(seed) for seed in range(5)]
        found.append(_rows(bed, tuple(TRIED), bed.reference(), truths))
    root = Path(os.environ.get("DDM_DATA", "data"))
    if (root / "cifar-10-batches-py").is_dir():
        bed = cifar10(root)
        reference = sample(bed.full, bed.noise, bed.schedule, "ddim", 500)
        found.append(_rows(bed, ON_IMAGES, reference, [reference]))
    else:
        log.info("policies: no CIFAR-10 in %s (DDM_DATA), only mixtures are measured", root)
    return {"calls": list(CALLS), "beds": found}


def _rows(
    bed: Bed, names: tuple[str, ...], reference: Tensor, truths: list[Tensor]
) -> dict[str, Any]:
    rows = []
    for name in names:
        ends = [TRIED[name][0](bed, n) for n in CALLS]
        errors = torch.stack([errors_of(end, reference) for end in ends])
        distance = [sum(sliced_w2(end, truth) for truth in truths) / len(truths) for end in ends]
        rows.append(
            {
                "tried": name,
                "error": errors.mean(dim=1).tolist(),
                "sliced_w2": distance,
                "fit": fitted(list(CALLS), errors),
            }
        )
    return {"bed": bed.name, "rows": rows}


def page(numbers: dict[str, Any]) -> Page:
    """A table a bed, what is kept, and a plot."""
    calls = numbers["calls"]
    text = [
        """# Policies beyond the papers

What can be better than `balanced` at one expert call a step? E is the mean square distance to the end of the mixture's own path;
columns are NFE per image (`full` alone takes K times as many); DDIM. On CIFAR-10 an expert is the exact softmax average
of its cluster's images, nothing is trained, and the path is the mixture's of 500 DDIM steps.
`DDM_DATA=data python -m benchmarks.lab policies` makes this page.

- **control_variate=gaussian**: a Gaussian a cluster (mean, and variances in the cosine basis) says what each expert not
asked would say.
- **last words**: instead of it, or besides it, what an expert said at its last call, fading as the noise falls.
- **adaptive**: a second expert where alpha is undecided, fewer steps.
- **credit by ...**: the credit counts a step by how much of x it replaces, or by its share of log SNR, or forgets a tenth a step.
- **steps where alpha moves**: half the grid's steps go where alpha of the mixture's paths changes.
"""
    ]
    figure, plots = axes(len(numbers["beds"]), height=3.6)
    for plot, bed in zip(plots, numbers["beds"], strict=True):
        head = ["tried", *(f"E at {n}" for n in calls), "p of N^-p", "sliced W2 at 25"]
        body = [
            [
                r["tried"],
                *(f"{e:.2g}" for e in r["error"]),
                law(r["fit"]),
                f"{r['sliced_w2'][1]:.3f}",
            ]
            for r in bed["rows"]
        ]
        text.append(f"## {bed['bed']}\n\n{table(head, body)}\n")
        for row in bed["rows"]:
            colour = TRIED[row["tried"]][1]
            if colour:
                plot.plot(
                    calls,
                    row["error"],
                    "o-",
                    color=colour,
                    markersize=3.5,
                    linewidth=1.2,
                    label=row["tried"],
                )
        plot.set_xscale("log")
        plot.set_yscale("log")
        plot.set_title(bed["bed"], fontsize=9)
        steps_axis(plot, calls, "NFE per image")
    plots[0].set_ylabel("E, mean square distance")
    legend_below(figure, plots[0], columns=4)
    text.append("![E over calls](policies-e.png)\n")
    text.append(_verdict(numbers))
    return Page("\n".join(text), {"e": figure})


def _verdict(numbers: dict[str, Any]) -> str:
    body = []
    for name in TRIED:
        cells = []
        for bed in numbers["beds"]:
            rows = {row["tried"]: torch.tensor(row["error"]).log() for row in bed["rows"]}
            gain = (rows["balanced"] - rows[name])[:3].mean().exp() if name in rows else None
            cells.append("" if gain is None else f"{float(gain):.2f}")
        body.append([name, *cells])
    return f"""## Times closer than `balanced`, 10 to 50 calls

{table(["tried", *(bed["bed"] for bed in numbers["beds"])], body)}

Geometric mean over 10, 25 and 50 calls; above 1 is better than `balanced`. A path ends on another image or cluster or it does
not, so few paths make most of E: the intervals above are wide, and on CIFAR-10 factors below 1.3 mean little.

**Kept**: `control_variate=gaussian`, the default. Over these calls it is better than `balanced` on every bed, if not in
every cell; it is
exact where clusters are Gaussian, costs no call and remembers nothing; on trained digits it halves E at 10 and 25 steps
([results](../results/digits.md)). `adaptive` is kept for a number of steps that is given: on mixtures its calls are better spent
on more steps of `balanced`, on the finite sets of CIFAR-10 they are not.

**Not kept**: last words beside the Gaussians, which on all that is not Gaussian is the best of all at 25 and 50 calls, but
needs K images of memory for every path, which a server would have to carry along; it is the first to come back to. Last
words alone; a credit that weighs steps or forgets; grids even in log SNR for DDIM, or by where alpha moves, which helps
on one mixture and not on the other, and has to be measured for each router.
"""
