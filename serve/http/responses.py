"""From an admitted request to its answer in one piece: bytes, headers and errors."""

import asyncio
import base64
import io
import json
import logging
import math
import secrets
import time
from typing import Any

import numpy as np
import torch
from fastapi import Request
from torch import Tensor

from ddm.errors import require
from serve.engine.expert import CancelledRequestError, ServingError
from serve.engine.service import AdmittedRequest, Service
from serve.http.middleware import error_body
from serve.model.images import contact_sheet, encoded, to_uint8

log = logging.getLogger(__name__)

MEDIA_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}

SHEET_SIDE = 64  # pixels that an image in a contact sheet has at least, unless asked otherwise
LARGEST_SIDE = 512  # pixels that an image may be enlarged to


class MissingError(Exception):
    """What a request names is not there."""


class ClientGoneError(Exception):
    """The client left before its answer was ready."""


async def run_while_connected(
    service: Service, admitted: AdmittedRequest, request: Request
) -> None:
    """Sample a request's images. Raises `ClientGoneError` if the client leaves meanwhile."""
    started = time.perf_counter()
    sampling = asyncio.create_task(service.run(admitted))
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((sampling, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not sampling.done():
            raise ClientGoneError
        await sampling
    finally:
        for task in (sampling, leaving):
            task.cancel()
        await asyncio.gather(sampling, leaving, return_exceptions=True)
        service.metrics.observe("request_seconds", time.perf_counter() - started)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def id_of(request: Request) -> str:
    """A request's id, by which its key may cancel it: the client's own, or a new one.

    Raises `ConfigError` for one that is too long or unprintable.
    """
    given = request.headers.get("x-request-id")
    if given is None:
        return f"req_{secrets.token_hex(12)}"
    fits = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
    require(fits, "x-request-id", "have 1 to 128 printable ASCII characters", given[:200])
    return given


def headers_of(admitted: AdmittedRequest) -> dict[str, str]:
    """The headers of every answer; `ddm-degraded` names the experts that were away."""
    request = admitted.request
    headers = {
        "ddm-seed": str(admitted.seed),
        "ddm-version": admitted.version.model.version,
        "ddm-nfe": str(request.nfe),
        "ddm-router-nfe": str(request.router_nfe),
    }
    if admitted.id is not None:
        headers["x-request-id"] = admitted.id
    if request.absent:
        headers["ddm-degraded"] = " ".join(sorted(request.absent))
    return headers


def facts_of(admitted: AdmittedRequest) -> dict[str, Any]:
    """What every answer in JSON says about its request."""
    request = admitted.request
    return {
        "seed": admitted.seed,
        "first_index": int(request.index[0]),
        "version": admitted.version.model.version,
        "nfe": request.nfe,
        "router_nfe": request.router_nfe,
        "degraded": sorted(request.absent),
    }


def images_of(admitted: AdmittedRequest) -> Tensor:
    """The images of a request that is done: uint8 `[n, C, H, W]`."""
    images = admitted.request.images
    return to_uint8(torch.stack([images[place] for place in range(len(images))]))


def b64(image: Tensor, form: str = "png", quality: int | None = None) -> str:
    """A uint8 image `[C, H, W]` as a file in base64."""
    return base64.b64encode(encoded(image, form, quality)).decode()


def sheet_scale(n: int, side: int) -> int:
    """By how much `n` images of that side are enlarged unless asked otherwise; one never is."""
    return 1 if n == 1 else max(1, -(-SHEET_SIDE // side))


def file_of(admitted: AdmittedRequest, form: str, scale: int) -> bytes:
    """The image, or a contact sheet of all, as a png or webp file, each enlarged `scale` times."""
    images = images_of(admitted)
    if len(images) == scale == 1:
        return encoded(images[0], form)
    columns = math.ceil(math.sqrt(len(images)))
    sheet = contact_sheet(images.split(columns), least_side=scale * images.shape[-1])
    return encoded(sheet, form)


def npz_of(admitted: AdmittedRequest) -> bytes:
    """Images uint8 `[n, H, W, C]`, and the trace if there is one, as an npz file."""
    arrays: dict[str, Any] = {
        "images": images_of(admitted).permute(0, 2, 3, 1).numpy(),
        "seed": np.int64(admitted.seed),
        "first_index": np.int64(int(admitted.request.index[0])),
    }
    if admitted.request.trace:
        trace = admitted.trace()
        arrays["t"] = trace.t.numpy()
        arrays["alpha"] = trace.alpha.numpy()
        arrays["chosen"] = trace.chosen.numpy()
        arrays["nfe"] = np.int64(trace.calls)
        arrays["router_nfe"] = np.int64(trace.router_calls)
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return file.getvalue()


def json_of(admitted: AdmittedRequest) -> bytes:
    """PNGs in JSON, and the trace if there is one."""
    answer = facts_of(admitted)
    first = answer["first_index"]
    answer["data"] = [
        {"index": first + i, "b64_json": b64(image)} for i, image in enumerate(images_of(admitted))
    ]
    if admitted.request.trace:
        trace = admitted.trace()
        answer["trace"] = {
            "t": trace.t.tolist(),
            "alpha": trace.alpha.double().mul(1e6).round().div(1e6).tolist(),
            "chosen": trace.chosen.int().tolist(),
            "experts": admitted.version.model.names,
        }
    return json.dumps(answer).encode()


def failure(error: Exception, deadline_s: float) -> tuple[int, dict[str, Any]]:
    """The status and the body of an error that is not the request's fault; deadline_s: that it had."""
    match error:
        case TimeoutError():
            return 504, error_body("deadline", f"not done within {deadline_s:g} s")
        case CancelledRequestError():
            return 409, error_body("cancelled", str(error))
        case ServingError():
            return 503, error_body("unavailable", str(error))
    log.error("a request failed", exc_info=error)
    return 500, error_body("internal", "the server failed; its log says why")
