"""The order in which images wait for an expert: round robin over requests."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator

from serve.engine.state import ImageState, Request


class FairQueue:
    """Images that wait for one expert. Requests take turns of one image each.

    An image waits for at most as many images of any other request as there are ahead of it in its
    own: with r requests in the queue, the first image of each is among the next r that are taken.
    Within a request the order is first come, first served.
    """

    def __init__(self) -> None:
        self._of_request: OrderedDict[Request, deque[ImageState]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[ImageState]:
        for states in self._of_request.values():
            yield from states

    def peek(self) -> ImageState:
        """The image that `pop` takes next. Raises `StopIteration` if the queue is empty."""
        return next(iter(self._of_request.values()))[0]

    def push(self, state: ImageState) -> None:
        """Add an image behind the others of its request; a new request has its turn last."""
        self._of_request.setdefault(state.request, deque()).append(state)
        self._length += 1

    def push_first(self, states: Iterable[ImageState]) -> None:
        """Put images back that were taken in vain, as the next ones, in their order."""
        for state in reversed(list(states)):
            self._of_request.setdefault(state.request, deque()).appendleft(state)
            self._of_request.move_to_end(state.request, last=False)
            self._length += 1

    def pop(self) -> ImageState:
        """Take the next image; its request has its next turn after all others."""
        request, states = next(iter(self._of_request.items()))
        state = states.popleft()
        self._length -= 1
        if states:
            self._of_request.move_to_end(request)
        else:
            del self._of_request[request]
        return state

    def remove(self, condition: Callable[[ImageState], bool]) -> None:
        """Take out the images that meet a condition."""
        for request, states in list(self._of_request.items()):
            kept = deque(state for state in states if not condition(state))
            self._length -= len(states) - len(kept)
            if kept:
                self._of_request[request] = kept
            else:
                del self._of_request[request]
