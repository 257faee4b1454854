"""Measure the program's speed against its peers and the machine's limit, on a CPU or on a GPU.

Prints each row as soon as it is measured, writes all of them to speed-cpu.json or speed-gpu.json,
and the tables of both to speed.md.
"""

import argparse
import importlib
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cli import Parser, run
from benchmarks.speed.timing import Record, Variant, brief
from ddm.device import pick_device
from ddm.errors import one_of, require

SUBJECTS = {  # name -> module
    "network": "network",
    "training": "expert_training",
    "routing": "routed_sampling",
    "targets": "exact_targets",
    "serving": "serving",
    "scaling": "scaling",
    "startup": "startup",
    "shapes": "shapes",
}
RESULTS = Path(__file__).parents[2] / "docs" / "results"

log = logging.getLogger("speed")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("speed", __doc__)
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"of {' '.join(SUBJECTS)}; default all"
    )
    parser.add_argument(
        "--seconds", type=float, default=1800, help="for everything together; default 1800"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default auto")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="the folder of the results; default docs/results"
    )
    return run(parser, _run_all, words)


def _run_all(arguments: argparse.Namespace) -> None:
    for name in arguments.names:
        if name not in SUBJECTS:
            raise one_of("name", name, tuple(SUBJECTS))
    require(arguments.seconds > 0, "--seconds", "be above 0", arguments.seconds)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)
    device = pick_device(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = "cpu" if device == "cpu" else "gpu"
    names = arguments.names or SUBJECTS
    words = [*names, f"--seconds={arguments.seconds:g}"]
    command = shlex.join(["python", "-m", "benchmarks.speed", *words])
    path = arguments.out / f"speed-{machine}.json"
    record = Record(path, device, arguments.seconds, command)
    rows = [(name, variant) for name in names for variant in _variants(record, name)]
    for name, variant in sorted(rows, key=lambda row: row[1].rank):
        record.measure(name, variant)
    from benchmarks.speed.speed_page import section, write_page  # matplotlib, when all is measured

    for name in names:
        print(f"\n{section(machine.upper(), name, record.facts[name])}")
    write_page(arguments.out)
    log.info("the tables are in %s", arguments.out / "speed.md")


def _variants(record: Record, name: str) -> list[Variant]:
    """The rows of a subject, which it begins anew; one that fails if it cannot be imported."""
    try:
        subject = importlib.import_module(f"benchmarks.speed.{SUBJECTS[name]}")
        record.start(name, subject.__doc__ or "")
        return subject.variants(record.device)
    except Exception as error:
        message = brief(error)
        record.start(name, message)

        def fail() -> dict[str, float | str]:
            raise RuntimeError(message)

        return [Variant("import", fail)]


if __name__ == "__main__":
    sys.exit(main())
