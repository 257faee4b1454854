"""OpenAI's API for images, for its public client: `/v1/models` and `/v1/images/generations`."""

import asyncio
import functools
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from ddm.errors import ConfigError, require
from ddm.grids import GRIDS
from ddm.samplers import SAMPLERS
from router.policies import POLICIES
from router.sources import SOURCES
from serve.engine.expert import ServingError
from serve.engine.models import Models
from serve.engine.service import AdmittedRequest, SamplingParams, Service
from serve.http.middleware import key_of, shown
from serve.http.prompt import condition_of, in_words
from serve.http.responses import b64, headers_of, id_of, images_of, run_while_connected
from serve.http.schemas import IMAGE_ERRORS, ImagesRequest, errors, secured_by
from serve.http.streams import EventStream, StreamQueue, event, failed, steps_of
from serve.http.uploads import Uploads
from serve.model.model import Model
from serve.model.params import CONTROL_VARIATES, SETTINGS


def add_openai(app: FastAPI, models: Models) -> None:
    """Add these paths to the application."""
    secured = secured_by(models.settings.serve)

    @app.get("/v1/models", responses=errors(401, 503), dependencies=secured)
    async def listed() -> dict[str, Any]:
        """The models, and of those that are loaded their clusters, choices, limits and defaults."""
        return {"object": "list", "data": [_card(models, name) for name in models.names]}

    @app.get("/v1/models/{model}", responses=errors(401, 404, 422, 429, 503), dependencies=secured)
    async def model(model: str) -> dict[str, Any]:
        """The model of that name, which is loaded if it is not."""
        await models.get(model)
        return _card(models, model)

    @app.post(
        "/v1/images/generations",
        responses={200: {"content": {"text/event-stream": {}}}, **IMAGE_ERRORS},
        dependencies=secured,
    )
    async def generations(request: Request, body: ImagesRequest) -> Response:
        """Sample images, as the public `openai` client asks for them."""
        return await answer(await models.get(body.model), request, body)


async def answer(
    service: Service, request: Request, body: ImagesRequest, of: Uploads | None = None
) -> Response:
    """Sample images, perhaps from an uploaded one. Raises as `Service.admit`, and `ConfigError`."""
    if service.current is None:
        raise ServingError("no bundle is in service")
    model = service.current.model
    form, size = body.output_format or "png", f"{model.shape[2]}x{model.shape[1]}"
    _check_combination(body, form, size, model.shape[0])
    settings, understood = _settings(body, model)
    with service.held():
        edit = None if of is None else await asyncio.to_thread(of.edit, model.shape)
    params = SamplingParams(
        body.n or 1,
        body.seed,
        settings=settings,
        key=key_of(request.scope),
        id=id_of(request),
        edit=edit,
    )
    facts = {
        "created": int(time.time()),
        "output_format": form,
        "size": size,
        "quality": "auto",
        "background": "opaque",
    }
    encode = functools.partial(b64, form=form, quality=body.output_compression)
    if body.stream:
        queue = StreamQueue(0)
        admitted = service.admit(params, queue)
        if body.partial_images:
            calls = admitted.request.denoiser_calls
            queue.preview_every = math.ceil(calls / (body.partial_images + 1))
        kind = "image_generation" if of is None else "image_edit"
        events = _events(service, admitted, queue, facts | understood, encode, kind)
        return EventStream(service, admitted, events)
    admitted = service.admit(params)
    await run_while_connected(service, admitted, request)
    files = await asyncio.to_thread(lambda: [encode(image) for image in images_of(admitted)])
    answer = {
        **facts,
        "data": [{"b64_json": file, **understood} for file in files],
        "usage": _usage(admitted),
    }
    service.metrics.count("requests", status="200")
    return JSONResponse(answer, headers=headers_of(admitted))


def _check_combination(body: ImagesRequest, form: str, size: str, channels: int) -> None:
    """Refuse fields that would be ignored. Raises `ConfigError`."""
    sizes, compression = (None, "auto", size), body.output_compression
    if body.size not in sizes:
        raise ConfigError(f"size must be auto or {size}, got {shown(body.size)}", "size")
    for field, fits, rule in (
        (
            "output_format",
            form != "jpeg" or channels in (1, 3),
            f"be png or webp for {channels} channels",
        ),
        ("output_compression", compression is None or form != "png", "have a webp or jpeg format"),
        ("partial_images", not body.partial_images or body.stream, "be 0 unless stream is true"),
    ):
        require(bool(fits), field, rule, getattr(body, field))


def _settings(body: ImagesRequest, model: Model) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a request, whose prompt may name a condition in plain words, or a cluster; and
    how the prompt was understood, as `revised_prompt`. Raises `ConfigError`.
    """
    settings, prompt = body.given(), body.prompt
    if not prompt:
        return settings, {}
    words = model.vocabulary
    if words is not None and (prompt in words.names or prompt not in model.names):
        _require_alone(body, "condition")
        condition = condition_of(prompt, words)
        return {**settings, "condition": condition}, {"revised_prompt": in_words(condition, words)}
    if prompt not in model.names:
        names = ", ".join(repr(name) for name in model.names)
        rule = f"be empty or name a cluster, one of {names}"
        raise ConfigError(f"prompt must {rule}; got {shown(prompt)}", "prompt")
    _require_alone(body, "clusters")
    return {**settings, "clusters": {prompt: 1.0}}, {}


def _require_alone(body: ImagesRequest, field: str) -> None:
    if getattr(body, field) is not None:
        verb = "are" if field == "clusters" else "is"
        rule = f"be empty where {field} {verb} given"
        raise ConfigError(f"prompt must {rule}, got {shown(body.prompt)}", "prompt")


async def _events(
    service: Service,
    admitted: AdmittedRequest,
    queue: StreamQueue,
    facts: dict[str, Any],
    encode: Callable[[Tensor], str],
    kind: str,
) -> AsyncGenerator[str]:
    facts = {"created_at" if key == "created" else key: value for key, value in facts.items()}
    partials = [0] * len(admitted.request.index)
    try:
        async with aclosing(steps_of(service, admitted, queue)) as steps:
            async for step in steps:
                if step.preview is None or step.call == admitted.request.denoiser_calls:
                    continue
                name = f"{kind}.partial_image"
                file = await asyncio.to_thread(encode, step.preview)
                data = {"type": name, "b64_json": file, **facts}
                yield event(name, {**data, "partial_image_index": partials[step.place]})
                partials[step.place] += 1
        for image in images_of(admitted):
            name = f"{kind}.completed"
            file = await asyncio.to_thread(encode, image)
            data = {"type": name, "b64_json": file, **facts}
            yield event(name, {**data, "usage": _usage(admitted)})
        service.metrics.count("requests", status="200")
    except Exception as error:
        yield event("error", {"type": "error", **failed(service, error)})


def _usage(admitted: AdmittedRequest) -> dict[str, Any]:
    """That API counts tokens; here an expert evaluation counts as one."""
    nfe = admitted.request.nfe
    details = {"text_tokens": 0, "image_tokens": 0}
    return {
        "input_tokens": 0,
        "input_tokens_details": details,
        "output_tokens": nfe,
        "total_tokens": nfe,
    }


def _card(models: Models, name: str) -> dict[str, Any]:
    facts = {"id": name, "object": "model", "created": models.began_s, "owned_by": "ddm"}
    service = models.loaded(name)
    if service is None:
        return {**facts, "loaded": False}
    if service.current is None:
        raise ServingError("no bundle is in service")
    model, limits = service.current.model, service.settings.serve.limits
    return {
        **facts,
        "loaded": True,
        "version": model.version,
        "shape": list(model.shape),
        "clusters": model.names,
        "weights": model.pi.tolist(),
        "vocabulary": None if model.vocabulary is None else asdict(model.vocabulary),
        "seeded": model.seeded,
        "limits": {"n": limits.n, "steps": limits.steps},
        "choices": {
            "sampler": SAMPLERS,
            "grid": GRIDS,
            "source": SOURCES,
            "policy": POLICIES,
            "control_variate": CONTROL_VARIATES,
        },
        "defaults": {
            setting.name: getattr(service.settings.sample, setting.name) for setting in SETTINGS
        }
        | {key: getattr(service.settings.sample, key) or {} for key in ("clusters", "condition")},
    }
