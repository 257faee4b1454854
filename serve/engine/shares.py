"""How requests share the engine: who goes first, counted in expert evaluations."""

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T", bound=Hashable)

_SIZE = 8  # requests whose costs differ by less than this factor may be of one size


@dataclass(frozen=True)
class Key:
    """Whose requests share by weight; those of a higher priority always go before the others.

    The rest are its quotas, None for no limit: requests accepted and not done, and images and
    expert evaluations per minute (`Quotas`).
    """

    name: str
    weight: float = 1.0
    priority: int = 0
    requests: int | None = None
    images_per_minute: float | None = None
    nfe_per_minute: float | None = None


ANYONE = Key("anyone")  # where no token is asked for


class Flow(NamedTuple):
    """Requests that take turns: of one key, and of about one size."""

    key: Key
    size: int


def size_of(cost: float) -> int:
    """The size of a request of that many expert evaluations: the whole part of log8."""
    return int(math.log(max(1.0, cost), _SIZE))


class Shares:
    """Weighted fair queueing in two levels: keys share by weight, and the sizes of a key equally.

    Each has a virtual time, the evaluations it was given over its weight, and the earliest goes
    first. So a small request does not wait for the many images of a large one, and the large one
    has its half however many small ones come. Who comes back from a pause is at most `credit`
    behind: what is short is over before it has to share, and nobody saves up for more.
    """

    def __init__(self, credit: float) -> None:
        self.credit = credit
        self.smallest = 0  # size of those that are active
        self._keys = _Clock[Key](credit)
        self._sizes: dict[Key, _Clock[int]] = {}
        self._active = Counter[int]()

    def enter(self, flow: Flow) -> None:
        """A request begins."""
        self._keys.enter(flow.key)
        self._sizes.setdefault(flow.key, _Clock(self.credit)).enter(flow.size)
        self._active[flow.size] += 1
        self.smallest = min(self._active)

    def leave(self, flow: Flow) -> None:
        """A request ends."""
        self._keys.leave(flow.key)
        self._sizes[flow.key].leave(flow.size)
        if not self._sizes[flow.key].active:
            del self._sizes[flow.key]
        self._active -= Counter({flow.size: 1})
        self.smallest = min(self._active, default=0)

    def charge(self, flow: Flow, evaluations: float) -> None:
        """Count evaluations that an active flow is given."""
        self._keys.charge(flow.key, evaluations / flow.key.weight)
        self._sizes[flow.key].charge(flow.size, evaluations)

    def rank(self, flow: Flow) -> tuple[float, ...]:
        """An active flow's; lower is sooner."""
        key, size = flow
        return -key.priority, self._keys.time[key], self._sizes[key].time[size], size

    def joins(self, flow: Flow, first: Flow) -> bool:
        """Whether a flow's images may be added to those of another one, which is first: it is not
        larger, and not ahead of its share.
        """
        if flow.key.priority != first.key.priority or flow.size > first.size:
            return False
        if flow.key == first.key:
            time, mine, other = self._sizes[flow.key].time, flow.size, first.size
            return time[mine] <= time[other] + self.credit
        return self._keys.time[flow.key] <= self._keys.time[first.key] + self.credit


class _Clock(Generic[T]):
    """Virtual times of those that are active, which come and go (start-time fair queueing)."""

    def __init__(self, credit: float) -> None:
        self.credit = credit
        self.now = 0.0  # the latest time at which somebody was served
        self.time: dict[T, float] = {}
        self.active = Counter[T]()

    def enter(self, who: T) -> None:
        if not self.active[who]:
            self.time[who] = max(self.time.get(who, -math.inf), self.now - self.credit)
        self.active[who] += 1

    def leave(self, who: T) -> None:
        self.active -= Counter({who: 1})
        if not self.active:
            self.time.clear()

    def charge(self, who: T, amount: float) -> None:
        self.now = max(self.now, self.time[who])
        self.time[who] += amount
