"""A service: bundles that answer requests, one after another in time, each with an engine of its own.

A request finishes on the version that it began with; `switch` makes another one the current, and the old one goes when its last
request is done.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from ddm.errors import require
from serve.engine.expert import Expert, ServingError
from serve.engine.local_expert import local_experts
from serve.engine.metrics import Metrics
from serve.engine.scheduler import Engine
from serve.engine.state import Request, StepRecord
from serve.model.loading import load, picked_device
from serve.model.model import Model, SamplingPlan, Trace, kept
from serve.settings import Settings

log = logging.getLogger(__name__)

Watch = Callable[[int, StepRecord, Tensor], None]
# A loaded model, its folder, and the turn that routing takes -> its experts.
Connect = Callable[[Model, Path, asyncio.Semaphore], Sequence[Expert]]


class BusyError(ServingError):
    """More is pending than the service accepts; `retry_after_s` is a guess at when there is room."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass
class SamplingParams:
    """What a request asks for; `settings` are fields of `SampleConfig`, the service's own where they are missing."""

    n: int = 1
    seed: int | None = None
    first_index: int = 0
    trace: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Version:
    """A bundle in service, and what was ordered of it and is not done; an order that is dropped before it is made leaves."""

    model: Model
    folder: Path
    engine: Engine
    plans: dict[str, SamplingPlan] = field(
        default_factory=dict
    )  # by what requests gave, so that it is checked once
    orders: "WeakSet[AdmittedRequest]" = field(default_factory=WeakSet)


@dataclass(frozen=True, eq=False)
class AdmittedRequest:
    """A request that was accepted: its version, its job, and the seed that it got."""

    version: Version
    request: Request
    seed: int

    def trace(self) -> Trace:
        """What happened on the way of its images, once they are done and where the job was traced."""
        ways = [self.request.record[place] for place in range(len(self.request.index))]
        return Trace(
            torch.tensor([record.t for record in ways[0]], dtype=torch.float64),
            torch.stack([torch.stack([record.alpha for record in way]) for way in ways], dim=1),
            torch.stack([torch.stack([record.chosen for record in way]) for way in ways], dim=1),
            self.request.calls,
        )


class Service:
    """Answers requests for images. `start` it on the loop that it is to live on; `stop` it there.

    Making one loads the bundle: raises `DdmError` naming what is wrong with it, or with the settings for it.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, connect: Connect | None = None
    ) -> None:
        self.settings, self.metrics = settings, metrics
        self.name = Path(settings.run).resolve().name
        self.current: Version | None = None
        self.versions: list[Version] = []
        self.began_s = int(time.time())
        self._remote = connect is not None
        self._connect = connect or (
            lambda model, folder, turn: local_experts(model, turn, settings.serve.compile)
        )
        self._observer: asyncio.Task[None] | None = None
        self._pace = 0.0  # image steps a second, lately
        self._switching = asyncio.Lock()
        self._first: tuple[Model, Path] | None = (
            self._load(settings.run),
            Path(settings.run),
        )  # until it is begun

    @property
    def pending(self) -> int:
        """Image steps that were accepted and are still to come."""
        return sum(order.request.cost for version in self.versions for order in version.orders)

    async def start(self) -> None:
        """Begin."""
        assert self._first is not None
        first, self._first = self._first, None
        self._begin(*first)
        self._observer = asyncio.create_task(self._observe())

    async def switch(self, folder: str | Path) -> None:
        """Make the bundle there the current version; requests under way finish on theirs.

        Raises `DdmError`, and the old version stays.
        """
        async with self._switching:
            model = await asyncio.to_thread(self._load, folder)
            if self._first is not None:  # it did not start yet
                self._first = model, Path(folder)
            elif self.current is not None and self.current.model.version != model.version:
                self._begin(model, Path(folder))
                await self._retire()

    def _load(self, folder: str | Path) -> Model:
        model = load(folder, picked_device(self.settings.serve.device), experts=not self._remote)
        model.settings(**asdict(self.settings.sample))
        return model

    def _begin(self, model: Model, folder: Path) -> None:
        """Make a loaded bundle the current version."""
        serve, turn = self.settings.serve, asyncio.Semaphore(1)
        engine = Engine(
            self._connect(model, folder, turn),
            turn,
            max_batch=serve.max_batch,
            max_active=serve.max_active,
            call_timeout_s=serve.call_timeout_s
            if self._remote
            else None,  # here a call can be slow, and never lost
            retry_s=serve.retry_s,
            degraded=serve.degraded,
            metrics=self.metrics,
        )
        engine.start()
        self.current = Version(model, folder, engine)
        self.versions.append(self.current)
        log.info("serving %s, %d experts, version %s", folder, len(model.names), model.version[:12])

    async def stop(self) -> None:
        """End every engine; requests under way end with an error."""
        if self._observer is not None:
            self._observer.cancel()
        versions, self.versions, self.current = self.versions, [], None
        for version in versions:
            await version.engine.close()

    def order(self, params: SamplingParams, watch: Watch | None = None) -> AdmittedRequest:
        """Check a request against the current version and the limits.

        Raises `ConfigError` naming the key, `BusyError` where there is no room, `ServingError` where nothing is in service.
        """
        if self.current is None:
            raise ServingError("no bundle is in service")
        model, limits = self.current.model, self.settings.serve.limits
        plan = kept(
            self.current.plans, repr(params.settings), lambda: self._plan(model, params.settings)
        )
        config = plan.config
        require(1 <= params.n <= limits.n, "sample.n", f"be in [1, {limits.n}]", params.n)
        require(
            config.steps <= limits.steps, "sample.steps", f"be in [1, {limits.steps}]", config.steps
        )
        for key, value in (("seed", params.seed), ("first_index", params.first_index)):
            require(
                value is None or 0 <= value < 2**63 - limits.n,
                f"sample.{key}",
                "be in [0, 2^63 - n)",
                value,
            )
        # 53 bits: a number that any JSON reader keeps whole
        seed = secrets.randbits(53) if params.seed is None else params.seed
        index = torch.arange(params.first_index, params.first_index + params.n, device=model.device)
        request = Request(plan, seed, index, watch, params.trace)
        pending = self.pending
        if pending and pending + request.cost > limits.pending:
            wait_s = pending / self._pace if self._pace else 1.0
            said = f"{pending} image steps are pending, and {request.cost} more would be above {limits.pending}"
            raise BusyError(said, int(min(60, max(1, wait_s))))
        order = AdmittedRequest(self.current, request, seed)
        self.current.orders.add(order)
        return order

    def _plan(self, model: Model, given: dict[str, Any]) -> SamplingPlan:
        return model.plan(model.settings(**{**asdict(self.settings.sample), **given}))

    async def make(self, order: AdmittedRequest) -> None:
        """Make an order's images, within the deadline.

        Raises `ServingError`; `TimeoutError` after the deadline. Cancelling it takes the images off the engine at once.
        """
        started, cost = time.perf_counter(), order.request.cost
        try:
            async with asyncio.timeout(self.settings.serve.limits.deadline_s):
                await order.version.engine.run(order.request)
            pace = cost / (time.perf_counter() - started)
            self._pace = max(pace, 0.9 * self._pace)
        finally:
            order.version.orders.discard(order)
            await self._retire()

    async def _retire(self) -> None:
        """Close the engines of versions that are neither current nor asked for anything more."""
        idle = [
            version
            for version in self.versions
            if version is not self.current and not version.orders
        ]
        self.versions = [version for version in self.versions if version not in idle]
        for version in idle:
            await version.engine.close()

    async def _observe(self) -> None:
        """Keep the gauges fresh for a scraper that does not come here for them, as Ray's does not."""
        while True:
            self.observe()
            await asyncio.sleep(2.0)

    def observe(self) -> None:
        """Set the gauges."""
        self.metrics.gauge("pending_cost", self.pending)
        self.metrics.gauge(
            "active_requests", sum(len(version.engine.requests) for version in self.versions)
        )
        if self.current is not None:
            engine = self.current.engine
            for k, expert in enumerate(engine.experts):
                self.metrics.gauge("queue_length", engine.waiting(k), expert=expert.name)
                self.metrics.gauge("expert_alive", float(engine.alive[k]), expert=expert.name)
