"""Where trainings run: the section `launch` of a config."""

from dataclasses import dataclass, field
from typing import Literal

from ddm.errors import require


@dataclass
class LaunchConfig:
    """Experts side by side: in processes of this machine, or on the nodes of a Ray cluster.

    backend: `local` or `ray`
    address: of the Ray cluster: HOST:PORT, ray://HOST:PORT for one that this machine is no node of, `auto` for the one
        that this machine is a node of; null starts Ray on this machine
    storage: the folder or URL (any of fsspec, such as s3://BUCKET/ddm) that all nodes reach; null for RUN/ray
    cpus: of each process, for Ray's accounting; at least 0
    gpus: of each process, at least 0, such as 0.5; null for 1 if the cluster has GPUs and accelerator is not cpu, else 0
    resources: others of Ray that each process claims, such as {a100: 1}
    retries: how often an expert resumes whose process has died; a preempted node of Ray does not count. At least 0
    """

    backend: Literal["local", "ray"] = "local"
    address: str | None = None
    storage: str | None = None
    cpus: float = 1.0
    gpus: float | None = None
    resources: dict[str, float] = field(default_factory=dict)
    retries: int = 3

    def check(self) -> None:
        """Raise `ConfigError` naming the key of a value out of its range."""
        require(self.cpus >= 0, "cpus", "be at least 0", self.cpus)
        require(self.gpus is None or self.gpus >= 0, "gpus", "be at least 0, or null", self.gpus)
        require(self.retries >= 0, "retries", "be at least 0", self.retries)
        for name, amount in self.resources.items():
            require(amount >= 0, f"resources.{name}", "be at least 0", amount)
        for key in ("address", "storage"):
            value = getattr(self, key)
            require(value is None or bool(value), key, "be given, or null", value)
            only_ray = value is None or self.backend == "ray"
            require(only_ray, key, "be null without launch.backend=ray", value)
