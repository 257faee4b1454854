"""The HTTP API over a `Service`: pictures, errors in one shape, health, metrics, and a page for people."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from ddm.errors import ConfigError
from serve.answers import MEDIA, ClientGoneError, body_of, headers_of, made, streamed
from serve.engine import ServingError
from serve.generations import UnknownModelError, add_openai
from serve.guard import error_body, shown
from serve.metrics import Prometheus
from serve.schemas import ERRORS, SampleRequest
from serve.service import Ask, BusyError, Service

_PAGE = Path(__file__).parent / "page"


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
    add_openai(app, service)
    _health(app, service)
    app.mount("/page", StaticFiles(directory=_PAGE))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    return app


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
            return reply(400, "not_json", f"the body is not JSON: {shown(first['ctx'].get('error', first['msg']))}")
        param = ".".join(str(part) for part in first["loc"] if part != "body") or None
        rule = first["msg"][:1].lower() + first["msg"][1:]
        got = "" if first["type"] == "missing" else f", got {shown(first.get('input'))}"
        return reply(422, "invalid_value", f"{shown(param, 100) if param else 'the body'}: {rule}{got}", param)

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

    @app.exception_handler(UnknownModelError)
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

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; logs do


def _pictures(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/samples",
        responses={
            200: {"content": {kind: {} for kind in (*MEDIA.values(), "application/x-npz", "text/event-stream")}},
            **ERRORS,
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
            return await streamed(service, ask, asked.preview_every)
        order = service.order(ask)
        await made(service, order, request)
        body, media = await asyncio.to_thread(body_of, order, asked.format)
        service.metrics.count("requests", status="200")
        return Response(body, media_type=media, headers=headers_of(order))


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
