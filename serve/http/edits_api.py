"""`/v1/images/edits` and `/v1/images/variations`, for OpenAI's public client: multipart forms."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from ddm.errors import ConfigError, require
from serve.engine.models import Models
from serve.http.middleware import UPLOADS, shown
from serve.http.openai_api import answer
from serve.http.schemas import IMAGE_ERRORS, EditRequest, secured_by
from serve.http.uploads import Uploads

_FILE = {"type": "string", "contentMediaType": "application/octet-stream"}
_JSON = ("clusters", "condition", "guidance_interval")  # fields that may be more than text
_MOST_FIELDS = 64


def add_edits(app: FastAPI, models: Models) -> None:
    """Add these paths to the application."""
    secured = secured_by(models.settings.serve)
    content: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
    for path, files in zip(UPLOADS, (("image", "mask"), ("image",)), strict=True):
        app.add_api_route(
            path,
            _endpoint(models, files),
            methods=["POST"],
            response_class=Response,
            responses={200: {"content": content}, **IMAGE_ERRORS},
            dependencies=secured,
            openapi_extra={"requestBody": _body_of(files)},
        )


def _endpoint(
    models: Models, files: tuple[str, ...]
) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def edited(request: Request) -> Response:
        """Sample images that start from an uploaded one."""
        return await _edited(models, request, files)

    return edited


def _body_of(files: tuple[str, ...]) -> dict[str, Any]:
    schema = EditRequest.model_json_schema()
    schema["properties"] = dict.fromkeys(files, _FILE) | schema["properties"]
    schema["required"] = ["image"]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


async def _edited(models: Models, request: Request, files: tuple[str, ...]) -> Response:
    try:
        form = await request.form(max_files=2, max_fields=_MOST_FIELDS)
    except HTTPException as error:
        raise ConfigError(f"the body must be multipart/form-data: {error.detail}") from error
    try:
        found = {name: await _file(form, name) for name in files}
        body = _fields(form, files)
    finally:
        await form.close()
    image, mask = found["image"], found.get("mask")
    if image is None:
        raise ConfigError("image must be a file in multipart/form-data, got none", "image")
    return await answer(
        await models.get(body.model),
        request,
        body,
        Uploads(image, mask, body.strength, body.resamplings),
    )


async def _file(form: FormData, name: str) -> bytes | None:
    """The file of that name, which the public client may also send as a list of one."""
    given = [*form.getlist(name), *form.getlist(f"{name}[]")]
    require(len(given) <= 1, name, "be one file", len(given))
    if not given:
        return None
    (file,) = given
    if not isinstance(file, UploadFile):
        raise ConfigError(f"{name} must be a file, got {shown(file)}", name)
    return await file.read()


def _fields(form: FormData, files: tuple[str, ...]) -> EditRequest:
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name.removesuffix("[]") in files:
            continue
        if not isinstance(value, str) or name in values:
            raise ConfigError(f"{shown(name)} must be one text", name)
        values[name] = value
        if name in _JSON and value[:1] in ("[", "{"):
            try:
                values[name] = json.loads(value)
            except (ValueError, RecursionError):
                raise ConfigError(
                    f"{name} must be text or JSON, got {shown(value)}", name
                ) from None
    try:
        return EditRequest.model_validate(values)
    except ValidationError as error:
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(found) from None
