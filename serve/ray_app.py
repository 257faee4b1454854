"""On Ray Serve: every expert a deployment of its own, and the sampling service, which holds router and engine and is the ingress.

`serve deploy docker/serve.yaml` and `python -m serve RUN serve.placement=ray` both come to `build`. A step of an expert is pure
in (x, t), so a call that was lost with its replica is made again by the engine; Serve itself does not.
"""

import asyncio
import logging
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Read by Ray when it is imported, and inherited by what it starts: answers of experts go straight from process to process
# (a third of the time of a call by the object store), of any size that a batch may have; and every process counts no users.
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
from ray.serve.exceptions import RayServeException  # noqa: E402
from ray.serve.handle import DeploymentHandle  # noqa: E402
from ray.util import metrics as ray_metrics  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from torch import Tensor  # noqa: E402

from ddm.bundle import read_bundle  # noqa: E402
from ddm.device import pick_device  # noqa: E402
from ddm.errors import ArtifactError, ConfigError  # noqa: E402
from serve.engine.expert import UnavailableError  # noqa: E402
from serve.engine.local_expert import Runner  # noqa: E402
from serve.engine.metrics import METRICS, Metrics  # noqa: E402
from serve.engine.service import Service  # noqa: E402
from serve.http.app import build_app  # noqa: E402
from serve.http.middleware import LimitsMiddleware  # noqa: E402
from serve.model.loading import (  # noqa: E402
    bundle_folder,
    load_expert,
)
from serve.settings import Settings, settings  # noqa: E402

log = logging.getLogger(__name__)

_KEPT = 2  # versions that an expert keeps: the current, and the one that requests under way may still be on
_CALLS = 8  # calls that a replica takes at once: they are computed in turn, but the next is there when one ends


class ExpertReplica:
    """One expert, in one process: answers for the versions that are asked for, each loaded when it is first."""

    def __init__(self, k: int, folder: str, device: str, compiled: bool) -> None:
        self.k, self.device, self.compiled = k, torch.device(pick_device(device)), compiled
        self.runners: dict[str, Runner] = {}
        self.turn = ThreadPoolExecutor(1)
        self._load(folder)

    async def denoise(self, folder: str, version: str, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """x float32 `[B, C, H, W]`, t `[B]` -> the denoised x, by the weights of that version of the bundle in `folder`."""
        return await asyncio.get_running_loop().run_in_executor(
            self.turn, self._denoise, folder, version, x, t
        )

    async def where(self) -> tuple[int, str]:
        """Its process and node; that it answers says that it is alive."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def _denoise(self, folder: str, version: str, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        if version not in self.runners and self._load(folder) != version:
            raise ArtifactError(
                f"{folder} no longer holds version {version}: keep a bundle until its requests are done"
            )
        return self.runners[version](
            torch.tensor(x), torch.tensor(t)
        ).numpy()  # copies: what arrives may be read-only

    def _load(self, folder: str) -> str:
        denoiser, version = load_expert(folder, self.k, self.device)
        self.runners[version] = Runner(denoiser, self.device, self.compiled)
        for old in list(self.runners)[:-_KEPT]:
            del self.runners[old]
        return version


class RayExpert:
    """An expert's deployment, as the engine asks it."""

    def __init__(
        self, name: str, handle: DeploymentHandle[Any], folder: Path, version: str, calls: int
    ) -> None:
        self.name, self.handle, self.folder, self.version = name, handle, str(folder), version
        self.calls, self.turn = calls, asyncio.Semaphore(calls)

    async def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        arrays = x.cpu().numpy(), t.to("cpu", torch.float32).numpy()
        return torch.tensor(
            await _answer(self.handle.denoise.remote(self.folder, self.version, *arrays))
        )

    async def check(self) -> None:
        await _answer(self.handle.where.remote())


async def _answer(response: Any) -> Any:
    """What a replica answers; its own errors as they are, and `UnavailableError` if the call was lost on the way."""
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
    """The sampling service, and the HTTP application in front of it."""

    def __init__(self, tree: dict[str, Any], experts: dict[str, DeploymentHandle[Any]]) -> None:
        logging.getLogger("serve").setLevel(logging.INFO)
        self.settings = settings(tree)

        def connect(model: Any, folder: Path, turn: asyncio.Semaphore) -> list[RayExpert]:
            if len(model.names) != len(experts):
                raise ConfigError(
                    f"run must have {len(experts)} experts, as many as are deployed, got {len(model.names)}",
                    "run",
                )
            ray_config = self.settings.serve.ray
            calls = ray_config.max_replicas or ray_config.replicas
            return [
                RayExpert(name, handle, folder, model.version, calls)
                for name, handle in experts.items()
            ]

        self.service = Service(self.settings, RayMetrics(), connect)

    def __serve_build_asgi_app__(self) -> Any:
        limits = self.settings.serve.limits
        return LimitsMiddleware(
            build_app(self.service), self.settings.token(), limits.body_bytes, limits.body_timeout_s
        )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """New weights, without a restart: `user_config: {run: FOLDER}`."""
        if set(user_config) != {"run"}:
            raise ConfigError(
                f"user_config must have the one key run, got {sorted(user_config)}", "user_config"
            )
        await self.service.switch(user_config["run"])


class RayMetrics(Metrics):
    """Metrics that Ray exports on its own port, as `ray_ddm_NAME`."""

    def __init__(self) -> None:
        kinds: dict[str, Any] = {
            "counter": ray_metrics.Counter,
            "gauge": ray_metrics.Gauge,
            "histogram": ray_metrics.Histogram,
        }
        self.kept: dict[str, Any] = {
            name: kinds[metric.kind](
                f"ddm_{name}",
                description=metric.help,
                tag_keys=(metric.label,) if metric.label else (),
                **({"boundaries": list(metric.bounds)} if metric.bounds else {}),
            )
            for name, metric in METRICS.items()
        }

    def count(self, name: str, amount: float = 1, **label: str) -> None:
        if amount:  # Ray refuses 0
            self.kept[name].inc(amount, tags=label)

    def gauge(self, name: str, value: float, **label: str) -> None:
        self.kept[name].set(value, tags=label)

    def observe(self, name: str, value: float, **label: str) -> None:
        self.kept[name].observe(value, tags=label)


def proxy_middlewares() -> list[Middleware]:
    """What Serve's HTTP proxy runs before it reads a body, which it does without a limit: named in `RAY_ENV`.

    `DDM_BODY_BYTES` and `DDM_BODY_TIMEOUT_S` are its limits. The token is asked for behind it, by the service, which knows it.
    """
    limits = Settings().serve.limits
    body_bytes = int(os.environ.get("DDM_BODY_BYTES", limits.body_bytes))
    body_timeout_s = float(os.environ.get("DDM_BODY_TIMEOUT_S", limits.body_timeout_s))
    return [Middleware(LimitsMiddleware, body_bytes=body_bytes, body_timeout_s=body_timeout_s)]


def build(args: dict[str, Any]) -> ray_serve.Application:
    """The application of a tree of settings, such as `{"run": "/bundles/one", "serve": {"ray": {"gpus": 1}}}`.

    Raises `ConfigError` and `ArtifactError` naming what is wrong.
    """
    config = settings(args)
    ray_config = config.serve.ray
    experts = {
        f"expert-{k:02d}": _deployment(ExpertReplica, name=f"expert-{k:02d}")
        .options(
            max_ongoing_requests=_CALLS,
            ray_actor_options={
                "num_cpus": ray_config.cpus,
                "num_gpus": ray_config.gpus,
                "resources": ray_config.resources,
            },
            health_check_period_s=1,  # a replica that dies is replaced a second later, not ten
            graceful_shutdown_timeout_s=10,
            graceful_shutdown_wait_loop_s=0.2,
            **_scale(ray_config.replicas, ray_config.max_replicas),
        )
        .bind(k, config.run, config.serve.device, config.serve.compile)
        for k in range(read_bundle(bundle_folder(config.run), only=()).partition.k)
    }
    return (
        _deployment(Sampling, name="sampling")
        .options(
            num_replicas=ray_config.services,
            max_ongoing_requests=1000,  # the service itself says when it is full
            ray_actor_options={"num_cpus": ray_config.service_cpus},
            health_check_period_s=1,
            graceful_shutdown_timeout_s=config.serve.limits.deadline_s,
            graceful_shutdown_wait_loop_s=0.2,
        )
        .bind(asdict(config), experts)
    )


def _deployment(kind: type, name: str) -> ray_serve.Deployment:
    made: Any = ray_serve.deployment(kind, name=name)
    return made


def _scale(replicas: int, most: int | None) -> dict[str, Any]:
    if most is None:
        return {"num_replicas": replicas}
    return {
        "autoscaling_config": {
            "min_replicas": replicas,
            "max_replicas": most,
            "target_ongoing_requests": 1,
        }
    }


def serve_on_ray(config: Settings) -> None:
    """Serve on a Ray cluster, or on one started here for the purpose, until told to end."""
    serve = config.serve
    app = build(asdict(config))  # what is wrong is said before Ray starts
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # this terminal is for people
    os.environ.setdefault("DDM_BODY_BYTES", str(serve.limits.body_bytes))
    os.environ.setdefault("DDM_BODY_TIMEOUT_S", str(serve.limits.body_timeout_s))
    if serve.ray.address is None:
        # The only switch by which Ray's own ports stay on this machine.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    log.info("starting Ray and %s's experts", config.run)
    ray.init(
        address=serve.ray.address or "local",
        include_dashboard=False if serve.ray.address is None else None,
        num_cpus=_cpus_here(config) if serve.ray.address is None else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which sets its own
        signal.signal(number, lambda *_: ended.set())
    try:
        ray_serve.start(
            proxy_location="HeadOnly",
            http_options={
                "host": serve.host,
                "port": serve.port,
                "request_timeout_s": serve.limits.deadline_s
                + 30,  # the service's own deadline comes first
            },
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        ray_serve.run(app, name="ddm", route_prefix="/")
        log.info("http://%s:%d  (the API: /docs; ctrl-C ends it)", serve.host, serve.port)
        ended.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if serve.ray.address is None:
            ray_serve.shutdown()
        else:
            ray_serve.delete("ddm")
        ray.shutdown()


def _cpus_here(config: Settings) -> int:
    """CPUs to claim of this machine's own Ray: as many as the deployments ask for, since they share what there is."""
    ray_config = config.serve.ray
    k = read_bundle(bundle_folder(config.run), only=()).partition.k
    wanted = k * (ray_config.max_replicas or ray_config.replicas) * ray_config.cpus
    return max(
        os.cpu_count() or 1, int(np.ceil(wanted + ray_config.services * ray_config.service_cpus))
    )
