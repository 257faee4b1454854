"""python -m benchmarks.relaxation_rate [RUN]

Where `sample.pull` should stand: for each strength of the pull towards the posterior net, the trajectory error of `balanced` and
`stochastic` with source `combined`, against the full mixture's 1000-step path under the posterior net. 0 is `derivative`.
"""

import sys

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ddm.measures import trajectory_error
from serve import load

RELAXATION_RATES, STEPS, PATHS = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0), (10, 25, 50, 100), 128


def main(run: str) -> None:
    """Measure and print."""
    model = load(run)
    reference = model.sample(PATHS, steps=1000, source="posterior", policy="full")
    table = Table(title=f"E(N), {PATHS} paths of {run}", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("policy", "relaxation_rate", *(f"{n} steps" for n in STEPS)):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for policy, relaxation_rate in track(
        [
            (policy, relaxation_rate)
            for policy in ("balanced", "stochastic")
            for relaxation_rate in RELAXATION_RATES
        ]
    ):
        ends = [
            model.sample(
                PATHS, steps=n, source="combined", policy=policy, relaxation_rate=relaxation_rate
            )
            for n in STEPS
        ]
        table.add_row(
            policy, f"{relaxation_rate:g}", *(f"{trajectory_error(x, reference):.4f}" for x in ends)
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/digits")
