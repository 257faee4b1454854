"""Jobs: requests that are accepted now, sampled when it is their turn, and fetched later.

They live in this process: the client that submitted one may leave, but a restart of the server ends them.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ddm.errors import require
from serve.engine.expert import CancelledRequestError
from serve.engine.metrics import Metrics
from serve.engine.service import AdmittedRequest, BusyError, Service
from serve.engine.shares import Key
from serve.settings import JobsConfig

log = logging.getLogger(__name__)

JobStatus = Literal["queued", "running", "done", "failed", "cancelled"]


class Answer(NamedTuple):
    """What a request gives."""

    content: bytes
    media_type: str
    headers: dict[str, str]


class Place(NamedTuple):
    """How many jobs start before one, itself included, 0 once it has started; and in about how many
    seconds it will be done, None where that is not known.
    """

    position: int
    estimate_s: float | None


class Error(NamedTuple):
    """Why a job failed: a kind, and in words."""

    kind: str
    message: str


Encode = Callable[[AdmittedRequest], Answer]  # the images of a request that is done


@dataclass(eq=False)
class Job:
    """A request under way, and what has become of it.

    service: that samples it. admitted: until it has ended. idempotency: what its sender calls it,
    and a digest of what was asked. *_s: seconds since the epoch.
    """

    key: Key
    service: Service
    admitted: AdmittedRequest | None
    encode: Encode
    model: str
    idempotency: tuple[str, str] | None = None
    webhook: str | None = None
    id: str = field(default_factory=lambda: f"job_{secrets.token_hex(12)}")
    created_s: float = field(default_factory=time.time)
    started_s: float | None = None
    ended_s: float | None = None
    status: JobStatus = "queued"
    n: int = 0
    images: int = 0  # finished
    answer: Answer | None = None
    error: Error | None = None

    def __post_init__(self) -> None:
        """Note what remains when the request is gone."""
        assert self.admitted is not None
        self.n = len(self.admitted.request.index)

    @property
    def cost(self) -> float:
        """Expert evaluations to come."""
        return 0.0 if self.admitted is None else self.admitted.request.cost

    @property
    def ended(self) -> bool:
        """Whether nothing more becomes of it."""
        return self.ended_s is not None


class Jobs:
    """The jobs of all keys, of which `config.running` are sampled at once.

    explain: the error of a failed job, for its owner. on_end: awaited with each job that has ended.
    """

    def __init__(
        self,
        config: JobsConfig,
        metrics: Metrics,
        explain: Callable[[Exception], Error],
        on_end: Callable[[Job], Awaitable[None]],
    ) -> None:
        self.config, self.metrics = config, metrics
        self.explain, self.on_end = explain, on_end
        self._jobs: dict[str, Job] = {}  # in order of arrival
        self._tasks: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """End all."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._jobs.clear()

    def known(self, key: Key, idempotency: tuple[str, str]) -> Job | None:
        """The job that a key has submitted under this name before.

        Raises `ConfigError` if it was another request.
        """
        name, digest = idempotency
        for job in self.of(key):
            if job.idempotency is not None and job.idempotency[0] == name:
                again = job.idempotency[1] == digest
                require(again, "Idempotency-Key", "be new for another request", name)
                return job
        return None

    def require_room(self) -> None:
        """Raise `BusyError` if as many jobs are kept as may be, and none of them has ended."""
        self._forget()
        under_way = sum(not job.ended for job in self._jobs.values())
        if under_way >= self.config.kept:
            raise BusyError(f"{under_way} jobs are under way, as many as may be", 5)

    def submit(self, job: Job) -> None:
        """Take a job in, in place of the one that ended first if there is no room; see `require_room`."""
        if len(self._jobs) >= self.config.kept:
            ended = [kept for kept in self._jobs.values() if kept.ended]
            del self._jobs[min(ended, key=lambda kept: kept.ended_s or 0).id]
        self._jobs[job.id] = job
        self._start_next()

    def find(self, key: Key, job_id: str) -> Job | None:
        """A key's job."""
        self._forget()
        job = self._jobs.get(job_id)
        return job if job is not None and job.key == key else None

    def of(self, key: Key) -> list[Job]:
        """A key's jobs, in order of arrival."""
        self._forget()
        return [job for job in self._jobs.values() if job.key == key]

    def cancel(self, job: Job) -> None:
        """End a job, whose images leave the experts' queues at once; forget one that has ended."""
        if job.ended:
            del self._jobs[job.id]
            return
        if job.admitted is not None and job.status == "running":
            job.admitted.request.fail(CancelledRequestError("the job was cancelled"))
        if job.status == "queued":  # nothing of it was sampled
            job.service.shared.quotas.use(job.key, 0, -job.cost)
        self._end(job, "cancelled")

    def places(self, jobs: Sequence[Job]) -> list[Place]:
        """Where some jobs are in the queue."""
        running = sum(job.cost for job in self._jobs.values() if job.status == "running")
        cost, ahead = running, {}
        for i, job in enumerate(self._queue()):
            cost += job.cost
            ahead[job.id] = i + 1, cost
        pending = {service: service.pending for service in {job.service for job in jobs}}
        places = []
        for job in jobs:
            position, nfe = ahead.get(job.id, (0, running))
            pace = None if job.ended else job.service.pace
            estimate_s = min(nfe, pending[job.service]) / pace if pace else None
            places.append(Place(position, estimate_s))
        return places

    def _queue(self) -> list[Job]:
        """Those that have not started, in the order in which they will."""
        queued = [job for job in self._jobs.values() if job.status == "queued"]
        return sorted(queued, key=lambda job: -job.key.priority)

    def _start_next(self) -> None:
        running = sum(job.status == "running" for job in self._jobs.values())
        for job in self._queue()[: max(0, self.config.running - running)]:
            job.status, job.started_s = "running", time.time()
            self._start(self._run(job))

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, job: Job) -> None:
        admitted = job.admitted
        assert admitted is not None
        try:
            await job.service.run(admitted, self.config.deadline_s)
            answer = await asyncio.to_thread(job.encode, admitted)
            if not job.ended:  # or it was cancelled while it was encoded
                self._make_room(len(answer.content))
                job.answer = answer
                self._end(job, "done")
        except Exception as error:
            if not job.ended:
                by_id = isinstance(error, CancelledRequestError)
                job.error = None if by_id else self.explain(error)
                self._end(job, "cancelled" if by_id else "failed")

    def _end(self, job: Job, status: JobStatus) -> None:
        assert job.admitted is not None
        job.images = len(job.admitted.request.images)
        job.status, job.ended_s, job.admitted = status, time.time(), None
        self.metrics.count("jobs", status=status)
        self._start(self.on_end(job))
        self._start_next()

    def _make_room(self, size: int) -> None:
        """Forget the results that are oldest, for one of that many bytes.

        Raises `ConfigError` if there can be no room.
        """
        most = self.config.memory_MiB * 2**20
        require(size <= most, "n", f"give a result of at most {most} bytes", size)
        kept = [job for job in self._jobs.values() if job.answer is not None]
        kept.sort(key=lambda job: job.ended_s or 0)
        used = sum(len(job.answer.content) for job in kept if job.answer)
        while used + size > most:
            oldest = kept.pop(0)
            assert oldest.answer is not None
            used -= len(oldest.answer.content)
            del self._jobs[oldest.id]

    def _forget(self) -> None:
        """Forget what ended too long ago."""
        before = time.time() - self.config.keep_s
        for job in list(self._jobs.values()):
            if job.ended_s is not None and job.ended_s <= before:
                del self._jobs[job.id]
