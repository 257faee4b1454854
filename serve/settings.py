"""How a bundle is served: one tree of keys for `python -m serve`, and for `args` of a Ray Serve config."""

import ipaddress
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ddm.errors import require
from serve.model.config_merge import filled
from serve.model.params import SampleConfig


@dataclass
class LimitsConfig:
    """What one request, and all of them together, may ask for."""

    n: int = 64  # images a request
    steps: int = 250
    body_bytes: int = 65_536
    body_timeout_s: float = 10.0  # for a request's body to arrive
    header_timeout_s: float = 10.0  # for a request's headers to arrive; not behind Ray's proxy
    send_timeout_s: float = 30.0  # for a client that does not read its answer; then it is cut off
    keep_alive_s: float = 75.0  # a connection without a request is kept; not behind Ray's proxy
    connections: int = 1000  # open at once; then idle ones are closed; not behind Ray's proxy
    pending: int = 100_000  # image steps, accepted and still to come; beyond it 429
    deadline_s: float = 300.0  # from a request to its last image; beyond it 504


@dataclass
class RayConfig:
    """Placement `ray`: each expert its own deployment."""

    address: str | None = None  # of a cluster; null starts one on this machine
    gpus: float = 0.0  # each expert replica's
    cpus: float = 1.0
    resources: dict[str, float] = field(default_factory=dict)
    replicas: int = 1  # of each expert, or the fewest where max_replicas is more
    max_replicas: int | None = None  # autoscaling's upper bound; null for none
    services: int = 1  # replicas of the sampling service
    service_cpus: float = 1.0


@dataclass
class ServeConfig:
    """Where, how and for whom."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None  # the model's, in the API; null for the run folder's name
    token_file: str | None = None  # a file with the bearer token that requests must carry
    open: bool = False  # allow a host beyond this machine without a token
    placement: Literal["local", "ray"] = "local"
    device: str = "auto"  # auto is cuda where there is one
    compile: bool = False
    max_batch: int = 64  # images a call of an expert
    max_active: int = 256  # images on their way at once
    call_timeout_s: float = 30.0
    retry_s: float = 60.0  # how long an expert may be unreachable before it counts as away
    degraded: Literal["fail", "renormalize"] = "fail"
    drain_s: float = 15.0  # for requests under way, after the first SIGTERM or ctrl-C
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def may_listen_on(self, host: str) -> bool:
        """Whether this host is allowed: without a token and without `open`, only this machine's own."""
        return self.token_file is not None or self.open or _is_loopback(host)


@dataclass
class Settings:
    """A whole service. `run` is a run's folder or a bundle's; `sample` holds what requests leave out."""

    run: str = ""
    serve: ServeConfig = field(default_factory=ServeConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def check(self) -> None:
        """Raise `ConfigError` naming the first key whose value makes no sense."""
        serve, limits, ray = self.serve, self.serve.limits, self.serve.ray
        require(bool(self.run), "run", "be a run's folder or a bundle's", self.run)
        self.sample.check()
        require(0 <= serve.port < 65536, "serve.port", "be in [0, 65535]", serve.port)
        for section, key, config in (
            *(
                ("serve", key, serve)
                for key in ("max_batch", "max_active", "call_timeout_s", "retry_s")
            ),
            *(("serve.limits", key, limits) for key in vars(limits)),
            *(("serve.ray", key, ray) for key in ("replicas", "services")),
        ):
            require(
                getattr(config, key) > 0, f"{section}.{key}", "be above 0", getattr(config, key)
            )
        require(0 <= serve.drain_s < math.inf, "serve.drain_s", "be at least 0", serve.drain_s)
        name = serve.name
        named = name is None or (0 < len(name) <= 256 and name.isprintable() and "/" not in name)
        require(named, "serve.name", "have 1 to 256 printable characters, and no /", name)
        for key in ("gpus", "cpus", "service_cpus"):
            require(getattr(ray, key) >= 0, f"serve.ray.{key}", "be at least 0", getattr(ray, key))
        most = ray.max_replicas
        require(
            most is None or most >= ray.replicas,
            "serve.ray.max_replicas",
            "be at least serve.ray.replicas",
            most,
        )
        require(
            serve.may_listen_on(serve.host),
            "serve.host",
            "be this machine's own (127.0.0.1) unless serve.token_file is given or serve.open=true",
            serve.host,
        )

    def name(self) -> str:
        """The model's name in the API: `serve.name`, or the run folder's as it was given."""
        if self.serve.name is not None:
            return self.serve.name
        # Follows no link, since its target may change.
        folder = Path(os.path.abspath(self.run))  # noqa: PTH100
        if folder.name == "bundle" and folder.parent.name:
            folder = folder.parent
        return folder.name or "ddm"

    def token(self) -> str | None:
        """The bearer token, None without `serve.token_file`. Raises `ConfigError`."""
        if self.serve.token_file is None:
            return None
        file, token = Path(self.serve.token_file), ""
        try:
            if file.is_file():  # a pipe could block for ever
                token = file.read_text().strip()
        except (OSError, UnicodeDecodeError):
            pass
        require(bool(token), "serve.token_file", "be a file with a token", self.serve.token_file)
        return token


def settings(tree: Mapping[str, Any], words: Sequence[str] = ()) -> Settings:
    """Settings from a tree of keys and `key=value` words over it; unknown keys and bad values are refused by name.

    Raises `ConfigError`.
    """
    found = filled(Settings, tree, *words)
    found.check()
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
