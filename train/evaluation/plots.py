"""The report's figures."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.evaluation.results import Cell, Evaluation, Spread
from train.evaluation.rows import ROWS
from train.evaluation.samples import SampleSet
from train.evaluation.tables import label

_GREY = "#555555"  # of a row; too dark on a dark page
COLOURS = {name: row.colour for name, row in ROWS.items()}
_SIZE = (5.2, 3.4)  # inches: text of 10 points is as large as a page's where it is a phone's width
_ABOVE: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3, "fontsize": 8.5}
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def svg(figure: Figure) -> str:
    """A figure as SVG that takes the page's colours, and closes it: black is the text's own.

    It has no size of its own, and no background.
    """
    file = io.StringIO()
    unknown = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", bbox_inches="tight", transparent=True, metadata=unknown)
    plt.close(figure)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("#000000", "currentColor").replace(_GREY, "var(--grey)")


def save(path: Path, figure: Figure, dpi: int = 150) -> None:
    """Write a figure as PNG and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, bbox_inches="tight")
    plt.close(figure)


def frechet(
    evaluation: Evaluation, features: str | None = None, sampler: str | None = None
) -> Figure:
    """Frechet distance over the number of steps, one line per method.

    With the deviation over the seeds; by default with the first features and sampler.
    """
    named = features or next(iter(evaluation.features))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=_SIZE)
        for name in evaluation.versions:
            points = _points(evaluation, name, lambda cell: cell.scores[named].frechet, sampler)
            axes.errorbar(
                list(points),
                [spread.mean for spread in points.values()],
                [spread.deviation or 0 for spread in points.values()],
                fmt="o-",
                color=COLOURS[name],
                label=label(evaluation, name, sampler),
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
        axes.legend(**_ABOVE)
        return figure


def trajectory(evaluation: Evaluation, sampler: str | None = None) -> Figure:
    """Trajectory error over the number of steps, with the fitted power laws."""
    named = sampler or next(iter(evaluation.samplers))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=_SIZE)
        for name, fits in evaluation.fits.items():
            points = _points(evaluation, name, lambda cell: cell.trajectory_error, named)
            errors = [spread.mean for spread in points.values()]
            steps = np.array(list(points))
            fit = fits[named]
            axes.plot(steps, errors, "o", color=COLOURS[name], markersize=5)
            axes.plot(
                steps,
                fit.constant * steps**-fit.exponent,
                color=COLOURS[name],
                label=f"{label(evaluation, name, sampler)}: N$^{{-{fit.exponent:.2f}}}$, R² {fit.r2:.2f}",
                linewidth=1,
            )
        _log_steps(axes, evaluation)
        axes.set_yscale("log")
        axes.set_ylabel("E(N), mean squared difference")
        axes.legend(**{**_ABOVE, "ncols": 2})
        return figure


def load(
    samples: Mapping[str, SampleSet],
    names: Sequence[str],
    pi: Sequence[float],
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """The fraction of all NFE that each expert has, beside its mixture weight pi.

    `labels` are what the methods are called, if not by their names.
    """
    called = labels or {}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=_SIZE)
        width = 0.8 / (len(samples) + 1)
        places = np.arange(len(names))
        axes.bar(places - 0.4 + width / 2, pi, width, color="#DDDDDD", label="pi")
        for i, (method, one) in enumerate(samples.items(), start=1):
            fraction = (one.load.sum(dim=0) / one.load.sum()).numpy()
            left = places - 0.4 + (i + 0.5) * width
            axes.bar(left, fraction, width, color=COLOURS[method], label=called.get(method, method))
        short = sum(map(len, names)) <= 60
        axes.set_xticks(
            places,
            [_literal(name) for name in names],
            rotation=0 if short else 45,
            ha="center" if short else "right",
            rotation_mode="anchor",
        )
        axes.set_ylabel("fraction of all NFE")
        axes.legend(**_ABOVE)
        axes.grid(axis="x", visible=False)
        return figure


def certainty(samples: Mapping[str, SampleSet], labels: Mapping[str, str] | None = None) -> Figure:
    """The largest alpha over time, averaged over the images; `labels` as of `load`."""
    called = labels or {}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=_SIZE)
        for method, one in samples.items():
            axes.plot(
                one.t.numpy(),
                one.certainty.numpy(),
                color=COLOURS[method],
                label=called.get(method, method),
            )
        axes.set_xlim(1, 0)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("t, from noise (1) to data (0)")
        axes.set_ylabel("mean of the largest alpha")
        axes.legend(**_ABOVE)
        return figure


def alpha_over_time(samples: SampleSet, names: Sequence[str], images: int = 4) -> Figure:
    """Alpha of a few images as a stack over time, above the expert that updated each image."""
    with plt.rc_context({**STYLE, "axes.grid": False}):
        shown = min(images, samples.alpha.shape[1])
        figure, rows = plt.subplots(
            shown, 2, figsize=(5.6, 1.1 * shown), width_ratios=[7, 1], squeeze=False, sharex="col"
        )
        palette = plt.get_cmap("tab20" if len(names) > 10 else "tab10")
        colours = [palette(k % palette.N) for k in range(len(names))]
        t = samples.t.numpy()
        edges = np.append(t, 0.0)
        for i, (axes, side) in enumerate(rows):
            axes.stackplot(
                t,
                samples.alpha[:, i].T.numpy(),
                colors=colours,
                labels=[_literal(name) for name in names] if i == 0 else [],
            )
            for n, chosen in enumerate(samples.chosen[:, i].numpy()):
                colour = colours[int(chosen.argmax())]
                axes.fill_between(edges[n : n + 2], -0.22, -0.06, color=colour, linewidth=0)
            axes.set_xlim(1, 0)
            axes.set_ylim(-0.24, 1)
            axes.set_yticks([0, 1])
            side.imshow(_displayed(samples, i), cmap="gray", vmin=0, vmax=255)
            side.axis("off")
        rows[-1, 0].set_xlabel("t   (strip: the expert that updated the image)")
        figure.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(names)), fontsize=8.5
        )
        figure.tight_layout()
        return figure


def losses(folder: Path, names: Sequence[str]) -> Figure:
    """The training losses of a run's experts, whose clusters have the `names`, and of its router."""
    files = [
        file
        for part in ("experts", "router")
        for file in sorted(folder.glob(f"{part}/*/losses.txt"))
    ]
    with plt.rc_context(STYLE):
        figure, pair = plt.subplots(2, 1, figsize=(5.2, 5.6))
        for file in files:
            of_expert = file.parent.parent.name == "experts"
            axes = pair[0 if of_expert else 1]
            points = dict(np.loadtxt(file, ndmin=2))  # a resumed run wrote some steps twice
            name = _literal(names[int(file.parent.name)]) if of_expert else file.parent.name
            axes.plot(list(points), list(points.values()), linewidth=1, label=name)
        for axes, title in zip(pair, ("experts", "router"), strict=True):
            axes.set_title(title, fontsize=10)
            axes.set_yscale("log")
            axes.set_xlabel("step")
            axes.set_ylabel("loss")
            axes.set_visible(bool(axes.lines))
            if axes.lines:
                axes.legend(fontsize=7.5, ncols=2)
        figure.tight_layout()
        return figure


def _points(
    evaluation: Evaluation,
    method: str,
    value: Callable[[Cell], float | None],
    sampler: str | None,
) -> dict[int, Spread]:
    """A measure of a method by the number of steps, if it was measured."""
    found = {n: evaluation.over_seeds(method, n, value, sampler) for n in evaluation.steps}
    return {n: spread for n, spread in found.items() if spread is not None}


def _literal(name: str) -> str:
    """A cluster's name without what matplotlib takes for a formula or a hidden label."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _displayed(samples: SampleSet, i: int) -> np.ndarray:
    image = samples.images[i].permute(1, 2, 0).numpy()
    return image[:, :, 0] if image.shape[2] == 1 else image


def _log_steps(axes: Axes, evaluation: Evaluation) -> None:
    steps = evaluation.steps
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("steps N")
