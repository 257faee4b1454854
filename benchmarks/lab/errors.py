"""Score errors: how far a controlled error of the score, of the posterior or of the experts moves the law of what is drawn."""

import math
from collections.abc import Callable, Mapping, Sequence
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
    legend_below,
    steps_axis,
    w2_square,
)
from benchmarks.lab.page import Page, axes, table
from ddm.grids import time_grid
from ddm.measures import power_law_fit
from ddm.oracle import GaussianMixture
from ddm.samplers import Denoiser, sample
from ddm.schedules import Schedule, TwoPhase, schedule
from router.routing import RoutedDenoiser

SAMPLERS = ("ddpm", "ddim", "accelerated_ode", "accelerated_sde")
KINDS = ("shift", "slope")
EPS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
DIMENSIONS = (1, 16, 256)

POLICIES = {"full": "#009E73", "balanced": "#D55E00", "stochastic": "#0072B2"}
ROUTED_EPS = {"posterior": (0.02, 0.05, 0.1, 0.2, 0.4), "experts": (0.05, 0.15, 0.4, 1.0, 2.5)}
ROUTED_STEPS = (20, 80, 320)
DELTA = 0.02


def erring(data: Law, path: Schedule, eps: float, kind: str) -> Denoiser:
    """The exact denoiser, its score off by e with `E|e|^2 = eps^2` at every t.

    shift: the same in every direction. slope: in proportion to `(x - a m)/std` of x_t, so the Jacobian is off as well.
    """
    exact = exact_denoiser(data, path)
    size = eps / math.sqrt(len(data.mean))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        c = path(t)
        law = data.at(c)
        e = size if kind == "shift" else size * (x - law.mean) / law.variance.sqrt()
        return exact(x, t) + c.s**2 / c.a * e

    return denoise


def gaussian_errors(T: int, eps: Sequence[float], dimensions: Sequence[int]) -> list[dict[str, Any]]:
    """KL and W2 of the erring samplers on the Gaussian of `laws`, over eps and d; and of the exact ones, their floor."""
    path = TwoPhase(T)
    times = time_grid("own", T, path, t_min=1 / T)
    tabled, cells = Tabled(path, times), []
    for d in dimensions:
        data = gaussian(d, seed=0)
        true, start = data.at(tabled(times[-1])), Law(torch.zeros_like(data.mean), torch.ones_like(data.mean))
        for name in SAMPLERS:
            method = METHODS[name]

            def measured(
                e: float, kind: str, method: Any = method, data: Law = data, true: Law = true, start: Law = start
            ) -> tuple[float, float]:
                denoise = erring(data, tabled, e, kind)
                law = affine(method.walk, denoise, tabled, times, method.draws, len(data.mean))(start)
                return float(kl(true, law).sum()), float(w2_square(true, law).sum().sqrt())

            floor = measured(0.0, "shift")
            for kind in KINDS:
                found = [measured(e, kind) for e in eps]
                cells.append(
                    {
                        "sampler": name,
                        "kind": kind,
                        "d": d,
                        "floor": floor,
                        "kl": [k for k, _ in found],
                        "w2": [w for _, w in found],
                    }
                )
    return cells


def quartet(path: Schedule, d: int = 8) -> GaussianMixture:
    """Four Gaussians of unequal weight in d dimensions, float64."""
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(4, d, generator=generator, dtype=torch.float64)
    stds = 0.3 + 0.5 * torch.rand(4, d, generator=generator, dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), means, stds, path)


def routed_errors(
    steps: Sequence[int], eps: Mapping[str, Sequence[float]], paths: int, policies: Sequence[str]
) -> list[dict[str, Any]]:
    """Root mean square distance, over the paths, of the routed Euler sampler to the exact flow from the same noise at t = delta.

    posterior: alpha is mixed with the uniform one, `|alphahat - alpha| <= eps`. experts: each off by eps in a direction of its own.
    """
    oracle = quartet(schedule("vp_linear"))
    K, d = oracle.means.shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(paths, d, generator=generator, dtype=torch.float64)
    off = torch.nn.functional.normalize(torch.randn(K, d, generator=generator, dtype=torch.float64), dim=1)
    exact = sample(oracle.denoise, x, oracle.schedule, "heun", 300, "uniform_log_snr", t_min=DELTA)

    def distance(policy: str, n: int, of_posterior: float, of_experts: float) -> float:
        share = of_posterior / math.sqrt(1 - 1 / K)

        def alpha(x: Tensor, t: Tensor) -> Tensor:
            return (1 - share) * oracle.posterior(x, t) + share / K

        experts = [_shifted(oracle.expert(k), of_experts * off[k]) for k in range(K)]
        routed = RoutedDenoiser(experts, alpha, policy, seed=n, pi=oracle.weights)
        y = sample(routed, x, oracle.schedule, "euler", n, "uniform_t", t_min=DELTA)
        return float((y - exact).square().sum(dim=1).mean().sqrt())

    cells = []
    for policy in policies:
        for n in steps:
            floor = distance(policy, n, 0, 0)
            for kind, values in eps.items():
                found = [distance(policy, n, *((e, 0) if kind == "posterior" else (0, e))) for e in values]
                cells.append(
                    {"policy": policy, "N": n, "kind": kind, "eps": list(values), "floor": floor, "error": found}
                )
    return cells


def _shifted(expert: Callable[[Tensor, Tensor], Tensor], by: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: expert(x, t) + by


def measure(
    T: int = 400,
    eps: Sequence[float] = EPS,
    dimensions: Sequence[int] = DIMENSIONS,
    routed_steps: Sequence[int] = ROUTED_STEPS,
    paths: int = 400,
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

    found = minimize_scalar(lambda log_C: float(rest(log_C).square().sum()), bounds=(-12, 12), method="bounded")
    return Quadrature(math.exp(found.x), float(rest(found.x).abs().max().exp()))


def page(numbers: Mapping[str, Any]) -> Page:
    """Powers and constants of the errors' own terms, beside the theorems' linear ones."""
    eps, cells = numbers["eps"], numbers["gaussian"]
    dimensions = sorted({cell["d"] for cell in cells})
    rows = []
    for name in SAMPLERS:
        for kind in KINDS:
            own = {c["d"]: c for c in cells if c["sampler"] == name and c["kind"] == kind}
            C = {d: _constants(eps, own[d]) for d in dimensions}
            of_d = (
                -power_law_fit(dimensions, [C[d][0] for d in dimensions]).exponent if len(dimensions) > 1 else math.nan
            )
            rows.append(
                [f"`{name}`", kind, *(f"{C[d][0]:.2f}" for d in dimensions), f"{of_d:.2f}"]
                + [f"{C[dimensions[-1]][2]:.2f}", f"{C[dimensions[-1]][1]:.2f}", f"{C[dimensions[-1]][3]:.2f}"]
            )
    head = (
        "sampler",
        "error",
        *(f"C, d = {d}" for d in dimensions),
        "power of d",
        "power of eps",
        "C of W2",
        "its power of eps",
    )
    routed, routed_rows = numbers["routed"], []
    steps = sorted({cell["N"] for cell in routed})
    for policy in dict.fromkeys(cell["policy"] for cell in routed):
        own = [cell for cell in routed if cell["policy"] == policy]
        floors = [next(c["floor"] for c in own if c["N"] == n) for n in steps]
        falls = power_law_fit(steps, floors).exponent
        row = [f"`{policy}`", *(f"{floor:.3f}" for floor in floors), f"{falls:.2f}"]
        for kind in ROUTED_EPS:
            fits = [
                quadrature_fit(c["eps"], c["error"], c["floor"])
                for n in steps
                for c in own
                if c["N"] == n and c["kind"] == kind
            ]
            row += [" ".join(f"{fit.C:.2f}" for fit in fits), f"{max(fit.worst for fit in fits):.2f}"]
        routed_rows.append(row)
    routed_head = (
        "policy",
        *(f"floor, N = {n}" for n in steps),
        "falls as 1/N to the",
        "C of the posterior",
        "off by at most",
        "C of the experts",
        "off by at most",
    )
    text = f"""
# Score errors

## On Gaussians, exactly

arXiv 2408.02320 allows DDIM an error of the score: its TV grows by at most sqrt(d) eps_score + d eps_Jacobi, times logarithms. Here
the score of a Gaussian ([the one of the exact laws](laws.md)) is off by e with E|e|^2 = eps^2 at every t: by a constant shift, or in
proportion to `(x - a m)/std`, which bends the Jacobian too, by eps / sqrt(d) over the standard deviation of x_t. Both keep the samplers affine, so their laws are
exact. T = {numbers["T"]}, two-phase schedule. sqrt(KL/2) >= TV is what stands beside the theorem. C is fitted as `sqrt(floor^2 + (C eps)^2)`; the powers are of what exceeds the floor, at d = {dimensions[-1]}.

{table(head, rows)}

![KL and W2 over the error of the score](errors-gaussian.png)

Linear in eps, as the theorem's terms are; independent of d at a given eps, where the bound has sqrt(d) for the shift and d times the
Jacobian's eps / sqrt(d), sqrt(d) again, for the slope. What the bound multiplies by d, a product shares out: e is eps / sqrt(d) in every coordinate. The
ODE samplers carry all errors to the end, the SDE samplers correct the early ones, but take steps of the score twice as large; the two come out near each other.

## On a mixture, routed

The routed theorem (arXiv 2606.15835) has W2 = O(N^-1/2 + eps). Here four Gaussians in 8 dimensions with exact experts and posterior, the routed Euler sampler on even steps from
t = 1 to {numbers["delta"]:g}, against the exact flow from the same noise: the root mean square distance over {numbers["paths"]} paths, which is at least W2. The posterior
is mixed with the uniform one, |alphahat - alpha| <= eps; each expert is off by eps in a direction of its own. C for N = {", ".join(map(str, steps))}; "off by at most" is the
largest ratio between a measured error and the law `sqrt(floor^2 + (C eps)^2)`.

{table(routed_head, routed_rows)}

![Distance to the exact path over the error of router and experts](errors-routed.png)

**What is seen.** Floor and error add as squares, so the worse one is all that matters: there is no use in experts better than floor / C, nor in
steps beyond it. The floor of `stochastic` falls as N^-1/2, the theorem's rate; `full` and `balanced` fall as 1/N, and there
the theorem is a half power loose. C does not depend on N, as it must not, nor much on the policy: an error of the router or of an expert costs the same however the expert is chosen.
An expert that is off by eps costs at most eps in the end, since every x0 it asks for is off by so much.
"""
    return Page(text, {"gaussian": _gaussian(numbers), "routed": _routed(numbers)})


def _constants(eps: Sequence[float], cell: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """C of sqrt(KL/2) and of W2, and the powers of eps of what exceeds their floors."""
    found = []
    for key, scale in (("kl", lambda value: math.sqrt(value / 2)), ("w2", lambda value: value)):
        errors, floor = [scale(value) for value in cell[key]], scale(cell["floor"][0 if key == "kl" else 1])
        above = [
            (e, math.sqrt(error**2 - floor**2))
            for e, error in zip(eps, errors, strict=True)
            if error > 1.5 * floor and error < 0.3
        ]
        power = -power_law_fit(*zip(*above, strict=True)).exponent if len(above) > 1 else math.nan
        small = [(e, error) for e, error in zip(eps, errors, strict=True) if error < 0.3] or [(eps[0], errors[0])]
        found.append((quadrature_fit(*zip(*small, strict=True), floor).C, power))
    return found[0][0], found[1][0], found[0][1], found[1][1]


def _gaussian(numbers: Mapping[str, Any]) -> Figure:
    figure, plots = axes(3, height=4.0)
    largest = max(cell["d"] for cell in numbers["gaussian"])
    eps = numbers["eps"]
    shown = (("shift", "kl"), ("slope", "kl"), ("shift", "w2"))
    for axis, (kind, key) in zip(plots, shown, strict=True):
        for cell in numbers["gaussian"]:
            if cell["kind"] == kind and cell["d"] == largest:
                values = [math.sqrt(value / 2) for value in cell["kl"]] if key == "kl" else cell["w2"]
                axis.plot(
                    eps, values, "o-", color=METHODS[cell["sampler"]].colour, label=cell["sampler"], markersize=3.5
                )
        axis.plot(eps, eps, "--", color="#777777", linewidth=1, label="eps")
        if key == "kl":
            axis.plot(
                eps, [math.sqrt(largest) * e for e in eps], ":", color="#777777", linewidth=1.5, label="sqrt(d) eps"
            )
        axis.set(xscale="log", yscale="log", ylabel="sqrt(KL/2)" if key == "kl" else "W2", xlabel="eps of the score")
        axis.set_title(f"{kind}, d = {largest}", fontsize=10)
    legend_below(figure, plots[0], 6)
    return figure


def _routed(numbers: Mapping[str, Any]) -> Figure:
    figure, plots = axes(2, height=4.2)
    cells = numbers["routed"]
    steps = sorted({cell["N"] for cell in cells})
    for axis, kind in zip(plots, ROUTED_EPS, strict=True):
        for cell in (c for c in cells if c["kind"] == kind):
            fit, width = quadrature_fit(cell["eps"], cell["error"], cell["floor"]), 1 + steps.index(cell["N"]) * 0.7
            low, high = cell["eps"][0] / 2, cell["eps"][-1]
            line = [low * (high / low) ** (i / 50) for i in range(51)]
            colour = POLICIES[cell["policy"]]
            axis.plot(
                line, [math.hypot(cell["floor"], fit.C * e) for e in line], color=colour, linewidth=width, alpha=0.55
            )
            axis.plot(cell["eps"], cell["error"], "o", color=colour, markersize=4)
        axis.set(xscale="log", yscale="log", ylabel="distance to the exact path")
        axis.set_title({"posterior": "error of the posterior", "experts": "error of the experts"}[kind], fontsize=10)
        steps_axis(axis, ROUTED_EPS[kind], "eps")
    for policy in dict.fromkeys(cell["policy"] for cell in cells):
        plots[0].plot([], [], "o-", color=POLICIES[policy], label=policy)
    for i, n in enumerate(steps):
        plots[0].plot([], [], color="#777777", linewidth=1 + i * 0.7, label=f"N = {n}")
    legend_below(figure, plots[0], 6)
    return figure
