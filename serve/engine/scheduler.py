"""The step engine: continuous batching at the level of the ODE step.

Every image is a path of its own: its sampler, its place in time, what routing remembers of it. A path that needs expert k
waits in k's queue; whenever k is free it takes up to `max_batch` of what waits there, whatever request and whatever step it
belongs to; the answers move those paths on, which are routed, together with whoever else is ready, and queued again. There is
no barrier between experts and none between requests. Nothing here knows of Ray, HTTP or devices: experts are asked through
`Expert`, and all of it runs on one asyncio loop, with the arithmetic of routing in a thread.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from serve.engine.expert import (
    Expert,
    ExpertAwayError,
    ExpertFailedError,
    ServingError,
    UnavailableError,
    in_thread,
)
from serve.engine.metrics import Metrics
from serve.engine.state import ImageState, Request
from serve.engine.step import advance

log = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSE_S = 5.0  # between two calls of an expert: then the loss of one says nothing about the time before the other


class Engine:
    """Moves the paths of all jobs. `start` it, `run` jobs, `close` it.

    experts: in the order of the clusters. turn: acquired for routing, so that it shares a device with those experts that have the
    same. max_batch: images a call. max_active: images on their way at once; others wait, first come first served.
    call_timeout_s: after which a call counts as lost, None for never. retry_s: how long an expert may be unreachable before it
    counts as away; then jobs that need it end with `ExpertAwayError` (`degraded="fail"`), or alpha is renormalized over the
    others (`"renormalize"`) until it is back.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        turn: asyncio.Semaphore,
        *,
        max_batch: int = 64,
        max_active: int = 256,
        call_timeout_s: float | None = 30.0,
        retry_s: float = 60.0,
        degraded: Literal["fail", "renormalize"] = "fail",
        metrics: Metrics | None = None,
    ) -> None:
        self.experts, self.turn = experts, turn
        self.max_batch, self.max_active = max_batch, max_active
        self.call_timeout_s, self.retry_s, self.degraded = call_timeout_s, retry_s, degraded
        self.metrics = metrics or Metrics()
        self.alive = [True] * len(experts)
        self.requests: dict[Request, None] = {}  # in the order in which they came
        self._ready: deque[ImageState] = deque()  # to be routed
        self._queues: list[deque[ImageState]] = [deque() for _ in experts]
        self._lost_since = [0.0] * len(experts)  # when the first of several calls in a row was lost
        self._lost_last = [-math.inf] * len(
            experts
        )  # and the last of them; -inf: it was reached since
        self._wakes = [
            asyncio.Event() for _ in range(len(experts) + 1)
        ]  # each expert's, and routing's
        self._workers: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(self) -> None:
        """Begin to work."""
        self._employ(self._route)
        for k, expert in enumerate(self.experts):
            for _ in range(expert.calls):
                self._employ(self._ask, k)

    async def close(self) -> None:
        """Stop; jobs that are not done end with an error, and so do those that come later."""
        self._closed = True
        workers = list(self._workers)
        for worker in workers:
            worker.cancel()
        for request in list(self.requests):
            request.fail(ServingError("the server is stopping"))
        await asyncio.gather(*workers, return_exceptions=True)

    @property
    def cost(self) -> int:
        """Images × steps that were accepted and are still to come."""
        return sum(request.cost for request in self.requests)

    def waiting(self, k: int) -> int:
        """Images that wait for expert k."""
        return len(self._queues[k])

    async def run(self, request: Request) -> None:
        """Make the job's images. Cancelling it, as a deadline does, takes them off the engine at once.

        Raises `ServingError`.
        """
        if self._closed:
            raise ServingError("the server is stopping")
        self.requests[request] = None
        self._wakes[-1].set()
        try:
            await request.done
        finally:
            del self.requests[request]
            if len(request.images) < len(request.index):
                self._drop(lambda state: state.request is request)
            self._wakes[-1].set()  # there is room for others

    def _employ(self, work: Callable[..., Coroutine[Any, Any, None]], *of: int) -> None:
        """Keep a worker. One that ends by itself is our own fault: the jobs of that moment fail, and another takes its place."""

        def ended(worker: asyncio.Task[None]) -> None:
            self._workers.discard(worker)
            if not worker.cancelled():
                log.error("a worker of the engine ended", exc_info=worker.exception())
                for request in list(self.requests):
                    request.fail(ServingError("the engine failed"))
                self._employ(work, *of)

        worker = asyncio.create_task(work(*of))
        self._workers.add(worker)
        worker.add_done_callback(ended)

    def _drop(self, condition: Callable[[ImageState], bool]) -> None:
        """Take the paths that meet a condition out of every queue."""
        for queue in (self._ready, *self._queues):
            kept = [state for state in queue if not condition(state)]
            if len(kept) < len(queue):
                queue.clear()
                queue.extend(kept)

    # Routing: one worker

    async def _route(self) -> None:
        wake = self._wakes[-1]
        while True:
            await wake.wait()
            async with self.turn:
                wake.clear()
                states, begun = list(self._ready), self._begin()
                self._ready.clear()
                if not states and not begun:
                    continue
                started = time.perf_counter()
                alive = (
                    None if all(self.alive) or self.degraded == "fail" else torch.tensor(self.alive)
                )
                states, failed = await in_thread(advance, states, begun, alive)
                self.metrics.observe("route_seconds", time.perf_counter() - started)
            for request, error in failed:
                self._mistaken(request, error)
            for state in states:
                if state.request in self.requests:  # it may have left meanwhile
                    self._report(state)
                    self._enqueue(state, alive)

    def _begin(self) -> list[tuple[Request, range]]:
        """The next images for which there is room, in the order in which they came: their places in their jobs."""
        room = self.max_active - sum(
            request.begun - len(request.images) for request in self.requests
        )
        begun = []
        for request in self.requests:
            places = range(request.begun, min(request.begun + room, len(request.index)))
            if places:
                begun.append((request, places))
                request.begun, room = places.stop, room - len(places)
        return begun

    def _report(self, state: ImageState) -> None:
        """Report the call that has brought the path here."""
        request, record = state.request, state.record
        if record is None:
            return
        state.record = None
        request.calls += record.calls
        if request.trace:
            request.record.setdefault(state.place, []).append(record)
        if request.watch is not None and state.denoised is not None:
            try:
                request.watch(state.place, record, state.denoised[0])
            except Exception as error:  # the listener's own
                self._mistaken(request, error)

    def _mistaken(self, request: Request, error: Exception) -> None:
        """End a job over which something that is no expert stumbled."""
        if not request.done.done():
            log.error("an image failed", exc_info=error)
            request.fail(ServingError(f"an image failed: {error}"))

    def _enqueue(self, state: ImageState, alive: Tensor | None) -> None:
        """Hand a path, routed among those `alive`, to the experts that it waits for, or its image to its job."""
        request = state.request
        if state.image is not None:
            request.images[state.place] = state.image
            self.metrics.count("images")
            self._wakes[-1].set()  # there is room for another
            if len(request.images) == len(request.index) and not request.done.done():
                request.done.set_result(None)
            return
        if alive is not None:
            weights = request.plan.router.weights
            wanted = torch.ones_like(alive) if weights is None else weights.cpu() > 0
            away = [self.experts[k].name for k in (wanted & ~alive).nonzero()[:, 0].tolist()]
            request.absent.update(away)
            if not (wanted & alive).any():
                request.fail(
                    ExpertAwayError(f"{', '.join(away)} {'are' if len(away) > 1 else 'is'} away")
                )
                return
        gone = [k for k in state.waits_for if not self.alive[k]]
        if gone:
            self._deprive(gone[0], [state])
            return
        for k in state.waits_for:
            self._queues[k].append(state)
            self._wakes[k].set()

    # Asking: as many workers an expert as it takes calls at once

    async def _ask(self, k: int) -> None:
        expert, queue, wake = self.experts[k], self._queues[k], self._wakes[k]
        while True:
            while not queue:
                wake.clear()
                await wake.wait()
            lost: UnavailableError | None = None
            async with expert.turn:
                asked = self._take(k)
                if not asked:
                    continue
                began = time.monotonic()
                try:
                    answers = await self._call(k, [state for state, _ in asked])
                except UnavailableError as error:
                    lost = error
                except Exception as error:
                    self._failed(k, self._still(asked), error)
                    continue
            if lost is not None:
                await self._lost(k, self._still(asked), began, lost)
                continue
            self._lost_last[k] = -math.inf
            said = dict(zip((state for state, _ in asked), answers.split(1), strict=True))
            for state in self._still(asked):
                state.answers[k] = said[state]
                state.failures.pop(k, None)
                if len(state.answers) == len(state.waits_for):
                    self._ready.append(state)
            self._wakes[-1].set()

    def _still(self, asked: list[tuple[ImageState, int]]) -> list[ImageState]:
        """Those that still wait for what they asked: their job is there, and they were not routed again meanwhile."""
        return [
            state for state, turn in asked if state.turn == turn and state.request in self.requests
        ]

    def _take(self, k: int) -> list[tuple[ImageState, int]]:
        """The next call's paths, with their turns. One that the expert has failed is asked for alone: it may be its own fault."""
        queue, states = self._queues[k], list[ImageState]()
        while queue and len(states) < self.max_batch:
            if states and (k in states[0].failures or k in queue[0].failures):
                break
            states.append(queue.popleft())
        return [(state, state.turn) for state in states]

    async def _call(self, k: int, states: list[ImageState]) -> Tensor:
        name = self.experts[k].name
        x = torch.cat([state.x for state in states if state.x is not None])
        t = torch.stack([state.t for state in states if state.t is not None])
        started = time.perf_counter()
        answers = await self._reach(self.experts[k](x, t))
        if answers.shape != x.shape:
            raise ValueError(f"answered {tuple(answers.shape)} to {tuple(x.shape)}")
        self.metrics.observe("call_seconds", time.perf_counter() - started, expert=name)
        self.metrics.observe("batch_fill", len(states) / self.max_batch, expert=name)
        self.metrics.count("calls", len(states), expert=name)
        return answers

    async def _reach(self, call: Awaitable[T]) -> T:
        """What an expert says. Raises `UnavailableError` where it is late, or somebody but us has cancelled the call."""
        try:
            async with asyncio.timeout(self.call_timeout_s):
                return await call
        except TimeoutError as error:
            raise UnavailableError("no answer in time") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise UnavailableError("the call was cancelled") from error

    def _failed(self, k: int, states: list[ImageState], error: Exception) -> None:
        """An expert answered with an error: each image is asked for again, alone, and gives up the third time."""
        name = self.experts[k].name
        log.warning("%s failed on %d images: %r", name, len(states), error)
        self.metrics.count("retries", len(states), expert=name)
        for state in states:
            state.failures[k] = state.failures.get(k, 0) + 1
            if state.failures[k] >= 3:
                state.request.fail(ExpertFailedError(f"{name} failed: {error}"))
        self._return(k, [state for state in states if state.failures[k] < 3])

    def _return(self, k: int, states: list[ImageState], first: bool = False) -> None:
        """Put paths that were asked for in vain back into the queue, at its end or as its first."""
        if not self.alive[k]:  # another worker has given it up meanwhile
            self._deprive(k, states)
        elif first:
            self._queues[k].extendleft(reversed(states))
        else:
            self._queues[k].extend(states)

    # Losing an expert

    async def _lost(
        self, k: int, states: list[ImageState], began: float, error: UnavailableError
    ) -> None:
        """Wait a little before the next try; after `retry_s` of them the expert counts as away."""
        now, name = time.monotonic(), self.experts[k].name
        if began - self._lost_last[k] > _PAUSE_S:
            log.warning("%s is unavailable: %s", name, error)
            self._lost_since[k] = now
        self._lost_last[k] = now
        self.metrics.count("retries", len(states), expert=name)
        self._return(k, states, first=True)
        away_for = now - self._lost_since[k]
        await asyncio.sleep(min(1.0, max(0.05, away_for / 4)))
        if away_for < self.retry_s or self._lost_last[k] == -math.inf:
            return
        if self.alive[k]:
            log.error("%s has been unavailable for %.0f s and counts as away", name, away_for)
            self.alive[k] = False
            states = list(self._queues[k])
            self._queues[k].clear()
            self._deprive(k, states)
        while not self.alive[k]:
            try:
                await self._reach(self.experts[k].check())
            except Exception:
                await asyncio.sleep(min(1.0, self.retry_s))
            else:
                log.warning("%s is back", name)
                self.alive[k], self._lost_last[k] = True, -math.inf

    def _deprive(self, k: int, states: list[ImageState]) -> None:
        """What is to become of paths whose expert is away."""
        if self.degraded == "fail":
            for state in states:
                state.request.fail(ExpertAwayError(f"{self.experts[k].name} is away"))
            return
        leaving = set(states)
        self._drop(lambda state: state in leaving)
        for state in states:
            state.turn += 1
            state.memory, state.waits_for, state.answers = state.before, {}, {}
        self._ready.extend(states)
        self._wakes[-1].set()
