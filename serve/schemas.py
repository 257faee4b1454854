"""What requests over HTTP may say, and the one shape of every error."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ddm.grids import GRIDS
from ddm.samplers import SAMPLERS
from router.policies import POLICIES
from router.sources import SOURCES
from serve.model import CONTROLS, SampleConfig


def _one_of(names: Sequence[str], what: str) -> Any:
    return Field(default=None, description=what, json_schema_extra={"enum": [*names, None]}, max_length=64)


class RequestSettings(BaseModel):
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


class SampleRequest(RequestSettings):
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


class ImagesRequest(RequestSettings):
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


ERRORS: dict[int | str, dict[str, Any]] = {
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
