"""Densities: the law of a sampler's samples on one-dimensional mixtures, which are not log-concave,
by quadrature.

With p the density of x_t and q that of the sampler's Y, everything is represented as `log q/p`: p
is known, and the quotient stays smooth and near 1 however narrow p and the step's noise become.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.interpolate import CubicSpline
from scipy.special import ndtr, ndtri
from torch import Tensor

from benchmarks.lab.laws import (
    METHODS,
    Law,
    Tabled,
    Walker,
    affine,
    exact_denoiser,
    kl,
    local_slopes,
    walker,
)
from benchmarks.lab.markdown import Rendered, axes, legend_below, steps_axis, table
from ddm.grids import time_grid
from ddm.oracle import GaussianMixture
from ddm.samplers import Denoiser, drive
from ddm.schedules import Schedule, TwoPhase

Density = Callable[[Tensor], Tensor]  # x -> log p(x)
REACH = 9.0  # how far the grid reaches beyond the outer bumps, in standard deviations
FINENESS = 10  # grid points per standard deviation
_HERMITE = np.polynomial.hermite_e.hermegauss(20)
NODES = torch.from_numpy(_HERMITE[0])
WEIGHTS = torch.from_numpy(_HERMITE[1] / _HERMITE[1].sum())


def bumps(std: float, schedule: Schedule) -> GaussianMixture:
    """Three bumps of unequal weight; how well they are separated depends on `std`."""
    means = torch.tensor([[-1.2], [0.1], [1.1]], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.45, 0.25], dtype=torch.float64)
    return GaussianMixture(weights, means, torch.full_like(means, std), schedule)


def _components(data: GaussianMixture, t: Tensor, extra: float = 0.0) -> tuple[Tensor, Tensor]:
    """Means and standard deviations `[K]` of x_t, plus independent noise of variance `extra`."""
    c = data.schedule(t)
    return c.a * data.means[:, 0], ((c.a * data.stds[:, 0]) ** 2 + c.s**2 + extra).sqrt()


def log_density(data: GaussianMixture, t: Tensor, extra: float = 0.0) -> Density:
    """`log p` of x_t, plus independent noise of variance `extra`."""
    means, stds = _components(data, t, extra)

    def log_p(x: Tensor) -> Tensor:
        z = (x[..., None] - means) / stds
        unnormalized = (data.weights.log() - stds.log() - z**2 / 2).logsumexp(-1)
        return unnormalized - math.log(2 * math.pi) / 2

    return log_p


def support(data: GaussianMixture, t: Tensor) -> Tensor:
    """An even grid over the support of p, fine relative to its narrowest bump."""
    means, stds = _components(data, t)
    low = float((means - REACH * stds).min())
    high = float((means + REACH * stds).max())
    points = math.ceil((high - low) / float(stds.min()) * FINENESS)
    return torch.linspace(low, high, points, dtype=torch.float64)


def denoised(data: GaussianMixture, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """`D = E[x0 | x_t = x]` and its derivative `dD/dx`, for x `[B]`."""
    c = data.schedule(t)
    means, stds = _components(data, t)
    off = (x[:, None] - means) / stds**2
    gain = c.a * data.stds[:, 0] ** 2
    alpha = (data.weights.log() - stds.log() - off**2 * stds**2 / 2).softmax(dim=1)
    D_k = data.means[:, 0] + gain * off
    D = (alpha * D_k).sum(dim=1)
    mean_off = (alpha * off).sum(dim=1, keepdim=True)
    return D, (alpha * (gain / stds**2 - D_k * (off - mean_off))).sum(dim=1)


def score(data: GaussianMixture, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """`d log p/dx`, and `s^2` times its derivative: `a dD/dx - 1`."""
    c = data.schedule(t)
    D, slope = denoised(data, x, t)
    return (c.a * D - x) / c.s**2, c.a * slope - 1


def _integral(integrand: Tensor, x: Tensor) -> float:
    return float(CubicSpline(x.numpy(), integrand.numpy()).integrate(float(x[0]), float(x[-1])))


def kl_of(log_p: Tensor, log_r: Tensor, x: Tensor) -> float:
    """`KL(p | q) = int q - p - p log q/p` from `log p` and `log q/p` at rising points x."""
    p = log_p.exp()
    near = log_r.clamp_max(1)
    series = log_r**2 / 2 + log_r**3 / 6 + log_r**4 / 24 + log_r**5 / 120
    small = torch.where(log_r.abs() < 0.01, series, torch.expm1(near) - near)  # q/p - 1 - log q/p
    large = (log_p + log_r).exp() - p - p * log_r
    return _integral(torch.where(log_r < 1, p * small, large), x)


def _log_quadrature(log_r: CubicSpline, p: Density, y: Tensor, log_weight: Tensor) -> Tensor:
    """`log` of the sum over the Gauss-Hermite nodes (the last axis) of q/p(y) p(y) e^log_weight."""
    inside = y.numpy().clip(log_r.x[0], log_r.x[-1])
    return (
        (torch.from_numpy(log_r(inside)) + p(y) + log_weight + WEIGHTS.log())
        .logsumexp(-1)
        .clamp(-600, 600)
    )


def evolved(name: str, data: GaussianMixture, times: Tensor) -> tuple[Tensor, Tensor]:
    """A grid over x at the last time, and `log q/p` on it, for `ddpm as proven` or
    `accelerated_sde` started from N(0, 1).

    A step maps Y to `M(Y) + b Z`; both come from the sampler itself, which is driven with and
    without noise. With `y = centre + width z`, z at the Gauss-Hermite nodes, and N(y) the density
    of that proposal,

        q'/p'(y') = int q/p(y) p(y) N(y'; M(y), b^2) / p'(y') dy
                  = E_z [ q/p(y) p(y) N(y'; M(y), b^2) / (p'(y') N(y)) ]

    and the proposal, which is nearly the law of Y given Y', makes all but the first factor nearly
    constant. The accelerated sampler also adds noise before the denoiser: one more step, from x_t
    to x_t plus noise, whose density is a mixture too.
    """
    trajectory = walker(name)
    first = times[0]
    y = support(data, first)
    log_r = -(y**2) / 2 - math.log(2 * math.pi) / 2 - log_density(data, first)(y)
    for n in range(len(times) - 1):
        t, t_next = times[n], times[n + 1]
        p, p_next, y_next = log_density(data, t), log_density(data, t_next), support(data, t_next)
        r, spline = (
            data.schedule(t).a / data.schedule(t_next).a,
            CubicSpline(y.numpy(), log_r.numpy()),
        )
        before, after = _noise_of_step(trajectory, data, times[n : n + 2])
        centre, width = r * y_next, r * after
        if before > 0:
            p_noisy, noisy = (
                log_density(data, t, before**2),
                (y + before**2 * score(data, y, t)[0])[:, None] + before * NODES,
            )
            weight = (NODES**2 - ((noisy - y[:, None]) / before) ** 2) / 2
            log_r = _log_quadrature(spline, p, noisy, weight - p_noisy(y)[:, None])
            p, spline = p_noisy, CubicSpline(y.numpy(), log_r.numpy())
            centre = centre - before**2 * score(data, centre, t)[0]
        points = centre[:, None] + width * NODES
        evaluated = points.reshape(-1, 1)
        mean, _ = drive(
            trajectory(evaluated, data.schedule, times[n : n + 2], lambda _: torch.zeros(())),
            _oracle(data),
        )
        off = (y_next[:, None] - mean.reshape(points.shape)) / after
        log_r = _log_quadrature(
            spline, p, points, (NODES**2 - off**2) / 2 + r.log() - p_next(y_next)[:, None]
        )
        y = y_next
    return y, log_r


def _oracle(data: GaussianMixture) -> Denoiser:
    """The exact denoiser for x `[B, 1]`, or for x and its derivative `[B, 2]`.

    A sampler is linear in x and in the denoised images. So if the denoised second column is dD/dx
    times that column, the column remains the derivative of the first with respect to the start.
    """

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        D, slope = denoised(data, x[:, 0], t)
        return torch.stack([D, slope * x[:, 1]], dim=1) if x.shape[1] == 2 else D[:, None]

    return denoise


def _noise_of_step(trajectory: Walker, data: GaussianMixture, step: Tensor) -> tuple[float, float]:
    """The standard deviation of the noise that a step adds before the denoiser, and after it."""
    zero, evaluated = torch.zeros(1, 1, dtype=torch.float64), []

    def answer(x: Tensor, t: Tensor) -> Tensor:
        evaluated.append(float(x))
        return torch.zeros_like(x)

    drive(trajectory(zero, data.schedule, step, lambda n: torch.ones(()) * (n == 0)), answer)
    last = drive(
        trajectory(
            zero, data.schedule, step, lambda n: torch.ones(()) * (n == 1 or evaluated[-1] == 0)
        ),
        answer,
    )[0]
    return evaluated[0], float(last)


def pushed(
    trajectory: Walker, data: GaussianMixture, times: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Rising points over x's support at the last time, and log q/p there, for a deterministic
    sampler started from N(0, 1).

    In one dimension the exact flow preserves the distribution function, so `start = Phi^-1(F(y))`
    ends near y. Between bumps the starts are very close and the sampler separates them: gaps
    between ends are filled until they are small or hold no probability. The density is that of the
    start over the derivative of the map. None if the map is not monotone.
    """
    y, p = support(data, times[-1]), log_density(data, times[-1])
    means, stds = _components(data, times[-1])
    z = (y[:, None] - means) / stds
    below, above = ((data.weights.numpy() * ndtr(side.numpy())).sum(axis=1) for side in (z, -z))
    new = torch.from_numpy(np.where(below < above, ndtri(below), -ndtri(above)))
    start, end, slope = torch.empty(3, 0, dtype=torch.float64)
    for _ in range(12):
        x = torch.stack([new, torch.ones_like(new)], dim=1)
        moved = drive(
            trajectory(x, data.schedule, times, lambda _: torch.zeros(())), _oracle(data)
        )[0]
        start, order = torch.cat([start, new]).sort()
        end, slope = torch.cat([end, moved[:, 0]])[order], torch.cat([slope, moved[:, 1]])[order]
        if bool((slope <= 0).any()):
            return None
        # Only where starts differ:
        rising = torch.cat([torch.ones(1, dtype=torch.bool), end[1:] > end.cummax(0).values[:-1]])
        start, end, slope = start[rising], end[rising], slope[rising]
        wide = (end.diff() > 1.5 * stds.min() / FINENESS) & (
            torch.maximum(p(end[1:]), p(end[:-1])) > math.log(1e-10)
        )
        parts = torch.linspace(0, 1, 34, dtype=torch.float64)[1:-1]
        new = (start[:-1][wide, None] + start.diff()[wide, None] * parts).flatten()
        if len(new) == 0:
            break
    return end, -(start**2) / 2 - math.log(2 * math.pi) / 2 - slope.log() - p(end)


SAMPLERS = {  # and their normal variables per step
    "ddpm as proven": 1,
    "accelerated_sde": 2,
    "ddim": 0,
    "accelerated_ode": 0,
    "dpmpp_2m": 0,
}
STEPS = (100, 200, 400, 800, 1600)
WIDE = 0.5  # the standard deviations measured over T
NARROW = 0.1
STDS = (0.5, 0.2, 0.1, 0.05, 0.03)
TOLERANCE = 0.1  # a cell whose total mass is off by more than this fraction of its KL is not shown


def law_of(name: str, data: GaussianMixture, times: Tensor) -> tuple[float, float] | None:
    """KL(X | Y) at the last time, and the error of the total mass of q, which is 0 in exact
    arithmetic.
    """
    stochastic = SAMPLERS[name] > 0
    found = evolved(name, data, times) if stochastic else pushed(walker(name), data, times)
    if found is None:
        return None
    x, log_r = found
    log_p = log_density(data, times[-1])(x)
    return kl_of(log_p, log_r, x), _integral((log_p + log_r).exp(), x) - 1


def smoothness(data: GaussianMixture, times: Tensor) -> dict[str, float]:
    """`s^2 |d score/dx|` over the times: its supremum over x, and the least L that x_t exceeds with
    probability 1/T at most.
    """
    supremum = 0.0
    relaxed = 0.0
    for t in times[:: max(1, len(times) // 100)]:
        x = support(data, t)
        slope, order = score(data, x, t)[1].abs().sort(descending=True)
        mass = log_density(data, t)(x).exp() * (x[1] - x[0])
        exceeded = mass[order].cumsum(0) <= 1 / len(times)
        supremum = max(supremum, float(slope[0]))
        relaxed = max(relaxed, float(slope[int(exceeded.sum())]))
    return {"supremum": supremum, "relaxed": relaxed}


def _setting(std: float, T: int) -> tuple[GaussianMixture, Tensor]:
    schedule = TwoPhase(T)
    times = time_grid("own", T, schedule, t_min=1 / T)
    return bumps(std, Tabled(schedule, times)), times


def check(std: float, T: int) -> list[dict[str, Any]]:
    """KL on one Gaussian, by this module and from the exact law."""
    data, times = _setting(std, T)
    one = torch.ones(1, dtype=torch.float64)
    law = Law(0.7 * one, std**2 * one)
    single = GaussianMixture(one, law.mean[:, None], std * one[:, None], data.schedule)
    rows = []
    for name, draws in SAMPLERS.items():
        affine_map = affine(
            walker(name),
            exact_denoiser(law, data.schedule),
            data.schedule,
            times,
            draws,
            1,
        )
        exact = float(kl(law.at(data.schedule(times[-1])), affine_map(Law(0 * one, one))))
        found = law_of(name, single, times)
        assert found is not None
        rows.append({"sampler": name, "std": std, "T": T, "exact": exact, "kl": found[0]})
    return rows


def measure(
    steps: Sequence[int] = STEPS,
    stds: Sequence[float] = STDS,
    samplers: Sequence[str] = tuple(SAMPLERS),
    checked: int = 200,
) -> dict[str, Any]:
    """KL over T for wide and narrow bumps; KL and smoothness over the bumps' width; and the check
    on one Gaussian.
    """
    settings = [*product([WIDE], steps), *product([NARROW], steps[:-1])]
    over_steps = [
        {"std": std, "T": T, "sampler": name, **_cell(name, std, T)}
        for (std, T), name in product(settings, samplers)
    ]
    middle = steps[len(steps) // 2]
    over_std = []
    for std in stds:
        data, times = _setting(std, middle)
        # For bumps this narrow accelerated_sde would need more nodes than the others.
        found = {name: _cell(name, std, middle) for name in samplers if name != "accelerated_sde"}
        over_std.append({"std": std, "T": middle, "L": smoothness(data, times), "cells": found})
    checks = [row for std in (WIDE, min(stds)) for row in check(std, checked)]
    return {"over_steps": over_steps, "over_std": over_std, "checks": checks}


def _cell(name: str, std: float, T: int) -> dict[str, float | None]:
    found = law_of(name, *_setting(std, T))
    if found is None or abs(found[1]) > TOLERANCE * found[0]:
        return {"kl": None, "defect": None if found is None else found[1]}
    return {"kl": found[0], "defect": found[1]}


def render(numbers: Mapping[str, Any]) -> Rendered:
    """Tables of the slopes over T, of the smoothness constant over the bumps' width, and of the
    check on one Gaussian.
    """
    names = list(dict.fromkeys(cell["sampler"] for cell in numbers["over_steps"]))
    shown = [name for name in names if name in numbers["over_std"][0]["cells"]]
    steps = sorted({cell["T"] for cell in numbers["over_steps"]})
    tables = {
        "over_steps": _steps_table(numbers["over_steps"], steps, names),
        "over_std": _std_table(numbers["over_std"], shown),
        "check": _check_table(numbers["checks"], names),
    }
    figures = {
        "steps": _over_steps(numbers["over_steps"], steps, names),
        "smoothness": _over_std(numbers["over_std"], shown),
    }
    return Rendered(tables, figures)


def _steps_table(
    cells: Sequence[Mapping[str, Any]], steps: Sequence[int], names: Sequence[str]
) -> str:
    rows = []
    for name in names:
        row = [f"`{name}`"]
        for std in (WIDE, NARROW):
            by_steps = {cell["T"]: cell["kl"] for cell in _shown_cells(cells, name, std)}
            last = sorted(by_steps)[-2:]
            slope = local_slopes(last, [by_steps[T] for T in last])[0]
            row += [f"{by_steps[last[-1]]:.2g}", f"{slope:.2f}"]
        rows.append(row)
    wide = f"std {WIDE:g}: KL, T = {steps[-1]}"
    narrow = f"std {NARROW:g}: KL, T = {steps[-2]}"
    return table(("sampler", wide, "slope", narrow, "slope"), rows)


def _shown_cells(
    cells: Sequence[Mapping[str, Any]], name: str, std: float
) -> list[Mapping[str, Any]]:
    """The cells of a sampler and width whose KL could be computed."""
    of_sampler = [cell for cell in cells if (cell["sampler"], cell["std"]) == (name, std)]
    return [cell for cell in of_sampler if cell["kl"] is not None]


def _std_table(over_std: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    rows = []
    for row in over_std:
        constants = [f"{row['L'][key]:.3g}" for key in ("supremum", "relaxed")]
        values = [row["cells"][name]["kl"] for name in names]
        shown = ["not invertible" if kl is None else f"{kl:.3g}" for kl in values]
        rows.append([f"{row['std']:g}", *constants, *shown])
    head = ("std", "L, supremum", "L, relaxed", *(f"KL of `{name}`" for name in names))
    return table(head, rows)


def _check_table(checks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The largest relative error of KL on one Gaussian, for each sampler."""
    worst = []
    for name in names:
        of_sampler = [row for row in checks if row["sampler"] == name]
        worst.append(max(abs(row["kl"] / row["exact"] - 1) for row in of_sampler))
    return table(
        ["", *(f"`{name}`" for name in names)], [["relative error", *(f"{x:.0e}" for x in worst)]]
    )


def _over_steps(
    cells: Sequence[Mapping[str, Any]], steps: Sequence[int], names: Sequence[str]
) -> Figure:
    figure, plots = axes(3, height=3.9)
    for axis, std in zip(plots[1:], (WIDE, NARROW), strict=True):
        for name in names:
            by_steps = _shown_cells(cells, name, std)
            values = [cell["kl"] for cell in by_steps]
            style: dict[str, Any] = {"color": METHODS[name].colour, "markersize": 4}
            axis.plot([cell["T"] for cell in by_steps], values, "o-", label=name, **style)
        axis.set(xscale="log", yscale="log", ylabel="KL(X | Y)", title=f"bumps of std {std:g}")
        axis.title.set_fontsize(10)
        steps_axis(axis, steps)
    x = torch.linspace(-2.8, 2.8, 1000, dtype=torch.float64)
    start = torch.zeros((), dtype=torch.float64)
    for std, colour in ((WIDE, "#56B4E9"), (NARROW, "#000000")):
        density = log_density(bumps(std, TwoPhase()), start)(x).exp()
        plots[0].plot(x, density, color=colour, label=f"std {std:g}")
    plots[0].set(xlabel="x", ylabel="density", title="the data")
    plots[0].title.set_fontsize(10)
    plots[0].legend(fontsize=9, frameon=False)
    legend_below(figure, plots[1], 5)
    return figure


def _over_std(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    figure, (left, right) = axes(2, height=4.0)
    stds = [row["std"] for row in rows]
    for key, colour in (("supremum", "#999999"), ("relaxed", "#D55E00")):
        left.plot(stds, [row["L"][key] ** 2 for row in rows], "o-", color=colour, markersize=4)
        place: dict[str, Any] = {"xytext": (-12, 0), "textcoords": "offset points", "ha": "right"}
        left.annotate(key, (stds[-1], rows[-1]["L"][key] ** 2), color=colour, **place)
    for name in names:
        shown = [row for row in rows if row["cells"][name]["kl"] is not None]
        values = [row["cells"][name]["kl"] for row in shown]
        style: dict[str, Any] = {"color": METHODS[name].colour, "markersize": 4}
        right.plot([row["std"] for row in shown], values, "o-", label=name, **style)
    for axis, label in ((left, "L$^2$"), (right, f"KL(X | Y), T = {rows[0]['T']}")):
        axis.set(xscale="log", yscale="log", ylabel=label)
        steps_axis(axis, stds, "std of the bumps (narrower to the right)")
        axis.invert_xaxis()
    legend_below(figure, right, 5)
    return figure
