"""Score errors: how far a known error of the score, the posterior or the experts moves the law of
the samples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from torch import Tensor

from benchmarks.lab.laws import (
    METHODS,
    Law,
    Tabled,
    affine,
    exact_denoiser,
    gaussian,
    kl,
    w2_square,
)
from benchmarks.lab.markdown import Rendered, axes, legend_below, steps_axis, table
from ddm.grids import time_grid
from ddm.measures import power_law_fit
from ddm.oracle import GaussianMixture
from ddm.samplers import Denoiser, sample
from ddm.schedules import Schedule, TwoPhase, schedule
from router.routing import RoutedDenoiser
from router.step import Router

SAMPLERS = ("ddpm as proven", "ddim", "accelerated_ode", "accelerated_sde")
KINDS = ("shift", "slope")
EPS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DIMENSIONS = (1, 16, 256)

POLICIES = {"full": "#009E73", "balanced": "#D55E00", "stochastic": "#0072B2"}
ROUTED_EPS = {"posterior": (0.03, 0.08, 0.2, 0.5), "experts": (0.03, 0.1, 0.3, 1.0)}
ROUTED_STEPS = (20, 60, 180)
DELTA = 0.02
LINEAR_UP_TO = 0.1  # eps


def erring(data: Law, path: Schedule, shift: Tensor, slope: Tensor) -> Denoiser:
    """The exact denoiser with an error of the score: `shift_i + slope_i (x_i - a m_i)/std` in
    coordinate i, at every t.
    """
    exact = exact_denoiser(data, path)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        c = path(t)
        law = data.at(c)
        return exact(x, t) + c.s**2 / c.a * (shift + slope * (x - law.mean) / law.variance.sqrt())

    return denoise


def gaussian_errors(
    T: int, eps: Sequence[float], dimensions: Sequence[int]
) -> list[dict[str, Any]]:
    """KL and W2 of samplers with a score error on the Gaussian of `laws`: to the truth, and to the
    sampler without error.

    Coordinates are independent, so every d, kind and eps is a block of the coordinates of one run;
    the first eps is 0.
    """
    path = TwoPhase(T)
    times = time_grid("own", T, path, t_min=1 / T)
    blocks = list(product(dimensions, KINDS, (0.0, *eps)))
    gaussians = [gaussian(d, seed=0) for d, _, _ in blocks]
    means = torch.cat([law.mean for law in gaussians])
    data = Law(means, torch.cat([law.variance for law in gaussians]))
    shift = torch.cat([_error(d, e if kind == "shift" else 0.0) for d, kind, e in blocks])
    slope = torch.cat([_error(d, e if kind == "slope" else 0.0) for d, kind, e in blocks])
    tabled = Tabled(path, times)
    true = data.at(tabled(times[-1]))
    start = Law(torch.zeros_like(means), torch.ones_like(means))
    cells = []
    for name in SAMPLERS:
        method = METHODS[name]
        law = affine(
            method.trajectory,
            erring(data, tabled, shift, slope),
            tabled,
            times,
            method.draws,
            len(data.mean),
        )(start)
        sizes = [d for d, _, _ in blocks]
        parts = _split(law, sizes)
        truths = _split(true, sizes)
        for first in range(0, len(blocks), len(eps) + 1):
            runs = slice(first + 1, first + 1 + len(eps))
            exact = parts[first]
            cells.append(
                {
                    "sampler": name,
                    "d": blocks[first][0],
                    "kind": blocks[first][1],
                    "floor": _distances(truths[first], exact),
                    "to_truth": [
                        _distances(t, p) for t, p in zip(truths[runs], parts[runs], strict=True)
                    ],
                    "moved": [_distances(exact, p) for p in parts[runs]],
                }
            )
    return cells


def _error(d: int, eps: float) -> Tensor:
    """An error of norm eps, the same in all d coordinates."""
    return torch.full((d,), eps / math.sqrt(d), dtype=torch.float64)


def _split(law: Law, sizes: Sequence[int]) -> list[Law]:
    means = law.mean.split(list(sizes))
    variances = law.variance.split(list(sizes))
    return [Law(mean, variance) for mean, variance in zip(means, variances, strict=True)]


def _distances(p: Law, q: Law) -> dict[str, float]:
    return {"kl": float(kl(p, q).sum()), "w2": float(w2_square(p, q).sum().sqrt())}


def quartet(path: Schedule, d: int = 8) -> GaussianMixture:
    """Four Gaussians of unequal weight in d dimensions, float64."""
    generator = torch.Generator().manual_seed(0)
    means = 0.8 * torch.randn(4, d, generator=generator, dtype=torch.float64)
    stds = 0.5 + 0.3 * torch.rand(4, d, generator=generator, dtype=torch.float64)
    return GaussianMixture(
        torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), means, stds, path
    )


def routed_errors(
    steps: Sequence[int], eps: Mapping[str, Sequence[float]], paths: int, policies: Sequence[str]
) -> list[dict[str, Any]]:
    """Root mean square distance, over the trajectories, between the routed Euler sampler and the
    exact flow at t = delta.

    Both start from the same noise. posterior: alpha is mixed with the uniform distribution,
    `|alphahat - alpha| <= eps`. experts: each has an error of norm eps in a direction of its own.
    """
    oracle = quartet(schedule("vp_linear"))
    K, d = oracle.means.shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(paths, d, generator=generator, dtype=torch.float64)
    off = torch.nn.functional.normalize(
        torch.randn(K, d, generator=generator, dtype=torch.float64), dim=1
    )
    exact = sample(oracle.denoise, x, oracle.schedule, "heun", 300, "uniform_log_snr", t_min=DELTA)

    def distance(policy: str, n: int, of_posterior: float, of_experts: float) -> float:
        share = of_posterior / math.sqrt(1 - 1 / K)

        def alpha(x: Tensor, t: Tensor) -> Tensor:
            return (1 - share) * oracle.posterior(x, t) + share / K

        experts = [_shifted(oracle.expert(k), of_experts * off[k]) for k in range(K)]
        router = Router.of(alpha, policy, oracle.weights)
        routed = RoutedDenoiser(experts, router, seed=n)
        y = sample(routed, x, oracle.schedule, "euler", n, "uniform_t", t_min=DELTA)
        return float((y - exact).square().sum(dim=1).mean().sqrt())

    cells = []
    for policy in policies:
        for n in steps:
            floor = distance(policy, n, 0, 0)
            for kind, values in eps.items():
                of_posterior = kind == "posterior"
                found = [
                    distance(policy, n, e if of_posterior else 0, 0 if of_posterior else e)
                    for e in values
                ]
                cell = {"policy": policy, "N": n, "kind": kind, "eps": list(values)}
                cells.append({**cell, "floor": floor, "error": found})
    return cells


def _shifted(
    expert: Callable[[Tensor, Tensor], Tensor], by: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: expert(x, t) + by


def measure(
    T: int = 400,
    eps: Sequence[float] = EPS,
    dimensions: Sequence[int] = DIMENSIONS,
    routed_steps: Sequence[int] = ROUTED_STEPS,
    paths: int = 300,
    policies: Sequence[str] = tuple(POLICIES),
) -> dict[str, Any]:
    """Exact laws on Gaussians, and trajectories on a mixture."""
    return {
        "T": T,
        "eps": list(eps),
        "gaussian": gaussian_errors(T, eps, dimensions),
        "delta": DELTA,
        "paths": paths,
        "routed": routed_errors(routed_steps, ROUTED_EPS, paths, policies),
    }


class Quadrature(NamedTuple):
    """`E(eps) = sqrt(floor^2 + (C eps)^2)`: C fitted in log E, and the largest ratio of a
    measurement to the fit.
    """

    C: float
    worst: float


def quadrature_fit(eps: Sequence[float], errors: Sequence[float], floor: float) -> Quadrature:
    """Least squares in log E over C alone."""
    e = torch.tensor(eps, dtype=torch.float64)
    measured = torch.tensor(errors, dtype=torch.float64)

    def rest(log_C: float) -> Tensor:
        return (floor**2 + (math.exp(log_C) * e) ** 2).sqrt().log() - measured.log()

    found = minimize_scalar(
        lambda log_C: float(rest(log_C).square().sum()), bounds=(-12, 12), method="bounded"
    )
    return Quadrature(math.exp(found.x), float(rest(found.x).abs().max().exp()))


def render(numbers: Mapping[str, Any]) -> Rendered:
    """Tables of the constants and powers of the errors, on Gaussians and for the routed sampler."""
    tables = {
        "gaussian": _gaussian_table(numbers["gaussian"], numbers["eps"]),
        "routed": _routed_table(numbers["routed"]),
    }
    return Rendered(tables, {"gaussian": _gaussian(numbers), "routed": _routed(numbers)})


def _gaussian_table(cells: Sequence[Mapping[str, Any]], eps: Sequence[float]) -> str:
    dimensions = sorted({cell["d"] for cell in cells})
    rows = []
    for name, kind in product(SAMPLERS, KINDS):
        of_sampler = [cell for cell in cells if (cell["sampler"], cell["kind"]) == (name, kind)]
        by_d = {cell["d"]: cell for cell in of_sampler}
        largest = by_d[dimensions[-1]]
        kl_constants = _constants(by_d, eps, "kl")
        w2_constants = _constants(by_d, eps, "w2")
        row = [f"`{name}`", kind]
        for key, constants in (("kl", kl_constants), ("w2", w2_constants)):
            row += [f"{C:.2f}" for C in constants]
            row += [f"{_eps_power(largest, eps, key):.2f}", _d_power(dimensions, constants)]
        eps_at_floor = _linear(largest["floor"], "kl") / kl_constants[-1]
        rows.append([*row, f"{eps_at_floor:.2g}"])
    head = [
        "sampler",
        "error",
        *(f"C of sqrt(KL/2), d = {d}" for d in dimensions),
        "power of eps",
        "of d",
        *(f"C of W2, d = {d}" for d in dimensions),
        "power of eps",
        "of d",
        f"eps at the floor, d = {dimensions[-1]}",
    ]
    return table(head, rows)


def _constants(
    by_d: Mapping[int, Mapping[str, Any]], eps: Sequence[float], key: str
) -> list[float]:
    """C at each d: the distance that the smallest error causes, divided by eps."""
    return [_linear(by_d[d]["moved"][0], key) / eps[0] for d in sorted(by_d)]


def _eps_power(cell: Mapping[str, Any], eps: Sequence[float], key: str) -> float:
    """The power of eps in the distance that an error causes, fitted up to eps = LINEAR_UP_TO."""
    small = [e for e in eps if e <= LINEAR_UP_TO]
    moved = [_linear(distances, key) for distances in cell["moved"][: len(small)]]
    return -power_law_fit(small, moved).exponent


def _d_power(dimensions: Sequence[int], constants: Sequence[float]) -> str:
    if len(dimensions) == 1:
        return "-"
    return f"{-power_law_fit(dimensions, constants).exponent:.2f}"


def _routed_table(cells: Sequence[Mapping[str, Any]]) -> str:
    steps = sorted({cell["N"] for cell in cells})
    rows = []
    for policy in dict.fromkeys(cell["policy"] for cell in cells):
        of_policy = [cell for cell in cells if cell["policy"] == policy]
        floors = [next(cell["floor"] for cell in of_policy if cell["N"] == n) for n in steps]
        exponent = f"{power_law_fit(steps, floors).exponent:.2f}" if len(steps) > 1 else "-"
        row = [f"`{policy}`", *(f"{floor:.3f}" for floor in floors), exponent]
        for kind in ROUTED_EPS:
            of_kind = [cell for cell in of_policy if cell["kind"] == kind]
            fits = [quadrature_fit(c["eps"], c["error"], c["floor"]) for c in of_kind]
            row.append(", ".join(f"{fit.C:.2f}" for fit in fits))
            row.append(f"{max(fit.worst for fit in fits):.2f}")
        rows.append(row)
    head = [
        "policy",
        *(f"floor, N = {n}" for n in steps),
        "exponent of 1/N",
        "C of the posterior",
        "largest ratio to the fit",
        "C of the experts",
        "largest ratio to the fit",
    ]
    return table(head, rows)


def _linear(distances: Mapping[str, float], key: str) -> float:
    """A distance that is linear in eps: sqrt(KL/2), or W2."""
    return math.sqrt(distances["kl"] / 2) if key == "kl" else distances["w2"]


def _gaussian(numbers: Mapping[str, Any]) -> Figure:
    figure, plots = axes(3, height=4.0)
    largest = max(cell["d"] for cell in numbers["gaussian"])
    eps = numbers["eps"]
    for axis, (kind, key) in zip(
        plots, (("shift", "kl"), ("slope", "kl"), ("shift", "w2")), strict=True
    ):
        for cell in numbers["gaussian"]:
            if cell["kind"] == kind and cell["d"] == largest:
                colour = METHODS[cell["sampler"]].colour
                values = [_linear(distances, key) for distances in cell["to_truth"]]
                axis.plot(eps, values, "o-", color=colour, label=cell["sampler"], markersize=3.5)
        if key == "kl":
            axis.plot(
                eps,
                [math.sqrt(largest) * e for e in eps],
                ":",
                color="#777777",
                label="sqrt(d) eps",
            )
        axis.plot(eps, eps, "--", color="#777777", linewidth=1, label="eps")
        axis.set(
            xscale="log",
            yscale="log",
            ylabel="sqrt(KL/2) to the truth" if key == "kl" else "W2 to the truth",
        )
        axis.set_xlabel("eps of the score")
        axis.set_title(f"{kind}, d = {largest}", fontsize=10)
    legend_below(figure, plots[0], 6)
    return figure


def _routed(numbers: Mapping[str, Any]) -> Figure:
    figure, plots = axes(2, height=4.2)
    cells = numbers["routed"]
    steps = sorted({cell["N"] for cell in cells})
    for axis, kind in zip(plots, ROUTED_EPS, strict=True):
        for cell in (c for c in cells if c["kind"] == kind):
            fit = quadrature_fit(cell["eps"], cell["error"], cell["floor"])
            width = 1 + steps.index(cell["N"]) * 0.7
            colour = POLICIES[cell["policy"]]
            low = cell["eps"][0] / 2
            high = cell["eps"][-1]
            line = [low * (high / low) ** (i / 50) for i in range(51)]
            fitted = [math.hypot(cell["floor"], fit.C * e) for e in line]
            axis.plot(line, fitted, color=colour, linewidth=width, alpha=0.55)
            axis.plot(cell["eps"], cell["error"], "o", color=colour, markersize=4)
        axis.set(xscale="log", yscale="log", ylabel="distance to the exact path")
        axis.set_title(
            {"posterior": "error of the posterior", "experts": "error of the experts"}[kind],
            fontsize=10,
        )
        steps_axis(axis, ROUTED_EPS[kind], "eps")
    for policy in dict.fromkeys(cell["policy"] for cell in cells):
        plots[0].plot([], [], "o-", color=POLICIES[policy], label=policy)
    for i, n in enumerate(steps):
        plots[0].plot([], [], color="#777777", linewidth=1 + i * 0.7, label=f"N = {n}")
    legend_below(figure, plots[0], 6)
    return figure
