"""The HTTP API of `Models`: images, errors in one shape, health, metrics, and the page."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from ddm.errors import ConfigError
from serve.engine.expert import ServingError
from serve.engine.metrics import Prometheus
from serve.engine.models import Models, UnknownModelError
from serve.engine.service import BusyError
from serve.http.edits_api import add_edits
from serve.http.jobs_api import NoResultError, add_jobs
from serve.http.middleware import UPLOADS, HeadAsGet, error_body, key_of, shown
from serve.http.openai_api import add_openai
from serve.http.responses import (
    ClientGoneError,
    MissingError,
    failure,
)
from serve.http.samples_api import add_samples
from serve.http.schemas import fault

_PAGE = Path(__file__).parent / "page"
_DOCS_FILES = "page/docs"
_REVALIDATED = {"Cache-Control": "no-cache"}  # so that an upgrade never mixes old and new modules
_IMAGE_PATHS = ("/v1/samples", "/v1/images/generations", "/v1/jobs", *UPLOADS)


def build_app(models: Models) -> FastAPI:
    """The application. The models start and stop with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await models.start()
        yield
        await jobs.stop()
        await models.stop()

    app = FastAPIOffline(
        docs_url=None,
        redoc_url=None,
        static_url=f"/{_DOCS_FILES}",
        title="ddm",
        summary="Images from a decentralized mixture of experts",
        servers=[{"url": "./"}],  # relative to openapi.json, also behind a proxy with a prefix
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.add_middleware(HeadAsGet)
    _add_errors(app, models)
    add_samples(app, models)
    jobs = add_jobs(app, models)
    add_openai(app, models)
    add_edits(app, models)
    _add_health(app, models)
    app.mount("/page", _PageFiles(directory=_PAGE))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html", headers=_REVALIDATED)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(  # relative URLs, for the same reason
            title="ddm",
            openapi_url="openapi.json",
            swagger_js_url=f"{_DOCS_FILES}/swagger-ui-bundle.js",
            swagger_css_url=f"{_DOCS_FILES}/swagger-ui.css",
            swagger_favicon_url=f"{_DOCS_FILES}/favicon.png",
        )

    return app


class _PageFiles(StaticFiles):
    """The page's files: a browser asks whether a kept one is still current before it is used."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_REVALIDATED)
        return response


def _add_errors(app: FastAPI, models: Models) -> None:
    def reply(
        request: Request,
        status: int,
        body: dict[str, Any],
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        models.metrics.count("rejections", reason=body["error"]["type"])
        if request.url.path in _IMAGE_PATHS:
            models.metrics.count("requests", status=str(status))
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
            message = "the body must be JSON, with the header Content-Type: application/json"
            return reply(request, 400, error_body("not_json", message))
        return reply(request, 422, error_body("invalid_value", *fault(first)))

    @app.exception_handler(ConfigError)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ConfigError)
        param = error.key.removeprefix("sample.") if error.key else None
        # It shows the value, which may be long.
        message = str(error).removeprefix("sample.")[:2000]
        return reply(request, 422, error_body("invalid_value", message, param))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind, message = {
            400: (
                "not_json",
                "the body is not JSON: it must be UTF-8, not nested deeply, "
                "with numbers below 4300 digits",
            ),
            404: ("not_found", "there is nothing at this path: /docs lists the paths"),
            405: ("method_not_allowed", f"this path does not take {request.method}"),
        }.get(error.status_code, ("http_error", str(error.detail)))
        return reply(request, error.status_code, error_body(kind, message), error.headers)

    @app.exception_handler(UnknownModelError)
    async def missing(request: Request, error: Exception) -> Response:
        names = [repr(name) for name in models.names]
        known = names[0] if len(names) == 1 else f"one of {', '.join(names)}"
        message = f"model must be {known}, got {shown(error.args[0])}"
        return reply(request, 404, error_body("model_not_found", message, "model"))

    @app.exception_handler(MissingError)
    async def not_there(request: Request, error: Exception) -> Response:
        return reply(request, 404, error_body("not_found", str(error)))

    @app.exception_handler(NoResultError)
    async def no_result(request: Request, error: Exception) -> Response:
        return reply(request, 409, error_body("no_result", str(error)))

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: Exception) -> Response:
        assert isinstance(error, BusyError)
        models.metrics.count("key_rejections", key=key_of(request.scope).name)
        return reply(
            request, 429, error_body("busy", str(error)), {"Retry-After": str(error.retry_after_s)}
        )

    @app.exception_handler(ServingError)
    @app.exception_handler(TimeoutError)
    @app.exception_handler(Exception)
    async def unserved(request: Request, error: Exception) -> Response:
        status, body = failure(error, models.settings.serve.limits.deadline_s)
        headers = {"Retry-After": "5"} if status == 503 else None
        if status in (409, 504):  # OpenAI's client would send it again
            headers = {"x-should-retry": "false"}
        return reply(request, status, body, headers)

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: Exception) -> Response:
        models.metrics.count("requests", status="499")
        return Response(status_code=499)  # nobody reads it


def _add_health(app: FastAPI, models: Models) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Answers as long as the process lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "no bundle, or an expert is away"}})
    async def readyz() -> JSONResponse:
        """Whether images can be sampled, and the state of each expert."""
        versions = {each.name: each.current for each in models.services if each.current}
        if models.draining or (models.services and not versions):
            status = "stopping" if models.draining else "starting"
            return JSONResponse({"status": status, "experts": {}}, 503)
        engines = [version.engine for version in versions.values()]
        states = {
            expert.name: "ready" if alive else "away"
            for engine in engines
            for expert, alive in zip(engine.experts, engine.alive, strict=True)
        }
        whole = all(all(engine.alive) for engine in engines)
        able = all(
            all(engine.alive) or (engine.degraded == "renormalize" and any(engine.alive))
            for engine in engines
        )
        status = "ready" if whole else "degraded" if able else "unavailable"
        # Of several models all may have been dropped: the next request loads one.
        loaded = {name: version.model.version for name, version in versions.items()}
        of_models: dict[str, Any] = {"models": loaded}
        if len(models.names) == 1:
            of_models = {"version": loaded[models.names[0]]}
        return JSONResponse(
            {"status": status, **of_models, "experts": states}, 200 if able else 503
        )

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        for service in models.services:
            service.observe()
        if not isinstance(models.metrics, Prometheus):
            return Response("# scraped from Ray's own metrics port\n", media_type="text/plain")
        return Response(
            models.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


__all__ = ["build_app"]
