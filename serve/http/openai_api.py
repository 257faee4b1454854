"""The names of OpenAI's API, such that its public client works: `/v1/models` and `/v1/images/generations`."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import fields
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from ddm.errors import ConfigError
from ddm.grids import GRIDS
from ddm.samplers import SAMPLERS
from router.policies import POLICIES
from router.sources import SOURCES
from serve.engine.expert import ServingError
from serve.engine.service import AdmittedRequest, SamplingParams, Service
from serve.http.middleware import shown
from serve.http.responses import (
    EventStream,
    StreamQueue,
    b64,
    event,
    failed,
    headers_of,
    images_of,
    made,
    told_by,
)
from serve.http.schemas import IMAGE_ERRORS, ImagesRequest, errors
from serve.model.images import to_uint8
from serve.model.params import CONTROL_VARIATES, SampleConfig


class UnknownModelError(Exception):
    """A model that is not served here."""


def add_openai(app: FastAPI, service: Service) -> None:
    """Add these paths to the application."""

    @app.get("/v1/models", responses=errors(401, 503))
    async def models() -> dict[str, Any]:
        """What is served: one model, its clusters, what it can be asked for and what it does unless asked."""
        return {"object": "list", "data": [_card(service)]}

    @app.get("/v1/models/{model}", responses=errors(401, 404, 422, 503))
    async def model(model: str) -> dict[str, Any]:
        """The model of that name."""
        _known(service, model)
        return _card(service)

    @app.post(
        "/v1/images/generations",
        responses={200: {"content": {"text/event-stream": {}}}, **errors(404), **IMAGE_ERRORS},
    )
    async def generations(request: Request, asked: ImagesRequest) -> Response:
        """Draw images, as the public `openai` client asks for them."""
        if asked.model is not None:
            _known(service, asked.model)
        if service.current is None:
            raise ServingError("no bundle is in service")
        model, given = service.current.model, asked.given()
        if asked.prompt:
            if asked.prompt not in model.names:
                names = ", ".join(repr(name) for name in model.names)
                raise ConfigError(
                    f"prompt must be empty or name a cluster, one of {names}; got {shown(asked.prompt)}",
                    "prompt",
                )
            if asked.clusters is not None:
                raise ConfigError(
                    f"prompt must be empty where clusters are given, got {shown(asked.prompt)}",
                    "prompt",
                )
            given["clusters"] = {asked.prompt: 1.0}
        height, width = model.shape[1:]
        size = f"{width}x{height}"
        if asked.size not in (None, "auto", size):
            raise ConfigError(f"size must be auto or {size}, got {shown(asked.size)}", "size")
        params, form = (
            SamplingParams(asked.n or 1, asked.seed, settings=given),
            asked.output_format or "png",
        )
        told = StreamQueue(0)
        order = service.admit(params, told if asked.stream else None)
        facts = {
            "created": int(time.time()),
            "output_format": form,
            "size": size,
            "quality": "auto",
            "background": "opaque",
        }
        if asked.stream:
            told.every = (
                math.ceil(order.request.denoiser_calls / (asked.partial_images + 1))
                if asked.partial_images
                else 0
            )
            return EventStream(order, _events(service, order, told, facts))
        await made(service, order, request)
        data = await asyncio.to_thread(
            lambda: [{"b64_json": b64(image, form)} for image in images_of(order)]
        )
        service.metrics.count("requests", status="200")
        return JSONResponse(
            {**facts, "data": data, "usage": _usage(order)}, headers=headers_of(order)
        )


async def _events(
    service: Service, order: AdmittedRequest, told: StreamQueue, facts: dict[str, Any]
) -> AsyncGenerator[str]:
    facts = {"created_at" if key == "created" else key: value for key, value in facts.items()}
    form, partials = facts["output_format"], [0] * len(order.request.index)
    try:
        async with aclosing(told_by(service, order, told)) as news:
            async for place, call, _, denoised in news:
                if denoised is not None and call < order.request.denoiser_calls:
                    single = await asyncio.to_thread(b64, to_uint8(denoised), form)
                    kind, number = "image_generation.partial_image", partials[place]
                    yield event(
                        kind,
                        {"type": kind, "b64_json": single, "partial_image_index": number, **facts},
                    )
                    partials[place] += 1
        for image in images_of(order):
            kind, single = "image_generation.completed", await asyncio.to_thread(b64, image, form)
            yield event(kind, {"type": kind, "b64_json": single, **facts, "usage": _usage(order)})
        service.metrics.count("requests", status="200")
    except Exception as error:
        yield event("error", {"type": "error", **failed(service, error)})


def _usage(order: AdmittedRequest) -> dict[str, Any]:
    """That API counts tokens; here an expert's evaluation of an image is one."""
    calls = order.request.nfe
    details = {"text_tokens": 0, "image_tokens": 0}
    return {
        "input_tokens": 0,
        "input_tokens_details": details,
        "output_tokens": calls,
        "total_tokens": calls,
    }


def _known(service: Service, name: str) -> None:
    if name != service.name:
        raise UnknownModelError(f"model must be {service.name!r}, got {shown(name)}")


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
        "choices": {
            "sampler": SAMPLERS,
            "grid": GRIDS,
            "source": SOURCES,
            "policy": POLICIES,
            "control_variate": CONTROL_VARIATES,
        },
        "defaults": {
            f.name: getattr(service.settings.sample, f.name) for f in fields(SampleConfig)
        },
    }
