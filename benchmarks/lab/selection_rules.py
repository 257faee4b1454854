"""Selection rules beyond the papers: what was tried at one NFE per step, what was better, and what
was not.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.lab.markdown import Rendered, axes, legend_below, steps_axis, table
from benchmarks.lab.selection import exponent_fit, shown_fit, square_errors
from benchmarks.lab.testbeds import Testbed, cifar10, mixture
from ddm.grids import time_grid
from ddm.measures import sliced_w2
from ddm.samplers import sample
from router.policies import Balanced
from router.routing import RoutedDenoiser

NFE = (10, 25, 50, 100)
COMPARED = 3  # step counts, from 10 to 50, over which rules are compared with `balanced`

log = logging.getLogger(__name__)


class WeightedCredit(Balanced):
    """`balanced` with a weight for each step's credit, and a factor by which credit decays from
    step to step.
    """

    def __init__(self, testbed: Testbed, times: Tensor, kind: str) -> None:
        c = testbed.schedule(times[:-1])
        c_next = testbed.schedule(times[1:])
        one = torch.ones(len(times) - 1)
        log_snr_change = (c_next.a / c_next.s.clamp_min(1e-2)).log() - (c.a / c.s).log()
        noise_ratio = c_next.s / c.s
        self.weight, self.decay = {
            "change of x": (c_next.a - c.a * noise_ratio, noise_ratio),
            "log SNR": (log_snr_change / log_snr_change.mean(), one),
            "decay": (one, 0.9 * one),
        }[kind]
        self.step = 0

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        weight = float(self.weight[self.step])
        decay = float(self.decay[self.step])
        self.step += 1
        credit = decay * state + weight * alpha
        most = credit.argmax(dim=1, keepdim=True)
        chosen = torch.zeros_like(alpha, dtype=torch.bool).scatter_(1, most, True)
        return chosen, credit - weight * chosen


class LastResiduals(RoutedDenoiser):
    """`balanced` with a control variate that also remembers each expert's last residual against its
    approximation.

    A residual is weighted by the ratio of a/s then and now, so it fades as the noise falls. The
    approximation is the cluster's Gaussian, or its mean.
    """

    def __init__(self, testbed: Testbed, gaussian: bool) -> None:
        super().__init__(testbed.experts, testbed.router("balanced"), seed=3)
        self.testbed = testbed
        self.gaussian = gaussian
        self.residuals: Tensor | None = None
        self.snr_then = torch.full((len(testbed.noise), len(testbed.experts)), 1e-9)

    def _approximations(self, x: Tensor, t: Tensor) -> Tensor:
        if self.gaussian:
            return self.testbed.gaussian_denoised(x, t)
        means = self.testbed.means
        return means.expand(len(x), *means.shape)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        denoised = super().__call__(x, t)
        assert self._state is not None
        alpha, chosen = self._state.alpha, self._state.chosen
        c = self.testbed.schedule(t)
        snr = float(c.a / c.s)
        rows = torch.arange(len(x))
        expert = chosen.int().argmax(dim=1)
        trailing = [1] * (x.ndim - 1)
        approximations = self._approximations(x, t)
        if self.residuals is None:
            self.residuals = torch.zeros_like(approximations)
        fading = (self.snr_then / snr).reshape(*alpha.shape, *trailing)
        estimates = approximations + fading * self.residuals
        self.residuals[rows, expert] = denoised - approximations[rows, expert]
        self.snr_then[rows, expert] = snr
        mean = (alpha.reshape(*alpha.shape, *trailing) * estimates).sum(dim=1)
        return denoised + mean - estimates[rows, expert]


def alpha_grid(testbed: Testbed, steps: int) -> Tensor:
    """A grid with half its steps even in t, and half where alpha changes along the mixture's
    trajectories.
    """
    fine = time_grid("uniform_t", 200, testbed.schedule)
    alphas: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alphas.append(testbed.alpha(x, t))
        return testbed.full(x, t)

    sample(denoise, testbed.noise, testbed.schedule, steps=200)
    change = torch.stack(alphas).diff(dim=0).abs().sum(dim=2).mean(dim=1).double()
    density = torch.cat([change / change.sum(), change.new_zeros(1)]) + 1 / len(fine)
    mass = torch.cat([density.new_zeros(1), density.cumsum(0) / density.sum()])
    wanted = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    right = torch.searchsorted(mass, wanted).clamp(1, len(fine) - 1)
    fraction = (wanted - mass[right - 1]) / (mass[right] - mass[right - 1])
    times = fine[right - 1] + fraction * (fine[right] - fine[right - 1])
    times[0] = 1
    times[-1] = 0
    return times


Rule = Callable[[Testbed, int], Tensor]  # testbed, NFE per image -> ends


def _policy(name: str, nfe_per_step: float = 1, **settings: Any) -> Rule:
    def ends(testbed: Testbed, nfe: int) -> Tensor:
        return testbed.trajectory(round(nfe / nfe_per_step), name, **settings)[0]

    return ends


def _weighted(kind: str) -> Rule:
    def ends(testbed: Testbed, nfe: int) -> Tensor:
        times = time_grid("uniform_t", nfe, testbed.schedule)
        return testbed.trajectory(nfe, WeightedCredit(testbed, times, kind))[0]

    return ends


def _on_alpha_grid(testbed: Testbed, nfe: int) -> Tensor:
    return testbed.trajectory(nfe, "balanced", grid=alpha_grid(testbed, nfe))[0]


def _last_residuals(gaussian: bool) -> Rule:
    def ends(testbed: Testbed, nfe: int) -> Tensor:
        routed = LastResiduals(testbed, gaussian)
        return sample(routed, testbed.noise, testbed.schedule, steps=nfe)

    return ends


RULES: dict[str, tuple[Rule, str]] = {  # and the colour of its curve, if it is plotted
    "full, K NFE per step": (_policy("full"), "#009E73"),
    "stochastic": (_policy("stochastic"), "#56B4E9"),
    "balanced": (_policy("balanced"), "#D55E00"),
    "balanced, control_variate=gaussian": (_policy("balanced", control_variate=True), "#E69F00"),
    "balanced, last residuals": (_last_residuals(False), "#CC79A7"),
    "balanced, Gaussians and last residuals": (_last_residuals(True), "#0072B2"),
    "stochastic, control_variate=gaussian": (_policy("stochastic", control_variate=True), ""),
    "adaptive, 1.5 NFE per step": (_policy("adaptive", nfe_per_step=1.5), "#882255"),
    "balanced, credit weighted by change of x": (_weighted("change of x"), ""),
    "balanced, credit weighted by log SNR": (_weighted("log SNR"), ""),
    "balanced, decaying credit": (_weighted("decay"), ""),
    "balanced, steps where alpha changes": (_on_alpha_grid, ""),
    "balanced, even in log SNR": (_policy("balanced", grid="uniform_log_snr"), ""),
}
ON_IMAGES = tuple(RULES)[:8]


def measure() -> dict[str, Any]:
    """E of every rule on mixtures, and of the more promising ones on CIFAR-10 if `DDM_DATA`
    (default `data`) holds it.
    """
    found = []
    for testbed in (mixture(4, 8, 3.0), mixture(4, 8, 3.0, components=3)):
        assert testbed.draw is not None
        exact = [testbed.draw(seed) for seed in range(5)]
        found.append(_measure(testbed, tuple(RULES), testbed.reference(), exact))
    root = Path(os.environ.get("DDM_DATA", "data"))
    if (root / "cifar-10-batches-py").is_dir():
        images = cifar10(root)
        reference = sample(images.full, images.noise, images.schedule, "ddim", 500)
        found.append(_measure(images, ON_IMAGES, reference, [reference]))
    else:
        log.info("selection_rules: no CIFAR-10 in %s (DDM_DATA): measuring mixtures only", root)
    return {"nfe": list(NFE), "testbeds": found}


def _measure(
    testbed: Testbed, names: tuple[str, ...], reference: Tensor, exact: list[Tensor]
) -> dict[str, Any]:
    rows = []
    for name in names:
        rule, _ = RULES[name]
        ends = [rule(testbed, nfe) for nfe in NFE]
        errors = torch.stack([square_errors(end, reference) for end in ends])
        rows.append(
            {
                "rule": name,
                "error": errors.mean(dim=1).tolist(),
                "sliced_w2": [_mean_distance(end, exact) for end in ends],
                "fit": exponent_fit(list(NFE), errors),
            }
        )
    return {"testbed": testbed.name, "rows": rows}


def _mean_distance(ends: Tensor, exact: list[Tensor]) -> float:
    return sum(sliced_w2(ends, samples) for samples in exact) / len(exact)


def render(numbers: dict[str, Any]) -> Rendered:
    """A table for each testbed, the gains over `balanced`, and a plot."""
    testbeds = numbers["testbeds"]
    tables = {
        f"testbed_{i}": _errors_table(numbers["nfe"], testbed["rows"])
        for i, testbed in enumerate(testbeds)
    }
    tables.setdefault("testbed_2", "Not measured: the images of CIFAR-10 were not there.")
    tables["gains"] = _gains(testbeds)
    figure, plots = axes(len(testbeds), height=3.6)
    for plot, testbed in zip(plots, testbeds, strict=True):
        _panel(plot, testbed, numbers["nfe"])
    plots[0].set_ylabel("E, mean square distance")
    legend_below(figure, plots[0], columns=4)
    return Rendered(tables, {"e": figure})


def _errors_table(nfe: list[int], measured: list[dict[str, Any]]) -> str:
    rows = []
    for row in measured:
        errors = [f"{error:.2g}" for error in row["error"]]
        rows.append([row["rule"], *errors, shown_fit(row["fit"]), f"{row['sliced_w2'][1]:.3f}"])
    return table(["rule", *(f"E at {n}" for n in nfe), "p of N^-p", "sliced W2 at 25"], rows)


def _gains(testbeds: list[dict[str, Any]]) -> str:
    """E of `balanced` over that of each rule: the geometric mean over 10, 25 and 50 NFE."""
    rows = []
    for rule in RULES:
        cells = []
        for testbed in testbeds:
            logs = {row["rule"]: torch.tensor(row["error"]).log() for row in testbed["rows"]}
            if rule in logs:
                gain = float((logs["balanced"] - logs[rule])[:COMPARED].mean().exp())
                cells.append(f"{gain:.2f}")
            else:
                cells.append("")
        rows.append([rule, *cells])
    return table(["rule", *(testbed["testbed"] for testbed in testbeds)], rows)


def _panel(plot: Axes, testbed: dict[str, Any], nfe: list[int]) -> None:
    for row in testbed["rows"]:
        _, colour = RULES[row["rule"]]
        if colour:
            style: dict[str, Any] = {"markersize": 3.5, "linewidth": 1.2, "color": colour}
            plot.plot(nfe, row["error"], "o-", label=row["rule"], **style)
    plot.set(xscale="log", yscale="log")
    plot.set_title(testbed["testbed"], fontsize=9)
    steps_axis(plot, nfe, "NFE per image")
