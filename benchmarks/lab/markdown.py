"""What an experiment hands over: its numbers, and the page that is drawn from them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.evaluation.plots import COLOURS as METHODS
from train.evaluation.plots import STYLE, save

COLOURS = METHODS | {  # the policies that have no row in a run's table
    "stochastic": METHODS["MoG-a"],
    "fixed": METHODS["Naive"],
}


class Page(NamedTuple):
    """A page of `docs/lab`: Markdown that shows its figures as `![...](NAME-FIGURE.png)`, and the figures by that name."""

    text: str
    figures: Mapping[str, Figure]


def write(folder: Path, name: str, numbers: Mapping[str, Any], page: Page) -> None:
    """Write `NAME.json`, `NAME.md` and `NAME-FIGURE.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (folder / f"{name}.md").write_text(page.text.strip() + "\n")
    for figure_name, figure in page.figures.items():
        save(folder / f"{name}-{figure_name}.png", figure)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)
    )


def axes(columns: int = 1, width: float = 6.4, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    """A figure in the house's style, with that many plots side by side."""
    plt.rcParams.update(STYLE)
    figure, grid = plt.subplots(
        1, columns, figsize=(width if columns == 1 else 5.2 * columns, height), squeeze=False
    )
    return figure, list(grid[0])


def steps_axis(axis: Axes, ticks: Sequence[float], label: str = "steps T") -> None:
    """A logarithmic axis of x with these ticks and no others."""
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel(label)


def legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    """One legend for all plots, under them."""
    figure.tight_layout()
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=columns,
        fontsize=9,
        frameon=False,
    )
