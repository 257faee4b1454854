"""The page speed.md, made from speed-cpu.json and speed-gpu.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab.markdown import table
from ddm.artifacts import read_json, replaced

MACHINES = {"speed-cpu": "CPU", "speed-gpu": "GPU"}
HEAD = """# Speed

    python -m benchmarks.speed [name ...] [--seconds N]

Every comparison alternates its sides within one run, after a warm-up; a figure is the median over
three to five rounds, `±` half their range over the median. The share of the ceiling is operations
per second over those of a square matrix product (2048 on a CPU, 8192 on a GPU) in the same rounds.
"""


def write_page(folder: Path) -> None:
    """Write the page beside its records."""
    with replaced(folder / "speed.md") as scratch:
        scratch.write_text(page(folder))


def page(folder: Path) -> str:
    """The page of the records in a folder."""
    parts = [HEAD]
    for stem, machine in MACHINES.items():
        path = folder / f"{stem}.json"
        if path.exists():
            facts = read_json(path)
            parts += [
                section(machine, subject, found)
                for subject, found in facts.items()
                if any("not_measured" not in row for row in found["rows"])
            ]
    return "\n".join(parts)


def section(machine: str, subject: str, found: Mapping[str, Any]) -> str:
    """A subject's table on one machine, how it was measured, and what could not be."""
    hardware = found["machine"]
    device = f"{hardware['gpu']}, " if "gpu" in hardware else ""
    where = (
        f"{device}{hardware['cpu']}, {hardware['threads']} threads; "
        f"torch {hardware['torch']}, Python {hardware['python']}"
    )
    how = f"`{found['command']}`, {found['date']}, commit {found['commit']}. {where}."
    rows = [row for row in found["rows"] if "figures" in row]
    failed = [row for row in found["rows"] if "error" in row]
    late = [row["name"] for row in found["rows"] if "not_measured" in row]
    parts = [f"## {subject} on a {machine}", found["about"], how]
    if rows:
        parts.append(_table(rows))
    if failed:
        parts.append("\n".join(f"- {row['name']} failed: {row['error']}" for row in failed))
    if late:
        parts.append(f"Not measured, for lack of time: {'; '.join(late)}.")
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row["figures"]))
    cells = [
        [row["name"], *(shown(row["figures"].get(column, "")) for column in columns)]
        for row in rows
    ]
    return table(["", *columns], cells)


def shown(value: float | str) -> str:
    """A cell: at most four digits, and no exponent for what fits without."""
    if isinstance(value, str):
        return value.replace("|", "/")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
