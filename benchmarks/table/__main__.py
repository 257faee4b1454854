"""python -m benchmarks.table CONFIG [key=value ...] [--out=FOLDER]
python -m benchmarks.table --page=FOLDER/NAME.json

The paper's table on the images of CONFIG: trains what is not trained yet (the experts, the router, and one model of the same
compute), draws every method's images with every sampler over several seeds, scores them, and writes NAME.json, NAME.md and
their images into FOLDER (default docs/results of the checkout, else results), where NAME is the name
of the run's folder. Cut off, the same command resumes. The section `table` of the config says
what is measured. --page writes NAME.md again from its record alone.
"""

import logging
import shlex
import sys
from pathlib import Path

from ddm.errors import ConfigError, DdmError
from train.config import load_config

CHECKOUT_RESULTS = Path(__file__).parents[2] / "docs" / "results"
RESULTS = CHECKOUT_RESULTS if CHECKOUT_RESULTS.is_dir() else Path("results")


def main(words: list[str]) -> int:
    """Run the command line; returns the exit status: 0, or 2 where the user can mend what went wrong."""
    if {"-h", "--help"} & set(words) or not words:
        print(__doc__)
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    rest = [word for word in words if not word.startswith("--")]
    paths = [word for word in rest if "=" not in word]
    try:
        from benchmarks.table.measurements import make
        from benchmarks.table.results_page import (
            write_page,  # here, so that a typo need not wait for Lightning
        )

        if set(options) <= {"--page"} and options and not rest:
            write_page(Path(options["--page"]))
        elif (
            set(options) <= {"--out"} and len(paths) == 1 and len(rest) + len(options) == len(words)
        ):
            config = load_config(Path(paths[0]), [word for word in rest if "=" in word])
            command = shlex.join(["python", "-m", "benchmarks.table", *rest])
            write_page(make(config, command, Path(options.get("--out", RESULTS))))
        else:
            raise ConfigError(
                f"give one config, key=value words and --out=FOLDER, or --page=FILE alone; got {words}"
            )
    except DdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit):  # Lightning answers the first with the second
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
