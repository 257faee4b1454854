"""The report's figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.evaluation.results import Evaluation
from train.evaluation.samples import SampleSet

# Okabe and Ito's colours, which the colour-blind tell apart; a method has the same one everywhere.
COLOURS = {
    "DDIM": "#000000",
    "Naive": "#999999",
    "MoG-a": "#56B4E9",
    "MoG-da": "#0072B2",
    "balanced": "#D55E00",
    "balanced-cv": "#E69F00",
    "adaptive": "#882255",
    "top-1": "#CC79A7",
    "top-2": "#DDAADD",
    "nucleus": "#AA9900",
    "full": "#009E73",
}
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def save(path: Path, figure: Figure, dpi: int = 150) -> None:
    """Write a figure as PNG and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, bbox_inches="tight")
    plt.close(figure)


def frechet(
    evaluation: Evaluation, features: str | None = None, sampler: str | None = None
) -> Figure:
    """Frechet distance over the number of steps, a line a method, with the deviation over the seeds where there are several.

    With the first features and the first sampler where none are named.
    """
    judge = features or next(iter(evaluation.features))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.8))
        for name in evaluation.versions:
            of = {
                n: evaluation.over_seeds(name, n, lambda cell: cell.scores[judge].frechet, sampler)
                for n in evaluation.steps
            }
            points = {n: spread for n, spread in of.items() if spread is not None}
            axes.errorbar(
                list(points),
                [spread.mean for spread in points.values()],
                [spread.deviation or 0 for spread in points.values()],
                fmt="o-",
                color=COLOURS[name],
                label=name,
                markersize=4,
                linewidth=1.2,
                elinewidth=0.8,
            )
        _log_steps(axes, evaluation)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=7.5)
        axes.set_ylabel("Fréchet distance")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return figure


def trajectory(evaluation: Evaluation, sampler: str | None = None) -> Figure:
    """Mean square distance to the mixture's own path over the number of steps, with the fitted power laws."""
    walked = sampler or next(iter(evaluation.samplers))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.8))
        for name, fits in evaluation.fits.items():
            of = {
                n: evaluation.over_seeds(name, n, lambda cell: cell.trajectory_error, walked)
                for n in evaluation.steps
            }
            points = {n: spread.mean for n, spread in of.items() if spread is not None}
            steps, fit = np.array(list(points)), fits[walked]
            axes.plot(steps, list(points.values()), "o", color=COLOURS[name], markersize=5)
            axes.plot(
                steps,
                fit.constant * steps**-fit.exponent,
                color=COLOURS[name],
                label=f"{name}: N$^{{-{fit.exponent:.2f}}}$, R² {fit.r2:.2f}",
                linewidth=1,
            )
        _log_steps(axes, evaluation)
        axes.set_yscale("log")
        axes.set_ylabel("E(N), mean square distance")
        axes.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure


def load(drawn: Mapping[str, SampleSet], names: Sequence[str], pi: Sequence[float]) -> Figure:
    """The share of the calls that each expert answered, beside its cluster's share of the images."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.4))
        width = 0.8 / (len(drawn) + 1)
        places = np.arange(len(names))
        axes.bar(places - 0.4 + width / 2, pi, width, color="#DDDDDD", label="share of the images")
        for i, (method, draw) in enumerate(drawn.items(), start=1):
            share = draw.load.sum(dim=0) / draw.load.sum()
            axes.bar(
                places - 0.4 + (i + 0.5) * width,
                share.numpy(),
                width,
                color=COLOURS[method],
                label=method,
            )
        axes.set_xticks(places, names, rotation=0 if len(names) <= 6 else 60)
        axes.set_ylabel("share of the calls")
        axes.legend(fontsize=8.5, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        axes.grid(axis="x", visible=False)
        return figure


def certainty(drawn: Mapping[str, SampleSet]) -> Figure:
    """How sure the router is over time: the largest alpha, averaged over the images."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.2))
        for method, draw in drawn.items():
            axes.plot(draw.t.numpy(), draw.certainty.numpy(), color=COLOURS[method], label=method)
        axes.set_xlim(1, 0)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("t, from noise (1) to data (0)")
        axes.set_ylabel("mean of the largest alpha")
        axes.legend()
        return figure


def alpha_over_time(draw: SampleSet, names: Sequence[str], images: int = 4) -> Figure:
    """For a few images: alpha as a stack over time, and under it who moved the image at each step."""
    with plt.rc_context({**STYLE, "axes.grid": False}):
        shown = min(images, draw.alpha.shape[1])
        figure, rows = plt.subplots(
            shown, 2, figsize=(7.6, 1.25 * shown), width_ratios=[9, 1], squeeze=False, sharex="col"
        )
        palette = plt.get_cmap("tab20" if len(names) > 10 else "tab10")
        t = draw.t.numpy()
        edges = np.append(t, 0.0)
        for i, (axes, side) in enumerate(rows):
            axes.stackplot(
                t,
                draw.alpha[:, i].T.numpy(),
                colors=[palette(k % palette.N) for k in range(len(names))],
                labels=names if i == 0 else [],
            )
            for n, chosen in enumerate(draw.chosen[:, i].numpy()):
                axes.fill_between(
                    [edges[n], edges[n + 1]],
                    -0.22,
                    -0.06,
                    color=palette(int(chosen.argmax()) % palette.N),
                    linewidth=0,
                )
            axes.set_xlim(1, 0)
            axes.set_ylim(-0.24, 1)
            axes.set_yticks([0, 1])
            side.imshow(_displayed(draw, i), cmap="gray", vmin=0, vmax=255)
            side.axis("off")
        rows[-1, 0].set_xlabel("t   (strip: the expert that moved the image)")
        figure.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(5, len(names)), fontsize=8.5
        )
        figure.tight_layout()
        return figure


def losses(folder: Path) -> Figure:
    """The training losses of a run's experts and router."""
    files = sorted((folder / "experts").glob("*/losses.txt")) + sorted(
        (folder / "router").glob("*/losses.txt")
    )
    with plt.rc_context(STYLE):
        figure, pair = plt.subplots(1, 2, figsize=(8.4, 3.2))
        for file in files:
            axes = pair[0 if file.parent.parent.name == "experts" else 1]
            points = dict(np.loadtxt(file, ndmin=2))  # a resumed run wrote some steps twice
            axes.plot(list(points), list(points.values()), linewidth=1, label=file.parent.name)
        for axes, title in zip(pair, ("experts", "router"), strict=True):
            axes.set_title(title, fontsize=10)
            axes.set_yscale("log")
            axes.set_xlabel("step")
            axes.set_visible(bool(axes.lines))
            if axes.lines:
                axes.legend(fontsize=7.5, ncols=2)
        pair[0].set_ylabel("loss")
        figure.tight_layout()
        return figure


def _displayed(draw: SampleSet, i: int) -> np.ndarray:
    image = draw.images[i].permute(1, 2, 0).numpy()
    return image[:, :, 0] if image.shape[2] == 1 else image


def _log_steps(axes: Axes, evaluation: Evaluation) -> None:
    steps = evaluation.steps
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("steps N")
