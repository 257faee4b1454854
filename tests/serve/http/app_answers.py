"""What the HTTP API answers, as arrays."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from tests.serve.conftest import Reply

# A settled sampler and policy, whatever the defaults: it ends in what was denoised last, and
# evaluates alpha at every step.
GIVEN = {"seed": 5, "steps": 4, "sampler": "dpmpp_2m", "grid": "uniform_t", "policy": "balanced"}


STATUSES = (400, 401, 408, 413, 422, 429, 503, 504)


def image(file: bytes) -> np.ndarray[Any, Any]:
    """A grey image in a file, `[H, W, 1]`."""
    with Image.open(io.BytesIO(file)) as image:
        return np.array(image.convert("L"))[:, :, None]


def arrays(reply: Reply) -> dict[str, np.ndarray[Any, Any]]:
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "application/x-npz"
    with np.load(io.BytesIO(reply.body), allow_pickle=False) as file:
        return dict(file)


def images(reply: Reply) -> np.ndarray[Any, Any]:
    return arrays(reply)["images"]


def decoded(data: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    return np.stack([image(base64.b64decode(item["b64_json"])) for item in data])
