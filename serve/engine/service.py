"""A service: the current bundle answers requests, with an engine of its own.

A request finishes on the version of the bundle that it began with. `switch` makes another version
the current one; the old one goes when its last request is done.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from ddm.errors import require, within
from ddm.rng import IMAGES_OF_A_SEED
from serve.engine.expert import CancelledRequestError, Expert, ServingError
from serve.engine.local_expert import local_experts
from serve.engine.metrics import Metrics
from serve.engine.quotas import Quotas
from serve.engine.scheduler import Engine
from serve.engine.shares import ANYONE, Key, Shares
from serve.engine.state import OnStep, Request
from serve.engine.turn import Turn
from serve.model.edits import Edit
from serve.model.loading import load
from serve.model.model import Model
from serve.model.params import over
from serve.model.planning import SamplingPlan
from serve.model.running import Trace
from serve.settings import Settings

log = logging.getLogger(__name__)

# A loaded model, its folder, and the turn that routing takes -> its experts.
Connect = Callable[[Model, Path, Turn], Sequence[Expert]]

_OBSERVE_S = 2.0  # between two updates of the gauges


class BusyError(ServingError):
    """More is pending than the service accepts; `retry_after_s` estimates when there is room."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass
class SamplingParams:
    """What a request asks for.

    n: images. seed: None for a random one. first_index: of the first image. settings: fields of
    `SampleConfig`; those that are missing are the service's own. key: who asks. id: by which its
    key may cancel it, None for none. edit: what the images start from, None for noise alone.
    """

    n: int = 1
    seed: int | None = None
    first_index: int = 0
    trace: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    key: Key = ANYONE
    id: str | None = None
    edit: Edit | None = None


@dataclass
class Shared:
    """What the services of a server have in common: the device, and who may ask for how much."""

    turn: Turn = field(default_factory=Turn)
    shares: Shares | None = None  # those of the first engine
    quotas: Quotas = field(default_factory=Quotas)
    services: "list[Service]" = field(default_factory=list)  # that have started


@dataclass(eq=False)
class Version:
    """A bundle in service, and the requests that were admitted to it and do not run yet.

    A request that is dropped before it runs disappears from `admitted`.
    """

    model: Model
    folder: Path
    engine: Engine
    admitted: "WeakSet[AdmittedRequest]" = field(default_factory=WeakSet)


@dataclass(frozen=True, eq=False)
class AdmittedRequest:
    """A request that was accepted, its version of the bundle, its seed, and its id."""

    version: Version
    request: Request
    seed: int
    id: str | None = None

    def trace(self) -> Trace:
        """The trace of a request that is done and was traced."""
        n = len(self.request.index)
        trajectories = [self.request.records[place] for place in range(n)]
        alpha = [torch.stack([step.alpha for step in steps]) for steps in trajectories]
        chosen = [torch.stack([step.chosen for step in steps]) for steps in trajectories]
        return Trace(
            torch.tensor([step.t for step in trajectories[0]], dtype=torch.float64),
            torch.stack(alpha, dim=1),
            torch.stack(chosen, dim=1),
            self.request.nfe,
            self.request.router_nfe,
        )


class Service:
    """Answers requests for images. `start` and `stop` it on one event loop.

    `__init__` loads the bundle. shared: with the other services of this server. prefix: of the
    names of local experts. Raises `DdmError` naming what is wrong with the bundle, or with the
    settings for it.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        connect: Connect | None = None,
        shared: Shared | None = None,
        prefix: str = "",
    ) -> None:
        self.shared = shared or Shared()
        self.settings, self.metrics = settings, metrics
        self.name = settings.name()
        self.current: Version | None = None
        self.versions: list[Version] = []
        self.draining = False
        self._held = 0
        self._remote = connect is not None
        self._connect = connect or (
            lambda model, folder, turn: local_experts(
                model, turn, settings.serve.precision, settings.serve.compile, prefix
            )
        )
        self._observer: asyncio.Task[None] | None = None
        self.pace = 0.0  # expert evaluations a second, lately
        self._running = set[AdmittedRequest]()
        self._switching = asyncio.Lock()
        # Loaded, until `start`.
        self._first: tuple[Model, Path] | None = (self._load(settings.run), Path(settings.run))

    @property
    def pending(self) -> int:
        """Expert evaluations that are accepted and not done."""
        versions = [version for each in self.shared.services for version in each.versions]
        waiting = sum(each.request.cost for version in versions for each in version.admitted)
        return round(waiting) + sum(version.engine.cost for version in versions)

    @property
    def busy(self) -> bool:
        """Whether requests are under way, or about to be."""
        return self._held > 0 or any(
            version.admitted or version.engine.requests for version in self.versions
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, it counts as busy: for what a request waits for before it is admitted."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    async def start(self) -> None:
        """Start the engine."""
        assert self._first is not None
        self.shared.services.append(self)
        async with self._switching:
            first, self._first = self._first, None
            experts = await self._experts(*first)
            if self not in self.shared.services:  # stopped meanwhile
                return
            self._begin(*first, experts)
        self._observer = asyncio.create_task(self._observe())

    async def switch(self, folder: str | Path) -> None:
        """Make the bundle in a folder the current version; requests under way finish on theirs.

        Raises `DdmError`; the old version then stays.
        """
        async with self._switching:
            model = await asyncio.to_thread(self._load, folder)
            if self._first is not None:  # not started yet
                self._first = model, Path(folder)
            elif self.current is not None and self.current.model.version != model.version:
                experts = await self._experts(model, Path(folder))
                if self.current is not None:  # not stopped meanwhile
                    self._begin(model, Path(folder), experts)
                    await self._retire()
            else:
                log.info("%s is in service already, version %s", folder, model.version[:12])

    def _load(self, folder: str | Path) -> Model:
        with within("serve"):
            serve = self.settings.serve
            device = "cpu" if self._remote else serve.device  # which is the experts'
            model = load(folder, device, experts=not self._remote, signers=serve.signers)
        model.settings(**asdict(self.settings.sample))
        return model

    async def _experts(self, model: Model, folder: Path) -> Sequence[Expert]:
        """Those of a loaded bundle; to compile them takes a while."""
        return await asyncio.to_thread(self._connect, model, folder, self.shared.turn)

    def _begin(self, model: Model, folder: Path, experts: Sequence[Expert]) -> None:
        """Make a loaded bundle the current version."""
        serve, turn = self.settings.serve, self.shared.turn
        engine = Engine(
            experts,
            turn,
            max_batch=serve.max_batch,
            max_active=serve.max_active,
            parallel=serve.max_batch if self._on_gpu(model) else 1,
            # A local call may be slow, but is never lost.
            call_timeout_s=serve.call_timeout_s if self._remote else None,
            retry_s=serve.retry_s,
            degraded=serve.degraded,
            metrics=self.metrics,
            shares=self.shared.shares,
        )
        self.shared.shares = engine.shares
        engine.start()
        self.current = Version(model, folder, engine)
        self.versions.append(self.current)
        log.info("serving %s, %d experts, version %s", folder, len(model.names), model.version[:12])

    def _on_gpu(self, model: Model) -> bool:
        """Whether the experts compute on one, which takes about as long for many images as for one."""
        return self.settings.serve.ray.gpus > 0 if self._remote else model.device.type == "cuda"

    async def stop(self) -> None:
        """End every engine; requests under way end with an error."""
        if self._observer is not None:
            self._observer.cancel()
        if self in self.shared.services:
            self.shared.services.remove(self)
        versions, self.versions, self.current = self.versions, [], None
        for version in versions:
            await version.engine.close()

    def drain(self) -> None:
        """Admit no more requests."""
        self.draining = True

    def admit(self, params: SamplingParams, on_step: OnStep | None = None) -> AdmittedRequest:
        """Check a request against the current version and the limits, and accept it.

        Raises `ConfigError` naming the key, `BusyError` if there is no room, `ServingError` if
        nothing is in service.
        """
        if self.draining:
            raise ServingError("the server is stopping")
        if self.current is None:
            raise ServingError("no bundle is in service")
        model, limits = self.current.model, self.settings.serve.limits
        plan = self._plan(model, params)
        steps = len(plan.times) - 1
        require(1 <= params.n <= limits.n, "sample.n", f"be in [1, {limits.n}]", params.n)
        rule = f"be in [1, {limits.steps}]" + (", times resamplings" if params.edit else "")
        require(steps <= limits.steps, "sample.steps", rule, steps)
        # 53 bits: a number that any JSON reader keeps whole
        seed = secrets.randbits(53) if params.seed is None else params.seed
        require(0 <= seed < 2**63, "sample.seed", "be in [0, 2^63)", seed)
        first, n = params.first_index, params.n
        in_range = 0 <= first <= IMAGES_OF_A_SEED - n
        require(in_range, "sample.first_index", "be in [0, 2^56 - n]", first)
        index = torch.arange(first, first + n, device=model.device)
        given = None
        if params.edit is not None:
            with within("sample"):
                given = params.edit.given(params.n, model.shape, model.device)
        request = Request(plan, seed, index, on_step, params.trace, params.key, given)
        self._require_room(round(request.cost))
        self._require_quota(request)
        admitted = AdmittedRequest(self.current, request, seed, params.id)
        self.current.admitted.add(admitted)
        return admitted

    def _require_room(self, cost: int) -> None:
        pending, limit = self.pending, self.settings.serve.limits.pending
        if pending and pending + cost > limit:
            wait_s = pending / self.pace if self.pace else 1.0
            message = (
                f"{pending} expert evaluations are pending, and {cost} more would exceed {limit}"
            )
            raise BusyError(message, int(min(60, max(1, wait_s))))

    def _require_quota(self, request: Request) -> None:
        key, n = request.key, len(request.index)
        if key.requests is not None:
            services = self.shared.services
            mine = sum(each.key == key for service in services for each in service.under_way())
            if mine >= key.requests:
                message = f"{mine} requests of this key are pending, and it may have {key.requests}"
                raise BusyError(message, 1)
        wait_s = self.shared.quotas.wait_s(key, n, request.cost)
        if wait_s > 0:
            message = f"this key has used its quota; {n} more images fit in {wait_s:.0f} s"
            raise BusyError(message, math.ceil(wait_s))
        self.shared.quotas.use(key, n, request.cost)

    def under_way(self) -> Iterator[Request]:
        """The requests that were accepted and are not done."""
        for version in self.versions:
            yield from (each.request for each in version.admitted)
            yield from version.engine.requests

    def cancel(self, key: Key, request_id: str) -> bool:
        """End the requests of a key that have this id with `CancelledRequestError`, at once.

        Returns whether there are any under way.
        """
        found = [
            admitted.request
            for admitted in self._running
            if admitted.id == request_id and admitted.request.key == key
        ]
        for request in found:
            request.fail(CancelledRequestError("the request was cancelled"))
        return bool(found)

    def _plan(self, model: Model, params: SamplingParams) -> SamplingPlan:
        config = model.settings(**over(asdict(self.settings.sample), params.settings))
        with within("sample"):
            return model.plan(config, params.edit)

    async def run(self, admitted: AdmittedRequest, deadline_s: float | None = None) -> None:
        """Sample the images of an admitted request. Cancelling takes them off the engine at once.

        Raises `ServingError`; `TimeoutError` after `deadline_s`, None for
        `serve.limits.deadline_s`.
        """
        request, version = admitted.request, admitted.version
        started, cost = time.perf_counter(), request.cost
        version.admitted.discard(admitted)
        self._running.add(admitted)
        try:
            async with asyncio.timeout(deadline_s or self.settings.serve.limits.deadline_s):
                await version.engine.run(request)
            pace = request.nfe / (time.perf_counter() - started)
            self.pace = max(pace, 0.9 * self.pace)
        finally:
            self._running.discard(admitted)
            self.shared.quotas.use(request.key, 0, request.nfe - cost)  # what it did not need
            self._count(request)
            await self._retire()

    def _count(self, request: Request) -> None:
        """Count what a request that ends has got."""
        self.metrics.count("key_images", len(request.images), key=request.key.name)
        self.metrics.count("key_nfe", request.nfe, key=request.key.name)

    async def _retire(self) -> None:
        """Close the engines of old versions without requests."""
        idle = [
            version
            for version in self.versions
            if version is not self.current and not (version.admitted or version.engine.requests)
        ]
        self.versions = [version for version in self.versions if version not in idle]
        for version in idle:
            await version.engine.close()

    async def _observe(self) -> None:
        """Update the gauges at intervals, for scrapers that do not call `/metrics`, as Ray's."""
        while True:
            self.observe()
            await asyncio.sleep(_OBSERVE_S)

    def observe(self) -> None:
        """Set the gauges."""
        self.metrics.gauge("pending_cost", self.pending)
        versions = [version for each in self.shared.services for version in each.versions]
        active = sum(len(version.engine.requests) for version in versions)
        self.metrics.gauge("active_requests", active)
        if self.current is not None:
            engine = self.current.engine
            for k, (expert, alive) in enumerate(zip(engine.experts, engine.alive, strict=True)):
                self.metrics.gauge("queue_length", engine.waiting(k), expert=expert.name)
                self.metrics.gauge("expert_alive", float(alive), expert=expert.name)
