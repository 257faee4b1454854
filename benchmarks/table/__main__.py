"""The paper's table on the images of CONFIG.

Trains what is not trained yet (the seed model if there is one, the experts, the router, and two
single models, of equal compute and of equal time), samples with every method and sampler for several
seeds, scores the images, and writes NAME.json, NAME.md and their images to docs/results, or the
folder of --out, where NAME is the name of the run's folder. The section `table` of the config sets
what is measured. If interrupted, the same command resumes.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cli import Parser, run
from ddm.errors import ConfigError

DOCUMENTED = Path(__file__).parents[2] / "docs" / "results"
RESULTS = DOCUMENTED if DOCUMENTED.is_dir() else Path("results")  # there are no docs in a wheel


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("table", __doc__)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="word",
        help="CONFIG, a YAML file or a shipped name, and key=value overrides",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="the folder to write to; default: %(default)s"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="only write the page of this record (JSON) again"
    )
    return run(parser, _make, words)


def _make(arguments: argparse.Namespace) -> None:
    from train.config import config_file, load_config, shipped_configs  # imports torch

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    paths = [config_file(word) for word in arguments.words if "=" not in word]
    overrides = [word for word in arguments.words if "=" in word]
    if arguments.page is not None and not arguments.words:
        from benchmarks.table.results_page import write_page

        write_page(arguments.page)
        return
    if arguments.page is not None or len(paths) != 1 or paths[0] is None:
        names = " ".join(shipped_configs())
        raise ConfigError(
            f"give one config (*.yaml, or one of {names}) and key=value words, or --page=FILE alone"
        )
    config = load_config(paths[0], overrides)
    # Imported here so that a typo in the config is reported at once.
    from benchmarks.table.measurements import make
    from benchmarks.table.results_page import write_page

    command = shlex.join(["python", "-m", "benchmarks.table", *arguments.words])
    write_page(make(config, command, arguments.out))


if __name__ == "__main__":
    sys.exit(main())
