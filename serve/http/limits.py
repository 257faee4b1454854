"""Limits of requests, and the middleware that keeps them in Ray Serve's proxy.

Imported by every proxy that starts: without torch and Ray's deployments, a lost one is soon replaced.
"""

import ipaddress
import os
from dataclasses import dataclass
from typing import Any

from ddm.errors import require


@dataclass
class LimitsConfig:
    """Limits of one request and of all together; each is above 0.

    n: images per request
    steps: steps per image
    body_bytes: size of a request's body
    upload_bytes: size of one with images, for edits and variations
    body_timeout_s: for a request's body to arrive
    header_timeout_s: for a request's headers to arrive; not behind Ray's proxy
    send_timeout_s: for a client that does not read its answer; then it is cut off
    keep_alive_s: how long a connection without a request is kept; not behind Ray's proxy
    connections: open at once; beyond it idle ones are closed; not behind Ray's proxy
    pending: expert evaluations that are accepted and not done; beyond it 429
    deadline_s: from a request to its last image; beyond it 504
    """

    n: int = 64
    steps: int = 250
    body_bytes: int = 65_536
    upload_bytes: int = 4 << 20
    body_timeout_s: float = 10.0
    header_timeout_s: float = 10.0
    send_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    connections: int = 1000
    pending: int = 100_000
    deadline_s: float = 300.0


def proxy_middlewares() -> list[Any]:
    """The middleware of Serve's HTTP proxy, which would read bodies of any size; see `RAY_ENV` of serve/ray_app.

    The environment sets the limits: `DDM_BODY_BYTES`, `DDM_UPLOAD_BYTES` and `DDM_BODY_TIMEOUT_S`. The service behind
    the proxy checks the token, which the proxy does not know. Raises `ConfigError` naming the variable at fault.
    """
    from starlette.middleware import Middleware  # here, because the settings need no server

    from serve.http.middleware import LimitsMiddleware

    limits = {}
    for key in ("body_bytes", "upload_bytes", "body_timeout_s"):
        variable, default = f"DDM_{key.upper()}", getattr(LimitsConfig, key)
        found = os.environ.get(variable, default)
        try:
            limits[key] = type(default)(found)
        except ValueError:
            limits[key] = 0
        kind = "an integer" if isinstance(default, int) else "a number"
        require(limits[key] > 0, variable, f"be {kind} above 0", found)
    return [Middleware(LimitsMiddleware, **limits)]


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's own, by an address or as localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
