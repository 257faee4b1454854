"""Exact laws: on Gaussian data every sampler is an affine map, so the law of its samples is known
in closed form.

The law is computed from the samplers themselves, driven with probes: a deterministic one from x = 0
and x = 1 over its whole trajectory, a stochastic one over each step alone, which gives
`Y' = A Y + b + sum B Z`, hence mean and variance.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.lab.markdown import Rendered, axes, legend_below, steps_axis, table
from ddm.grids import time_grid
from ddm.measures import power_law_fit
from ddm.oracle import GaussianMixture
from ddm.samplers import Denoiser, Noise, Trajectory, drive, sampler
from ddm.schedules import Coeffs, Schedule, TwoPhase

Walker = Callable[[Tensor, Schedule, Tensor, Noise], Trajectory]
STEPS = (100, 200, 400, 800, 1600, 3200, 6400)
DIMENSIONS = (1, 4, 16, 64, 256, 1024)
BLOCK = 16  # the dimension of one Gaussian; 1024 coordinates are 64 of them


class Law(NamedTuple):
    """Independent Gaussians: means and variances `[d]`, float64."""

    mean: Tensor
    variance: Tensor

    def at(self, c: Coeffs) -> "Law":
        """The law of `a x0 + s eps` for x0 of this law."""
        return Law(c.a * self.mean, c.a**2 * self.variance + c.s**2)

    def first(self, d: int) -> "Law":
        """The first d coordinates alone."""
        return Law(self.mean[:d], self.variance[:d])


class Tabled:
    """A schedule tabulated at the times of a grid, so that T = 6400 steps take seconds."""

    def __init__(self, schedule: Schedule, times: Tensor) -> None:
        self._at = {float(t): Coeffs(*row) for t, *row in zip(times, *schedule(times), strict=True)}

    def __call__(self, t: Tensor) -> Coeffs:
        return self._at[float(t)]


def exact_denoiser(data: Law, schedule: Schedule) -> Denoiser:
    """`E[x0 | x_t = x]` for x `[B, d]`: for Gaussian data it is affine in each coordinate
    separately.
    """
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(one, data.mean[None], data.variance.sqrt()[None], schedule).expert(0)


class Affine(NamedTuple):
    """A sampler on Gaussian data, from its first time to its last: `Y = A Y_0 + b + sqrt(noise) Z`,
    each `[d]`.
    """

    A: Tensor
    b: Tensor
    noise: Tensor

    def __call__(self, start: Law) -> Law:
        return Law(self.A * start.mean + self.b, self.A**2 * start.variance + self.noise)


def affine(
    trajectory: Walker, denoise: Denoiser, schedule: Schedule, times: Tensor, draws: int, d: int
) -> Affine:
    """Drive a sampler with probes, for a denoiser that is affine in each of d coordinates
    separately.

    draws: the normal variables of a step; 0 for a deterministic sampler, which may be multistep.
    """
    probes = torch.zeros(draws + 2, d, dtype=torch.float64)
    probes[1] = 1

    def noise(n: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(2 + n), draws + 2).to(probes)[:, None]

    whole = Affine(torch.ones(d, dtype=torch.float64), *torch.zeros(2, d, dtype=torch.float64))
    for path in [times] if draws == 0 else [times[n : n + 2] for n in range(len(times) - 1)]:
        ends = drive(trajectory(probes, schedule, path, noise), denoise)[0]
        A, b = ends[1] - ends[0], ends[0]
        whole = Affine(
            A * whole.A, A * whole.b + b, A**2 * whole.noise + (ends[2:] - b).square().sum(dim=0)
        )
    return whole


def kl(p: Law, q: Law) -> Tensor:
    """`KL(p | q)` of each coordinate, `[d]`; their sum is that of the product. Accurate even if the
    laws are very close.

    With `u = var_p / var_q - 1` it is `(u - log(1 + u) + (difference of means)^2 / var_q) / 2`, a
    series where u is small.
    """
    u = (p.variance - q.variance) / q.variance
    powers = torch.arange(2, 12, dtype=u.dtype)
    series = ((-u[:, None]) ** powers / powers).sum(dim=1)  # u - log(1 + u) = u^2/2 - u^3/3 + ...
    return (
        torch.where(u.abs() < 0.03, series, u - torch.log1p(u))
        + (p.mean - q.mean) ** 2 / q.variance
    ) / 2


def w2_square(p: Law, q: Law) -> Tensor:
    """`W2^2` of each coordinate, `[d]`; their sum is that of the product."""
    spread = (p.variance - q.variance) / (p.variance.sqrt() + q.variance.sqrt())
    return (p.mean - q.mean) ** 2 + spread**2


def ddim_as_proven(x: Tensor, schedule: Schedule, times: Tensor, noise: Noise) -> Trajectory:
    """DDIM as defined in arXiv 2408.02320: `Y' = (Y + (1 - alpha)/2 score) / sqrt(alpha)`, alpha
    the step's ratio of a^2.
    """
    for t, t_next in pairwise(times):
        c, r = schedule(t), schedule(t).a / schedule(t_next).a
        x = (x + (1 - r**2) / 2 * (c.a * (yield x, t) - x) / c.s**2) / r
    return x


def ddpm_as_proven(x: Tensor, schedule: Schedule, times: Tensor, noise: Noise) -> Trajectory:
    """DDPM as defined in arXiv 2510.27562: `Y' = (Y + beta score + sqrt(beta) Z) / sqrt(1 - beta)`.

    Its noise has the variance beta / (1 - beta), where arXiv 2006.11239 and `ddm.samplers.ddpm`
    have beta.
    """

    def larger(n: int) -> Tensor:
        return schedule(times[n + 1]).a / schedule(times[n]).a * noise(n)

    return sampler("ddpm").trajectory(x, schedule, times, larger)


def walker(name: str) -> Walker:
    """The sampler of that name, or its form in a paper's proof."""
    as_proven = {"ddim as proven": ddim_as_proven, "ddpm as proven": ddpm_as_proven}
    return as_proven[name] if name in as_proven else sampler(name).trajectory


def local_slopes(steps: Sequence[float], errors: Sequence[float]) -> list[float]:
    """`-d log error / d log T` between each number of steps and the next."""
    points = list(zip(steps, errors, strict=True))
    return [-math.log(e2 / e1) / math.log(t2 / t1) for (t1, e1), (t2, e2) in pairwise(points)]


class Method(NamedTuple):
    """A sampler: generator, normal variables per step, proven powers of 1/T and d for its KL, their
    source, and its colour.
    """

    trajectory: Walker
    draws: int
    T_power: int | None
    d_power: str
    proof: str
    colour: str


METHODS = {
    "ddpm as proven": Method(ddpm_as_proven, 1, 2, "1 (L bounded)", "2510.27562: KL", "#0072B2"),
    "ddim as proven": Method(ddim_as_proven, 0, 2, "2", "2408.02320: TV d/T", "#D55E00"),
    "ddim": Method(sampler("ddim").trajectory, 0, None, "-", "-", "#E69F00"),
    "accelerated_ode": Method(
        sampler("accelerated_ode").trajectory, 0, 4, "poly", "2403.03852: TV 1/T^2", "#009E73"
    ),
    "accelerated_sde": Method(
        sampler("accelerated_sde").trajectory, 2, 2, "poly", "2403.03852: TV 1/T", "#CC79A7"
    ),
    "dpmpp_2m": Method(sampler("dpmpp_2m").trajectory, 0, None, "-", "-", "#000000"),
}
FLOORS = {
    "ddpm as proven": 1.6,
    "ddim as proven": 1.4,
    "ddim": 1.4,
    "accelerated_sde": 3.3,
}  # least slopes, T = 1600 to 6400


def gaussian(d: int, seed: int) -> Law:
    """Means from N(0, 1) and standard deviations from 0.2 to 1.2, evenly."""
    generator = torch.Generator().manual_seed(seed)
    std = 0.2 + torch.rand(d, generator=generator, dtype=torch.float64)
    return Law(torch.randn(d, generator=generator, dtype=torch.float64), std**2)


def decaying(d: int) -> Law:
    """Standard deviations 1/i, the spectrum of images, means 0."""
    return Law(
        torch.zeros(d, dtype=torch.float64), torch.arange(1, d + 1, dtype=torch.float64) ** -2
    )


class Outcome(NamedTuple):
    """For each coordinate `[d]`, at t = 1/T: KL(x | Y), W2^2, KL if Y starts from the true x_1, and
    the KL of the start.
    """

    kl: Tensor
    w2_square: Tensor
    kl_from_true: Tensor
    kl_of_start: Tensor


def outcome(method: Method, data: Law, steps: int) -> Outcome:
    """Run the two-phase schedule (c0 = 2, c1 = 4) from N(0, 1) at n = T to n = 1, where the
    theorems compare X_1 and Y_1.
    """
    schedule = TwoPhase(steps)
    times = time_grid("own", steps, schedule, t_min=1 / steps)
    tabled = Tabled(schedule, times)
    d = len(data.mean)
    affine_map = affine(
        method.trajectory, exact_denoiser(data, tabled), tabled, times, method.draws, d
    )
    first, true = data.at(tabled(times[0])), data.at(tabled(times[-1]))
    start = Law(torch.zeros_like(data.mean), torch.ones_like(data.mean))
    law = affine_map(start)
    return Outcome(
        kl(true, law), w2_square(true, law), kl(true, affine_map(first)), kl(first, start)
    )


def measure(
    steps: Sequence[int] = STEPS, dimensions: Sequence[int] = DIMENSIONS, seed: int = 0
) -> dict[str, Any]:
    """KL and W2 in 16 dimensions over T, for every block of 16 coordinates; and KL over d at the
    middle T.
    """
    data, middle = gaussian(max(*dimensions, BLOCK), seed), steps[len(steps) // 2]
    over_steps, over_d = [], []
    for name, method in METHODS.items():
        for T in steps:
            found = outcome(method, data, T)
            over_steps.append(
                {
                    "sampler": name,
                    "T": T,
                    "kl": [float(block.sum()) for block in found.kl.split(BLOCK)],
                    "w2": float(found.w2_square[:BLOCK].sum().sqrt()),
                    "kl_from_true": [
                        float(block.sum()) for block in found.kl_from_true.split(BLOCK)
                    ],
                    "kl_of_start": float(found.kl_of_start[:BLOCK].sum()),
                }
            )
            if middle == T:
                spectra = {
                    "even": found.kl,
                    "decaying": outcome(method, decaying(max(dimensions)), T).kl,
                }
                over_d += [
                    {"sampler": name, "spectrum": spectrum, "d": d, "kl": float(part[:d].sum())}
                    for spectrum, part in spectra.items()
                    for d in dimensions
                ]
    return {"block": BLOCK, "middle": middle, "over_steps": over_steps, "over_d": over_d}


def slopes(
    numbers: Mapping[str, Any], name: str, key: str = "kl", first: int = 1600, last: int = 6400
) -> list[float]:
    """For each Gaussian, `-d log KL / d log T` between two numbers of steps."""
    cells = {cell["T"]: cell[key] for cell in numbers["over_steps"] if cell["sampler"] == name}
    return [
        local_slopes((first, last), pair)[0] for pair in zip(cells[first], cells[last], strict=True)
    ]


def lead(
    numbers: Mapping[str, Any], loser: str, winner: str = "accelerated_ode", T: int = 800
) -> list[float]:
    """For each Gaussian, how many times smaller the winner's KL is."""
    cells = {cell["sampler"]: cell["kl"] for cell in numbers["over_steps"] if cell["T"] == T}
    return [a / b for a, b in zip(cells[loser], cells[winner], strict=True)]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """`median (least to most)`."""
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 2]:{form}} ({ordered[0]:{form}} to {ordered[-1]:{form}})"


def render(numbers: Mapping[str, Any]) -> Rendered:
    """Tables of the slopes beside the proven ones, over T and over d, and of the accelerated ODE's
    lead over DDIM.
    """
    steps = sorted({cell["T"] for cell in numbers["over_steps"]})
    tables = {
        "over_steps": _steps_table(numbers, (steps[-3], steps[-1])),
        "lead": _lead_table(numbers),
        "over_d": _d_table(numbers),
    }
    figures = {"steps": _over_steps(numbers["over_steps"], steps), "dimension": _over_d(numbers)}
    return Rendered(tables, figures)


def _steps_table(numbers: Mapping[str, Any], last: tuple[int, int]) -> str:
    middle = numbers["middle"]
    rows = []
    for name, method in METHODS.items():
        of_sampler = [cell for cell in numbers["over_steps"] if cell["sampler"] == name]
        by_steps = {cell["T"]: cell for cell in of_sampler}
        w2_slope = local_slopes(last, [by_steps[T]["w2"] for T in last])[0]
        rows.append(
            (
                f"`{name}`",
                method.proof,
                str(method.T_power or "-"),
                f"{by_steps[middle]['kl'][0]:.2g}",
                spread(slopes(numbers, name, "kl", *last)),
                spread(slopes(numbers, name, "kl_from_true", *last)),
                f"{w2_slope:.2f}",
                f"{FLOORS[name]}" if name in FLOORS else "-",
            )
        )
    head = (
        "sampler",
        "proven",
        "power of 1/T",
        f"KL at T = {middle}",
        "slope of KL",
        "from the true x_1",
        "slope of W2",
        "required slope of KL",
    )
    return table(head, rows)


def _lead_table(numbers: Mapping[str, Any]) -> str:
    T = numbers["middle"]
    losers = ("ddim as proven", "ddim")
    row = [spread(lead(numbers, name, T=T), ".0f") for name in losers]
    return table(
        [f"KL over that of `accelerated_ode`, T = {T}", *(f"`{name}`" for name in losers)],
        [["ratio", *row]],
    )


def _d_table(numbers: Mapping[str, Any]) -> str:
    rows = []
    for name, method in METHODS.items():
        row = [f"`{name}`", method.d_power]
        for spectrum in ("even", "decaying"):
            cells = _over_d_cells(numbers, name, spectrum)
            fit = power_law_fit([cell["d"] for cell in cells], [cell["kl"] for cell in cells])
            row.append(f"{-fit.exponent:.2f}")
        rows.append(row)
    return table(("sampler", "proven power of d", "even spectrum", "spectrum 1/i"), rows)


def _over_d_cells(numbers: Mapping[str, Any], name: str, spectrum: str) -> list[Any]:
    wanted = (name, spectrum)
    return [cell for cell in numbers["over_d"] if (cell["sampler"], cell["spectrum"]) == wanted]


def _over_steps(cells: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> Figure:
    figure, pair = axes(2, height=4.2)
    for axis, key, label in zip(
        pair, ("kl", "w2"), ("KL(X | Y), d = 16", "W2, d = 16"), strict=True
    ):
        for name, method in METHODS.items():
            by_steps = [cell for cell in cells if cell["sampler"] == name]
            values = [cell[key][0] if key == "kl" else cell[key] for cell in by_steps]
            axis.plot(
                steps, values, "o-", color=method.colour, label=name, markersize=3.5, linewidth=1.3
            )
            if key == "kl" and method.draws == 0:
                axis.plot(
                    steps,
                    [cell["kl_from_true"][0] for cell in by_steps],
                    ":",
                    color=method.colour,
                    linewidth=1.2,
                )
        axis.set(xscale="log", yscale="log", ylabel=label)
        steps_axis(axis, steps)
    start = [cell["kl_of_start"] for cell in cells if cell["sampler"] == "ddpm as proven"]
    pair[0].plot(
        steps, start, color="#BBBBBB", linewidth=6, alpha=0.7, label="the start's own KL", zorder=0
    )
    pair[0].plot([], [], ":", color="#555555", label="from the true x_1")
    for power, at in ((2, 1.2e-2), (4, 2e-11)):
        line = [at * (T / steps[-1]) ** -power for T in steps[-3:]]
        pair[0].plot(steps[-3:], line, "--", color="#777777", linewidth=1)
        pair[0].annotate(
            f"$T^{{-{power}}}$",
            (steps[-2], line[1]),
            color="#777777",
            xytext=(4 if power == 2 else -24, 4 if power == 2 else -12),
            textcoords="offset points",
        )
    pair[0].set_ylim(1e-12, 10)
    legend_below(figure, pair[0], 4)
    return figure


def _over_d(numbers: Mapping[str, Any]) -> Figure:
    figure, pair = axes(2, height=3.9)
    for axis, spectrum in zip(pair, ("even", "decaying"), strict=True):
        for name, method in METHODS.items():
            by_steps = _over_d_cells(numbers, name, spectrum)
            axis.plot(
                [c["d"] for c in by_steps],
                [c["kl"] for c in by_steps],
                "o-",
                color=method.colour,
                label=name,
                markersize=3.5,
            )
        axis.set(xscale="log", yscale="log", ylabel=f"KL(X | Y), T = {numbers['middle']}")
        steps_axis(axis, [c["d"] for c in by_steps], "dimension d")
        axis.set_title(
            {"even": "stds even in [0.2, 1.2]", "decaying": "stds 1/i"}[spectrum], fontsize=10
        )
    legend_below(figure, pair[0], 3)
    return figure
