"""`python -m serve RUN serve.placement=ray`: Serve on a Ray cluster, or on one that is started here."""

import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import ray
from ray import serve as ray_serve
from ray.serve.context import _get_global_client

from ddm.bundle import read_bundle
from ddm.errors import ConfigError, DdmError
from serve.http.local_server import listen
from serve.model.loading import bundle_folder
from serve.ray_address import check_ray_answers
from serve.ray_app.application import build
from serve.ray_app.replica import expert_groups
from serve.settings import Settings

log = logging.getLogger(__name__)

_NAME = "ddm"  # of the application
# The folder of the packages, which Ray's workers import them from.
_HOME = Path(__file__).parents[2]


def serve_on_ray(config: Settings) -> None:
    """Serve on a Ray cluster, or on one that is started here, until SIGINT or SIGTERM.

    Raises `ConfigError` and `ArtifactError` for settings or files at fault, before Ray starts if
    they can be found then, and `RayStartError` if Ray or the application does not start.
    """
    serve = config.serve
    make_absolute(config)
    app = build(asdict(config))
    if serve.ray.address is None:
        listen(serve.host, serve.port).close()  # Serve's proxy would retry a taken port
    else:
        check_ray_answers("serve.ray.address", serve.ray.address)
    stop = threading.Event()
    with _ray(config):
        for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which sets its own
            signal.signal(number, _interrupt)
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
        if _NAME in ray_serve.status().applications:
            raise ConfigError(
                f"serve.ray.address must be a cluster that serves no application {_NAME!r} yet, "
                f"got {serve.ray.address!r}",
                "serve.ray.address",
            )
        with _deleted(serve.ray.address):
            with _failing_as(RayStartError, "the application did not start on Ray"):
                ray_serve.run(app, name=_NAME, route_prefix="/")
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            log.info("http://%s:%d  (the API: /docs; ctrl-C ends it)", serve.host, serve.port)
            stop.wait()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _deleted(address: str | None) -> Iterator[None]:
    """Delete the application at the end where Ray goes on."""
    try:
        yield
    finally:
        if address is not None:
            _ignore_signals()
            ray_serve.delete(_NAME)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def make_absolute(config: Settings) -> None:
    """Make the paths of the settings absolute: the processes that read them run in another folder."""
    if Path(config.run).exists():  # else it is demo, or an error that names it
        config.run = str(Path(config.run).absolute())
    for section, key in (
        (config.serve, "token_file"),
        (config.serve, "signers"),
        (config.serve.jobs, "webhook_secret_file"),
        *((own, "token_file") for own in config.serve.keys.values()),
    ):
        if (path := getattr(section, key)) is not None:
            setattr(section, key, str(Path(path).absolute()))


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
        _ignore_signals()
        client = _get_global_client(False) if address is None and ray.is_initialized() else None
        if client is not None:
            client.shutdown(timeout_s=config.serve.drain_s)  # requests under way end first
        ray.shutdown()


def _claimed_cpus(config: Settings) -> int:
    """CPUs that Ray here claims: as many as the deployments ask for, which share the real ones."""
    ray_config = config.serve.ray
    k_experts = read_bundle(bundle_folder(config.run), only=()).mixture.k
    deployments = len(expert_groups(k_experts, ray_config.experts_per_replica))
    replicas = deployments * (ray_config.max_replicas or ray_config.replicas)
    wanted = replicas * ray_config.cpus + ray_config.services * ray_config.service_cpus
    return max(os.cpu_count() or 1, math.ceil(wanted))
