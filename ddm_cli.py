"""ddm COMMAND ...: the program from any folder; `ddm COMMAND --help` lists what a command takes.

    ddm train [CONFIG] [stage ...] [key=value ...]    train experts and a router, sample, evaluate
    ddm serve RUN [key=value ...]                     serve a run's folder or a bundle over HTTP
    ddm table CONFIG [key=value ...]                  compare all methods on the images of a config
    ddm import diffusers FOLDER [key=value ...]       make an expert of a UNet2DModel
    ddm export diffusers RUN FOLDER                   write a bundle as a pipeline of diffusers

--version prints the version.

A module of its own outside the packages, whose names (`train`, `serve`, ...) a user's files may have as well: it makes
sure that they are found where this file is, here and in every process that is started from here.
"""

import os
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

# The package whose `main` a command is, and words that go before the user's.
COMMANDS = {
    "train": ["train"],
    "serve": ["serve"],
    "table": ["benchmarks.table"],
    "import": ["train.exchange", "import"],
    "export": ["train.exchange", "export"],
}


def main() -> int:
    """Run the command line; returns the exit status, 2 if there is no such command."""
    command, *words = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print((__doc__ or "").partition("\nA module")[0].rstrip())
        return 0
    if command == "--version":
        print(f"ddm {version('ddm')}")
        return 0
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: the command must be one of {known}, got {command!r}", file=sys.stderr)
        return 2
    _find_packages_here()
    package, *first = COMMANDS[command]
    status: int = import_module(f"{package}.__main__").main([*first, *words])
    return status


def _find_packages_here() -> None:
    """Put this folder before PYTHONPATH, and keep the current folder off the path of child processes."""
    here = str(Path(__file__).parent)
    os.environ["PYTHONSAFEPATH"] = "1"
    if given := os.environ.get("PYTHONPATH"):
        os.environ["PYTHONPATH"] = os.pathsep.join([here, given])
        sys.path.insert(0, here)
