"""The order in which images wait, for an expert or to be routed: requests take turns."""

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator

from serve.engine.shares import Flow, Shares
from serve.engine.state import ImageState, Request
from serve.engine.turn import Rank

_entries = itertools.count()


class FairQueue:
    """Images that wait. Flows go in the order of their shares, and the requests of a flow take
    turns of one image each.

    An image waits for at most as many images of any other request of its flow as there are ahead
    of it in its own: with r requests in the queue, the first image of each is among the next r
    that are taken. Within a request the order is first come, first served.
    """

    def __init__(self, shares: Shares) -> None:
        self.shares = shares
        self._flows: dict[Flow, OrderedDict[Request, deque[ImageState]]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[ImageState]:
        for requests in self._flows.values():
            for states in requests.values():
                yield from states

    def rank(self) -> Rank | None:
        """Of the first flow, and among queues of one flow that of its first image's arrival; None
        for an empty queue.
        """
        if not self._flows:
            return None
        flow = min(self._flows, key=self.shares.rank)
        return *self.shares.rank(flow), self._peek(flow).entry

    def push(self, state: ImageState) -> None:
        """Add an image behind the others of its request; a new request has its turn last."""
        state.entry = next(_entries)
        self._of(state.request).append(state)
        self._length += 1

    def push_first(self, states: Iterable[ImageState]) -> None:
        """Put images back that were taken in vain, as the next ones, in their order."""
        for state in reversed(list(states)):
            self._of(state.request).appendleft(state)
            self._flows[state.request.flow].move_to_end(state.request, last=False)
            self._length += 1

    def take(
        self, most: int, quantum: int, fill: int, alone: Callable[[ImageState], bool]
    ) -> list[ImageState]:
        """Take the images that go next, at most `most`; one that is to be `alone` comes alone.

        The first flow's, and those of others that are no larger and not ahead of their share.
        quantum: at most so many if there are smaller requests, in any queue, so that those need
        not wait for long. fill: others are added up to that length.
        """
        flows = sorted(self._flows, key=self.shares.rank)
        taken: list[ImageState] = []
        for flow in flows:
            joins = flow is flows[0] or self.shares.joins(flow, flows[0])
            limit = most if flows[0].size <= self.shares.smallest else min(most, quantum)
            limit = limit if joins else min(limit, fill)
            while flow in self._flows and len(taken) < limit:
                if taken and (alone(taken[0]) or alone(self._peek(flow))):
                    return taken
                taken.append(self._pop(flow))
        return taken

    def remove(self, condition: Callable[[ImageState], bool]) -> None:
        """Take out the images that meet a condition."""
        for flow, requests in list(self._flows.items()):
            for request, states in list(requests.items()):
                kept = deque(state for state in states if not condition(state))
                self._length -= len(states) - len(kept)
                requests[request] = kept
                self._drop_if_empty(flow, request)

    def _of(self, request: Request) -> deque[ImageState]:
        return self._flows.setdefault(request.flow, OrderedDict()).setdefault(request, deque())

    def _peek(self, flow: Flow) -> ImageState:
        return next(iter(self._flows[flow].values()))[0]

    def _pop(self, flow: Flow) -> ImageState:
        """Take a flow's next image; its request has its next turn after all others."""
        request, states = next(iter(self._flows[flow].items()))
        state = states.popleft()
        self._length -= 1
        self._flows[flow].move_to_end(request)
        self._drop_if_empty(flow, request)
        return state

    def _drop_if_empty(self, flow: Flow, request: Request) -> None:
        if not self._flows[flow][request]:
            del self._flows[flow][request]
        if not self._flows[flow]:
            del self._flows[flow]
