"""Expert selection: how closely each policy and source of alpha follows the mixture's trajectory,
at equal NFE.
"""

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.lab.markdown import COLOURS, Rendered, axes, legend_below, steps_axis, table
from benchmarks.lab.testbeds import Testbed, mixture
from ddm.measures import power_law_fit, sliced_w2
from router.policies import Nucleus, Policy, TopK
from router.sources import Alpha, Integrated, Source, prior

NFE = (10, 25, 50, 100)
RELAXATION_RATE = 40.0  # the default of `sample.relaxation_rate`
PLOTTED = (0, 2)  # testbeds with a figure


def _testbeds() -> list[Testbed]:
    return [
        mixture(4, 8, 3.0),
        mixture(4, 8, 1.0),
        mixture(4, 8, 3.0, components=3),
        mixture(2, 2, 2.0),
        mixture(16, 64, 1.0, paths=200),
        mixture(64, 256, 1.0, paths=64),
        mixture(10, 3072, 0.2, paths=64),
    ]


def _methods(testbed: Testbed) -> dict[str, tuple[str | Policy, bool, float]]:
    """For each method: its policy, whether it uses the control variate, and its NFE per step."""
    return {
        "full": ("full", False, len(testbed.experts)),
        "top-1": (TopK(1), False, 1),
        "top-2": (TopK(2), False, 2),
        "nucleus": (Nucleus(0.9), False, 1.5),
        "fixed": ("fixed", False, 1),
        "stochastic": ("stochastic", False, 1),
        "balanced": ("balanced", False, 1),
        "adaptive": ("adaptive", False, 1.5),
        "balanced-cv": ("balanced", True, 1),
    }


def _sources(testbed: Testbed) -> dict[str, Alpha | Source]:
    """The exact posterior, the prior, and the posterior's exact rate integrated without and with
    relaxation.
    """
    assert testbed.rate is not None
    return {
        "posterior": testbed.alpha,
        "prior": prior(testbed.pi),
        "derivative": Integrated(testbed.rate, testbed.pi),
        "combined": Integrated(testbed.rate, testbed.pi, testbed.alpha, RELAXATION_RATE),
    }


def exponent_fit(steps: list[int], errors: Tensor, resamples: int = 200) -> dict[str, float]:
    """The exponent of mean errors `[steps, paths]` over steps, and its 95 % interval by resampling
    the paths.
    """
    errors = errors.clamp_min(1e-12)  # trajectories over a finite set can end in the same image
    generator = torch.Generator().manual_seed(0)
    paths = errors.shape[1]
    rows = torch.randint(paths, (resamples, paths), generator=generator)
    means = [errors[:, row].mean(dim=1).tolist() for row in rows]
    exponents = torch.tensor([power_law_fit(steps, mean).exponent for mean in means])
    low, high = exponents.quantile(torch.tensor([0.025, 0.975])).tolist()
    exponent = power_law_fit(steps, errors.mean(dim=1).tolist()).exponent
    return {"exponent": exponent, "low": low, "high": high}


def square_errors(ends: Tensor, reference: Tensor) -> Tensor:
    """The mean square distance between each trajectory's end and the reference's, per coordinate:
    `[paths]`.
    """
    return (ends - reference).double().square().flatten(1).mean(dim=1)


def measure() -> dict[str, Any]:
    """Every policy on every mixture at equal NFE; every source on the first mixture."""
    testbeds = _testbeds()
    return {
        "nfe": list(NFE),
        "testbeds": [_measure_policies(testbed) for testbed in testbeds],
        "sources": _measure_sources(testbeds[0]),
    }


def _measure_policies(testbed: Testbed) -> dict[str, Any]:
    reference = testbed.reference()
    exact = [testbed.draw(seed) for seed in range(5)] if testbed.draw else []
    rows = []
    for name, (policy, control_variate, per_step) in _methods(testbed).items():
        steps = [max(1, round(nfe / per_step)) for nfe in NFE]
        runs = [testbed.trajectory(n, policy, control_variate=control_variate) for n in steps]
        errors = torch.stack([square_errors(ends, reference) for ends, _ in runs])
        distances = torch.stack([_distances(ends, exact) for ends, _ in runs])
        rows.append(
            {
                "method": name,
                "steps": steps,
                "nfe": [nfe for _, nfe in runs],
                "error": errors.mean(dim=1).tolist(),
                "sliced_w2": distances.mean(dim=1).tolist(),
                "sliced_w2_deviation": distances.std(dim=1).tolist(),
                "fit": exponent_fit(steps, errors),
            }
        )
    return {"testbed": testbed.name, "experts": len(testbed.experts), "rows": rows}


def _distances(ends: Tensor, exact: list[Tensor]) -> Tensor:
    return torch.tensor([sliced_w2(ends, samples) for samples in exact])


def _measure_sources(testbed: Testbed) -> list[dict[str, Any]]:
    reference = testbed.reference()
    rows = []
    for policy in ("full", "stochastic", "balanced"):
        for name, source in _sources(testbed).items():
            ends = [testbed.trajectory(n, policy, alpha=source)[0] for n in NFE]
            errors = torch.stack([square_errors(end, reference) for end in ends])
            error = errors.mean(dim=1).tolist()
            fit = exponent_fit(list(NFE), errors)
            rows.append({"policy": policy, "source": name, "error": error, "fit": fit})
    return rows


def shown_fit(fit: dict[str, float]) -> str:
    """A fitted exponent p with its interval, as text."""
    return f"{fit['exponent']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]".replace("-0.00", "0.00")


def render(numbers: dict[str, Any]) -> Rendered:
    """Tables of E and sliced W2 for each mixture, of the ratios between methods, and of the
    sources.
    """
    tables, figures = {}, {}
    for i, testbed in enumerate(numbers["testbeds"]):
        tables[f"testbed_{i}"] = _policies_table(numbers["nfe"], testbed["rows"])
        if i in PLOTTED:
            figures[str(i)] = _plot(testbed)
    tables["ratios"] = _ratios(numbers)
    tables["sources"] = _sources_table(numbers)
    return Rendered(tables, figures)


def _policies_table(nfe: list[int], measured: list[dict[str, Any]]) -> str:
    rows = []
    for row in measured:
        w2 = f"{row['sliced_w2'][2]:.3f} ± {row['sliced_w2_deviation'][2]:.3f}"
        errors = [f"{error:.2g}" for error in row["error"]]
        rows.append([row["method"], *errors, shown_fit(row["fit"]), w2])
    columns = [f"E at {n} NFE" for n in nfe]
    return table(["policy", *columns, "p of N^-p", "sliced W2 at 50 NFE"], rows)


def _sources_table(numbers: dict[str, Any]) -> str:
    rows = []
    for row in numbers["sources"]:
        errors = [f"{error:.2g}" for error in row["error"]]
        rows.append([row["policy"], row["source"], *errors, shown_fit(row["fit"])])
    columns = [f"E at {n} steps" for n in numbers["nfe"]]
    return table(["policy", "source", *columns, "p of N^-p"], rows)


def _ratios(numbers: dict[str, Any]) -> str:
    """Ratios of E: `stochastic` over `balanced` at 50 and 100 NFE, `balanced` over `balanced-cv` at
    all.
    """
    rows = []
    for testbed in numbers["testbeds"]:
        errors = {row["method"]: row["error"] for row in testbed["rows"]}
        balanced = errors["balanced"]
        first = [errors["stochastic"][i] / balanced[i] for i in (2, 3)]
        second = [a / b for a, b in zip(balanced, errors["balanced-cv"], strict=True)]
        rows.append([testbed["testbed"], *(f"{ratio:.1f}" for ratio in (*first, *second))])
    head = ["mixture", "at 50", "at 100", *(f"at {n}" for n in numbers["nfe"])]
    return table(head, rows)


def _plot(testbed: dict[str, Any]) -> Figure:
    figure, (left, right) = axes(2, height=3.8)
    style: dict[str, Any] = {"markersize": 3.5, "linewidth": 1.2}
    for row in testbed["rows"]:
        style["color"] = COLOURS.get(row["method"], "#666666")
        left.plot(row["nfe"], row["error"], "o-", label=row["method"], **style)
        deviation = row["sliced_w2_deviation"]
        right.errorbar(row["nfe"], row["sliced_w2"], deviation, fmt="o-", **style)
    labels = ("E, mean square distance", "sliced W2 to exact samples")
    for plot, label in zip((left, right), labels, strict=True):
        plot.set(xscale="log", yscale="log", ylabel=label)
        steps_axis(plot, testbed["rows"][-1]["steps"], "NFE per image")
    legend_below(figure, left, columns=5)
    return figure
