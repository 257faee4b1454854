"""Routing: how close each policy and each source of alpha keeps to the mixture's own path, at equal expert calls."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.lab.markdown import COLOURS, Page, axes, legend_below, steps_axis, table
from benchmarks.lab.testbeds import Bed, mixture
from ddm.measures import power_law_fit, sliced_w2
from router.policies import Nucleus, Policy, TopK
from router.sources import Alpha, Integrated, Source, prior

CALLS = (10, 25, 50, 100)
RELAXATION_RATE = 40.0  # the default of `sample.pull`


def _beds() -> list[Bed]:
    return [
        mixture(4, 8, 3.0),
        mixture(4, 8, 1.0),
        mixture(4, 8, 3.0, components=3),
        mixture(2, 2, 2.0),
        mixture(16, 64, 1.0, paths=200),
        mixture(64, 256, 1.0, paths=64),
        mixture(10, 3072, 0.2, paths=64),
    ]


def _methods(bed: Bed) -> dict[str, tuple[str | Policy, bool, float]]:
    """A method, its policy, whether Gaussians stand in, and its calls a step."""
    return {
        "full": ("full", False, len(bed.experts)),
        "top-1": (TopK(1), False, 1),
        "top-2": (TopK(2), False, 2),
        "nucleus": (Nucleus(0.9), False, 1.5),
        "fixed": ("fixed", False, 1),
        "stochastic": ("stochastic", False, 1),
        "balanced": ("balanced", False, 1),
        "adaptive": ("adaptive", False, 1.5),
        "balanced-cv": ("balanced", True, 1),
    }


def _sources(bed: Bed) -> dict[str, Alpha | Source]:
    """Sources: the exact posterior, none, and its exact rate integrated without and with correction."""
    assert bed.rate is not None
    return {
        "posterior": bed.alpha,
        "prior": prior(bed.pi),
        "derivative": Integrated(bed.rate, bed.pi),
        "combined": Integrated(bed.rate, bed.pi, bed.alpha, RELAXATION_RATE),
    }


def fitted(steps: list[int], errors: Tensor, resamples: int = 200) -> dict[str, float]:
    """The exponent of mean errors `[steps, paths]` over steps, and its 95 % interval by resampling the paths."""
    errors = errors.clamp_min(1e-12)  # paths over a finite set can end in the very same image
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(errors.shape[1], (resamples, errors.shape[1]), generator=generator)
    found = torch.tensor(
        [power_law_fit(steps, errors[:, row].mean(dim=1).tolist()).exponent for row in rows]
    )
    low, high = found.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {
        "exponent": power_law_fit(steps, errors.mean(dim=1).tolist()).exponent,
        "low": low,
        "high": high,
    }


def errors_of(ends: Tensor, reference: Tensor) -> Tensor:
    """The mean square distance of each path's end, `[paths]`."""
    return (ends - reference).double().square().flatten(1).mean(dim=1)


def measure() -> dict[str, Any]:
    """Every policy on every mixture at equal calls; every source on the first mixture."""
    beds, sources = [], []
    for bed in _beds():
        reference, draws = (
            bed.reference(),
            [bed.draw(seed) for seed in range(5)] if bed.draw else [],
        )
        rows = []
        for name, (policy, control_variate, per_step) in _methods(bed).items():
            steps = [max(1, round(calls / per_step)) for calls in CALLS]
            walks = [bed.trajectory(n, policy, control_variate=control_variate) for n in steps]
            errors = torch.stack([errors_of(ends, reference) for ends, _ in walks])
            distances = torch.tensor(
                [[sliced_w2(ends, truth) for truth in draws] for ends, _ in walks]
            )
            rows.append(
                {
                    "method": name,
                    "steps": steps,
                    "calls": [calls for _, calls in walks],
                    "error": errors.mean(dim=1).tolist(),
                    "sliced_w2": distances.mean(dim=1).tolist(),
                    "sliced_w2_deviation": distances.std(dim=1).tolist(),
                    "fit": fitted(steps, errors),
                }
            )
        beds.append({"bed": bed.name, "experts": len(bed.experts), "rows": rows})
    bed = _beds()[0]
    reference = bed.reference()
    for policy in ("full", "stochastic", "balanced"):
        for name in _sources(bed):
            ends = [bed.trajectory(n, policy, alpha=_sources(bed)[name])[0] for n in CALLS]
            errors = torch.stack([errors_of(end, reference) for end in ends])
            sources.append(
                {
                    "policy": policy,
                    "source": name,
                    "error": errors.mean(dim=1).tolist(),
                    "fit": fitted(list(CALLS), errors),
                }
            )
    return {"calls": list(CALLS), "beds": beds, "sources": sources}


def law(fit: dict[str, float]) -> str:
    """A fitted exponent p with its interval, as text."""
    return f"{fit['exponent']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]".replace("-0.00", "0.00")


def page(numbers: dict[str, Any]) -> Page:
    """Tables of E and sliced W2, and a plot a mixture."""
    calls = numbers["calls"]
    text = [
        f"""# Routing: who should move the image

Exact experts and the exact posterior on Gaussian mixtures, so that all error is the sampler's and the policy's. E is the mean
square distance, a number of the data, between where a path ends and where the full mixture's own path ends (UniPC-3, 500 steps).
Every method gets the same **calls** an image, {", ".join(map(str, calls))}: `full`, which asks all K experts, takes
calls/K steps, `top-2` calls/2, `adaptive` and `nucleus` calls/1.5 (nucleus asks as many as it needs: its true calls are in the
JSON). `balanced-cv` is `balanced` with `control_variate=gaussian`: Gaussians stand in for the experts that are not asked,
so where
clusters *are* Gaussians it is the full mixture at one call a step. DDIM, uniform in t. Intervals are 95 %, by resampling
the paths. `python -m benchmarks.lab routing` makes this page.
"""
    ]
    figures = {}
    for place, bed in enumerate(numbers["beds"]):
        rows = []
        for row in bed["rows"]:
            w2 = f"{row['sliced_w2'][2]:.3f} ± {row['sliced_w2_deviation'][2]:.3f}"
            rows.append([row["method"], *(f"{e:.2g}" for e in row["error"]), law(row["fit"]), w2])
        head = ["policy", *(f"E at {n} calls" for n in calls), "p of N^-p", "sliced W2 at 50 calls"]
        text.append(f"## {bed['bed']}\n\n{table(head, rows)}\n")
        if place in (0, 2):
            text.append(f"![E over calls](routing-{place}.png)\n")
            figures[str(place)] = _plot(bed)
    text.append(_summary(numbers))
    rows = [
        [s["policy"], s["source"], *(f"{e:.2g}" for e in s["error"]), law(s["fit"])]
        for s in numbers["sources"]
    ]
    head = ["policy", "source", *(f"E at {n} steps" for n in calls), "p of N^-p"]
    text.append(
        f"""## Where alpha comes from: {numbers["beds"][0]["bed"]}

The exact posterior; the prior; the posterior's exact rate integrated from the prior (`derivative`); and the same pulled to the
posterior by {RELAXATION_RATE:g} a unit of t (`combined`), which corrects what integration loses when one expert at a time
takes the path
away from the mixture's.

{table(head, rows)}

With one expert at a time the integral of the exact rate keeps nearer to the mixture's path than the exact posterior does: an
expert's detour moves the posterior at once, the integral only through its rate. For `full`, which makes no detours, the
posterior is better at many steps. This is the best case of `derivative`; a network that learned the rate is another matter.
"""
    )
    return Page("\n".join(text), figures)


def _summary(numbers: dict[str, Any]) -> str:
    """How many times closer, and whether the distribution is harmed, from the numbers."""
    lines = []
    for bed in numbers["beds"]:
        rows = {row["method"]: row for row in bed["rows"]}
        b, s, c = (rows[name]["error"] for name in ("balanced", "stochastic", "balanced-cv"))
        lines.append(
            [
                bed["bed"],
                f"{s[2] / b[2]:.1f}",
                f"{s[3] / b[3]:.1f}",
                *(f"{b[i] / c[i]:.1f}" for i in range(len(b))),
            ]
        )
    head = ["mixture", "at 50", "at 100", *(f"at {n}" for n in numbers["calls"])]
    return (
        "## Times closer at equal calls\n\nFirst two columns: `balanced` over `stochastic`. The others: `balanced-cv` over "
        f"`balanced`.\n\n{table(head, lines)}\n"
    )


def _plot(bed: dict[str, Any]) -> Any:
    figure, (left, right) = axes(2, height=3.8)
    for row in bed["rows"]:
        colour = COLOURS.get(row["method"], "#666666")
        left.plot(
            row["calls"],
            row["error"],
            "o-",
            color=colour,
            markersize=3.5,
            linewidth=1.2,
            label=row["method"],
        )
        right.errorbar(
            row["calls"],
            row["sliced_w2"],
            row["sliced_w2_deviation"],
            fmt="o-",
            color=colour,
            markersize=3.5,
            linewidth=1.2,
        )
    for plot, label in ((left, "E, mean square distance"), (right, "sliced W2 to exact draws")):
        plot.set_xscale("log")
        plot.set_yscale("log")
        steps_axis(plot, bed["rows"][-1]["steps"], "NFE per image")
        plot.set_ylabel(label)
    legend_below(figure, left, columns=5)
    return figure
