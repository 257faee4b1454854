"""Who computes next among those that share a device: the one with the work of lowest rank."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

Rank = tuple[float, ...]  # lower is sooner


class Turn:
    """`places` of those that ask compute at once. It belongs to one event loop.

    Unlike a semaphore's, the order is that of the work at the moment when a place becomes free,
    not that of asking, and who has no work waits without a place.
    """

    def __init__(self, places: int = 1) -> None:
        self._free = places
        self._waiting: dict[asyncio.Future[None], Callable[[], Rank | None]] = {}
        self._due = False

    @asynccontextmanager
    async def of(self, rank: Callable[[], Rank | None]) -> AsyncIterator[None]:
        """Wait for a place and hold it; rank: of the work there is now, None if there is none."""
        granted = asyncio.get_running_loop().create_future()
        self._waiting[granted] = rank
        self.changed()
        try:
            await granted
        except asyncio.CancelledError:
            self._waiting.pop(granted, None)
            if granted.done() and not granted.cancelled():
                self._release()
            raise
        try:
            yield
        finally:
            self._release()

    def changed(self) -> None:
        """Ranks may have changed: places are given once the running task lets others run, so that
        what it does until then counts.
        """
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._grant)

    def _release(self) -> None:
        self._free += 1
        self.changed()

    def _grant(self) -> None:
        self._due = False
        while self._free:
            ranked = [(rank(), granted) for granted, rank in self._waiting.items()]
            able = [(rank, granted) for rank, granted in ranked if rank is not None]
            if not able:
                return
            _, granted = min(able, key=lambda each: each[0])
            del self._waiting[granted]
            if not granted.done():  # or it was cancelled just now
                self._free -= 1
                granted.set_result(None)
