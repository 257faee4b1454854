"""`python -m benchmarks.lab [name ...]`: measure the named experiments, default all, and write their pages to docs/lab."""

import argparse
import importlib
import json
import logging
import time
from pathlib import Path

from benchmarks.lab.markdown import write

EXPERIMENTS = (
    "orders",
    "laws",
    "densities",
    "processes",
    "errors",
    "history",
    "routing",
    "policies",
    "bound",
)
DOCS = Path(__file__).parents[2] / "docs" / "lab"

log = logging.getLogger("lab")


def main() -> None:
    """Each experiment is a module with `measure() -> numbers` for JSON, and `page(numbers) -> Page`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab", description="Measure the laws of the samplers."
    )
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"of {' '.join(EXPERIMENTS)}; default all"
    )
    parser.add_argument(
        "--out", type=Path, default=DOCS, help="the folder of the pages; default docs/lab"
    )
    parser.add_argument(
        "--draw",
        action="store_true",
        help="only write the pages again, from the numbers that are there",
    )
    words = parser.parse_args()
    for name in words.names:
        if name not in EXPERIMENTS:
            parser.error(f"name must be of {' '.join(EXPERIMENTS)}, got {name!r}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in words.names or EXPERIMENTS:
        began = time.monotonic()
        experiment = importlib.import_module(f"benchmarks.lab.{name}")
        numbers = (
            json.loads((words.out / f"{name}.json").read_text())
            if words.draw
            else experiment.measure()
        )
        write(words.out, name, numbers, experiment.page(numbers))
        log.info("%-10s %4.0f s: %s", name, time.monotonic() - began, words.out / f"{name}.md")


if __name__ == "__main__":
    main()
