"""Measure samplers and policies on data whose exact posterior and score are known.

Writes the numbers (NAME.json), the figures (NAME-FIGURE.png) and the tables of the hand-written
pages (NAME.md).
"""

import argparse
import importlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cli import Parser, run
from benchmarks.lab.markdown import short_digest, text_is_current, write
from ddm.errors import require

EXPERIMENTS = (
    "orders",
    "few_steps",
    "laws",
    "densities",
    "processes",
    "score_errors",
    "history",
    "selection",
    "switching",
    "selection_rules",
    "bound",
)
DOCS = Path(__file__).parents[2] / "docs" / "lab"

log = logging.getLogger("lab")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("lab", __doc__)
    known = " ".join(EXPERIMENTS)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {known}; default all")
    parser.add_argument(
        "--out", type=Path, default=DOCS, help="the pages' folder; default docs/lab"
    )
    parser.add_argument(
        "--render", action="store_true", help="measure nothing; use the numbers in NAME.json"
    )
    return run(parser, _run_all, words)


def _run_all(arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in arguments.names:
        require(name in EXPERIMENTS, "name", f"be one of {' '.join(EXPERIMENTS)}", name)
    for name in arguments.names or EXPERIMENTS:
        _run(name, arguments.out, arguments.render)


def _run(name: str, folder: Path, only_render: bool) -> None:
    """An experiment is a module with `measure() -> numbers` for JSON and
    `render(numbers) -> Rendered`.
    """
    began = time.monotonic()
    experiment = importlib.import_module(f"benchmarks.lab.{name}")
    saved = folder / f"{name}.json"
    if only_render:
        require(saved.is_file(), "--out", f"hold {saved.name} for --render", str(folder))
        numbers = json.loads(saved.read_text())
    else:
        numbers = json.loads(json.dumps(experiment.measure()))
    write(folder, name, numbers, experiment.render(numbers))
    page = folder / f"{name}.md"
    log.info("%-15s %4.0f s: %s", name, time.monotonic() - began, page)
    if not text_is_current(page.read_text(), numbers):
        digest = short_digest(numbers)
        log.warning("%s: the numbers changed; check its text, then note %s there", page, digest)


if __name__ == "__main__":
    sys.exit(main())
