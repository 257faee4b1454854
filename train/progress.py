"""Progress bars, on the terminal's standard error only; silent anywhere else."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def bars() -> Progress:
    """A block of progress bars; its tasks have a field `note`, shown at the end of the line."""
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


@contextmanager
def bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """One progress bar; call what it gives to advance it, by 1 or by the number given."""
    with bars() as progress:
        task = progress.add_task(description, total=total, note="")
        yield lambda count=1: progress.advance(task, count)
