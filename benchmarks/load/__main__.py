"""python -m benchmarks.load [RUN] [MODE ...] [--clients=64] [--requests=512] [--rate=20] [--out=FOLDER]

Load on loopback against `python -m serve RUN` (default: runs/digits), which this starts and stops:
  closed  64 clients, each asking for an image when it has the last, beside one offline `sample` call of as many images, in
          turn, medians; and beside a server that answers one request after another
  open    requests at a rate, whether or not the server keeps up
  ray     the time of a step with each expert a deployment, beside a bare call of a Ray handle
  fairness  latency of small requests behind six giant ones (benchmarks/load/fairness.py)
  stalled   memory of the server while 20 clients do not read their streams
  drill   what becomes of 500 requests while experts, a node and weights go (see benchmarks/load/drill.py)
Prints a table and writes load.json. None named: closed open ray.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.load.child import server
from benchmarks.load.client import closed, opened
from benchmarks.load.fairness import fairness_mode, stalled_mode
from serve import load

MODES = ("closed", "open", "ray", "drill", "fairness", "stalled")
COLUMNS = ("requests", "failed", "images_per_s", "p50_ms", "p90_ms", "p99_ms", "max_ms")


def closed_mode(run: str, clients: int, requests: int) -> list[dict[str, Any]]:
    """Offline, one after another, and many clients; `of_offline` and `of_sequential` are ratios of images a second."""
    rows: list[dict[str, Any]] = []
    model = load(run)
    with server(run) as (url, first_s):
        rows.append({"what": "first image after a cold start", "seconds": first_s})
        for total, repeats in ((clients, 9), (requests, 3)):
            offline_s, tallies = [], []
            for _ in range(
                repeats + 1
            ):  # in turn, because the machine's speed changes; the first is to warm up
                started = time.perf_counter()
                model.sample(total, batch=clients)
                offline_s.append(time.perf_counter() - started)
                tallies.append(asyncio.run(closed(url, clients, total, {})))
            offline = total / statistics.median(offline_s[1:])
            rows.append(
                {"what": f"offline, sample({total}, batch={clients})", "images_per_s": offline}
            )
            found = sorted(tallies[1:], key=lambda tally: tally.seconds)[repeats // 2].row()
            rows.append(
                {
                    "what": f"{clients} clients, {total} requests",
                    **found,
                    "of_offline": found["images_per_s"] / offline,
                }
            )
        started = time.perf_counter()
        model.sample(requests)
        rows.append(
            {
                "what": f"offline, sample({requests})",
                "images_per_s": requests / (time.perf_counter() - started),
            }
        )
        alone = asyncio.run(closed(url, 1, 32, {})).row()
        rows.append({"what": "one request after another", **alone})
        for row in rows:
            if "of_offline" in row:
                row["of_sequential"] = row["images_per_s"] / alone["images_per_s"]
    return rows


def open_mode(run: str, rate_per_s: float, requests: int) -> list[dict[str, Any]]:
    """Requests at half, at once and at twice the rate."""
    with server(run) as (url, _):
        rates = [rate_per_s * factor for factor in (0.5, 1, 2)]
        return [
            {"what": f"{rate:g} requests/s", **asyncio.run(opened(url, rate, requests, {})).row()}
            for rate in rates
        ]


def ray_mode(run: str, clients: int, requests: int) -> list[dict[str, Any]]:
    """A step alone and under load, local and on Ray, and a bare handle call in the same Ray."""
    rows: list[dict[str, Any]] = []
    steps = load(run).settings().steps
    for placement in ("local", "ray"):
        with server(run, f"serve.placement={placement}") as (url, first_s):
            rows.append(
                {"what": f"{placement}: first image after a cold start", "seconds": first_s}
            )
            alone = asyncio.run(closed(url, 1, 32, {})).row()
            rows.append(
                {"what": f"{placement}: one client", **alone, "step_ms": alone["p50_ms"] / steps}
            )
            found = asyncio.run(closed(url, clients, requests, {})).row()
            rows.append({"what": f"{placement}: {clients} clients", **found})
    local, remote = (row["step_ms"] for row in rows if "step_ms" in row)
    from benchmarks.load.handle import bare_call_ms

    rows.append({"what": "ray: more a step than local", "step_ms": remote - local})
    rows += [
        {"what": f"ray: a bare handle call, {name}", "step_ms": ms}
        for name, ms in bare_call_ms(run).items()
    ]
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table with the columns that any of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title)
    for name in names:
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        cells = (row.get(name, "") for name in names)
        table.add_row(
            *(
                f"{cell:,.4g}" if isinstance(cell, float | np.floating) else str(cell)
                for cell in cells
            )
        )
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def main(words: list[str]) -> int:
    """Run the modes named."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    options = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
    modes = [word for word in words if word in MODES] or ["closed", "open", "ray"]
    runs = [word for word in words if word not in MODES and not word.startswith("--")] or [
        "runs/digits"
    ]
    clients, requests = int(options.pop("clients", 64)), int(options.pop("requests", 512))
    rate, out = float(options.pop("rate", 20)), Path(options.pop("out", "."))
    if options or len(runs) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    found: dict[str, Any] = {"run": runs[0], "cpus": os.cpu_count()}
    for mode in modes:
        match mode:
            case "closed":
                found[mode] = closed_mode(runs[0], clients, requests)
            case "open":
                found[mode] = open_mode(runs[0], rate, requests // 2)
            case "ray":
                found[mode] = ray_mode(runs[0], clients, requests)
            case "fairness":
                found[mode] = fairness_mode(runs[0])
            case "stalled":
                found[mode] = stalled_mode(runs[0])
            case _:
                from benchmarks.load.drill import drill

                found[mode] = drill(runs[0])
        show(mode, found[mode])
    out.mkdir(parents=True, exist_ok=True)
    (out / "load.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
