"""The policy `switching`: its law at any rate, and how fast its paths converge with the steps."""

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.lab.markdown import Rendered, axes, legend_below, steps_axis, table
from benchmarks.lab.selection import exponent_fit, shown_fit, square_errors
from benchmarks.lab.testbeds import Testbed, mixture
from ddm.grids import time_grid
from ddm.measures import sliced_w2
from ddm.samplers import drive, plan_steps, start
from router.policies import Switching
from router.routing import RoutedDenoiser

RATES = (0, 1, 4, 16)
LAW_STEPS = 100
STEPS = (10, 20, 40, 80)
REFERENCE_STEPS = 2000
SAMPLERS = ("ddim", "dpmpp_2m")
SETS = 5  # of exact samples
SPLIT = 80  # trajectories whose steps are split: one at a time, because their times differ
SEED = 3


def _testbeds() -> list[Testbed]:
    return [
        mixture(2, 2, 2.0),
        mixture(4, 8, 3.0),
        mixture(4, 8, 1.0),
        mixture(16, 64, 1.0, paths=200),
        mixture(64, 256, 1.0, paths=64),
        mixture(10, 3072, 0.2, paths=64),
    ]


def measure() -> dict[str, Any]:
    """The law on every mixture; the convergence on one whose clusters overlap for long."""
    testbeds = _testbeds()
    return {
        "laws": [_law(testbed) for testbed in testbeds],
        "convergence": _convergence(testbeds[2]),
    }


def _law(testbed: Testbed) -> dict[str, Any]:
    """Sliced W2 between exact samples and the ends of each rate, and between exact samples."""
    assert testbed.draw is not None
    exact = [testbed.draw(seed) for seed in range(2 * SETS)]
    pairs = list(zip(exact[:SETS], exact[SETS:], strict=True))
    distances = {"exact samples": [sliced_w2(a, b) for a, b in pairs]}
    for rate in RATES:
        ends, _ = testbed.trajectory(LAW_STEPS, Switching(rate), sampler="dpmpp_2m")
        distances[f"rate {rate}"] = [sliced_w2(ends, samples) for samples in exact[:SETS]]
    return {"testbed": testbed.name, "distances": distances}


def _convergence(testbed: Testbed) -> list[dict[str, Any]]:
    """The error of each rate to its own path of very many steps, over the number of steps; and that
    of `stochastic` to the full mixture's path.
    """
    rows = []
    for sampler in SAMPLERS:
        for rate in RATES[1:]:
            policy = Switching(rate)
            reference, _ = testbed.trajectory(
                REFERENCE_STEPS, policy, sampler="dpmpp_2m", seed=SEED
            )
            whole = [testbed.trajectory(n, policy, sampler=sampler, seed=SEED)[0] for n in STEPS]
            split = [_split_at_redraws(testbed, n, policy, sampler) for n in STEPS]
            for name, ends in (("at the next step", whole), ("split", split)):
                of_them = reference[: len(ends[0])]
                errors = torch.stack([square_errors(each, of_them) for each in ends])
                rows.append(
                    {"sampler": sampler, "policy": f"switching, rate {rate}", "redraws": name}
                    | _summary(errors)
                )
        ends = [testbed.trajectory(n, "stochastic", sampler=sampler)[0] for n in STEPS]
        errors = torch.stack([square_errors(each, testbed.reference()) for each in ends])
        rows.append({"sampler": sampler, "policy": "stochastic", "redraws": ""} | _summary(errors))
    return rows


def _summary(errors: Tensor) -> dict[str, Any]:
    """Mean and median over paths of errors `[steps, paths]`, and the exponents of both."""
    return {
        "mean": errors.mean(dim=1).tolist(),
        "median": errors.median(dim=1).values.tolist(),
        "changed": (errors > 0.1).double().mean(dim=1).tolist(),
        "fit": exponent_fit(list(STEPS), errors),
    }


def _split_at_redraws(testbed: Testbed, steps: int, policy: Switching, sampler: str) -> Tensor:
    """Ends of trajectories whose steps are also split at the image's own redraws."""
    grid = time_grid("uniform_t", steps, testbed.schedule)
    redraws, _ = policy.redraws(SEED, torch.arange(SPLIT))
    ends = []
    for i, of_image in enumerate(redraws):
        within = of_image[of_image > 1e-3]
        times = torch.cat([grid, within]).unique().flip(0)
        method, _ = plan_steps(sampler, len(times) - 1, times, testbed.schedule)
        index = torch.tensor([i])
        routed = RoutedDenoiser(
            testbed.experts,
            testbed.router(policy),
            seed=SEED,
            index=index,
            calls_per_step=method.calls_per_step,
        )
        x = testbed.noise[i : i + 1]
        path = start(x, testbed.schedule, sampler, len(times) - 1, times, seed=SEED, index=index)
        ends.append(drive(path, routed)[0])
    return torch.cat(ends)


def render(numbers: dict[str, Any]) -> Rendered:
    """A table of the laws, one of the convergence, and its plot."""
    tables = {
        "laws": _laws_table(numbers["laws"]),
        "convergence": _convergence_table(numbers["convergence"]),
    }
    return Rendered(tables, {"steps": _plot(numbers["convergence"])})


def _laws_table(laws: list[dict[str, Any]]) -> str:
    rows = []
    for law in laws:
        found = [torch.tensor(values) for values in law["distances"].values()]
        rows.append([law["testbed"], *(f"{d.mean():.3f} ± {d.std():.3f}" for d in found)])
    return table(["mixture", *laws[0]["distances"]], rows)


def _convergence_table(measured: list[dict[str, Any]]) -> str:
    rows = []
    for row in measured:
        errors = [f"{error:.2g}" for error in row["mean"]]
        ends = [f"{100 * row['changed'][i]:.1f} %" for i in (0, -1)]
        name = [row["sampler"], row["policy"], row["redraws"]]
        rows.append([*name, *errors, shown_fit(row["fit"]), f"{row['median'][-1]:.2g}", *ends])
    columns = [f"mean at {n}" for n in STEPS]
    last = [f"median at {STEPS[-1]}", *(f"moved at {n}" for n in (STEPS[0], STEPS[-1]))]
    return table(["sampler", "policy", "redraws", *columns, "p of N^-p", *last], rows)


def _plot(measured: list[dict[str, Any]]) -> Figure:
    figure, plots = axes(len(SAMPLERS), height=3.8)
    for plot, sampler in zip(plots, SAMPLERS, strict=True):
        for i, row in enumerate(row for row in measured if row["sampler"] == sampler):
            line = "--" if row["redraws"] == "split" else "-"
            label = ", ".join(filter(None, (row["policy"], row["redraws"])))
            plot.plot(STEPS, row["mean"], f"o{line}", color=f"C{i // 2}", label=label, markersize=3)
        plot.set(xscale="log", yscale="log", ylabel="mean square error")
        plot.set_title(sampler, fontsize=10)
        steps_axis(plot, list(STEPS), "steps")
    legend_below(figure, plots[0], columns=3)
    return figure
