"""Answers as server-sent events, for readers that may be slow."""

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NamedTuple

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from torch import Tensor

from serve.engine.service import AdmittedRequest, SamplingParams, Service
from serve.engine.state import StepRecord
from serve.http.responses import b64, facts_of, failure, headers_of, images_of
from serve.model.images import to_uint8

log = logging.getLogger(__name__)

_SILENCE_S = 5.0  # after which a comment is sent: proxies cut connections that are silent for long
_QUEUED_STEPS = 1024
_QUEUED_PREVIEW_BYTES = 4 << 20


def event(name: str, data: Any) -> str:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


class Step(NamedTuple):
    """What a stream tells of one denoiser call of an image: its number `call`, and that of its
    `step`, count from 1.

    alpha `[K]` and chosen, the experts evaluated, are None unless traced. preview: uint8
    `[C, H, W]`, None for most.
    """

    place: int
    step: int
    call: int
    t: float
    alpha: list[float] | None
    chosen: list[int] | None
    preview: Tensor | None


class StreamQueue:
    """The steps of a request that wait for their reader, within bounds.

    A reader who is too slow misses previews first, then the oldest steps.
    """

    def __init__(self, preview_every: int, trace: bool = False) -> None:
        self.preview_every, self.trace = preview_every, trace
        self.arrived = asyncio.Event()
        self._steps: deque[Step] = deque()
        self._calls: dict[int, int] = {}  # by place
        self._preview_bytes = 0

    def __call__(self, place: int, record: StepRecord, denoised: Tensor) -> None:
        """Queue a step, as the engine's callback."""
        call = self._calls[place] = self._calls.get(place, 0) + 1
        due = self.preview_every > 0 and call % self.preview_every == 0
        preview = None
        if due and self._preview_bytes + denoised.numel() <= _QUEUED_PREVIEW_BYTES:
            preview = to_uint8(denoised.float()).cpu()
            self._preview_bytes += preview.numel()
        if preview is None and not self.trace:
            return
        alpha = record.alpha.tolist() if self.trace else None
        chosen = record.chosen.nonzero()[:, 0].tolist() if self.trace else None
        self._steps.append(Step(place, record.step, call, record.t, alpha, chosen, preview))
        if len(self._steps) > _QUEUED_STEPS:
            self.pop()
        self.arrived.set()

    def __len__(self) -> int:
        return len(self._steps)

    def pop(self) -> Step:
        """Take the oldest step."""
        step = self._steps.popleft()
        if step.preview is not None:
            self._preview_bytes -= step.preview.numel()
        return step


async def steps_of(
    service: Service, admitted: AdmittedRequest, queue: StreamQueue
) -> AsyncGenerator[Step]:
    """The steps of a request while its images are sampled. Closing it ends the request.

    Raises `ServingError` and `TimeoutError`.
    """
    started = time.perf_counter()
    sampling = asyncio.create_task(service.run(admitted))
    arriving: asyncio.Task[Any] | None = None
    try:
        while not (sampling.done() and not queue):
            while queue:
                yield queue.pop()
            queue.arrived.clear()
            if arriving is None or arriving.done():
                arriving = asyncio.create_task(queue.arrived.wait())
            await asyncio.wait((sampling, arriving), return_when=asyncio.FIRST_COMPLETED)
        await sampling
    finally:
        if not sampling.done():
            service.metrics.count("requests", status="499")
        tasks = [sampling, *([arriving] if arriving else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        service.metrics.observe("request_seconds", time.perf_counter() - started)


def failed(service: Service, error: Exception) -> dict[str, Any]:
    """The body of an error in a stream that has begun, which is counted."""
    status, body = failure(error, service.settings.serve.limits.deadline_s)
    service.metrics.count("requests", status=str(status))
    service.metrics.count("rejections", reason=body["error"]["type"])
    return body


def stream_samples(service: Service, params: SamplingParams, preview_every: int) -> "EventStream":
    """An answer as events: `start`, `step` ..., `image` for each image, `done`; or `error`.

    Raises as `Service.admit`.
    """
    queue = StreamQueue(preview_every, params.trace)
    # The queue has the trace; the engine need not keep another.
    admitted = service.admit(replace(params, trace=False), queue)
    return EventStream(service, admitted, _sample_events(service, admitted, queue))


async def _sample_events(
    service: Service, admitted: AdmittedRequest, queue: StreamQueue
) -> AsyncGenerator[str]:
    request, model = admitted.request, admitted.version.model
    facts = facts_of(admitted)
    first = facts["first_index"]
    start = {
        "n": len(request.index),
        "steps": len(request.plan.times) - 1,
        "nfe_per_image": request.denoiser_calls,
        "experts": model.names,
        "shape": list(model.shape),
    }
    yield event("start", facts | start)
    try:
        async with aclosing(steps_of(service, admitted, queue)) as steps:
            async for step in steps:
                data: dict[str, Any] = {
                    "index": first + step.place,
                    "step": step.step,
                    "call": step.call,
                    "t": step.t,
                }
                if step.alpha is not None:
                    data["alpha"] = [round(p, 4) for p in step.alpha]
                    data["chosen"] = step.chosen
                if step.preview is not None:
                    data["b64_json"] = await asyncio.to_thread(b64, step.preview)
                yield event("step", data)
        for i, image in enumerate(images_of(admitted)):
            single = await asyncio.to_thread(b64, image)
            yield event("image", {"index": first + i, "b64_json": single})
        yield event("done", facts_of(admitted))
        service.metrics.count("requests", status="200")
    except Exception as error:
        yield event("error", failed(service, error))


async def with_comments(
    events: AsyncGenerator[str], silence_s: float = _SILENCE_S
) -> AsyncGenerator[str]:
    """The events, and a comment after every `silence_s` without one."""

    async def following() -> str:
        return await anext(events)

    waiting: asyncio.Task[str] | None = None
    try:
        while True:
            waiting = waiting or asyncio.create_task(following())
            done, _ = await asyncio.wait({waiting}, timeout=silence_s)
            if not done:
                yield ": keep-alive\n\n"
                continue
            finished, waiting = waiting, None
            try:
                following_event = finished.result()
            except StopAsyncIteration:
                return
            yield following_event
    finally:
        if waiting is not None:
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await waiting
        await events.aclose()


class EventStream(StreamingResponse):
    """A response that sends events until they end, the client leaves or its time is over.

    The time, `serve.limits.deadline_s` for the images and `serve.limits.send_timeout_s` more for
    reading them, bounds how long a client that does not read keeps a request in memory.
    """

    def __init__(
        self, service: Service, admitted: AdmittedRequest, events: AsyncGenerator[str]
    ) -> None:
        headers = headers_of(admitted) | {"cache-control": "no-store", "x-accel-buffering": "no"}
        for name in ("ddm-nfe", "ddm-router-nfe"):  # not known yet
            del headers[name]
        self.events = with_comments(events)
        super().__init__(self.events, media_type="text/event-stream", headers=headers)
        limits = service.settings.serve.limits
        self.timeout_s = limits.deadline_s + limits.send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.timeout_s):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a stream ended: its client did not read it in %g s", self.timeout_s)
        finally:
            await self.events.aclose()
