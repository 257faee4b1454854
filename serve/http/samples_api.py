"""`/v1/samples`: images in one piece or as a stream, and cancelling a request by its id."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from ddm.errors import require
from serve.engine.expert import ServingError
from serve.engine.job_queue import Answer, Encode
from serve.engine.models import Models
from serve.engine.service import AdmittedRequest, SamplingParams, Service
from serve.http.middleware import key_of, shown
from serve.http.responses import (
    LARGEST_SIDE,
    MEDIA_TYPES,
    MissingError,
    file_of,
    headers_of,
    id_of,
    json_of,
    npz_of,
    run_while_connected,
    sheet_scale,
)
from serve.http.schemas import IMAGE_ERRORS, SampleRequest, errors, secured_by
from serve.http.streams import stream_samples
from serve.http.uploads import Uploads, from_base64
from serve.model.edits import Edit

_OF_AN_IMAGE = ("mask", "strength", "resamplings")
RESULT_TYPES = ("image/png", "image/webp", "application/x-npz", "application/json")


def add_samples(app: FastAPI, models: Models) -> None:
    """Add these paths to the application."""
    secured = secured_by(models.settings.serve)
    content: dict[str, Any] = {kind: {} for kind in (*RESULT_TYPES, "text/event-stream")}

    @app.post(
        "/v1/samples",
        responses={200: {"content": content}, **IMAGE_ERRORS},
        dependencies=secured,
    )
    async def samples(request: Request, body: SampleRequest) -> Response:
        """Sample images."""
        check_combination(body)
        service = await models.get(body.model)
        params = await params_of(service, body, request)
        if body.stream:
            return stream_samples(service, params, body.preview_every)
        encode = encoder(service, body)
        admitted = service.admit(params)
        await run_while_connected(service, admitted, request)
        content, media_type, headers = await asyncio.to_thread(encode, admitted)
        service.metrics.count("requests", status="200")
        return Response(content, media_type=media_type, headers=headers)

    if not models.settings.serve.is_one_service:
        return  # the next request might reach another service, which does not know the first

    @app.delete(
        "/v1/requests/{request_id:path}",
        status_code=204,
        responses=errors(401, 404, 422),
        dependencies=secured,
    )
    async def cancel(request: Request, request_id: str) -> Response:
        """Cancel the request with this x-request-id: it ends with 409, and frees its experts."""
        key = key_of(request.scope)
        found = [service.cancel(key, request_id) for service in models.services]
        if True not in found:
            raise MissingError(f"no request {shown(request_id)} of this key is under way")
        return Response(status_code=204)


async def params_of(service: Service, body: SampleRequest, request: Request) -> SamplingParams:
    """What a request asks of the service. Raises `ConfigError`, and `ServingError` without a bundle."""
    with service.held():
        edit = None if body.image is None else await asyncio.to_thread(_edit, service, body)
    return SamplingParams(
        body.n,
        body.seed,
        body.first_index,
        body.trace,
        body.given(),
        key_of(request.scope),
        id_of(request),
        edit,
    )


def _edit(service: Service, body: SampleRequest) -> Edit:
    """What the images start from. Raises `ConfigError` naming `image` or `mask`."""
    assert body.image is not None
    image = from_base64("image", body.image)
    mask = None if body.mask is None else from_base64("mask", body.mask)
    return Uploads(image, mask, body.strength, body.resamplings).edit(_shape(service))


def encoder(service: Service, body: SampleRequest) -> Encode:
    """Makes the answer in the format that was asked for. Raises `ConfigError`."""
    scale = _scale(service, body)

    def encode(admitted: AdmittedRequest) -> Answer:
        headers = headers_of(admitted)
        if body.format == "npz":
            return Answer(npz_of(admitted), "application/x-npz", headers)
        if body.format == "b64_json":
            return Answer(json_of(admitted), "application/json", headers)
        headers["ddm-scale"] = str(scale)
        content = file_of(admitted, body.format, scale)
        return Answer(content, MEDIA_TYPES[body.format], headers)

    return encode


def check_combination(body: SampleRequest) -> None:
    """Refuse fields that would be ignored. Raises `ConfigError`."""
    given = body.model_fields_set
    is_file = body.format in ("png", "webp") and not body.stream
    alone = body.image is None
    rules = (
        *((field, alone, "be left out without an image") for field in _OF_AN_IMAGE),
        ("format", body.stream, "be left out of a stream, whose images are PNGs"),
        ("preview_every", not body.stream, "be left out unless stream is true"),
        ("scale", not is_file and body.scale is not None, "be left out unless a png or webp comes"),
    )
    for field, refused, rule in rules:
        require(not (refused and field in given), field, rule, getattr(body, field))
    traceable = not (body.trace and is_file)
    require(traceable, "trace", "have format npz or b64_json, or stream", body.format)


def _scale(service: Service, body: SampleRequest) -> int:
    """How many times each image is enlarged. Raises `ConfigError`."""
    side = _shape(service)[-1]
    if body.scale is None:
        return sheet_scale(body.n, side)
    most = max(1, LARGEST_SIDE // side)
    require(body.scale <= most, "scale", f"be in [1, {most}] for images of {side} px", body.scale)
    return body.scale


def _shape(service: Service) -> list[int]:
    """Of the images of the bundle in service."""
    if service.current is None:
        raise ServingError("no bundle is in service")
    return service.current.model.shape
