"""Score errors: how far a controlled error of the score, of the posterior or of the experts moves the law of what is drawn."""

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
from benchmarks.lab.markdown import Page, axes, legend_below, steps_axis, table
from ddm.grids import time_grid
from ddm.measures import power_law_fit
from ddm.oracle import GaussianMixture
from ddm.samplers import Denoiser, sample
from ddm.schedules import Schedule, TwoPhase, schedule
from router.routing import RoutedDenoiser, Router

SAMPLERS = ("ddpm as proven", "ddim", "accelerated_ode", "accelerated_sde")
KINDS = ("shift", "slope")
EPS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DIMENSIONS = (1, 16, 256)

POLICIES = {"full": "#009E73", "balanced": "#D55E00", "stochastic": "#0072B2"}
ROUTED_EPS = {"posterior": (0.03, 0.08, 0.2, 0.5), "experts": (0.03, 0.1, 0.3, 1.0)}
ROUTED_STEPS = (20, 60, 180)
DELTA = 0.02


def erring(data: Law, path: Schedule, shift: Tensor, slope: Tensor) -> Denoiser:
    """The exact denoiser with its score off, at every t and in coordinate i, by `shift_i + slope_i (x_i - a m_i)/std` of x_t."""
    exact = exact_denoiser(data, path)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        c = path(t)
        law = data.at(c)
        return exact(x, t) + c.s**2 / c.a * (shift + slope * (x - law.mean) / law.variance.sqrt())

    return denoise


def gaussian_errors(
    T: int, eps: Sequence[float], dimensions: Sequence[int]
) -> list[dict[str, Any]]:
    """KL and W2 of the erring samplers on the Gaussian of `laws`, to the truth and to what the sampler draws without the error.

    Coordinates go their own ways, so every d, kind and eps is a block of the coordinates of one walk; the first eps is 0.
    """
    path = TwoPhase(T)
    times = time_grid("own", T, path, t_min=1 / T)
    blocks = [(d, kind, e) for d in dimensions for kind in KINDS for e in (0.0, *eps)]
    data = Law(
        *(
            torch.cat(parts)
            for parts in zip(*(gaussian(d, seed=0) for d, _, _ in blocks), strict=True)
        )
    )
    shift, slope = (
        torch.cat(
            [
                torch.full((d,), e * (kind == wanted) / math.sqrt(d), dtype=torch.float64)
                for d, kind, e in blocks
            ]
        )
        for wanted in KINDS
    )
    tabled, cells = Tabled(path, times), []
    true, start = (
        data.at(tabled(times[-1])),
        Law(torch.zeros_like(data.mean), torch.ones_like(data.mean)),
    )
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
        parts = [
            Law(*pair)
            for pair in zip(law.mean.split(sizes), law.variance.split(sizes), strict=True)
        ]
        truths = [
            Law(*pair)
            for pair in zip(true.mean.split(sizes), true.variance.split(sizes), strict=True)
        ]
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
    """Root mean square distance, over the paths, of the routed Euler sampler to the exact flow from the same noise at t = delta.

    posterior: alpha is mixed with the uniform one, `|alphahat - alpha| <= eps`. experts: each off by eps, each its own way.
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
                found = [
                    distance(policy, n, *((e, 0) if kind == "posterior" else (0, e)))
                    for e in values
                ]
                cells.append(
                    {
                        "policy": policy,
                        "N": n,
                        "kind": kind,
                        "eps": list(values),
                        "floor": floor,
                        "error": found,
                    }
                )
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
    """Both halves: exact laws on Gaussians, paths on a mixture."""
    return {
        "T": T,
        "eps": list(eps),
        "gaussian": gaussian_errors(T, eps, dimensions),
        "delta": DELTA,
        "paths": paths,
        "routed": routed_errors(routed_steps, ROUTED_EPS, paths, policies),
    }


class Quadrature(NamedTuple):
    """`E(eps) = sqrt(floor^2 + (C eps)^2)` with the floor measured at eps = 0, C fitted in log E, and the largest ratio off."""

    C: float
    worst: float


def quadrature_fit(eps: Sequence[float], errors: Sequence[float], floor: float) -> Quadrature:
    """Least squares in log E over C alone."""
    e, measured = torch.tensor(eps, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)

    def rest(log_C: float) -> Tensor:
        return (floor**2 + (math.exp(log_C) * e) ** 2).sqrt().log() - measured.log()

    found = minimize_scalar(
        lambda log_C: float(rest(log_C).square().sum()), bounds=(-12, 12), method="bounded"
    )
    return Quadrature(math.exp(found.x), float(rest(found.x).abs().max().exp()))


def page(numbers: Mapping[str, Any]) -> Page:
    """Powers and constants of the errors' own terms, beside the theorems' linear ones."""
    eps, cells = numbers["eps"], numbers["gaussian"]
    dimensions, rows = sorted({cell["d"] for cell in cells}), []
    small = [i for i, e in enumerate(eps) if e <= 0.1]
    for name, kind in product(SAMPLERS, KINDS):
        cfg = {c["d"]: c for c in cells if c["sampler"] == name and c["kind"] == kind}
        row = [f"`{name}`", kind]
        for key in ("kl", "w2"):
            moved = {d: [_linear(cfg[d]["moved"][i], key) for i in small] for d in dimensions}
            C = [moved[d][0] / eps[0] for d in dimensions]
            power = -power_law_fit([eps[i] for i in small], moved[dimensions[-1]]).exponent
            row += [*(f"{value:.2f}" for value in C), f"{power:.2f}"]
            row += (
                [f"{-power_law_fit(dimensions, C).exponent:.2f}"] if len(dimensions) > 1 else ["-"]
            )
        rows.append(
            [
                *row,
                f"{_linear(cfg[dimensions[-1]]['floor'], 'kl') / float(row[1 + len(dimensions)]):.2g}",
            ]
        )
    at_d = [f"d = {d}" for d in dimensions]
    head = ("sampler", "error", *(f"C of sqrt(KL/2), {d}" for d in at_d), "power of eps", "of d")
    head += (
        *(f"C of W2, {d}" for d in at_d),
        "power of eps",
        "of d",
        f"eps at the floor, {at_d[-1]}",
    )
    routed, routed_rows = numbers["routed"], []
    steps = sorted({cell["N"] for cell in routed})
    for policy in dict.fromkeys(cell["policy"] for cell in routed):
        own_cells = [cell for cell in routed if cell["policy"] == policy]
        floors = [next(c["floor"] for c in own_cells if c["N"] == n) for n in steps]
        falls = f"{power_law_fit(steps, floors).exponent:.2f}" if len(steps) > 1 else "-"
        row = [f"`{policy}`", *(f"{floor:.3f}" for floor in floors), falls]
        for kind in ROUTED_EPS:
            fits = [
                quadrature_fit(c["eps"], c["error"], c["floor"])
                for c in own_cells
                if c["kind"] == kind
            ]
            row += [
                ", ".join(f"{fit.C:.2f}" for fit in fits),
                f"{max(fit.worst for fit in fits):.2f}",
            ]
        routed_rows.append(row)
    routed_head = ("policy", *(f"floor, N = {n}" for n in steps), "falls as 1/N to")
    routed_head += ("C of the posterior", "off by at most", "C of the experts", "off by at most")
    text = f"""
# Score errors

## On Gaussians, exactly

arXiv 2408.02320 allows DDIM an error of the score: its TV grows by at most sqrt(d) eps_score + d eps_Jacobi, times logarithms.
Here the score of a Gaussian ([that of the exact laws](laws.md)) is off by e with E|e|^2 = eps^2 at every t: by a constant
`shift`, or by a `slope`, in proportion to `(x - a m)/std`, which bends the Jacobian too, by eps / sqrt(d) over the standard
deviation of x_t. Both keep the samplers affine, so all laws are exact. T = {numbers["T"]}, the two-phase schedule.

sqrt(KL/2), which is at least TV, stands beside the theorem. C is what the error alone moves, per eps: the distance between what a
sampler draws with it and without it. Powers of eps are fitted up to eps = {eps[small[-1]]:g}. The last column is
the eps that moves the law as far as the exact sampler is from the truth already, in sqrt(KL/2).

{table(head, rows)}

![Distances over the error of the score](errors-gaussian.png)

**Linear in eps**, as the theorem says, for the shift exactly. **Not growing with d**: at a given eps the bound has sqrt(d) for
the shift, and for the slope d times a Jacobian off by eps / sqrt(d), so sqrt(d) again. A product shares eps out among its
coordinates, and pays once. **The SDE samplers forget**: the same error costs the ODE samplers several times more, since a
stochastic step corrects what earlier ones did wrong, and a deterministic one carries it to the end. No acceleration changes C:
it lowers the floor, so the better the sampler, the smaller the eps that it is worth training for. An error of slope can undo
the sampler's own, which is one of spread as well: hence the dip of the ODE samplers in the middle, an accident of its sign.

## On a mixture, routed

The routed theorem (arXiv 2606.15835) has W2 = O(N^-1/2 + eps). Here are four overlapping Gaussians in 8 dimensions with exact
experts and posterior, and the routed Euler sampler on even steps from t = 1 to {numbers["delta"]:g}, against the exact
flow from the same noise: the root mean square distance over {numbers["paths"]} paths, which is at least W2. The
posterior is mixed with the uniform one, |alphahat - alpha| <= eps; each expert is off by eps in a direction of its own. C is
fitted to `sqrt(floor^2 + (C eps)^2)`, floor as measured at eps = 0, for N = {", ".join(map(str, steps))};
"off by at most" is the largest ratio between a measured distance and that law.

{table(routed_head, routed_rows)}

![Distance to the exact path over the error of router and experts](errors-routed.png)

**What is seen.** Both terms of the theorem: a floor that falls with N, and a rise linear in eps; they add as squares, so the
worse of the two is all that matters, and experts better than floor / C are trained in vain. The floor of `stochastic` falls
about as N^-1/2, the theorem's rate; `full` and `balanced` fall as 1/N, for which the theorem is half a power
loose. C settles as N grows, as it must, and is the same for all policies: an error of the router or of an expert costs the
same however the expert is chosen.
"""
    return Page(text, {"gaussian": _gaussian(numbers), "routed": _routed(numbers)})


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
            fit, width = (
                quadrature_fit(cell["eps"], cell["error"], cell["floor"]),
                1 + steps.index(cell["N"]) * 0.7,
            )
            low, high = cell["eps"][0] / 2, cell["eps"][-1]
            line = [low * (high / low) ** (i / 50) for i in range(51)]
            colour = POLICIES[cell["policy"]]
            axis.plot(
                line,
                [math.hypot(cell["floor"], fit.C * e) for e in line],
                color=colour,
                linewidth=width,
                alpha=0.55,
            )
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
