"""A Ray cluster of several nodes on this machine, with docker/serve.yaml deployed on it as
`serve deploy` does.
"""

import contextlib
import logging
import os
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The only switch that keeps Ray's own ports on this machine.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # many processes share few cores
# Serve kills a proxy that is not ready in time, which on few cores is one that still imports.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")

from serve.ray_app import RAY_ENV  # Ray reads its environment when it is imported

assert RAY_ENV

import ray  # noqa: E402
import yaml  # noqa: E402
from ray import serve as ray_serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

from benchmarks.load.child import free_port  # noqa: E402

CONFIG = Path(__file__).resolve().parents[2] / "docker" / "serve.yaml"
# A node whose process has ended counts as dead after two seconds instead of half a minute.
_QUICK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 3,
}


@dataclass
class Deployed:
    """A cluster, the address of its service, and the config as deployed."""

    cluster: Any
    nodes: list[Any]  # all but the head
    url: str
    config: dict[str, Any]
    client: Any

    def deploy(self, run: str | None = None) -> None:
        """Deploy the config; with a `run`, the one that changes user_config alone."""
        if run is not None:
            self.config["applications"][0]["deployments"][0]["user_config"]["run"] = run
        schema = ServeDeploySchema.model_validate(self.config)
        self.client.deploy_applications(schema.model_dump(exclude_unset=True))

    def wait(self, within_s: float = 240) -> None:
        """Wait until it runs and its proxy answers, which Serve's status does not tell. Raises
        `RuntimeError` with Serve's message if it does not.
        """
        ends = time.monotonic() + within_s
        while True:
            app = self.client.get_serve_details()["applications"].get("ddm", {})
            if app.get("status") == "RUNNING" and self.answers():
                return
            if app.get("status") == "DEPLOY_FAILED" or time.monotonic() > ends:
                raise RuntimeError(f"not deployed: {app.get('status')}: {app.get('message')}")
            time.sleep(0.5)

    def answers(self) -> bool:
        """Whether the proxy takes requests."""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/healthz", timeout=5):
            return True
        return False

    def replicas(self) -> dict[str, list[tuple[int, str]]]:
        """The process and node of each running replica, by deployment."""
        found = self.client.get_serve_details()["applications"]["ddm"]["deployments"]
        running = {}
        for name, deployment in found.items():
            replicas = [r for r in deployment["replicas"] if r["state"] == "RUNNING" and r["pid"]]
            running[name] = [(replica["pid"], replica["node_id"]) for replica in replicas]
        return running


@contextmanager
def deployed(run: str, nodes: int = 3, slots: int = 4, **serve: Any) -> Iterator[Deployed]:
    """The service of that run on a head, where the sampling service lives, and `nodes` others of
    `slots` experts.
    """
    dashboard = free_port()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": dashboard,
            "object_store_memory": 100_000_000,
            "_system_config": _QUICK,
        },
    )
    try:
        workers = [
            cluster.add_node(
                wait=False,
                num_cpus=0,
                resources={"expert_slot": slots},
                object_store_memory=80_000_000,
            )
            for _ in range(nodes)
        ]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        config = yaml.safe_load(CONFIG.read_text())
        application = config["applications"][0]
        port = free_port()
        here = str(Path(run).resolve())
        config["http_options"] |= {"host": "127.0.0.1", "port": port}
        application["args"]["run"] = application["deployments"][0]["user_config"]["run"] = here
        application["args"]["serve"] |= serve
        application["args"]["serve"]["ray"] |= {
            "gpus": 0,
            "cpus": 0,
            "resources": {"expert_slot": 1},
            "services": 1,
            "service_cpus": 1,
        }
        config["logging_config"] = {"log_level": "WARNING", "enable_access_log": False}
        found = Deployed(
            cluster,
            workers,
            f"http://127.0.0.1:{port}",
            config,
            ServeSubmissionClient(f"http://127.0.0.1:{dashboard}"),
        )
        found.deploy()
        found.wait()
        yield found
        ray_serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()
