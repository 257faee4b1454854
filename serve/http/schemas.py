"""What requests over HTTP may say, and the one shape of every error."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ddm.grids import GRIDS
from ddm.samplers import SAMPLERS
from router.policies import POLICIES
from router.sources import SOURCES
from serve.http.middleware import shown
from serve.model.params import CONTROL_VARIATES, SampleConfig


def _one_of(names: Sequence[str], what: str) -> Any:
    return Field(
        default=None, description=what, json_schema_extra={"enum": [*names, None]}, max_length=64
    )


class RequestSettings(BaseModel):
    """The fields of `SampleConfig`; what is left out is the service's own default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    steps: Annotated[int | None, Field(ge=1, le=1000, description="steps of the sampler")] = None
    sampler: Annotated[str | None, _one_of(SAMPLERS, "how the ODE or SDE is walked")] = None
    grid: Annotated[str | None, _one_of(GRIDS, "the times of the steps")] = None
    source: Annotated[
        str | None, _one_of(SOURCES, "where alpha, the experts' probabilities, comes from")
    ] = None
    policy: Annotated[str | None, _one_of(POLICIES, "who moves the image, given alpha")] = None
    top_k: Annotated[int | None, Field(ge=1, le=2**31, description="for policy=top_k")] = None
    nucleus_p: Annotated[float | None, Field(ge=1e-6, le=1, description="for policy=nucleus")] = (
        None
    )
    budget: Annotated[
        float | None,
        Field(ge=1, le=1_000_000, description="for policy=adaptive: calls a step, on average"),
    ] = None
    temperature: Annotated[
        float | None,
        Field(ge=0.01, le=100, description="alpha^(1/temperature) is what the policy sees"),
    ] = None
    control_variate: Annotated[
        str | None, _one_of(CONTROL_VARIATES, "what stands in for the experts that are not asked")
    ] = None
    order: Annotated[int | None, Field(ge=2, le=3, description="for sampler=unipc")] = None
    relaxation_rate: Annotated[
        float | None, Field(ge=0, le=1_000_000, description="for source=combined, a unit of t")
    ] = None
    t_min: Annotated[float | None, Field(ge=0, le=0.999, description="where the grid ends")] = None
    clip: Annotated[bool | None, Field(description="bound the denoised images to [-1, 1]")] = None
    clusters: Annotated[
        list[str] | dict[str, Annotated[float, Field(ge=0)]] | None,
        Field(
            description="only these clusters; or what each cluster's share is multiplied by, others 0"
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """The settings that were given."""
        found = {
            f.name: value
            for f in fields(SampleConfig)
            if (value := getattr(self, f.name)) is not None
        }
        if isinstance(found.get("clusters"), list):
            found["clusters"] = dict.fromkeys(found["clusters"], 1.0)
        return found


class SampleRequest(RequestSettings):
    """Images `first_index ... first_index + n - 1` of a seed. Image i is the same whatever its company."""

    n: Annotated[int, Field(ge=1, description="how many images")] = 1
    seed: Annotated[
        int | None,
        Field(ge=0, lt=2**63, description="none: one is chosen, and returned as ddm-seed"),
    ] = None
    first_index: Annotated[
        int, Field(ge=0, lt=2**62, description="the number of the first image")
    ] = 0
    format: Annotated[
        Literal["png", "webp", "npz", "b64_json"],
        Field(
            description="png, webp: the image, or a sheet of all; npz: images uint8 [n, H, W, C]; b64_json: PNGs in JSON"
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
            description="also which expert moved which image when, alpha and the calls; npz, b64_json or stream"
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


class ImagesRequest(RequestSettings):
    """OpenAI's `images.generate`. `prompt` names a cluster, or is empty. `seed` and all settings may come as `extra_body`."""

    prompt: Annotated[
        str, Field(description="a cluster's name, or empty for all", max_length=32_000)
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


def _rule(field: Mapping[str, Any]) -> str:
    """What a field's JSON schema asks of a value, in words."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind["type"] != "null"]
    if len(kinds) > 1:
        return "be a list of clusters, or an object with a finite weight of at least 0 for each"
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
    low, high = bounds.get("minimum"), bounds.get("maximum", bounds.get("exclusiveMaximum"))
    close = ")" if "exclusiveMaximum" in bounds else "]"
    limits = (
        f" in [{low}, {high}{close}"
        if high is not None
        else ""
        if low is None
        else f" of at least {low}"
    )
    return f"be {words[bounds['type']]}{limits}"


RULES = {
    name: _rule(field)
    for kind in (SampleRequest, ImagesRequest)
    for name, field in kind.model_json_schema()["properties"].items()
}


def fault(error: Mapping[str, Any]) -> tuple[str, str | None]:
    """One of pydantic's errors as `KEY must RULE, got VALUE`, and the key, where it is one field's."""
    kind, place, value = error["type"], error["loc"], shown(error.get("input"))
    if len(place) < 2:
        return f"the body must be a JSON object, got {'none' if kind == 'missing' else value}", None
    name = str(place[1])
    if name not in RULES:
        return f"{shown(name)} is no field of this request: /docs lists them", name[:100].encode(
            "ascii", "replace"
        ).decode()
    return f"{name} must {RULES[name]}, got {'none' if kind == 'missing' else value}", name


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
        404: "no such model",
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


IMAGE_ERRORS = errors(400, 401, 408, 413, 422, 429, 503, 504)
