"""The trajectory error of `combined` at several relaxation rates: how to choose
`sample.relaxation_rate`.

Prints E(N) of the policies `balanced` and `stochastic` against the full mixture's trajectory of
1000 steps under the posterior net. A rate of 0 is the source `derivative`.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import product

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cli import Parser, run
from ddm.measures import trajectory_error
from serve import load

RELAXATION_RATES = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0)  # per unit of t
STEPS = (10, 25, 50, 100)
TRAJECTORIES = 128


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("relaxation_rate", __doc__)
    help_text = "a run's folder or a bundle's; default runs/digits"
    parser.add_argument("run", nargs="?", default="runs/digits", help=help_text)
    return run(parser, _measure, words)


def _measure(arguments: argparse.Namespace) -> None:
    model = load(arguments.run)
    reference = model.sample(TRAJECTORIES, steps=1000, source="posterior", policy="full")
    title = f"E(N), {TRAJECTORIES} trajectories of {arguments.run}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("policy")
    for name in ("relaxation_rate", *(f"{n} steps" for n in STEPS)):
        table.add_column(name, justify="right")
    for policy, rate in track(list(product(("balanced", "stochastic"), RELAXATION_RATES))):
        errors = []
        for n in STEPS:
            ends = model.sample(
                TRAJECTORIES,
                steps=n,
                source="combined",
                policy=policy,
                control_variate="none",
                relaxation_rate=rate,
            )
            errors.append(trajectory_error(ends, reference))
        table.add_row(policy, f"{rate:g}", *(f"{error:.4f}" for error in errors))
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
