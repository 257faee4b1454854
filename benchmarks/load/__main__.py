"""Load on loopback against `python -m serve RUN`, which this starts and stops.

Modes (default: closed open ray):
  closed    CLIENTS clients, each sending its next request as soon as the last is answered, in turn
            with one offline `sample` call of as many images, medians; and one request after another
  open      requests at a fixed rate, whether or not the server keeps up
  ray       the time per step with one deployment per expert, and of a bare call of a Ray handle
  fairness  the latency of small requests behind six giant ones (benchmarks/load/fairness.py)
  stalled   the memory of the server while 20 clients do not read their streams
  drill     500 requests while experts and a node die and weights change (benchmarks/load/drill.py)
Prints a table for each mode and writes load.json.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.cli import Parser, run
from benchmarks.load.child import server
from benchmarks.load.client import Tally, closed, opened
from benchmarks.load.fairness import fairness_mode, stalled_mode
from ddm.errors import ConfigError, require

MODES = ("closed", "open", "ray", "drill", "fairness", "stalled")
COLUMNS = ("requests", "failed", "images_per_s", "p50_ms", "p90_ms", "p99_ms", "max_ms")


def closed_mode(run: str, clients: int, requests: int) -> list[dict[str, Any]]:
    """Offline, one after another, and many clients; `of_offline` and `of_sequential` are ratios of
    images a second.
    """
    from serve import load  # imports torch

    rows: list[dict[str, Any]] = []
    model = load(run)
    with server(run) as (url, first_s):
        rows.append({"what": "first image after a cold start", "seconds": first_s})
        for total, repeats in ((clients, 9), (requests, 3)):
            offline_s: list[float] = []
            tallies: list[Tally] = []
            # In turn, because the machine's speed changes; the first round is a warm-up.
            for _ in range(repeats + 1):
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
    from serve import load  # imports torch

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

    rows.append({"what": "ray: more per step than local", "step_ms": remote - local})
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


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("load", __doc__)
    known = " ".join(MODES)
    parser.add_argument("words", nargs="*", metavar="word", help=f"RUN, or modes of {known}")
    parser.add_argument("--clients", type=int, default=64, help="default 64")
    parser.add_argument("--requests", type=int, default=512, help="default 512")
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second; default 20")
    parser.add_argument("--out", type=Path, default=Path(), help="load.json's folder; default .")
    return run(parser, _run_all, words)


def _run_all(arguments: argparse.Namespace) -> None:
    for key, least in (("clients", 1), ("requests", 2)):
        value = getattr(arguments, key)
        require(value >= least, f"--{key}", f"be at least {least}", value)
    require(arguments.rate > 0, "--rate", "be above 0", arguments.rate)
    modes = [word for word in arguments.words if word in MODES] or ["closed", "open", "ray"]
    runs = [word for word in arguments.words if word not in MODES] or ["runs/digits"]
    if len(runs) != 1:
        raise ConfigError(f"give one run and modes of {' '.join(MODES)}, got {' '.join(runs)}")
    from serve.model.loading import bundle_folder  # imports torch

    bundle_folder(runs[0])  # refuses what is not a run before a server is started
    found: dict[str, Any] = {"run": runs[0], "cpus": os.cpu_count()}
    for mode in modes:
        found[mode] = _run(mode, runs[0], arguments)
        show(mode, found[mode])
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "load.json").write_text(json.dumps(found, indent=1))


def _run(mode: str, folder: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    match mode:
        case "closed":
            return closed_mode(folder, arguments.clients, arguments.requests)
        case "open":
            return open_mode(folder, arguments.rate, arguments.requests // 2)
        case "ray":
            return ray_mode(folder, arguments.clients, arguments.requests)
        case "fairness":
            return fairness_mode(folder)
        case "stalled":
            return stalled_mode(folder)
        case _:
            from benchmarks.load.drill import drill

            return drill(folder)


if __name__ == "__main__":
    sys.exit(main())
