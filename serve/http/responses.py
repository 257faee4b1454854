"""From an order to an answer: made while the client waits, as bytes or as a stream of server-sent events."""

import asyncio
import base64
import io
import json
import logging
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import numpy as np
import torch
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from torch import Tensor

from serve.engine.expert import ServingError
from serve.engine.service import AdmittedRequest, SamplingParams, Service
from serve.engine.state import StepRecord
from serve.http.middleware import error_body
from serve.model.images import contact_sheet, encoded, to_uint8

log = logging.getLogger(__name__)

MEDIA = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


class ClientGoneError(Exception):
    """The client left before its answer was ready."""


async def made(service: Service, order: AdmittedRequest, request: Request) -> None:
    """Make an order's images; a client that leaves takes them off the engine."""
    started = time.perf_counter()
    making = asyncio.create_task(service.run(order))
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait((making, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not making.done():
            raise ClientGoneError
        await making
    finally:
        for task in (making, leaving):
            task.cancel()
        await asyncio.gather(making, leaving, return_exceptions=True)
        service.metrics.observe("request_seconds", time.perf_counter() - started)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def headers_of(order: AdmittedRequest) -> dict[str, str]:
    """What every answer says of itself in its headers; `ddm-degraded` names experts that were done without."""
    request = order.request
    found = {
        "ddm-seed": str(order.seed),
        "ddm-version": order.version.model.version,
        "ddm-nfe": str(request.nfe),
    }
    return found | ({"ddm-degraded": " ".join(sorted(request.absent))} if request.absent else {})


def facts_of(order: AdmittedRequest) -> dict[str, Any]:
    """What every answer in JSON says of itself."""
    request, model = order.request, order.version.model
    return {
        "seed": order.seed,
        "first_index": int(request.index[0]),
        "version": model.version,
        "calls": request.nfe,
        "degraded": sorted(request.absent),
    }


def images_of(order: AdmittedRequest) -> Tensor:
    """uint8 `[n, C, H, W]`, in the order of their numbers."""
    return to_uint8(
        torch.stack([order.request.images[place] for place in range(len(order.request.index))])
    )


def b64(image: Tensor, form: str = "png") -> str:
    """A uint8 image `[C, H, W]` as a file in base64."""
    return base64.b64encode(encoded(image, form)).decode()


def body_of(order: AdmittedRequest, form: str) -> tuple[bytes, str]:
    """An answer's bytes and media type; run in a thread."""
    images = images_of(order)
    if form in ("png", "webp"):
        columns = math.ceil(math.sqrt(len(images)))
        return encoded(
            contact_sheet(images.split(columns), least_side=1) if len(images) > 1 else images[0],
            form,
        ), MEDIA[form]
    if form == "npz":
        file = io.BytesIO()
        arrays = {
            "images": images.permute(0, 2, 3, 1).numpy(),
            "seed": np.int64(order.seed),
            "first_index": order.request.index[0],
        }
        if order.request.trace:
            arrays |= dict(order.trace()._asdict())
        np.savez_compressed(
            file, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()}
        )
        return file.getvalue(), "application/x-npz"
    facts = facts_of(order)
    first = facts["first_index"]
    facts["data"] = [{"index": first + i, "b64_json": b64(image)} for i, image in enumerate(images)]
    if order.request.trace:
        trace = order.trace()
        facts["trace"] = {
            "t": trace.t.tolist(),
            "alpha": trace.alpha.double().mul(1e6).round().div(1e6).tolist(),
            "chosen": trace.chosen.int().tolist(),
            "experts": order.version.model.names,
        }
    return json.dumps(facts).encode(), "application/json"


# Streams


def event(name: str, data: Any) -> str:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


class StreamQueue:
    """What an engine tells of a request's images, for one reader that may be slow: then previews are left out."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.queue: asyncio.Queue[tuple[int, int, StepRecord, Tensor | None]] = asyncio.Queue()
        self.calls: dict[int, int] = {}

    def __call__(self, place: int, record: StepRecord, denoised: Tensor) -> None:
        call = self.calls[place] = self.calls.get(place, 0) + 1
        shown = self.every and call % self.every == 0 and self.queue.qsize() < 1000
        self.queue.put_nowait((place, call, record, denoised.float().cpu() if shown else None))


async def told_by(
    service: Service, order: AdmittedRequest, told: StreamQueue
) -> AsyncGenerator[tuple[int, int, StepRecord, Tensor | None]]:
    """What happens while an order is made, until it is done. Leaving this takes its images off the engine."""
    started = time.perf_counter()
    making = asyncio.create_task(service.run(order))
    hearing: asyncio.Task[Any] | None = None
    try:
        while True:
            hearing = hearing or asyncio.create_task(told.queue.get())
            await asyncio.wait((making, hearing), return_when=asyncio.FIRST_COMPLETED)
            if hearing.done():
                yield hearing.result()
                hearing = None
            elif making.done() and told.queue.empty():
                break
        await making
    finally:
        if not making.done():
            service.metrics.count("requests", status="499")
        tasks = [making, *([hearing] if hearing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        service.metrics.observe("request_seconds", time.perf_counter() - started)


def failure(service: Service, error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body of an error that is not the request's fault."""
    match error:
        case TimeoutError():
            said = f"not done within {service.settings.serve.limits.deadline_s:g} s"
            return 504, error_body("deadline", said)
        case ServingError():
            return 503, error_body("unavailable", str(error))
    log.error("a request failed", exc_info=error)
    return 500, error_body("internal", "the server failed; its log says why")


def failed(service: Service, error: Exception) -> dict[str, Any]:
    """What a stream that has begun says of an error, which is counted."""
    status, body = failure(service, error)
    service.metrics.count("requests", status=str(status))
    service.metrics.count("rejections", reason=body["error"]["type"])
    return body


async def streamed(service: Service, params: SamplingParams, every: int) -> StreamingResponse:
    """An answer as server-sent events: `start`, a `step` each call, a `image` each, and `done`; or `error`."""
    told = StreamQueue(every)
    order = service.admit(params, told)
    model, first = order.version.model, params.first_index
    calls_per_step = order.request.plan.method.calls_per_step

    async def events() -> AsyncGenerator[str]:
        start = {
            "n": params.n,
            "steps": len(order.request.plan.times) - 1,
            "nfe_per_image": order.request.denoiser_calls,
            "experts": model.names,
            "shape": list(model.shape),
        }
        yield event("start", facts_of(order) | start)
        try:
            async with aclosing(told_by(service, order, told)) as news:
                async for place, call, record, denoised in news:
                    step: dict[str, Any] = {
                        "index": first + place,
                        "step": (call - 1) // calls_per_step + 1,
                        "call": call,
                        "t": record.t,
                    }
                    if params.trace:
                        step["alpha"] = [round(p, 4) for p in record.alpha.tolist()]
                        step["chosen"] = record.chosen.nonzero()[:, 0].tolist()
                    if denoised is not None:
                        step["b64_json"] = await asyncio.to_thread(b64, to_uint8(denoised))
                    if params.trace or denoised is not None:
                        yield event("step", step)
            for i, image in enumerate(images_of(order)):
                yield event(
                    "image", {"index": first + i, "b64_json": await asyncio.to_thread(b64, image)}
                )
            yield event("done", facts_of(order))
            service.metrics.count("requests", status="200")
        except Exception as error:
            yield event("error", failed(service, error))

    return EventStream(order, events())


class EventStream(StreamingResponse):
    """The answer that carries them. However it ends, they end with it: a client may leave while it does not read."""

    def __init__(self, order: AdmittedRequest, events: AsyncGenerator[str]) -> None:
        headers = headers_of(order) | {
            "cache-control": "no-store",
            "x-accel-buffering": "no",
        }
        del headers["ddm-nfe"]  # not known yet
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.events.aclose()
