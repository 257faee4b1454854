"""The command lines of the benchmarks: `--help`, and errors in one line."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ddm.errors import ConfigError, DdmError
from train import stopping

if TYPE_CHECKING:
    from train.config import Config


class Parser(argparse.ArgumentParser):
    """Arguments of `python -m benchmarks.NAME` or `ddm NAME`; the module's docstring is the help."""

    def __init__(self, name: str, doc: str | None) -> None:
        super().__init__(
            prog=f"ddm {name}"
            if Path(sys.argv[0]).stem == "ddm"
            else f"python -m benchmarks.{name}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError` instead of printing the usage."""
        raise ConfigError(message)


def config_of(words: Sequence[str]) -> "Config":
    """The config that the first word names, with the others as overrides. Raises `ConfigError`."""
    from train.config import config_file, load_config  # imports torch

    path = config_file(words[0])
    if path is None:
        raise ConfigError(f"the first word must be a config, got {words[0]!r}")
    return load_config(path, words[1:])


def run(
    parser: Parser, work: Callable[[argparse.Namespace], object], words: Sequence[str] | None = None
) -> int:
    """Parse the words (default: the command line's), do the work, and return the exit status.

    0: done, or help was asked for. 2: an error that the user can fix, in one line on stderr. 128
    and the signal's number: stopped, what was being trained with a checkpoint.
    """
    try:
        arguments = parser.parse_intermixed_args(words)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit:  # after --help
        return 0
    try:
        with stopping.on_signals():
            work(arguments)
    except stopping.Stopped as stop:
        again = "interrupted; the same command starts again, or resumes"
        print(stop if stop.steps else again, file=sys.stderr)
        return 128 + stop.signum
    except DdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
