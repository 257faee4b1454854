"""The sampling service on Ray: router, engine and HTTP as Serve's ingress, and its metrics."""

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util import metrics as ray_metrics

from ddm.errors import ArtifactError, ConfigError, DdmError, require
from serve.engine.metrics import METRICS, Metrics
from serve.engine.models import Models
from serve.engine.turn import Turn
from serve.http.app import build_app
from serve.http.middleware import LimitsMiddleware
from serve.ray_app.replica import RayExpert, expert_groups
from serve.settings import Settings, settings

log = logging.getLogger(__name__)

_PREPARE_S = 300.0  # for a replica to load a bundle


@ray_serve.ingress()
class Sampling:
    """The sampling service and its HTTP application.

    Raises `ConfigError` if Serve's proxy listens beyond loopback without a token or `serve.open`.
    """

    def __init__(self, tree: dict[str, Any], experts: list[DeploymentHandle[Any]]) -> None:
        logging.getLogger("serve").setLevel(logging.INFO)
        self.settings = settings(tree)
        self.started = False
        self.switching: set[asyncio.Task[None]] = set()
        self.experts = {handle.deployment_name: handle for handle in experts}
        _check_proxy_host(self.settings)

        def connect(model: Any, folder: Path, turn: Turn) -> list[RayExpert]:
            if len(model.names) != len(experts):
                raise ConfigError(
                    f"run must have {len(experts)} experts, as many as are deployed, "
                    f"got {len(model.names)}",
                    "run",
                )
            if self.started:  # at the start the experts may still be to come
                self._prepare(folder, model.version)
            ray_config = self.settings.serve.ray
            calls = ray_config.max_replicas or ray_config.replicas
            found = []
            for group in expert_groups(len(experts), ray_config.experts_per_replica):
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
            local=not self.settings.serve.open,
        )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Switch to the weights of `user_config: {run: FOLDER}`, without a restart.

        A `user_config` that cannot be served fails a replica that starts. A replica that has
        started switches beside its requests, of which Serve sends it none until this returns; it
        keeps its weights and logs the reason if it cannot, since an error would end it.
        """
        if self.started:
            switching = asyncio.create_task(self._switch_or_log(user_config))
            self.switching.add(switching)
            switching.add_done_callback(self.switching.discard)
        else:
            await self._switch(user_config)

    async def _switch_or_log(self, user_config: Any) -> None:
        try:
            await self._switch(user_config)
        except Exception as error:
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

    def _prepare(self, folder: Path, version: str) -> None:
        """Have a replica of each expert load a bundle. Raises what keeps one from it, and
        `ArtifactError` for one that has another version or does not answer.
        """
        until = time.monotonic() + _PREPARE_S
        calls = {name: handle.prepare.remote(str(folder)) for name, handle in self.experts.items()}
        for name, call in calls.items():
            try:
                found = call.result(timeout_s=max(0.0, until - time.monotonic()))
            except TimeoutError as error:
                message = f"{name} has not loaded {folder} within {_PREPARE_S:g} s"
                raise ArtifactError(message) from error
            except RayTaskError:
                raise
            except (RayError, RayServeException) as error:  # its next one loads what it needs
                log.warning("%s was lost while it loaded %s: %s", name, folder, error)
                continue
            if found != version:
                raise ArtifactError(
                    f"{folder} must be the same on all nodes: {name} has version {found[:12]}, "
                    f"expected {version[:12]}"
                )

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
