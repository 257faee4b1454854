"""The step engine: continuous batching at the level of the ODE step.

An image that needs expert k waits in k's queue. Whenever k is free, it takes up to `max_batch`
images from there, of any request and at any step. Images with all their answers take a step,
are routed together and queued again. There is no barrier between experts and none between
requests. Whose images go next is decided whenever a device is free (`turn`, `shares`,
`fair_queue`), so a small request is not held up by large ones.

Everything runs on one asyncio loop, with the arithmetic in a thread. Experts are called through
`Expert`: nothing here depends on Ray, HTTP or devices.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from serve.engine.admission import Admission
from serve.engine.advance import advance
from serve.engine.availability import Availability, reach
from serve.engine.expert import (
    Expert,
    ExpertAwayError,
    ExpertFailedError,
    ServingError,
    UnavailableError,
    in_thread,
)
from serve.engine.fair_queue import FairQueue
from serve.engine.metrics import Metrics
from serve.engine.shares import Shares
from serve.engine.stacking import Row, stacked
from serve.engine.state import ImageState, Request
from serve.engine.turn import Turn

log = logging.getLogger(__name__)

_FAILURES = 3  # failed calls in a row after which an image's request ends
# Images in a call of a large request while there are smaller ones, on a device that computes one
# after another. Of more, each takes hardly less time.
_QUANTUM = 8


class Engine:
    """Samples the images of all requests. `start` it, `run` requests, `close` it.

    experts: in the order of the clusters. turn: taken for routing, which so shares a device with
    the experts that have the same. max_batch: images per call. max_active: images under way (see
    `Admission`). parallel: images whose call takes about as long as that of one: 1 on a CPU, many
    on a GPU. call_timeout_s: after which a call counts as lost, None for never.
    retry_s: after how long without an answer an expert counts as away; then requests that need
    it end with `ExpertAwayError` (`degraded="fail"`), or alpha is renormalized over the others
    (`"renormalize"`) until it is back. shares: with other engines that have the same turn.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        turn: Turn,
        *,
        max_batch: int = 64,
        max_active: int = 256,
        parallel: int = 1,
        call_timeout_s: float | None = 30.0,
        retry_s: float = 60.0,
        degraded: Literal["fail", "renormalize"] = "fail",
        metrics: Metrics | None = None,
        shares: Shares | None = None,
    ) -> None:
        self.experts, self.turn = experts, turn
        self.max_batch, self.call_timeout_s = max_batch, call_timeout_s
        self.degraded, self.parallel = degraded, min(parallel, max_batch)
        self.quantum = min(_QUANTUM * self.parallel, max_batch)
        self.metrics = metrics or Metrics()
        self.requests: dict[Request, None] = {}  # in order of arrival
        self._cost = 0.0  # of what they have left
        self._admission = Admission(max_active)
        self._available = [Availability(expert, retry_s, call_timeout_s) for expert in experts]
        self.shares = shares or Shares(credit=float(self.quantum))
        self._ready = FairQueue(self.shares)  # to be moved and routed
        self._queues = [FairQueue(self.shares) for _ in experts]
        self._admitting = False
        self._workers: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(self) -> None:
        """Start the workers."""
        self._start_worker(self._route)
        for k, expert in enumerate(self.experts):
            for _ in range(expert.calls):
                self._start_worker(self._call_expert, k)

    async def close(self) -> None:
        """Stop. Requests under way and requests to come end with an error."""
        self._closed = True
        workers = list(self._workers)
        for worker in workers:
            worker.cancel()
        for request in list(self.requests):
            request.fail(ServingError("the server is stopping"))
        await asyncio.gather(*workers, return_exceptions=True)

    @property
    def alive(self) -> list[bool]:
        """Whether each expert can be reached."""
        return [available.alive for available in self._available]

    @property
    def cost(self) -> int:
        """About how many expert evaluations the requests under way have left."""
        return round(self._cost)

    def waiting(self, k: int) -> int:
        """Images that wait for expert k."""
        return len(self._queues[k])

    async def run(self, request: Request) -> None:
        """Sample a request's images. Cancelling takes them off the engine at once.

        Raises `ServingError`.
        """
        if self._closed:
            raise ServingError("the server is stopping")
        self.requests[request] = None
        self._cost += request.cost
        self.shares.enter(request.flow)
        self._admission.add(request)
        self._admit_soon()
        try:
            await request.done
        finally:
            del self.requests[request]
            self._cost -= request.cost
            self._admission.remove(request)
            if len(request.images) < len(request.index):
                self._remove(lambda state: state.request is request)
            self.shares.leave(request.flow)
            self._admit_soon()  # there is room for others

    def _start_worker(self, work: Callable[..., Coroutine[Any, Any, None]], *args: int) -> None:
        """Start a worker, and another if it ends by itself: then the requests of now fail."""

        def ended(worker: asyncio.Task[None]) -> None:
            self._workers.discard(worker)
            if not worker.cancelled():
                log.error("a worker of the engine ended", exc_info=worker.exception())
                for request in list(self.requests):
                    request.fail(ServingError("the engine failed"))
                self._start_worker(work, *args)

        worker = asyncio.create_task(work(*args))
        self._workers.add(worker)
        worker.add_done_callback(ended)

    def _remove(self, condition: Callable[[ImageState], bool]) -> None:
        """Take the images that meet a condition out of every queue."""
        for queue in (self._ready, *self._queues):
            queue.remove(condition)

    def _admit_soon(self) -> None:
        """Begin images, together with those of other requests that come or leave now."""
        if not self._admitting:
            self._admitting = True
            asyncio.get_running_loop().call_soon(self._admit)

    def _admit(self) -> None:
        self._admitting = False
        for request, places in self._admission.begin():
            for place in places:
                self._make_ready(ImageState(request, place))

    def _make_ready(self, state: ImageState) -> None:
        """Queue an image to be moved and routed."""
        self._ready.push(state)
        self.turn.changed()

    def _queue(self, k: int, state: ImageState) -> None:
        """Queue an image for expert k."""
        self._queues[k].push(state)
        self.experts[k].turn.changed()

    # Routing: one worker

    async def _route(self) -> None:
        while True:
            async with self.turn.of(self._ready.rank):
                # Images that are routed apart drift apart, so none are added to fill up.
                states = self._ready.take(
                    len(self._ready), self.quantum, fill=0, alone=lambda state: False
                )
                if not states:
                    continue
                started = time.perf_counter()
                everyone = all(self.alive) or self.degraded == "fail"
                alive = None if everyone else torch.tensor(self.alive)
                states, failed = await in_thread(advance, states, alive)
                self.metrics.observe("route_seconds", time.perf_counter() - started)
            for request, error in failed.items():
                self._fail(request, error)
            for state in states:
                if state.request in self.requests:  # it may have left meanwhile
                    self._report(state)
                    self._enqueue(state, alive)

    def _report(self, state: ImageState) -> None:
        """Report the last denoiser call of an image."""
        request, record = state.request, state.record
        if record is None:
            return
        state.record = None
        if request.trace:
            request.records.setdefault(state.place, []).append(record)
        if request.on_step is not None and state.denoised is not None:
            try:
                request.on_step(state.place, record, state.denoised)
            except Exception as error:
                self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        """End a request because of an error that is not an expert's."""
        if not request.done.done():
            log.error("an image failed", exc_info=error)
            request.fail(ServingError(f"an image failed: {error}"))

    def _enqueue(self, state: ImageState, alive: Tensor | None) -> None:
        """Queue an image, routed among the experts `alive`, or store it if it is finished."""
        request = state.request
        if state.image is not None:
            self._finish(state, state.image)
            return
        if alive is not None:
            weights = request.plan.router.weights
            eligible = torch.ones_like(alive) if weights is None else weights.cpu() > 0
            away = [self.experts[k].name for k in (eligible & ~alive).nonzero()[:, 0].tolist()]
            request.absent.update(away)
            if not (eligible & alive).any():
                verb = "are" if len(away) > 1 else "is"
                request.fail(ExpertAwayError(f"{', '.join(away)} {verb} away"))
                return
        gone = [k for k in state.experts if not self._available[k].alive]
        if gone:
            self._do_without(gone[0], [state])
            return
        for k in state.experts:
            self._queue(k, state)

    def _finish(self, state: ImageState, image: Tensor) -> None:
        request = state.request
        request.images[state.place] = image
        self._cost -= request.nfe_per_image
        self._admission.image_ended()
        self._admit_soon()  # there is room for another
        self.metrics.count("images")
        if len(request.images) == len(request.index) and not request.done.done():
            request.done.set_result(None)

    # Calling experts: one worker for each call that an expert takes at once

    async def _call_expert(self, k: int) -> None:
        expert, queue, available = self.experts[k], self._queues[k], self._available[k]
        while True:
            lost: UnavailableError | None = None
            async with expert.turn.of(queue.rank):
                batch = self._take(k)
                if not batch:
                    continue
                began = time.monotonic()
                try:
                    answers = await self._call(k, [state for state, _ in batch])
                except UnavailableError as error:
                    lost = error
                except Exception as error:
                    self._retry_alone(k, self._current(batch), error)
                    continue
            if lost is not None:
                await self._lost(k, self._current(batch), began, lost)
                continue
            available.answered()
            place = {state: i for i, (state, _) in enumerate(batch)}
            for state in self._current(batch):
                state.answers[k] = Row(answers, place[state])
                state.failures.pop(k, None)
                if len(state.answers) == len(state.experts):
                    self._make_ready(state)

    def _current(self, batch: list[tuple[ImageState, int]]) -> list[ImageState]:
        """The images whose request has not left, and that were not routed anew meanwhile."""
        return [
            state
            for state, attempt in batch
            if state.attempt == attempt and state.request in self.requests
        ]

    def _take(self, k: int) -> list[tuple[ImageState, int]]:
        """The images of the next call, with their attempts; one that failed before is alone."""
        states = self._queues[k].take(
            self.max_batch, self.quantum, self.parallel, alone=lambda state: k in state.failures
        )
        for state in states:
            self.shares.charge(state.request.flow, state.request.evaluations)
        return [(state, state.attempt) for state in states]

    async def _call(self, k: int, states: list[ImageState]) -> Tensor:
        name = self.experts[k].name
        call = stacked([state.call for state in states])
        started = time.perf_counter()
        given = () if call.given is None else (call.given,)
        answers = await reach(self.experts[k](call.x, call.t, *given), self.call_timeout_s)
        if answers.shape != call.x.shape:
            raise ValueError(f"answered {tuple(answers.shape)} to {tuple(call.x.shape)}")
        self.metrics.observe("call_seconds", time.perf_counter() - started, expert=name)
        self.metrics.observe("batch_fill", len(states) / self.max_batch, expert=name)
        nfe = len(states) if call.given is None else int(call.given.evaluations.sum())
        self.metrics.count("nfe", nfe, expert=name)
        return answers

    def _retry_alone(self, k: int, states: list[ImageState], error: Exception) -> None:
        """After a failed call: queue each image again, to be alone in its next call."""
        name = self.experts[k].name
        log.warning("%s failed on %d images: %r", name, len(states), error)
        self.metrics.count("retries", len(states), expert=name)
        again: list[ImageState] = []
        for state in states:
            state.failures[k] = state.failures.get(k, 0) + 1
            if state.failures[k] < _FAILURES:
                again.append(state)
            else:
                state.request.fail(ExpertFailedError(f"{name} failed: {error}"))
        if not self._available[k].alive:  # another worker found that out meanwhile
            self._do_without(k, again)
            return
        for state in again:
            self._queue(k, state)

    # Losing an expert

    async def _lost(
        self, k: int, states: list[ImageState], began: float, error: UnavailableError
    ) -> None:
        """After a lost call: queue its images again, wait a little, and give the expert up in time."""
        available, name = self._available[k], self.experts[k].name
        lost_for_s = available.lost(began, error)
        self.metrics.count("retries", len(states), expert=name)
        if available.alive:
            self._queues[k].push_first(states)
        else:
            self._do_without(k, states)
        await asyncio.sleep(min(1.0, max(0.05, lost_for_s / 4)))
        if not available.gone(lost_for_s):
            return
        if available.alive:
            log.error("%s has been unavailable for %.0f s and counts as away", name, lost_for_s)
            available.alive = False
            states = list(self._queues[k])
            self._queues[k].remove(lambda state: True)
            self._do_without(k, states)
        await available.back()

    def _do_without(self, k: int, states: list[ImageState]) -> None:
        """Fail the requests of images that need expert k, which is away, or route them anew."""
        if self.degraded == "fail":
            for state in states:
                state.request.fail(ExpertAwayError(f"{self.experts[k].name} is away"))
            return
        leaving = set(states)
        self._remove(lambda state: state in leaving)
        for state in states:
            state.attempt += 1
            state.memory, state.experts, state.answers = state.previous_memory, [], {}
            self._make_ready(state)
