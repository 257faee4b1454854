"""Progress on standard error: bars in a terminal, log lines every 30 s anywhere else."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)

EVERY_S = 30.0  # between two log lines of one task


class _Lines(Progress):
    """Tasks without bars: each one's progress is logged every `EVERY_S` seconds, and when it is complete."""

    def __init__(self) -> None:
        super().__init__(disable=True)
        self.logged: dict[TaskID, float] = {}

    def add_task(self, *args: Any, **fields: Any) -> TaskID:
        task = super().add_task(*args, **fields)
        self.logged[task] = time.monotonic()
        return task

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._log(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._log(task_id)

    def _log(self, task_id: TaskID) -> None:
        task = self._tasks[task_id]
        now, last = time.monotonic(), self.logged[task_id]
        if not task.finished and now - last < EVERY_S:
            return
        # A finished task is logged once.
        self.logged[task_id] = float("inf") if task.finished else now
        if last < float("inf"):
            text = f"{task.description:<24} {task.completed:,.0f} of {task.total:,.0f}"
            log.info("%s in %.0f s  %s", text, task.elapsed or 0, task.fields["note"])


def bars() -> Progress:
    """A block of progress bars; its tasks have a field `note`, shown at the end of the line."""
    if not sys.stderr.isatty():
        return _Lines()
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


@contextmanager
def bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """One progress bar; yields the function that advances it, by 1 or by the number given."""
    with bars() as progress:
        task = progress.add_task(description, total=total, note="")
        yield lambda count=1: progress.advance(task, count)
