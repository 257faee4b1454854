"""Connecting to a Ray cluster, and what of a config does not fit it."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

# Read when Ray is imported, and inherited by its processes.
_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # who claims no GPU sees none
    "RAY_AIR_NEW_OUTPUT": "0",  # our table is shown instead
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # train.stopping answers
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
for _key, _value in _ENV.items():
    os.environ.setdefault(_key, _value)

import ray  # noqa: E402
from ray.exceptions import RayError  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from ddm.errors import ConfigError, DdmError  # noqa: E402
from serve.ray_address import check_ray_answers  # noqa: E402
from train import stopping  # noqa: E402
from train.config import Config  # noqa: E402
from train.storage import Storage  # noqa: E402

# The folder of the packages, which Ray's workers import them from.
_HOME = Path(__file__).parents[1]


class RayStartError(DdmError):
    """Ray did not start."""


@contextlib.contextmanager
def connected(config: Config) -> Iterator[None]:
    """Connect to Ray, or start it; leave no process of it at the end."""
    address = config.launch.address
    if ray.is_initialized():
        raise RayStartError("this program uses Ray already: call ray.shutdown() first")
    if address is not None:
        check_ray_answers("launch.address", address)
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    try:
        # Ray's workers look for modules in the driver's current folder first: this one is ours.
        with contextlib.chdir(_HOME):
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False if address is None else None,
            )
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        if address is not None:
            raise ConfigError(
                f"launch.address must be a Ray cluster that answers, got {address!r}: {why}"
            ) from error
        raise RayStartError(f"Ray did not start: {why}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():  # Ray sets its own
                signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()
    return [node for node in nodes if node["Alive"]]


def claims(config: Config) -> dict[str, float]:
    """What one process claims of Ray."""
    launch = config.launch
    gpus = launch.gpus
    if gpus is None:
        there = any(node["Resources"].get("GPU", 0) > 0 for node in _nodes())
        wanted = config.accelerator == "gpu" or (config.accelerator == "auto" and there)
        gpus = 1.0 if wanted else 0.0
    return {"CPU": launch.cpus, "GPU": gpus, **launch.resources}


def processes_at_once(claimed: dict[str, float]) -> int:
    """How many processes the nodes have room for."""
    most = 0
    for node in _nodes():
        room = [node["Resources"].get(kind, 0) // n for kind, n in claimed.items() if n > 0]
        most += int(min(room, default=node["Resources"].get("CPU", 0)))
    return most


def check_room(claimed: dict[str, float], devices: int) -> None:
    """Raise `ConfigError` unless there is room for one job of so many processes: it would wait for ever."""
    if not any(claimed.values()):
        raise ConfigError("launch.cpus must be above 0 where nothing else is claimed, got 0")
    nodes = [node["Resources"] for node in _nodes()]
    keys = {"CPU": "cpus", "GPU": "gpus"}
    for kind, amount in claimed.items():
        most = max((node.get(kind, 0) for node in nodes), default=0)
        if amount > most:
            key = keys.get(kind, f"resources.{kind}")
            raise ConfigError(
                f"launch.{key} must be at most what one of the cluster's {len(nodes)} nodes has, {most:g}, got {amount:g}"
            )
    if not any(all(node.get(kind, 0) >= n for kind, n in claimed.items()) for node in nodes):
        raise ConfigError(
            f"launch.cpus, launch.gpus and launch.resources must fit on one of the cluster's nodes together, got {claimed}"
        )
    if devices > 1 and 0 < claimed["GPU"] < 1:
        rule = "be a whole number with expert.devices above 1: two processes cannot share a GPU"
        raise ConfigError(f"launch.gpus must {rule}, got {claimed['GPU']:g}")
    room = processes_at_once(claimed)
    if devices > room:
        raise ConfigError(
            f"expert.devices must be at most {room}, the processes that the cluster's {len(nodes)} nodes have room for at "
            f"launch.cpus={claimed['CPU']:g} and launch.gpus={claimed['GPU']:g}, got {devices}"
        )


def check_shared(storage: Storage) -> None:
    """Raise `ConfigError` naming a node that does not have the storage's folder."""
    nodes = _nodes()
    here = len(nodes) == 1 and not ray.util.client.ray.is_connected()
    if not storage.is_local or here:
        return
    probe = f"{storage.run}/.shared-{token_hex(8)}"
    storage.fs.touch(probe)

    def sees() -> bool:  # pickled whole: the node need not import this module for it
        import os

        return os.path.exists(probe)  # noqa: PTH110

    task = ray.remote(num_cpus=0)(sees)
    asked = {
        node["NodeManagerAddress"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in nodes
    }
    answers = {}
    try:
        for address, answer in asked.items():
            with contextlib.suppress(RayError):  # the node has gone
                answers[address] = ray.get(answer)
    finally:
        storage.fs.rm_file(probe)
    for address, seen in answers.items():
        if not seen:
            raise ConfigError(
                "launch.storage must be a URL, such as s3://BUCKET/ddm, or a folder that all nodes share: "
                f"{address} does not have {storage.url!r}"
            )
