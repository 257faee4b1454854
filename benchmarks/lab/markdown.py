"""What an experiment shows of its numbers: tables for its hand-written page, and figures."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddm.artifacts import digest
from train.evaluation.plots import COLOURS as METHODS
from train.evaluation.plots import STYLE, save

COLOURS = METHODS | {  # the policies that have no row in a run's table
    "stochastic": METHODS["MoG-a"],
    "fixed": METHODS["Naive"],
}
_TABLE = re.compile(r"<!-- table (\w+) -->\n.*?<!-- end -->", re.DOTALL)
_CHECKED = re.compile(r"<!-- text checked against numbers (\w+) -->")


class Rendered(NamedTuple):
    """Markdown tables and figures, by name."""

    tables: Mapping[str, str]
    figures: Mapping[str, Figure]


def write(folder: Path, name: str, numbers: Mapping[str, Any], rendered: Rendered) -> None:
    """Write `NAME.json` and `NAME-FIGURE.png`, and put the tables into `NAME.md` between their
    markers.

    The text of `NAME.md` is written by hand and stays as it is. Raises `ValueError` as
    `with_tables` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{name}.md"
    if page.exists():
        text = page.read_text()
    else:
        text = "\n".join(
            f"<!-- table {table_name} -->\n<!-- end -->\n" for table_name in rendered.tables
        )
    text = with_tables(text, rendered.tables)  # before anything is written
    (folder / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    for figure_name, figure in rendered.figures.items():
        save(folder / f"{name}-{figure_name}.png", figure)
    page.write_text(text)


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A page with each table between its markers `<!-- table NAME -->` and `<!-- end -->`.

    Raises `ValueError` if the page does not have exactly these tables.
    """
    marked = _TABLE.findall(text)
    if sorted(marked) != sorted(tables):
        raise ValueError(f"the page must mark the tables {sorted(tables)}, got {sorted(marked)}")

    def marked_table(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- table {name} -->\n{tables[name]}\n<!-- end -->"

    return _TABLE.sub(marked_table, text)


def text_is_current(text: str, numbers: Mapping[str, Any]) -> bool:
    """Whether someone read the page's text against these numbers, and noted their digest in it."""
    found = _CHECKED.search(text)
    return found is not None and found[1] == short_digest(numbers)


def short_digest(numbers: Mapping[str, Any]) -> str:
    """The digest that a page notes: `<!-- text checked against numbers DIGEST -->`."""
    return digest(numbers)[:12]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def axes(columns: int = 1, width: float = 6.4, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    """A figure with that many plots side by side; one plot is `width` inches wide, several 5.2
    each.
    """
    plt.rcParams.update(STYLE)
    size = (width if columns == 1 else 5.2 * columns, height)
    figure, grid = plt.subplots(1, columns, figsize=size, squeeze=False)
    return figure, list(grid[0])


def steps_axis(axis: Axes, ticks: Sequence[float], label: str = "steps T") -> None:
    """An x axis with these ticks and no others."""
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel(label)


def legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    """One legend for all plots, below them."""
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
