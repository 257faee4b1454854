"""Ray Serve: a deployment per expert or group of experts, and the sampling service (router, engine,
HTTP) as ingress.

`serve deploy docker/serve.yaml` and `python -m serve RUN serve.placement=ray` both use `build`. An
expert's step is a pure function of its arguments, so the engine repeats a call that was lost with its
replica; Serve itself does not retry.
"""

import asyncio
import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Ray reads these when it is imported, and the processes that it starts inherit them. gRPC takes an
# expert's reply directly from process to process, in a third of the object store's time.
RAY_ENV = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 1024 * 1024),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.ray_app:proxy_middlewares",
}
for _key, _value in RAY_ENV.items():
    os.environ.setdefault(_key, _value)

import numpy as np  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
from ray import serve as ray_serve  # noqa: E402
from ray.exceptions import RayError, RayTaskError  # noqa: E402
from ray.serve.context import _get_global_client  # noqa: E402
from ray.serve.exceptions import RayServeException  # noqa: E402
from ray.serve.handle import DeploymentHandle  # noqa: E402
from ray.util import metrics as ray_metrics  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from torch import Tensor  # noqa: E402

from ddm.bundle import read_bundle  # noqa: E402
from ddm.condition import Conditions  # noqa: E402
from ddm.device import pick_device  # noqa: E402
from ddm.errors import ArtifactError, ConfigError, DdmError, require  # noqa: E402
from serve.engine.expert import UnavailableError  # noqa: E402
from serve.engine.local_expert import Runner  # noqa: E402
from serve.engine.metrics import METRICS, Metrics  # noqa: E402
from serve.engine.models import Models  # noqa: E402
from serve.engine.turn import Turn  # noqa: E402
from serve.http.app import build_app  # noqa: E402
from serve.http.local_server import listen  # noqa: E402
from serve.http.middleware import LimitsMiddleware  # noqa: E402
from serve.model.loading import (  # noqa: E402
    bundle_folder,
    load_experts,
)
from serve.ray_address import check_ray_answers  # noqa: E402
from serve.settings import ServePrecision, Settings, settings  # noqa: E402

log = logging.getLogger(__name__)

# The folder of the packages, which Ray's workers import them from.
_HOME = Path(__file__).parents[1]
_KEPT_VERSIONS = 2  # the current one, and the one that requests under way may still use
_QUEUED_CALLS = 8  # per replica: computed one after another, without waiting for the next to arrive


class ExpertReplica:
    """One or several experts in one process, which computes one call after another. Loads a version
    of the bundle when a call first asks for it.
    """

    def __init__(
        self,
        experts: Sequence[int],
        folder: str,
        device: str,
        precision: ServePrecision,
        compiled: bool,
    ) -> None:
        self.experts = experts
        self.device = torch.device(pick_device(device))
        self.precision, self.compiled = precision, compiled
        self.runners: dict[str, dict[int, Runner]] = {}  # by version and expert
        self.turn = ThreadPoolExecutor(1)
        self._load(folder)

    async def denoise(
        self, k: int, folder: str, version: str, x: np.ndarray, t: np.ndarray, *given: np.ndarray
    ) -> np.ndarray:
        """Denoise x float32 `[B, C, H, W]` at t `[B]` by expert k of this version of the bundle in
        `folder`; given: the arrays of `Conditions`, if the images have a condition or guidance.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self.turn, self._denoise, k, folder, version, x, t, *given
        )

    async def where(self) -> tuple[int, str]:
        """The process and the node of this replica. An answer means that it is alive."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def _denoise(
        self, k: int, folder: str, version: str, x: np.ndarray, t: np.ndarray, *given: np.ndarray
    ) -> np.ndarray:
        if version not in self.runners and self._load(folder) != version:
            raise ArtifactError(
                f"{folder} no longer holds version {version}: "
                "keep a bundle until the requests that use it are done"
            )
        # torch.tensor copies: the arrays that arrive may be read-only.
        conditions = Conditions(*map(torch.tensor, given)) if given else None
        return self.runners[version][k](torch.tensor(x), torch.tensor(t), conditions).numpy()

    def _load(self, folder: str) -> str:
        denoisers, shape, version = load_experts(folder, self.experts, self.device)
        runners = {}
        for k, denoiser in zip(self.experts, denoisers, strict=True):
            runners[k] = Runner(denoiser, self.device, self.precision, self.compiled)
            runners[k].warm_up(shape)
        self.runners[version] = runners
        for old in list(self.runners)[:-_KEPT_VERSIONS]:
            del self.runners[old]
        return version


class RayExpert:
    """Expert k, as the engine calls it. turn: of its deployment, with its other experts."""

    def __init__(
        self,
        k: int,
        handle: DeploymentHandle[Any],
        folder: Path,
        version: str,
        calls: int,
        turn: Turn,
    ) -> None:
        self.name = _name(k)
        self.k = k
        self.handle = handle
        self.folder = str(folder)
        self.version = version
        self.calls = calls
        self.turn = turn

    async def __call__(self, x: Tensor, t: Tensor, given: Conditions | None = None) -> Tensor:
        tensors = x, t.float(), *(given or ())
        arrays = [tensor.cpu().numpy() for tensor in tensors]
        response = self.handle.denoise.remote(self.k, self.folder, self.version, *arrays)
        return torch.tensor(await _result(response))

    async def check(self) -> None:
        await _result(self.handle.where.remote())


async def _result(response: Any) -> Any:
    """The result of a call. Raises the replica's errors, or `UnavailableError` for a lost call."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except RayTaskError:
        raise
    except (RayError, RayServeException) as error:
        raise UnavailableError(str(error).splitlines()[0]) from error


@ray_serve.ingress()
class Sampling:
    """The sampling service and its HTTP application.

    Raises `ConfigError` if Serve's proxy listens beyond loopback without a token or `serve.open`.
    """

    def __init__(self, tree: dict[str, Any], experts: list[DeploymentHandle[Any]]) -> None:
        logging.getLogger("serve").setLevel(logging.INFO)
        self.settings = settings(tree)
        self.started = False
        _check_proxy_host(self.settings)

        def connect(model: Any, folder: Path, turn: Turn) -> list[RayExpert]:
            if len(model.names) != len(experts):
                raise ConfigError(
                    f"run must have {len(experts)} experts, as many as are deployed, "
                    f"got {len(model.names)}",
                    "run",
                )
            ray_config = self.settings.serve.ray
            calls = ray_config.max_replicas or ray_config.replicas
            found = []
            for group in _groups(len(experts), ray_config.experts_per_replica):
                # Of several experts, one's call is on its way while another's is computed.
                turn = Turn(calls * min(2, len(group)))
                for k in group:
                    found.append(RayExpert(k, experts[k], folder, model.version, calls, turn))
            return found

        self.models = Models(self.settings, RayMetrics(), connect)

    def __serve_build_asgi_app__(self) -> Any:
        limits = self.settings.serve.limits
        return LimitsMiddleware(
            build_app(self.models),
            self.settings.keys(),
            limits.body_bytes,
            limits.body_timeout_s,
            limits.upload_bytes,
        )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Switch to the weights of `user_config: {run: FOLDER}`, without a restart.

        A `user_config` that cannot be served fails a replica that starts. A replica that has
        started keeps its weights and logs the reason, since an error would end it.
        """
        try:
            await self._switch(user_config)
        except Exception as error:
            if not self.started:
                raise
            expected = isinstance(error, DdmError)
            log.error(
                "user_config is refused, the old weights stay: %s", error, exc_info=not expected
            )

    async def _switch(self, user_config: Any) -> None:
        match user_config:
            case {"run": str(folder), **rest} if not rest:
                await self.models.services[0].switch(folder)
            case _:
                raise ConfigError(f"user_config must be {{run: FOLDER}}, got {user_config!r}")

    async def check_health(self) -> None:
        """Serve's health check. The first one follows the first `reconfigure`."""
        self.started = True


def _check_proxy_host(config: Settings) -> None:
    """Raise `ConfigError` if Serve's proxy listens beyond loopback and the settings forbid it.

    `http_options` belong to the cluster and not to the application, so only Serve knows the host.
    """
    client = _get_global_client()
    assert client is not None
    host = client.http_config.host
    if host is not None:  # None: no HTTP at all
        require(
            config.serve.may_listen_on(host),
            "http_options.host",
            "be 127.0.0.1 unless args.serve.token_file or args.serve.keys is given, or "
            "args.serve.open is true",
            host,
        )


class RayMetrics(Metrics):
    """Metrics that Ray exports on its own port, as `ray_ddm_NAME`."""

    def __init__(self) -> None:
        kinds: dict[str, Any] = {
            "counter": ray_metrics.Counter,
            "gauge": ray_metrics.Gauge,
            "histogram": ray_metrics.Histogram,
        }
        self.metrics: dict[str, Any] = {
            name: kinds[metric.kind](
                f"ddm_{name}",
                description=metric.help,
                tag_keys=(metric.label,) if metric.label else (),
                **({"boundaries": list(metric.bounds)} if metric.bounds else {}),
            )
            for name, metric in METRICS.items()
        }

    def count(self, name: str, amount: float = 1, **label: str) -> None:
        if amount:  # Ray raises for 0
            self.metrics[name].inc(amount, tags=label)

    def gauge(self, name: str, value: float, **label: str) -> None:
        self.metrics[name].set(value, tags=label)

    def observe(self, name: str, value: float, **label: str) -> None:
        self.metrics[name].observe(value, tags=label)


def proxy_middlewares() -> list[Middleware]:
    """The middleware of Serve's HTTP proxy, which would read bodies of any size; see `RAY_ENV`.

    The environment sets the limits: `DDM_BODY_BYTES`, `DDM_UPLOAD_BYTES` and `DDM_BODY_TIMEOUT_S`. The service behind
    the proxy checks the token, which the proxy does not know.
    """
    limits = Settings().serve.limits
    body_bytes = int(os.environ.get("DDM_BODY_BYTES", limits.body_bytes))
    body_timeout_s = float(os.environ.get("DDM_BODY_TIMEOUT_S", limits.body_timeout_s))
    upload_bytes = int(os.environ.get("DDM_UPLOAD_BYTES", limits.upload_bytes))
    return [
        Middleware(
            LimitsMiddleware,
            body_bytes=body_bytes,
            body_timeout_s=body_timeout_s,
            upload_bytes=upload_bytes,
        )
    ]


def build(args: dict[str, Any]) -> ray_serve.Application:
    """The application for settings such as `{"run": "/bundles/1", "serve": {"ray": {"gpus": 1}}}`.

    Raises `ConfigError` or `ArtifactError` naming the key or the file at fault.
    """
    config = settings(args)
    ray_config = config.serve.ray
    k_experts = read_bundle(bundle_folder(config.run), only=()).mixture.k
    experts = []  # for each expert, the deployment that it is in
    for group in _groups(k_experts, ray_config.experts_per_replica):
        experts += [_deployed(config, group)] * len(group)
    return (
        _deployment(Sampling, name="sampling")
        .options(
            num_replicas=ray_config.services,
            max_ongoing_requests=1000,  # the service itself limits what is pending
            ray_actor_options={"num_cpus": ray_config.service_cpus},
            health_check_period_s=1,
            graceful_shutdown_timeout_s=config.serve.limits.deadline_s,
            graceful_shutdown_wait_loop_s=0.2,
        )
        .bind(asdict(config), experts)
    )


def _name(k: int) -> str:
    return f"expert-{k:02d}"


def _groups(k_experts: int, size: int) -> list[range]:
    """The experts of each deployment: so many at a time, in the order of the clusters."""
    return [range(k, min(k + size, k_experts)) for k in range(0, k_experts, size)]


def _deployed(config: Settings, group: range) -> ray_serve.Application:
    ray_config = config.serve.ray
    first, last = group[0], group[-1]
    name = _name(first) if first == last else f"experts-{first:02d}-{last:02d}"
    return (
        _deployment(ExpertReplica, name=name)
        .options(
            max_ongoing_requests=_QUEUED_CALLS,
            ray_actor_options={
                "num_cpus": ray_config.cpus,
                "num_gpus": ray_config.gpus,
                "resources": ray_config.resources,
            },
            health_check_period_s=1,  # a dead replica is replaced after 1 s instead of 10
            graceful_shutdown_timeout_s=10,
            graceful_shutdown_wait_loop_s=0.2,
            **_scale(ray_config.replicas, ray_config.max_replicas),
        )
        .bind(
            list(group),
            config.run,
            config.serve.device,
            config.serve.precision,
            config.serve.compile,
        )
    )


def _deployment(kind: type, name: str) -> ray_serve.Deployment:
    deployment: Any = ray_serve.deployment(kind, name=name)
    return deployment


def _scale(replicas: int, max_replicas: int | None) -> dict[str, Any]:
    if max_replicas is None:
        return {"num_replicas": replicas}
    return {
        "autoscaling_config": {
            "min_replicas": replicas,
            "max_replicas": max_replicas,
            "target_ongoing_requests": 1,
        }
    }


def serve_on_ray(config: Settings) -> None:
    """Serve on a Ray cluster, or on one that is started here, until SIGINT or SIGTERM.

    Raises `ConfigError` and `ArtifactError` for settings or files at fault, before Ray starts if
    they can be found then, and `RayStartError` if Ray or the application does not start.
    """
    serve = config.serve
    config.run = str(Path(config.run).absolute())
    if serve.token_file is not None:
        serve.token_file = str(Path(serve.token_file).absolute())
    for key in serve.keys.values():
        key.token_file = str(Path(key.token_file).absolute())
    app = build(asdict(config))
    if serve.ray.address is None:
        listen(serve.host, serve.port).close()  # Serve's proxy would retry a taken port
    else:
        check_ray_answers("serve.ray.address", serve.ray.address)
    stop = threading.Event()
    with _ray(config):
        for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which sets its own
            signal.signal(number, lambda *_: stop.set())
        with _failing_as(RayStartError, "the application did not start on Ray"):
            ray_serve.start(
                proxy_location="HeadOnly",
                http_options={
                    "host": serve.host,
                    "port": serve.port,
                    "keep_alive_timeout_s": math.ceil(serve.limits.keep_alive_s),
                    # The service's own deadline comes first.
                    "request_timeout_s": serve.limits.deadline_s + 30,
                },
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
            ray_serve.run(app, name="ddm", route_prefix="/")
        log.info("http://%s:%d  (the API: /docs; ctrl-C ends it)", serve.host, serve.port)
        stop.wait()


class RayStartError(DdmError):
    """Ray, or the application on it, did not start."""


@contextlib.contextmanager
def _failing_as(kind: type[DdmError], what: str) -> Iterator[None]:
    """Raise any error inside as `kind`, with the last line of its text, which names the cause."""
    try:
        yield
    except Exception as error:
        log.debug(what, exc_info=True)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise kind(f"{what}: {lines[-1].strip()}") from error


@contextlib.contextmanager
def _ray(config: Settings) -> Iterator[None]:
    """Connect to Ray, or start it; leave no process of it at the end."""
    address = config.serve.ray.address
    limits = config.serve.limits
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # the terminal shows our own log
    os.environ.setdefault("DDM_BODY_BYTES", str(limits.body_bytes))
    os.environ.setdefault("DDM_UPLOAD_BYTES", str(limits.upload_bytes))
    os.environ.setdefault("DDM_BODY_TIMEOUT_S", str(limits.body_timeout_s))
    log.info("starting Ray and the experts of %s", config.run)
    try:
        # Ray's workers look for modules in the driver's current folder first: this one is ours.
        with _failing_as(RayStartError, "Ray did not start"), contextlib.chdir(_HOME):
            ray.init(
                address=address or "local",
                include_dashboard=False if address is None else None,
                num_cpus=_claimed_cpus(config) if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if ray.is_initialized() and address is not None:
            ray_serve.delete("ddm")
        elif ray.is_initialized() and (client := _get_global_client(False)) is not None:
            client.shutdown(timeout_s=config.serve.drain_s)  # requests under way end first
        ray.shutdown()


def _claimed_cpus(config: Settings) -> int:
    """CPUs that Ray here claims: as many as the deployments ask for, which share the real ones."""
    ray_config = config.serve.ray
    k_experts = read_bundle(bundle_folder(config.run), only=()).mixture.k
    deployments = len(_groups(k_experts, ray_config.experts_per_replica))
    replicas = deployments * (ray_config.max_replicas or ray_config.replicas)
    wanted = replicas * ray_config.cpus + ray_config.services * ray_config.service_cpus
    return max(os.cpu_count() or 1, math.ceil(wanted))
