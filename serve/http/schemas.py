"""What requests over HTTP may say, and the one shape of every error."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import Depends
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, create_model

from ddm.rng import IMAGES_OF_A_SEED
from serve.engine.job_queue import JobStatus
from serve.http.middleware import shown
from serve.model.edits import MAX_RESAMPLINGS, RESAMPLINGS
from serve.model.params import SETTINGS, rule
from serve.settings import ServeConfig


class _Settings(BaseModel):
    """What requests have in common: no unknown fields, no conversion between types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def given(self) -> dict[str, Any]:
        """The settings that were given."""
        values = {setting.name: getattr(self, setting.name) for setting in SETTINGS}
        return {name: value for name, value in values.items() if value is not None}


_KINDS: dict[str, Any] = {
    "clusters": list[str] | dict[str, Annotated[float, Field(ge=0)]],
    "condition": Annotated[str, Field(max_length=256)] | dict[str, int | bool],
    "guidance_interval": Annotated[list[float], Field(min_length=2, max_length=2)],
}


def _field(setting: dataclasses.Field[Any]) -> Any:
    """A setting of `SampleConfig` as an optional field with its range and description."""
    bounds = setting.metadata
    kind: Any = _KINDS.get(setting.name, setting.type)
    enum: Any = {"enum": [*bounds["names"], None]} if bounds["names"] else None
    return Annotated[
        kind | None,
        Field(
            ge=bounds["low"],
            le=bounds["high"],
            max_length=64 if bounds["names"] else None,
            description=bounds["doc"],
            json_schema_extra=enum,
        ),
    ], None


RequestSettings = create_model(
    "RequestSettings",
    __base__=_Settings,
    __doc__="The fields of `SampleConfig`; the service's own defaults replace those left out.",
    **{setting.name: _field(setting) for setting in SETTINGS},
)


Strength = Annotated[
    float | None,
    Field(gt=0, le=1, description="the t to which the image is noised; 0.5, or 1 with a mask"),
]
Resamplings = Annotated[
    int, Field(ge=1, le=MAX_RESAMPLINGS, description="how often each step is taken, with a mask")
]
_FILE = Field(
    max_length=2**24,
    description="a PNG, JPEG or WebP in base64; its transparent pixels are sampled",
)


class SampleRequest(RequestSettings):  # type: ignore[misc, valid-type]
    """Images `first_index ... first_index + n - 1` of a seed.

    Image i is the same whatever its company.
    """

    model: Annotated[
        str | None, Field(max_length=256, description="a model's name; none: the first")
    ] = None
    n: Annotated[int, Field(ge=1, description="how many images")] = 1
    seed: Annotated[
        int | None,
        Field(ge=0, lt=2**63, description="none: one is chosen, and returned as ddm-seed"),
    ] = None
    first_index: Annotated[
        int, Field(ge=0, lt=IMAGES_OF_A_SEED, description="the number of the first image")
    ] = 0
    format: Annotated[
        Literal["png", "webp", "npz", "b64_json"],
        Field(
            description="png, webp: the image, or a sheet of all; "
            "npz: images uint8 [n, H, W, C]; b64_json: PNGs in JSON"
        ),
    ] = "png"
    scale: Annotated[
        int | None,
        Field(
            ge=1,
            le=1024,
            description="png, webp: how many times each image is enlarged; "
            "none: 1 for one image, as needed for 64 pixels a side in a sheet",
        ),
    ] = None
    trace: Annotated[
        bool,
        Field(
            description="also which expert moved which image when, alpha and the calls; "
            "for npz, b64_json or stream"
        ),
    ] = False
    stream: Annotated[
        bool, Field(description="server-sent events: start, step ..., image ..., done; or error")
    ] = False
    preview_every: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="an image's calls between its previews in a stream; 0 for none",
        ),
    ] = 1
    image: Annotated[str | None, _FILE] = None
    mask: Annotated[str | None, _FILE] = None
    strength: Strength = None
    resamplings: Resamplings = RESAMPLINGS


class JobRequest(SampleRequest):
    """Images to be fetched later: as for `/v1/samples`, in one piece."""

    webhook: Annotated[
        str | None,
        Field(description="an https URL that is told when the job has ended", max_length=2048),
    ] = None


class JobError(BaseModel):
    """Why a job failed."""

    type: str
    message: str


class JobRecord(BaseModel):
    """A job as its key sees it; times in seconds since the epoch."""

    id: str
    object: Literal["job"] = "job"
    model: str
    status: JobStatus
    n: Annotated[int, Field(description="images asked for")]
    images: Annotated[int, Field(description="images finished")]
    nfe_left: Annotated[int, Field(description="about how many expert evaluations are to come")]
    position: Annotated[int, Field(description="in the queue, from 1; 0 once it has started")]
    estimate_s: Annotated[float | None, Field(description="to its end; null while unknown")]
    created: float
    started: float | None
    ended: float | None
    expires: Annotated[float | None, Field(description="when the job and its result are dropped")]
    error: JobError | None


class JobList(BaseModel):
    """All jobs of a key, in order of arrival."""

    object: Literal["list"] = "list"
    data: list[JobRecord]


class ImagesRequest(RequestSettings):  # type: ignore[misc, valid-type]
    """OpenAI's `images.generate`.

    `prompt` names classes or attributes in plain words, or a cluster, or is empty. `seed` and all
    settings may come as `extra_body`.
    """

    prompt: Annotated[
        str,
        Field(
            description="a condition in plain words, a cluster's name, or empty for all",
            max_length=32_000,
        ),
    ]
    model: Annotated[str | None, Field(max_length=256)] = None
    n: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    size: Annotated[str | None, Field(description="auto, or the images' own", max_length=32)] = None
    response_format: Annotated[
        Literal["b64_json"] | None, Field(description="there are no URLs")
    ] = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int | None, Field(ge=0, le=3)] = None
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="quality of a webp or jpeg")
    ] = None
    # Fields of that API with one meaning here.
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto", "standard"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: Annotated[str | None, Field(max_length=512, description="not used")] = None


class EditRequest(ImagesRequest):
    """OpenAI's `images.edit` and `images.create_variation`, as multipart/form-data.

    The files `image` and `mask` come beside these fields. Of a list or an object the text is JSON.
    """

    model_config = ConfigDict(strict=False)  # all is text

    prompt: Annotated[
        str, Field(description="as for generations; a variation has none", max_length=32_000)
    ] = ""
    strength: Strength = None
    resamplings: Resamplings = RESAMPLINGS
    input_fidelity: Literal["high", "low"] | None = None


def _rule(field: Mapping[str, Any]) -> str:
    """What a field's JSON schema asks of a value, in words."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind["type"] != "null"]
    if "const" in kinds[0]:
        return f"be {kinds[0]['const']}"
    if names := field.get("enum", kinds[0].get("enum")):
        return f"be one of {' '.join(name for name in names if name is not None)}"
    words = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "a string",
    }
    bounds = kinds[0]
    if "maxLength" in bounds:
        return f"be a string of at most {bounds['maxLength']} characters"
    low = bounds.get("minimum", bounds.get("exclusiveMinimum"))
    high = bounds.get("maximum", bounds.get("exclusiveMaximum"))
    opening = "(" if "exclusiveMinimum" in bounds else "["
    close = ")" if "exclusiveMaximum" in bounds else "]"
    limits = (
        f" in {opening}{low}, {high}{close}"
        if high is not None
        else ""
        if low is None
        else f" of at least {low}"
    )
    return f"be {words[bounds['type']]}{limits}"


_OF_SAMPLING = {setting.name: rule(setting) for setting in SETTINGS}
RULES = {
    name: _OF_SAMPLING.get(name) or _rule(field)
    for kind in (JobRequest, ImagesRequest, EditRequest)
    for name, field in kind.model_json_schema()["properties"].items()
}


def fault(error: Mapping[str, Any]) -> tuple[str, str | None]:
    """An error of pydantic's as `KEY must RULE, got VALUE`, and the key if it is one field's."""
    kind, place, value = error["type"], error["loc"], shown(error.get("input"))
    if len(place) < 2:
        return f"the body must be a JSON object, got {'none' if kind == 'missing' else value}", None
    name = str(place[1])
    if kind == "extra_forbidden" or name not in RULES:
        return f"{shown(name)} is not a field of this request: /docs lists them", name[:100].encode(
            "ascii", "replace"
        ).decode()
    return f"{name} must {RULES[name]}, got {'none' if kind == 'missing' else value}", name


def secured_by(serve: ServeConfig) -> list[Any]:
    """The dependencies of paths that need a token, if any does, for /docs and generated clients;
    `LimitsMiddleware` has checked it.
    """
    return [Depends(HTTPBearer(auto_error=False))] if serve.protected else []


class ErrorDetail(BaseModel):
    """What went wrong: in words, by kind, and the field at fault where it is one."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(BaseModel):
    """The one shape of every error."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorReply, "description": what}
    for code, what in {
        400: "not JSON, or without Content-Type: application/json",
        401: "no token, or a wrong one",
        403: "sent by a page of another site to a server without a token",
        404: "no such model, request or job",
        409: "the request was cancelled by its id; the job has no result",
        408: "the body did not arrive in time",
        413: "the body is too large",
        422: "no JSON object, or a field that is unknown or out of its range",
        429: "too much is pending; Retry-After says when to come back",
        503: "an expert is away, or nothing is in service yet",
        504: "not done within the deadline",
    }.items()
}


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The part of `ERRORS` that a path can answer with."""
    return {code: ERRORS[code] for code in codes}


IMAGE_ERRORS = errors(400, 401, 403, 404, 408, 409, 413, 422, 429, 503, 504)
