"""The application: what is deployed, with which claims and limits."""

from dataclasses import asdict
from typing import Any

from ray import serve as ray_serve

from ddm.bundle import read_bundle
from serve.model.loading import bundle_folder
from serve.ray_app.ingress import Sampling
from serve.ray_app.replica import ExpertReplica, expert_groups, expert_name
from serve.settings import Settings, settings

_QUEUED_CALLS = 8  # per replica: computed one after another, without waiting for the next to arrive


def build(args: dict[str, Any]) -> ray_serve.Application:
    """The application for settings such as `{"run": "/bundles/1", "serve": {"ray": {"gpus": 1}}}`.

    Raises `ConfigError` or `ArtifactError` naming the key or the file at fault.
    """
    config = settings(args)
    ray_config = config.serve.ray
    k_experts = read_bundle(bundle_folder(config.run), only=()).mixture.k
    experts = []  # for each expert, the deployment that it is in
    for group in expert_groups(k_experts, ray_config.experts_per_replica):
        experts += [_deployed(config, group)] * len(group)
    return (
        _deployment(Sampling, name="sampling")
        .options(
            num_replicas=ray_config.services,
            # The service itself limits what is pending: one evaluation at least of each request for samples.
            max_ongoing_requests=max(1000, config.serve.limits.pending),
            ray_actor_options={"num_cpus": ray_config.service_cpus},
            health_check_period_s=1,
            graceful_shutdown_timeout_s=config.serve.limits.deadline_s,
            graceful_shutdown_wait_loop_s=0.2,
        )
        .bind(asdict(config), experts)
    )


def _deployed(config: Settings, group: range) -> ray_serve.Application:
    ray_config = config.serve.ray
    first, last = group[0], group[-1]
    name = expert_name(first) if first == last else f"experts-{first:02d}-{last:02d}"
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
