"""Which images begin next, so that every request has its share of those under way."""

from heapq import heapify, heappop, heappush

from serve.engine.state import Request


class Admission:
    """Admits the images of all requests.

    Room goes to the request with the fewest images under way, one image at a time; the earlier
    request first among equals. A request below its share, `max_active / requests` but at least
    one image, need not wait for room: it would have to wait for the images of the others to end,
    which may take all their steps. So `max_active` bounds the images under way of requests that
    came together, and n requests that came one after another may have up to
    `max_active (1 + ln n) + n` under way.
    """

    def __init__(self, max_active: int) -> None:
        self.max_active = max_active
        self.active = 0  # images under way, of all requests
        self._requests: set[Request] = set()
        self._waiting: dict[Request, None] = {}  # those with images to begin, in order of arrival

    def add(self, request: Request) -> None:
        """Take a request in."""
        self._requests.add(request)
        self._waiting[request] = None

    def image_ended(self) -> None:
        """Count one image of a request less under way."""
        self.active -= 1

    def remove(self, request: Request) -> None:
        """Let a request go, with its images that are still under way."""
        self._requests.remove(request)
        self._waiting.pop(request, None)
        self.active -= request.active

    def begin(self) -> list[tuple[Request, range]]:
        """The images that begin now: places in their requests."""
        if not self._waiting:
            return []
        share = max(1, self.max_active // len(self._requests))
        first: dict[Request, int] = {}
        heap = [(request.active, i, request) for i, request in enumerate(self._waiting)]
        heapify(heap)
        while heap:
            active, i, request = heappop(heap)
            if active >= share and self.active >= self.max_active:
                break
            first.setdefault(request, request.begun)
            request.begun += 1
            self.active += 1
            if request.begun < len(request.index):
                heappush(heap, (active + 1, i, request))
            else:
                del self._waiting[request]
        return [(request, range(begun, request.begun)) for request, begun in first.items()]
