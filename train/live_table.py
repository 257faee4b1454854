"""One table of all trainings: live in a terminal, lines in the log anywhere else."""

import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from train.progress import EVERY_S

log = logging.getLogger(__name__)

_STATES = ("running", "waiting", "stopped", "failed", "done")  # in the order of the table


@dataclass
class Row:
    """What is known of one training.

    name: such as `expert 03: cats`
    steps, batch: of the whole training, and images per step
    state: waiting, running, stopped, failed or done
    where: the node and process that train it, or the last one that did
    began: the step and the time of the first report of this attempt, from which the speed counts
    logged: when its last line was logged
    """

    name: str
    steps: int
    batch: int
    state: str = "waiting"
    where: str = ""
    step: int = 0
    loss: float = math.nan
    began: tuple[int, float] | None = None
    at: float = 0.0
    logged: float = field(default_factory=time.monotonic)

    @property
    def steps_per_s(self) -> float:
        """The speed of this attempt; 0 while it is not known."""
        if self.began is None or self.at <= self.began[1]:
            return 0.0
        return (self.step - self.began[0]) / (self.at - self.began[1])

    @property
    def cells(self) -> tuple[str, ...]:
        """The columns of the table, after the name."""
        speed = self.steps_per_s
        running = self.state == "running" and speed > 0
        left = str(timedelta(seconds=round((self.steps - self.step) / speed))) if running else ""
        rate = f"{speed * self.batch:,.0f} images/s" if speed > 0 else ""
        loss = "" if math.isnan(self.loss) else f"loss {self.loss:.4f}"
        left = f"{left} left" if left else ""
        return self.where, self.state, f"{self.step:,} of {self.steps:,}", loss, rate, left


class LiveTable:
    """The rows of trainings that run side by side: node, state, step, loss, images per second, time left."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.live = Live(
            get_renderable=self.table,
            console=Console(stderr=True),
            refresh_per_second=2,
            transient=False,
        )
        self.shown = sys.stderr.isatty()

    def __enter__(self) -> Self:
        if self.shown:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self.live.stop()

    def state(self, i: int, state: str, where: str | None = None) -> None:
        """Row i is in a new state, and a new place if it is given."""
        row = self.rows[i]
        row.state = state
        row.began = None if state == "running" else row.began
        if where is not None:
            row.where = where
        if state in ("running", "done"):
            self._log(row)

    def step(self, i: int, step: int, loss: float) -> None:
        """Row i has done some steps; its loss is NaN where it has only resumed there."""
        row, now = self.rows[i], time.monotonic()
        row.step, row.at = step, now
        if math.isnan(loss):
            row.began = step, now
        else:
            row.began = row.began or (step, now)
            row.loss = loss
        if now - row.logged >= EVERY_S:
            self._log(row)

    def table(self) -> Table:
        """The table as it is now: those that are done come last."""
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for row in sorted(self.rows, key=lambda row: _STATES.index(row.state)):
            table.add_row(row.name, *row.cells)
        return table

    def _log(self, row: Row) -> None:
        row.logged = time.monotonic()
        if not self.shown:
            cells = "  ".join(cell for cell in row.cells if cell)
            log.info("%-24s %s", row.name, cells)
