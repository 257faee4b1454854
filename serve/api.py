"""The HTTP API over a `Service`: pictures, the same in the names of OpenAI's images API, health, metrics, and a page."""

import asyncio
import base64
import io
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from torch import Tensor

from ddm.errors import ConfigError
from ddm.grids import GRIDS
from ddm.samplers import SAMPLERS
from router.policies import POLICIES
from router.sources import SOURCES
from serve.engine import ServingError, Taken
from serve.guard import error_body
from serve.metrics import Prometheus
from serve.model import CONTROLS, SampleConfig
from serve.pictures import contact_sheet, encoded, to_uint8
from serve.service import Ask, BusyError, Order, Service

log = logging.getLogger(__name__)

_PAGE = Path(__file__).parent / "page"
_MEDIA = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


def _one_of(names: Sequence[str], what: str) -> Any:
    return Field(default=None, description=what, json_schema_extra={"enum": [*names, None]}, max_length=64)


class _Settings(BaseModel):
    """The fields of `SampleConfig`; what is left out is the service's own default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    steps: Annotated[int | None, Field(ge=1, le=1000, description="steps of the sampler")] = None
    sampler: Annotated[str | None, _one_of(SAMPLERS, "how the ODE or SDE is walked")] = None
    grid: Annotated[str | None, _one_of(GRIDS, "the times of the steps")] = None
    source: Annotated[str | None, _one_of(SOURCES, "where alpha, the experts' probabilities, comes from")] = None
    policy: Annotated[str | None, _one_of(POLICIES, "who moves the picture, given alpha")] = None
    top_k: Annotated[int | None, Field(ge=1, le=2**31, description="for policy=top_k")] = None
    nucleus_p: Annotated[float | None, Field(gt=0, le=1, description="for policy=nucleus")] = None
    budget: Annotated[float | None, Field(ge=1, description="for policy=adaptive: calls a step, on average")] = None
    control: Annotated[str | None, _one_of(CONTROLS, "what stands in for the experts that are not asked")] = None
    order: Annotated[int | None, Field(ge=2, le=3, description="for sampler=unipc")] = None
    pull: Annotated[float | None, Field(ge=0, description="for source=combined, a unit of t")] = None
    t_min: Annotated[float | None, Field(ge=0, lt=1, description="where the grid ends")] = None
    clip: Annotated[bool | None, Field(description="bound the denoised pictures to [-1, 1]")] = None
    clusters: Annotated[
        list[str] | dict[str, float] | None,
        Field(description="only these clusters; or what each cluster's share is multiplied by, others 0"),
    ] = None

    def given(self) -> dict[str, Any]:
        """The settings that were given."""
        found = {f.name: value for f in fields(SampleConfig) if (value := getattr(self, f.name)) is not None}
        if isinstance(found.get("clusters"), list):
            found["clusters"] = dict.fromkeys(found["clusters"], 1.0)
        return found


class SampleRequest(_Settings):
    """Pictures `first_index ... first_index + n - 1` of a seed. Picture i is the same whatever its company."""

    n: Annotated[int, Field(ge=1, description="how many pictures")] = 1
    seed: Annotated[int | None, Field(ge=0, lt=2**63, description="none: one is chosen, and returned as ddm-seed")] = (
        None
    )
    first_index: Annotated[int, Field(ge=0, lt=2**62, description="the number of the first picture")] = 0
    format: Annotated[
        Literal["png", "webp", "npz", "b64_json"],
        Field(
            description="png, webp: the picture, or a sheet of all; npz: images uint8 [n, H, W, C]; b64_json: PNGs in JSON"
        ),
    ] = "png"
    trace: Annotated[
        bool,
        Field(description="also which expert moved which picture when, alpha and the calls; npz, b64_json or stream"),
    ] = False
    stream: Annotated[bool, Field(description="server-sent events: start, step ..., picture ..., done; or error")] = (
        False
    )
    preview_every: Annotated[
        int, Field(ge=0, le=1000, description="steps between previews in a stream; 0 for none")
    ] = 1


class ImagesRequest(_Settings):
    """OpenAI's `images.generate`. `prompt` names a cluster, or is empty. `seed` and all settings may come as `extra_body`."""

    prompt: Annotated[str, Field(description="a cluster's name, or empty for all", max_length=32_000)]
    model: Annotated[str | None, Field(max_length=256)] = None
    n: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    size: Annotated[str | None, Field(description="auto, or the pictures' own", max_length=32)] = None
    response_format: Annotated[Literal["b64_json"] | None, Field(description="there are no URLs")] = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int | None, Field(ge=0, le=3)] = None
    # Known to that API and of no meaning here.
    quality: Annotated[str | None, Field(max_length=64)] = None
    style: Annotated[str | None, Field(max_length=64)] = None
    background: Annotated[str | None, Field(max_length=64)] = None
    moderation: Annotated[str | None, Field(max_length=64)] = None
    output_compression: Annotated[int | None, Field(ge=0, le=100)] = None
    user: Annotated[str | None, Field(max_length=512)] = None


class ErrorDetail(BaseModel):
    """What went wrong: in words, by kind, and the field at fault where it is one."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(BaseModel):
    """The one shape of every error."""

    error: ErrorDetail


_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorReply, "description": what}
    for code, what in {
        400: "not JSON",
        401: "no token, or a wrong one",
        408: "the body did not arrive in time",
        413: "the body is too large",
        422: "a field is unknown, or out of its range",
        429: "too much is pending; Retry-After says when to come back",
        503: "an expert is away, or nothing is in service yet",
        504: "not done within the deadline",
    }.items()
}


class _NotFoundError(Exception):
    """A model that is not served here."""


def build_app(
    service: Service,
    switched: Callable[[], object] | None = None,
) -> FastAPI:
    """The application; the service starts and stops with it. `switched` is called once it has started."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        if switched is not None:
            switched()
        yield
        await service.stop()

    app = FastAPI(
        title="ddm", summary="Pictures from a decentralized mixture of experts", lifespan=lifespan, redoc_url=None
    )
    _errors(app, service)
    _pictures(app, service)
    _openai(app, service)
    _health(app, service)
    app.mount("/page", StaticFiles(directory=_PAGE))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    return app


# Errors


def _errors(app: FastAPI, service: Service) -> None:
    def reply(status: int, kind: str, message: str, param: str | None = None, **headers: str) -> JSONResponse:
        if status in (429, 503, 504):
            service.metrics.count("rejections", reason=kind)
        return JSONResponse(error_body(kind, message, param), status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return reply(400, "not_json", f"the body is not JSON: {_shown(first['ctx'].get('error', first['msg']))}")
        param = ".".join(str(part) for part in first["loc"] if part != "body") or None
        rule = first["msg"][:1].lower() + first["msg"][1:]
        got = "" if first["type"] == "missing" else f", got {_shown(first.get('input'))}"
        return reply(422, "invalid_value", f"{_shown(param, 100) if param else 'the body'}: {rule}{got}", param)

    @app.exception_handler(ConfigError)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ConfigError)
        param = error.key.removeprefix("sample.") if error.key else None
        return reply(422, "invalid_value", str(error).removeprefix("sample."), param)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        kinds = {400: "not_json", 404: "not_found", 405: "method_not_allowed"}
        return reply(
            error.status_code, kinds.get(error.status_code, "http_error"), str(error.detail), **(error.headers or {})
        )

    @app.exception_handler(_NotFoundError)
    async def missing(request: Request, error: Exception) -> JSONResponse:
        return reply(404, "model_not_found", str(error), "model")

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, BusyError)
        return reply(429, "busy", str(error), **{"Retry-After": str(error.retry_after_s)})

    @app.exception_handler(ServingError)
    async def unserved(request: Request, error: Exception) -> JSONResponse:
        return reply(503, "unavailable", str(error), **{"Retry-After": "5"})

    @app.exception_handler(TimeoutError)
    async def late(request: Request, error: Exception) -> JSONResponse:
        return reply(504, "deadline", f"not done within {service.settings.serve.limits.deadline_s:g} s")

    @app.exception_handler(_ClientGoneError)
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; logs do


def _shown(value: Any, most: int = 200) -> str:
    """A value for an error's text, in ASCII and short."""
    text = ascii(value)
    return text if len(text) <= most else f"{text[:most]}..."


# Making pictures


class _ClientGoneError(Exception):
    """The client left before its answer was ready."""


async def _made(service: Service, order: Order, request: Request) -> None:
    """Make an order's pictures; a client that leaves takes them off the engine."""
    started = time.perf_counter()
    making = asyncio.create_task(service.make(order))
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait((making, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not making.done():
            raise _ClientGoneError
        await making
    finally:
        for task in (making, leaving):
            task.cancel()
        await asyncio.gather(making, leaving, return_exceptions=True)
        service.metrics.observe("request_seconds", time.perf_counter() - started)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _headers(order: Order) -> dict[str, str]:
    job = order.job
    found = {"ddm-seed": str(order.seed), "ddm-version": order.version.model.version, "ddm-calls": str(job.calls)}
    return found | ({"ddm-degraded": " ".join(sorted(job.absent))} if job.absent else {})


def _facts(order: Order) -> dict[str, Any]:
    """What every answer in JSON says of itself."""
    job, model = order.job, order.version.model
    return {
        "seed": order.seed,
        "first_index": int(job.index[0]),
        "version": model.version,
        "calls": job.calls,
        "degraded": sorted(job.absent),
    }


def _images(order: Order) -> Tensor:
    """uint8 `[n, C, H, W]`, in the order of their numbers."""
    return to_uint8(torch.stack([order.job.pictures[place] for place in range(len(order.job.index))]))


def _b64(picture: Tensor, form: str = "png") -> str:
    return base64.b64encode(encoded(picture, form)).decode()


def _body(order: Order, form: str) -> tuple[bytes, str]:
    """An answer's bytes and media type; run in a thread."""
    images = _images(order)
    if form in ("png", "webp"):
        columns = math.ceil(math.sqrt(len(images)))
        return encoded(
            contact_sheet(images.split(columns), least_side=1) if len(images) > 1 else images[0], form
        ), _MEDIA[form]
    if form == "npz":
        file = io.BytesIO()
        arrays = {
            "images": images.permute(0, 2, 3, 1).numpy(),
            "seed": np.int64(order.seed),
            "first_index": order.job.index[0],
        }
        if order.job.trace:
            arrays |= dict(order.trace()._asdict())
        np.savez_compressed(file, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})
        return file.getvalue(), "application/x-npz"
    facts = _facts(order)
    first = facts["first_index"]
    facts["data"] = [{"index": first + i, "b64_json": _b64(image)} for i, image in enumerate(images)]
    if order.job.trace:
        trace = order.trace()
        facts["trace"] = {
            "t": trace.t.tolist(),
            "alpha": trace.alpha.double().mul(1e6).round().div(1e6).tolist(),
            "chosen": trace.chosen.int().tolist(),
            "experts": order.version.model.names,
        }
    return json.dumps(facts).encode(), "application/json"


def _pictures(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/samples",
        responses={
            200: {"content": {kind: {} for kind in (*_MEDIA.values(), "application/x-npz", "text/event-stream")}},
            **_ERRORS,
        },
    )
    async def samples(request: Request, asked: SampleRequest) -> Response:
        """Draw pictures."""
        if asked.trace and not asked.stream and asked.format in ("png", "webp"):
            raise ConfigError(
                f"sample.trace must have format npz or b64_json, or stream, got {asked.format!r}", "sample.trace"
            )
        ask = Ask(asked.n, asked.seed, asked.first_index, asked.trace, asked.given())
        if asked.stream:
            return await _streamed(service, ask, asked.preview_every)
        order = service.order(ask)
        await _made(service, order, request)
        body, media = await asyncio.to_thread(_body, order, asked.format)
        service.metrics.count("requests", status="200")
        return Response(body, media_type=media, headers=_headers(order))


# Streams


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


class _Told:
    """What an engine tells of a request's pictures, for one reader that may be slow: then previews are left out."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.queue: asyncio.Queue[tuple[int, int, Taken, Tensor | None]] = asyncio.Queue()
        self.calls: dict[int, int] = {}

    def __call__(self, place: int, taken: Taken, denoised: Tensor) -> None:
        call = self.calls[place] = self.calls.get(place, 0) + 1
        shown = self.every and call % self.every == 0 and self.queue.qsize() < 1000
        self.queue.put_nowait((place, call, taken, denoised.float().cpu() if shown else None))


async def _told(service: Service, order: Order, told: _Told) -> AsyncIterator[tuple[int, int, Taken, Tensor | None]]:
    """What happens while an order is made, until it is done. Leaving this takes its pictures off the engine."""
    started = time.perf_counter()
    making = asyncio.create_task(service.make(order))
    hearing: asyncio.Task[Any] | None = None
    try:
        while True:
            hearing = hearing or asyncio.create_task(told.queue.get())
            await asyncio.wait((making, hearing), return_when=asyncio.FIRST_COMPLETED)
            if hearing.done():
                yield hearing.result()
                hearing = None
            elif making.done():
                break
        await making
    finally:
        tasks = [making, *([hearing] if hearing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        service.metrics.observe("request_seconds", time.perf_counter() - started)


def _failure(service: Service, error: Exception) -> dict[str, Any]:
    """The error of a stream that has begun, in the shape of all errors."""
    if isinstance(error, TimeoutError):
        return error_body("deadline", f"not done within {service.settings.serve.limits.deadline_s:g} s")
    return error_body("unavailable", str(error))


async def _streamed(service: Service, ask: Ask, every: int) -> StreamingResponse:
    told = _Told(every)
    order = service.order(ask, told)
    model, first = order.version.model, ask.first_index

    async def events() -> AsyncIterator[str]:
        start = {"n": ask.n, "calls_a_picture": order.job.steps, "experts": model.names, "shape": list(model.shape)}
        yield _event("start", _facts(order) | start)
        try:
            async for place, call, taken, denoised in _told(service, order, told):
                step: dict[str, Any] = {"index": first + place, "call": call, "t": taken.t}
                if ask.trace:
                    step["alpha"] = [round(p, 4) for p in taken.alpha.tolist()]
                    step["chosen"] = taken.chosen.nonzero()[:, 0].tolist()
                if denoised is not None:
                    step["b64_json"] = await asyncio.to_thread(_b64, to_uint8(denoised))
                if ask.trace or denoised is not None:
                    yield _event("step", step)
            for i, image in enumerate(_images(order)):
                yield _event("picture", {"index": first + i, "b64_json": await asyncio.to_thread(_b64, image)})
            yield _event("done", _facts(order))
            service.metrics.count("requests", status="200")
        except (ServingError, TimeoutError) as error:
            yield _event("error", _failure(service, error))

    headers = _headers(order) | {"cache-control": "no-store", "x-accel-buffering": "no"}
    del headers["ddm-calls"]
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


# In the names of OpenAI's API


def _openai(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What is served: one model, its clusters, what it can be asked for and what it does unless asked."""
        return {"object": "list", "data": [_card(service)]}

    @app.get("/v1/models/{model}", responses={404: {"model": ErrorReply}})
    async def model(model: str) -> dict[str, Any]:
        """The model of that name."""
        _known(service, model)
        return _card(service)

    @app.post("/v1/images/generations", responses={404: {"model": ErrorReply}, **_ERRORS})
    async def generations(request: Request, asked: ImagesRequest) -> Response:
        """Draw pictures, as the public `openai` client asks for them."""
        if asked.model is not None:
            _known(service, asked.model)
        if service.current is None:
            raise ServingError("no bundle is in service")
        model, given = service.current.model, asked.given()
        if asked.prompt:
            if asked.prompt not in model.names:
                names = ", ".join(repr(name) for name in model.names)
                raise ConfigError(
                    f"prompt must be empty or name a cluster, one of {names}; got {_shown(asked.prompt)}", "prompt"
                )
            given["clusters"] = {asked.prompt: 1.0}
        height, width = model.shape[1:]
        size = f"{width}x{height}"
        if asked.size not in (None, "auto", size):
            raise ConfigError(f"size must be auto or {size}, got {_shown(asked.size)}", "size")
        ask, form = Ask(asked.n or 1, asked.seed, settings=given), asked.output_format or "png"
        told = _Told(0)
        order = service.order(ask, told if asked.stream else None)
        facts = {
            "created": int(time.time()),
            "output_format": form,
            "size": size,
            "quality": "auto",
            "background": "opaque",
        }
        if asked.stream:
            told.every = math.ceil(order.job.steps / (asked.partial_images + 1)) if asked.partial_images else 0
            return StreamingResponse(
                _images_events(service, order, told, facts),
                media_type="text/event-stream",
                headers={"ddm-seed": str(order.seed)},
            )
        await _made(service, order, request)
        data = await asyncio.to_thread(lambda: [{"b64_json": _b64(image, form)} for image in _images(order)])
        service.metrics.count("requests", status="200")
        return JSONResponse({**facts, "data": data, "usage": _usage(order)}, headers=_headers(order))


async def _images_events(service: Service, order: Order, told: _Told, facts: dict[str, Any]) -> AsyncIterator[str]:
    facts = {"created_at" if key == "created" else key: value for key, value in facts.items()}
    form, shown = facts["output_format"], dict.fromkeys(range(len(order.job.index)), 0)
    try:
        async for place, call, _, denoised in _told(service, order, told):
            if denoised is not None and call < order.job.steps:
                picture = await asyncio.to_thread(_b64, to_uint8(denoised), form)
                kind = "image_generation.partial_image"
                yield _event(kind, {"type": kind, "b64_json": picture, "partial_image_index": shown[place], **facts})
                shown[place] += 1
        for image in _images(order):
            kind, picture = "image_generation.completed", await asyncio.to_thread(_b64, image, form)
            yield _event(kind, {"type": kind, "b64_json": picture, **facts, "usage": _usage(order)})
        service.metrics.count("requests", status="200")
    except (ServingError, TimeoutError) as error:
        yield _event("error", {"type": "error", **_failure(service, error)})


def _usage(order: Order) -> dict[str, Any]:
    """That API counts tokens; here an expert's evaluation of a picture is one."""
    calls = order.job.calls
    details = {"text_tokens": 0, "image_tokens": 0}
    return {"input_tokens": 0, "input_tokens_details": details, "output_tokens": calls, "total_tokens": calls}


def _known(service: Service, name: str) -> None:
    if name != service.name:
        raise _NotFoundError(f"model must be {service.name!r}, got {_shown(name)}")


def _card(service: Service) -> dict[str, Any]:
    if service.current is None:
        raise ServingError("no bundle is in service")
    model, limits = service.current.model, service.settings.serve.limits
    return {
        "id": service.name,
        "object": "model",
        "created": service.began_s,
        "owned_by": "ddm",
        "version": model.version,
        "shape": list(model.shape),
        "clusters": model.names,
        "shares": model.pi.tolist(),
        "limits": {"n": limits.n, "steps": limits.steps},
        "choices": {"sampler": SAMPLERS, "grid": GRIDS, "source": SOURCES, "policy": POLICIES, "control": CONTROLS},
        "defaults": {f.name: getattr(service.settings.sample, f.name) for f in fields(SampleConfig)},
    }


# Health


def _health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "no bundle, or an expert is away"}})
    async def readyz() -> JSONResponse:
        """Whether pictures can be made, and each expert's state."""
        if service.current is None:
            return JSONResponse({"status": "starting", "experts": {}}, 503)
        engine = service.current.engine
        states = {e.name: "ready" if there else "away" for e, there in zip(engine.experts, engine.alive, strict=True)}
        able = all(engine.alive) or (engine.degraded == "renormalize" and any(engine.alive))
        status = "ready" if all(engine.alive) else "degraded" if able else "unavailable"
        return JSONResponse(
            {"status": status, "version": service.current.model.version, "experts": states}, 200 if able else 503
        )

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        service.observe()
        if not isinstance(service.metrics, Prometheus):
            return Response("# scraped from Ray's own metrics port\n", media_type="text/plain")
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


__all__ = ["build_app"]
