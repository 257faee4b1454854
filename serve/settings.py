"""The settings of serving: one tree of keys for the command line and for `args` of a Ray Serve
config.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ddm.errors import require, within
from serve.engine.shares import Key
from serve.http.limits import LimitsConfig, is_loopback
from serve.http.webhooks import secret_key
from serve.model.config_merge import filled
from serve.model.params import SampleConfig


@dataclass
class JobsConfig:
    """Jobs: requests whose images are fetched later. Each limit is above 0.

    running: sampled at once
    kept: known at once; beyond it those that ended first are forgotten, or 429
    keep_s: for which a job and its result are kept after its end
    memory_MiB: of all results; beyond it the oldest jobs are forgotten
    deadline_s: from a job's start to its last image
    webhook_hosts: to which the end of a job may be told, as HOST or HOST:PORT; none by default
    webhook_secret_file: a file with the secret that signs it; needed with webhook_hosts
    """

    running: int = 4
    kept: int = 1000
    keep_s: float = 3600.0
    memory_MiB: float = 256.0  # noqa: N815
    deadline_s: float = 3600.0
    webhook_hosts: list[str] = field(default_factory=list)
    webhook_secret_file: str | None = None


@dataclass
class KeyConfig:
    """Who may ask, and for how much.

    token_file: a file with the bearer token of this key
    weight: of its share of the experts while other keys ask too, above 0
    priority: keys of a higher one go before all of a lower one
    requests: accepted and not done at most, above 0; null for no limit
    images_per_minute, nfe_per_minute: images, and expert evaluations, above 0; null for no limit
    """

    token_file: str = ""
    weight: float = 1.0
    priority: int = 0
    requests: int | None = None
    images_per_minute: float | None = None
    nfe_per_minute: float | None = None


@dataclass
class RayConfig:
    """Placement `ray`: a deployment per expert, or per group of experts.

    address: of a Ray cluster; null starts one on this machine
    experts_per_replica: in one process, in the order of the clusters, at least 1; the last
        deployment has those that remain
    gpus, cpus, resources: of each replica, at least 0
    replicas: of each deployment of experts, at least 1; the minimum if max_replicas is given
    max_replicas: the maximum of autoscaling, at least replicas; null for no autoscaling
    services: replicas of the sampling service, at least 1
    service_cpus: of each of them, at least 0
    """

    address: str | None = None
    experts_per_replica: int = 1
    gpus: float = 0.0
    cpus: float = 1.0
    resources: dict[str, float] = field(default_factory=dict)
    replicas: int = 1
    max_replicas: int | None = None
    services: int = 1
    service_cpus: float = 1.0


_NAME_RULE = "have 1 to 256 printable characters, and no /"
_QUOTAS = ("requests", "images_per_minute", "nfe_per_minute")

ServePrecision = Literal["float32", "bf16"]


@dataclass
class ServeConfig:
    """Where and how a bundle is served.

    host, port: to listen on; port 0 takes a free one
    name: the model's name in the API, 1 to 256 printable characters without /; null for the run
        folder's name
    token_file: a file with a bearer token, of the key named default; null for none
    keys: other keys by name; where there is any key, requests must carry the token of one
    open: allow a host other than this machine's own without a token
    placement: experts in this process (local) or as Ray deployments (ray)
    device: a torch device, or auto: cuda if there is one, else cpu
    precision: of the experts' networks, float32 or bf16; the images under way are float32
    compile: compile the networks with torch.compile, once, before the server answers
    models_MiB: weights of all models that are loaded at once, above 0; null for no limit
    signers: a public key or a folder of them, of which one must have signed each bundle; null for any bundle
    max_batch: images per call of an expert, above 0
    max_active: images under way at once, above 0
    call_timeout_s: for one call of a remote expert, above 0
    retry_s: how long an expert may be unreachable before it counts as away, above 0
    degraded: without an expert, fail requests or renormalize alpha over the others
    drain_s: for requests under way, after the first SIGTERM or ctrl-C; at least 0
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    token_file: str | None = None
    keys: dict[str, KeyConfig] = field(default_factory=dict)
    open: bool = False
    placement: Literal["local", "ray"] = "local"
    device: str = "auto"
    precision: ServePrecision = "float32"
    compile: bool = False
    models_MiB: float | None = None  # noqa: N815
    signers: str | None = None
    max_batch: int = 64
    max_active: int = 256
    call_timeout_s: float = 30.0
    retry_s: float = 60.0
    degraded: Literal["fail", "renormalize"] = "fail"
    drain_s: float = 15.0
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    jobs: JobsConfig = field(default_factory=JobsConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    @property
    def protected(self) -> bool:
        """Whether requests must carry a token."""
        return self.token_file is not None or bool(self.keys)

    @property
    def is_one_service(self) -> bool:
        """Whether all requests reach the same process."""
        return self.placement == "local" or self.ray.services == 1

    def may_listen_on(self, host: str) -> bool:
        """Whether this host is allowed: without a token and without `open`, only this machine's
        own.
        """
        return self.protected or self.open or is_loopback(host)


@dataclass
class Settings:
    """A whole service.

    run: the folder of a run or of a bundle, or demo: the digits that come with the program
    models: instead of run: several folders by the names of the models; the first is the default
    sample: the settings of sampling that requests leave out
    """

    run: str = ""
    models: dict[str, str] = field(default_factory=dict)
    serve: ServeConfig = field(default_factory=ServeConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def check(self) -> None:
        """Raise `ConfigError` naming the first key whose value makes no sense."""
        if self.models:
            require(not self.run, "run", "be left out where models are given", self.run)
            require(self.serve.name is None, "serve.name", "be left out then", self.serve.name)
            local = self.serve.placement == "local"
            require(local, "serve.placement", "be local for several models", "ray")
            for name in self.models:
                require(_is_name(name), "models", _NAME_RULE, name)
        else:
            require(bool(self.run), "run", "be the folder of a run or of a bundle", self.run)
        self.sample.check()
        with within("serve"):
            _check_serve(self.serve)

    def name(self) -> str:
        """The model's name in the API: `serve.name`, or the run folder's as it was given."""
        if self.serve.name is not None:
            return self.serve.name
        if self.models:
            return next(iter(self.models))
        # Follows no link, since its target may change.
        folder = Path(os.path.abspath(self.run))  # noqa: PTH100
        if folder.name == "bundle" and folder.parent.name:
            folder = folder.parent
        return folder.name or "ddm"

    def keys(self) -> dict[str, Key]:
        """The keys by their bearer tokens; none if none is asked for. Raises `ConfigError`."""
        found: dict[str, Key] = {}
        if self.serve.token_file is not None:
            token = _read_secret(self.serve.token_file, "serve.token_file")
            found[token] = Key("default")
        for name, config in self.serve.keys.items():
            place = f"serve.keys.{name}.token_file"
            token = _read_secret(config.token_file, place)
            require(token not in found, place, "hold a token of its own", config.token_file)
            limits = {key: value for key, value in vars(config).items() if key != "token_file"}
            found[token] = Key(name, **limits)
        return found

    def webhook_secret(self) -> str | None:
        """What signs webhooks, None if there are none. Raises `ConfigError`."""
        file = self.serve.jobs.webhook_secret_file
        if file is None:
            return None
        key = "serve.jobs.webhook_secret_file"
        secret = _read_secret(file, key)
        try:
            secret_key(secret)
        except ValueError:
            require(False, key, "hold base64 after whsec_, or text without it", file)
        return secret


def settings(tree: Mapping[str, Any], words: Sequence[str] = ()) -> Settings:
    """Settings from a tree of keys and `key=value` words over it; unknown keys and bad values are
    refused by name.

    Raises `ConfigError`.
    """
    found = filled(Settings, tree, *words)
    found.check()
    return found


def _read_secret(name: str, key: str) -> str:
    file, token = Path(name), ""
    try:
        if file.is_file():  # a pipe could block for ever
            token = file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        pass
    require(bool(token), key, "be a file with a token", name)
    return token


def _check_serve(serve: ServeConfig) -> None:
    """Raise `ConfigError` naming a key without the section `serve`."""
    require(0 <= serve.port < 65536, "port", "be in [0, 65535]", serve.port)
    _check_positive(serve, "max_batch", "max_active", "call_timeout_s", "retry_s")
    require(0 <= serve.drain_s < math.inf, "drain_s", "be at least 0", serve.drain_s)
    require(serve.name is None or _is_name(serve.name), "name", _NAME_RULE, serve.name)
    room = serve.models_MiB is None or serve.models_MiB > 0
    require(room, "models_MiB", "be above 0", serve.models_MiB)
    require("default" not in serve.keys, "keys", "not be named default", "default")
    for key, config in serve.keys.items():
        with within(f"keys.{key}"):
            given = [each for each in _QUOTAS if getattr(config, each) is not None]
            _check_positive(config, "weight", *given)
            require(math.isfinite(config.weight), "weight", "be finite", config.weight)
    with within("limits"):
        _check_positive(serve.limits, *vars(serve.limits))
    with within("jobs"):
        _check_positive(serve.jobs, "running", "kept", "keep_s", "memory_MiB", "deadline_s")
        signed = serve.jobs.webhook_secret_file is not None or not serve.jobs.webhook_hosts
        rule = "be a file with a secret where webhook_hosts are given"
        require(signed, "webhook_secret_file", rule, serve.jobs.webhook_secret_file)
    with within("ray"):
        _check_ray(serve.ray)
    require(
        serve.may_listen_on(serve.host),
        "host",
        "be this machine's own (127.0.0.1) unless serve.token_file or serve.keys is given, or "
        "serve.open=true",
        serve.host,
    )


def _check_ray(ray: RayConfig) -> None:
    _check_positive(ray, "experts_per_replica", "replicas", "services")
    for key in ("gpus", "cpus", "service_cpus"):
        value = getattr(ray, key)
        require(value >= 0, key, "be at least 0", value)
    most = ray.max_replicas
    enough = most is None or most >= ray.replicas
    require(enough, "max_replicas", "be at least serve.ray.replicas", most)


def _check_positive(
    config: LimitsConfig | JobsConfig | KeyConfig | RayConfig | ServeConfig, *keys: str
) -> None:
    for key in keys:
        value = getattr(config, key)
        require(value > 0, key, "be above 0", value)


def _is_name(name: str) -> bool:
    return 0 < len(name) <= 256 and name.isprintable() and "/" not in name
