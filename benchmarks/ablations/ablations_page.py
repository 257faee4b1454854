"""`ablations.md`, from the records in its folder."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.ablations.variants import GROUPS
from benchmarks.lab.markdown import table
from benchmarks.table.results_page import earlier
from ddm.artifacts import read_json

_INTRODUCTION = """# Ablations

The effect of each choice: one thing of a config is changed, and what it affects is trained again on
the same number of images. Fréchet distances, lower is better; in parentheses the difference from the
config as it is, per seed (below 0 is better). Chance, where it is measured, is another seed, of
training and of which images are held out: for what is trained again, a smaller difference means nothing."""


def write_page(folder: Path) -> None:
    """Write `ablations.md` from the records in the folder."""
    (folder / "ablations.md").write_text(page(folder))
    print(page(folder))


def page(folder: Path) -> str:
    """`ablations.md`, from the records in the folder."""
    parts = [_INTRODUCTION]
    for file in sorted(folder.glob("ablations-*.json")):
        parts.append(_section(file.stem.removeprefix("ablations-"), read_json(file)))
    return "\n\n".join(parts) + "\n"


def _section(name: str, record: dict[str, Any]) -> str:
    base = record["base"]
    columns = list(base)
    steps = []
    for column in columns:
        steps.append(_column_title(column))
    values = [f"{mean(base[column]):.2f} ± {_deviation(base[column]):.2f}" for column in columns]
    parts = [
        f"## {name}\n\n    {record['command']}",
        *([earlier(record).strip()] if record.get("earlier") else []),
        f"{record['n']} images per cell and seed, {record['seeds']} seeds, "
        f"`sampler={record['sampler']}`; features: {record['features']}. "
        f"All experts together saw {record['images_seen']:,} images.",
        table(["", *steps], [["the config as it is", *values]]),
    ]
    for group, variants in record["groups"].items():
        rows = [_row(variant, base) for variant in variants]
        parts.append(table([GROUPS[group][0], *steps], rows))
    return "\n\n".join(parts)


def _column_title(column: str) -> str:
    """`balanced-cv, 10 steps` of `balanced-cv-10`; with `, pixels` of `balanced-cv-10-pixels`."""
    found = re.fullmatch(r"(.+)-(\d+)(?:-(.+))?", column)
    assert found is not None
    method, count, features = found.groups()
    return f"{method}, {count} steps" + (f", {features}" if features else "")


def _row(variant: dict[str, Any], base: dict[str, list[float]]) -> list[str]:
    """A variant's name, and its distance and difference from the base in each column."""
    if "default" in variant:
        return [f"{variant['name']} (as it is)", *("" for _ in base)]
    row = [variant["name"]]
    for column, before in base.items():
        after = variant["cells"][column]
        change = [b - a for a, b in zip(before, after, strict=True)]
        row.append(f"{mean(after):.2f} ({mean(change):+.2f} ± {_deviation(change):.2f})")
    return row


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
