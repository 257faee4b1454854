"""Whether an expert can be reached, judged by its calls."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable
from typing import TypeVar

from serve.engine.expert import Expert, UnavailableError

log = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSE_S = 5.0  # calls lost further apart than this do not count as one outage


async def reach(call: Awaitable[T], timeout_s: float | None) -> T:
    """The result of a call. Raises `UnavailableError` if it is late, or cancelled by the expert."""
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except TimeoutError as error:
        raise UnavailableError("no answer in time") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise UnavailableError("the call was cancelled") from error


class Availability:
    """One expert's: `alive` until its calls have been lost for `retry_s`, then until it is back."""

    def __init__(self, expert: Expert, retry_s: float, timeout_s: float | None) -> None:
        self.expert, self.retry_s, self.timeout_s = expert, retry_s, timeout_s
        self.alive = True
        self._first_lost = 0.0  # of the calls lost in a row
        self._last_lost = -math.inf  # -inf: the last call was answered

    def answered(self) -> None:
        """The expert answered a call."""
        self._last_lost = -math.inf

    def lost(self, began: float, error: UnavailableError) -> float:
        """A call that began then was lost. Returns for how long calls have been lost, in seconds."""
        now = time.monotonic()
        if began - self._last_lost > _PAUSE_S:
            log.warning("%s is unavailable: %s", self.expert.name, error)
            self._first_lost = now
        self._last_lost = now
        return now - self._first_lost

    def gone(self, lost_for_s: float) -> bool:
        """Whether the expert counts as away after calls were lost for that long."""
        return lost_for_s >= self.retry_s and self._last_lost != -math.inf

    async def back(self) -> None:
        """Check the expert until it can be reached. Each kind of failure is logged once."""
        name, seen = self.expert.name, set[type[Exception]]()
        while not self.alive:
            try:
                await reach(self.expert.check(), self.timeout_s)
            except Exception as error:
                if type(error) not in seen and not isinstance(error, UnavailableError):
                    log.exception("the health check of %s failed", name)
                seen.add(type(error))
                await asyncio.sleep(min(1.0, self.retry_s))
            else:
                log.warning("%s is back", name)
                self.alive = True
                self.answered()
