"""The HTTP API over a `Service`: images, errors in one shape, health, metrics, and a page for people."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from ddm.errors import ConfigError
from serve.engine.expert import ServingError
from serve.engine.metrics import Prometheus
from serve.engine.service import BusyError, SamplingParams, Service
from serve.http.middleware import error_body
from serve.http.openai_api import UnknownModelError, add_openai
from serve.http.responses import ClientGoneError, body_of, failure, headers_of, made, streamed
from serve.http.schemas import IMAGE_ERRORS, SampleRequest, fault

_PAGE = Path(__file__).parent / "page"
_IMAGES = ("/v1/samples", "/v1/images/generations")
_MEDIA = ("image/png", "image/webp", "application/x-npz", "text/event-stream")


def build_app(service: Service) -> FastAPI:
    """The application; the service starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPIOffline(  # its description needs nothing from elsewhere
        static_url="/page/docs",
        title="ddm",
        summary="Images from a decentralized mixture of experts",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    _errors(app, service)
    _images(app, service)
    add_openai(app, service)
    _health(app, service)
    app.mount("/page", StaticFiles(directory=_PAGE))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    return app


def _errors(app: FastAPI, service: Service) -> None:
    def reply(
        request: Request,
        status: int,
        body: dict[str, Any],
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        service.metrics.count("rejections", reason=body["error"]["type"])
        if request.url.path in _IMAGES:
            service.metrics.count("requests", status=str(status))
        return JSONResponse(body, status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return reply(
                request,
                400,
                error_body("not_json", f"the body is not JSON: {first['ctx']['error']}"),
            )
        if isinstance(error.body, bytes):
            said = "the body must be JSON, and come with the header Content-Type: application/json"
            return reply(request, 400, error_body("not_json", said))
        return reply(request, 422, error_body("invalid_value", *fault(first)))

    @app.exception_handler(ConfigError)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ConfigError)
        param = error.key.removeprefix("sample.") if error.key else None
        said = str(error).removeprefix("sample.")[:2000]  # it shows the value, which may be long
        return reply(request, 422, error_body("invalid_value", said, param))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind, said = {
            400: (
                "not_json",
                "the body is not JSON: it must be UTF-8, not nested deeply, its numbers below 4300 digits",
            ),
            404: ("not_found", "there is nothing here: /docs lists the paths"),
            405: ("method_not_allowed", f"this path does not take {request.method}"),
        }.get(error.status_code, ("http_error", str(error.detail)))
        return reply(request, error.status_code, error_body(kind, said), error.headers)

    @app.exception_handler(UnknownModelError)
    async def missing(request: Request, error: Exception) -> Response:
        return reply(request, 404, error_body("model_not_found", str(error), "model"))

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: Exception) -> Response:
        assert isinstance(error, BusyError)
        return reply(
            request, 429, error_body("busy", str(error)), {"Retry-After": str(error.retry_after_s)}
        )

    @app.exception_handler(ServingError)
    @app.exception_handler(TimeoutError)
    @app.exception_handler(Exception)
    async def unserved(request: Request, error: Exception) -> Response:
        status, body = failure(service, error)
        return reply(request, status, body, {"Retry-After": "5"} if status == 503 else None)

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: Exception) -> Response:
        service.metrics.count("requests", status="499")
        return Response(status_code=499)  # nobody reads it


def _images(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/samples",
        responses={
            200: {"content": {kind: {} for kind in _MEDIA}},
            **IMAGE_ERRORS,
        },
    )
    async def samples(request: Request, asked: SampleRequest) -> Response:
        """Draw images."""
        if asked.trace and not asked.stream and asked.format in ("png", "webp"):
            raise ConfigError(
                f"sample.trace must have format npz or b64_json, or stream, got {asked.format!r}",
                "sample.trace",
            )
        params = SamplingParams(asked.n, asked.seed, asked.first_index, asked.trace, asked.given())
        if asked.stream:
            return await streamed(service, params, asked.preview_every)
        order = service.admit(params)
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
        """Whether images can be made, and each expert's state."""
        if service.current is None:
            return JSONResponse({"status": "starting", "experts": {}}, 503)
        engine = service.current.engine
        states = {
            e.name: "ready" if there else "away"
            for e, there in zip(engine.experts, engine.alive, strict=True)
        }
        able = all(engine.alive) or (engine.degraded == "renormalize" and any(engine.alive))
        status = "ready" if all(engine.alive) else "degraded" if able else "unavailable"
        return JSONResponse(
            {"status": status, "version": service.current.model.version, "experts": states},
            200 if able else 503,
        )

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        service.observe()
        if not isinstance(service.metrics, Prometheus):
            return Response("# scraped from Ray's own metrics port\n", media_type="text/plain")
        return Response(
            service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


__all__ = ["build_app"]
