"""Quotas of keys: how much each may ask for."""

import math
import time
from collections.abc import Callable

from serve.engine.shares import Key


class Quotas:
    """What each key has used of its images and expert evaluations per minute.

    A key may use a minute's worth at once; it comes back evenly. A request for more than that is
    accepted when nothing is used, and counts in full.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._used: dict[tuple[Key, str], tuple[float, float]] = {}  # so much, at that time

    def wait_s(self, key: Key, images: int, evaluations: float) -> float:
        """In how many seconds the key may ask for that much, 0 for now."""
        return max(
            self._wait_s(key, "images", key.images_per_minute, images),
            self._wait_s(key, "nfe", key.nfe_per_minute, evaluations),
        )

    def use(self, key: Key, images: int, evaluations: float) -> None:
        """Count what a key was granted."""
        for what, per_minute, amount in (
            ("images", key.images_per_minute, images),
            ("nfe", key.nfe_per_minute, evaluations),
        ):
            if per_minute is not None:
                used = self._now_used(key, what, per_minute) + amount
                self._used[key, what] = used, self.clock()

    def _wait_s(self, key: Key, what: str, per_minute: float | None, amount: float) -> float:
        if per_minute is None:
            return 0.0
        over = self._now_used(key, what, per_minute) + min(amount, per_minute) - per_minute
        return max(0.0, over * 60 / per_minute)

    def _now_used(self, key: Key, what: str, per_minute: float) -> float:
        used, then = self._used.get((key, what), (0.0, -math.inf))
        return max(0.0, used - (self.clock() - then) * per_minute / 60)
