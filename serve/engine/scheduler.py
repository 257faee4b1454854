"""The step engine: continuous batching at the level of the ODE step.

Every picture is a path of its own: its sampler, its place in time, what routing remembers of it. A path that needs expert k
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
from serve.engine.state import Job, Path
from serve.engine.step import advance

log = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSE_S = 5.0  # between two calls of an expert: then the loss of one says nothing about the time before the other


class Engine:
    """Moves the paths of all jobs. `start` it, `run` jobs, `close` it.

    experts: in the order of the clusters. turn: acquired for routing, so that it shares a device with those experts that have the
    same. max_batch: pictures a call. max_active: pictures on their way at once; others wait, first come first served.
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
        self.jobs: dict[Job, None] = {}  # in the order in which they came
        self._ready: deque[Path] = deque()  # to be routed
        self._queues: list[deque[Path]] = [deque() for _ in experts]
        self._lost_since = [0.0] * len(experts)  # when the first of several calls in a row was lost
        self._lost_last = [-math.inf] * len(experts)  # and the last of them; -inf: it was reached since
        self._wakes = [asyncio.Event() for _ in range(len(experts) + 1)]  # each expert's, and routing's
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
        for job in list(self.jobs):
            job.fail(ServingError("the server is stopping"))
        await asyncio.gather(*workers, return_exceptions=True)

    @property
    def cost(self) -> int:
        """Pictures times steps that were accepted and are still to come."""
        return sum(job.cost for job in self.jobs)

    def waiting(self, k: int) -> int:
        """Pictures that wait for expert k."""
        return len(self._queues[k])

    async def run(self, job: Job) -> None:
        """Make the job's pictures. Cancelling it, as a deadline does, takes them off the engine at once.

        Raises `ServingError`.
        """
        if self._closed:
            raise ServingError("the server is stopping")
        self.jobs[job] = None
        self._wakes[-1].set()
        try:
            await job.done
        finally:
            del self.jobs[job]
            if len(job.pictures) < len(job.index):
                self._drop(lambda path: path.job is job)
            self._wakes[-1].set()  # there is room for others

    def _employ(self, work: Callable[..., Coroutine[Any, Any, None]], *of: int) -> None:
        """Keep a worker. One that ends by itself is our own fault: the jobs of that moment fail, and another takes its place."""

        def ended(worker: asyncio.Task[None]) -> None:
            self._workers.discard(worker)
            if not worker.cancelled():
                log.error("a worker of the engine ended", exc_info=worker.exception())
                for job in list(self.jobs):
                    job.fail(ServingError("the engine failed"))
                self._employ(work, *of)

        worker = asyncio.create_task(work(*of))
        self._workers.add(worker)
        worker.add_done_callback(ended)

    def _drop(self, condition: Callable[[Path], bool]) -> None:
        """Take the paths that meet a condition out of every queue."""
        for queue in (self._ready, *self._queues):
            kept = [path for path in queue if not condition(path)]
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
                paths, begun = list(self._ready), self._begin()
                self._ready.clear()
                if not paths and not begun:
                    continue
                started = time.perf_counter()
                alive = None if all(self.alive) or self.degraded == "fail" else torch.tensor(self.alive)
                paths, failed = await in_thread(advance, paths, begun, alive)
                self.metrics.observe("route_seconds", time.perf_counter() - started)
            for job, error in failed:
                self._mistaken(job, error)
            for path in paths:
                if path.job in self.jobs:  # it may have left meanwhile
                    self._tell(path)
                    self._enqueue(path, alive)

    def _begin(self) -> list[tuple[Job, range]]:
        """The next pictures for which there is room, in the order in which they came: their places in their jobs."""
        room = self.max_active - sum(job.begun - len(job.pictures) for job in self.jobs)
        begun = []
        for job in self.jobs:
            places = range(job.begun, min(job.begun + room, len(job.index)))
            if places:
                begun.append((job, places))
                job.begun, room = places.stop, room - len(places)
        return begun

    def _tell(self, path: Path) -> None:
        """Report the call that has brought the path here."""
        job, taken = path.job, path.taken
        if taken is None:
            return
        path.taken = None
        job.calls += taken.calls
        if job.trace:
            job.taken.setdefault(path.place, []).append(taken)
        if job.watch is not None and path.denoised is not None:
            try:
                job.watch(path.place, taken, path.denoised[0])
            except Exception as error:  # the listener's own
                self._mistaken(job, error)

    def _mistaken(self, job: Job, error: Exception) -> None:
        """End a job over which something that is no expert stumbled."""
        if not job.done.done():
            log.error("a picture failed", exc_info=error)
            job.fail(ServingError(f"a picture failed: {error}"))

    def _enqueue(self, path: Path, alive: Tensor | None) -> None:
        """Hand a path, routed among those `alive`, to the experts that it waits for, or its picture to its job."""
        job = path.job
        if path.picture is not None:
            job.pictures[path.place] = path.picture
            self.metrics.count("pictures")
            self._wakes[-1].set()  # there is room for another
            if len(job.pictures) == len(job.index) and not job.done.done():
                job.done.set_result(None)
            return
        if alive is not None:
            weights = job.recipe.router.weights
            wanted = torch.ones_like(alive) if weights is None else weights.cpu() > 0
            away = [self.experts[k].name for k in (wanted & ~alive).nonzero()[:, 0].tolist()]
            job.absent.update(away)
            if not (wanted & alive).any():
                job.fail(ExpertAwayError(f"{', '.join(away)} {'are' if len(away) > 1 else 'is'} away"))
                return
        gone = [k for k in path.waits_for if not self.alive[k]]
        if gone:
            self._deprive(gone[0], [path])
            return
        for k in path.waits_for:
            self._queues[k].append(path)
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
                    answers = await self._call(k, [path for path, _ in asked])
                except UnavailableError as error:
                    lost = error
                except Exception as error:
                    self._failed(k, self._still(asked), error)
                    continue
            if lost is not None:
                await self._lost(k, self._still(asked), began, lost)
                continue
            self._lost_last[k] = -math.inf
            said = dict(zip((path for path, _ in asked), answers.split(1), strict=True))
            for path in self._still(asked):
                path.answers[k] = said[path]
                path.failures.pop(k, None)
                if len(path.answers) == len(path.waits_for):
                    self._ready.append(path)
            self._wakes[-1].set()

    def _still(self, asked: list[tuple[Path, int]]) -> list[Path]:
        """Those that still wait for what they asked: their job is there, and they were not routed again meanwhile."""
        return [path for path, turn in asked if path.turn == turn and path.job in self.jobs]

    def _take(self, k: int) -> list[tuple[Path, int]]:
        """The next call's paths, with their turns. One that the expert has failed is asked for alone: it may be its own fault."""
        queue, paths = self._queues[k], list[Path]()
        while queue and len(paths) < self.max_batch:
            if paths and (k in paths[0].failures or k in queue[0].failures):
                break
            paths.append(queue.popleft())
        return [(path, path.turn) for path in paths]

    async def _call(self, k: int, paths: list[Path]) -> Tensor:
        name = self.experts[k].name
        x = torch.cat([path.x for path in paths if path.x is not None])
        t = torch.stack([path.t for path in paths if path.t is not None])
        started = time.perf_counter()
        answers = await self._reach(self.experts[k](x, t))
        if answers.shape != x.shape:
            raise ValueError(f"answered {tuple(answers.shape)} to {tuple(x.shape)}")
        self.metrics.observe("call_seconds", time.perf_counter() - started, expert=name)
        self.metrics.observe("batch_fill", len(paths) / self.max_batch, expert=name)
        self.metrics.count("calls", len(paths), expert=name)
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

    def _failed(self, k: int, paths: list[Path], error: Exception) -> None:
        """An expert answered with an error: each picture is asked for again, alone, and gives up the third time."""
        name = self.experts[k].name
        log.warning("%s failed on %d pictures: %r", name, len(paths), error)
        self.metrics.count("retries", len(paths), expert=name)
        for path in paths:
            path.failures[k] = path.failures.get(k, 0) + 1
            if path.failures[k] >= 3:
                path.job.fail(ExpertFailedError(f"{name} failed: {error}"))
        self._return(k, [path for path in paths if path.failures[k] < 3])

    def _return(self, k: int, paths: list[Path], first: bool = False) -> None:
        """Put paths that were asked for in vain back into the queue, at its end or as its first."""
        if not self.alive[k]:  # another worker has given it up meanwhile
            self._deprive(k, paths)
        elif first:
            self._queues[k].extendleft(reversed(paths))
        else:
            self._queues[k].extend(paths)

    # Losing an expert

    async def _lost(self, k: int, paths: list[Path], began: float, error: UnavailableError) -> None:
        """Wait a little before the next try; after `retry_s` of them the expert counts as away."""
        now, name = time.monotonic(), self.experts[k].name
        if began - self._lost_last[k] > _PAUSE_S:
            log.warning("%s is unavailable: %s", name, error)
            self._lost_since[k] = now
        self._lost_last[k] = now
        self.metrics.count("retries", len(paths), expert=name)
        self._return(k, paths, first=True)
        away_for = now - self._lost_since[k]
        await asyncio.sleep(min(1.0, max(0.05, away_for / 4)))
        if away_for < self.retry_s or self._lost_last[k] == -math.inf:
            return
        if self.alive[k]:
            log.error("%s has been unavailable for %.0f s and counts as away", name, away_for)
            self.alive[k] = False
            paths = list(self._queues[k])
            self._queues[k].clear()
            self._deprive(k, paths)
        while not self.alive[k]:
            try:
                await self._reach(self.experts[k].check())
            except Exception:
                await asyncio.sleep(min(1.0, self.retry_s))
            else:
                log.warning("%s is back", name)
                self.alive[k], self._lost_last[k] = True, -math.inf

    def _deprive(self, k: int, paths: list[Path]) -> None:
        """What is to become of paths whose expert is away."""
        if self.degraded == "fail":
            for path in paths:
                path.job.fail(ExpertAwayError(f"{self.experts[k].name} is away"))
            return
        leaving = set(paths)
        self._drop(lambda path: path in leaving)
        for path in paths:
            path.turn += 1
            path.memory, path.waits_for, path.answers = path.before, {}, {}
        self._ready.extend(paths)
        self._wakes[-1].set()


