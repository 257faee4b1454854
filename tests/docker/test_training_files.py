"""train-cluster.yaml and rayjob.yaml against Ray's, Kubernetes' and KubeRay's fields, and against our own command line."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddm_cli import PACKAGES
from train.config import STAGES, Config, config_file, load_config

DOCKER = Path(__file__).resolve().parents[2] / "docker"
CLUSTER = yaml.safe_load((DOCKER / "train-cluster.yaml").read_text())
PARTS: dict[str, dict[str, Any]] = {
    part["kind"]: part for part in yaml.safe_load_all((DOCKER / "rayjob.yaml").read_text())
}
JOB = PARTS["RayJob"]["spec"]
PODS: dict[str, dict[str, Any]] = {
    "head": JOB["rayClusterSpec"]["headGroupSpec"],
    **{group["groupName"]: group for group in JOB["rayClusterSpec"]["workerGroupSpecs"]},
}
# KubeRay's API reference, ray.io/v1.
FIELDS = {
    "RayJob": {
        "activeDeadlineSeconds",
        "backoffLimit",
        "rayClusterSpec",
        "submitterPodTemplate",
        "metadata",
        "clusterSelector",
        "submitterConfig",
        "managedBy",
        "deletionStrategy",
        "entrypoint",
        "runtimeEnvYAML",
        "jobId",
        "submissionMode",
        "entrypointResources",
        "entrypointNumCpus",
        "entrypointNumGpus",
        "ttlSecondsAfterFinished",
        "shutdownAfterJobFinishes",
        "suspend",
    },
    "RayCluster": {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"},
    "group": {
        "groupName",
        "replicas",
        "minReplicas",
        "maxReplicas",
        "rayStartParams",
        "template",
    },
}


def container(name: str) -> dict[str, Any]:
    (found,) = PODS[name]["template"]["spec"]["containers"]
    return found


def config_of_the_job() -> tuple[list[str], Config]:
    """The stages that the job's command runs, and its config."""
    program, command, name, *words = shlex.split(JOB["entrypoint"])
    assert (program, command) == ("ddm", "train")
    overrides = [word for word in words if "=" in word]
    return [word for word in words if "=" not in word], load_config(config_file(name), overrides)


def test_the_command_of_the_job_is_one_of_ours() -> None:
    stages, config = config_of_the_job()
    assert set(stages) <= set(STAGES)
    assert (config.launch.backend, config.launch.address) == ("ray", "auto")


def test_an_expert_fits_on_a_worker_and_none_on_the_head() -> None:
    _, config = config_of_the_job()
    limits = container("expert")["resources"]["limits"]
    assert config.launch.gpus is not None
    assert 0 < config.launch.gpus <= float(limits["nvidia.com/gpu"])
    assert config.launch.cpus <= float(limits["cpu"])
    assert PODS["head"]["rayStartParams"]["num-cpus"] == "0"


def test_all_that_the_command_writes_is_on_the_volume_of_every_pod() -> None:
    _, config = config_of_the_job()
    for path in (config.run, config.launch.storage, config.data.root):
        assert path is not None
        assert Path(path).is_relative_to("/shared")
    for name, group in PODS.items():
        mounts = {mount["mountPath"]: mount["name"] for mount in container(name)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        claim = volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"]
        assert claim == PARTS["PersistentVolumeClaim"]["metadata"]["name"]
        assert "/tmp" in mounts  # the root is read-only


def test_kuberay_knows_every_field() -> None:
    assert PARTS["RayJob"]["apiVersion"] == "ray.io/v1"
    assert JOB.keys() <= FIELDS["RayJob"]
    assert JOB["rayClusterSpec"].keys() <= FIELDS["RayCluster"]
    assert all(group.keys() <= FIELDS["group"] for group in PODS.values())
    constraints = (DOCKER.parent / "constraints.txt").read_text().splitlines()
    assert f"ray=={JOB['rayClusterSpec']['rayVersion']}" in constraints


@pytest.mark.parametrize("version", ["1.28", "1.37"])
@pytest.mark.parametrize("name", [*PODS, "PersistentVolumeClaim", "NetworkPolicy"])
def test_kubernetes_accepts_every_part(name: str, version: str) -> None:
    checker = pytest.importorskip("kubernetes_validate")
    part = PARTS.get(name)
    if part is None:
        template = PODS[name]["template"]
        metadata = {"name": f"ddm-{name}", **template["metadata"]}
        part = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    checker.validate(part, version, strict=True)


@pytest.mark.parametrize("name", PODS)
def test_pods_are_hardened_as_those_that_serve(name: str) -> None:
    served = yaml.safe_load_all((DOCKER / "rayservice.yaml").read_text())
    head = next(served)["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    spec = PODS[name]["template"]["spec"]
    assert spec["securityContext"] == head["securityContext"]
    assert container(name)["securityContext"] == head["containers"][0]["securityContext"]
    assert JOB["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_rays_ports_are_closed_to_other_pods() -> None:
    policy = PARTS["NetworkPolicy"]["spec"]
    own = policy["podSelector"]
    inner, submitting = policy["ingress"]
    assert inner == {"from": [{"podSelector": own}]}
    assert submitting["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert policy["egress"][0] == {"to": [{"podSelector": own}]}
    for group in PODS.values():
        assert own["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("name", ["train-cluster.yaml", "ray-cluster.yaml"])
def test_ray_up_copies_every_package(name: str) -> None:
    patterns = yaml.safe_load((DOCKER / name).read_text())["rsync_exclude"]
    in_the_root = {pattern[1:] for pattern in patterns if pattern.startswith("/")}
    anywhere = set(patterns) - {f"/{folder}" for folder in in_the_root}
    assert not any("/" in pattern or "*" in pattern for pattern in in_the_root | anywhere)
    root = DOCKER.parent
    for package in PACKAGES:
        assert package not in in_the_root
        for file in (root / package).rglob("*.py"):
            assert not set(file.relative_to(root).parts) & anywhere


def test_ray_up_accepts_the_cluster_and_knows_every_key() -> None:
    import jsonschema

    util = pytest.importorskip("ray.autoscaler._private.util")
    prepared = util.prepare_config(CLUSTER)
    util.validate_config(prepared)
    (kind,) = prepared["available_node_types"].values()
    assert kind["min_workers"] == len(CLUSTER["provider"]["worker_ips"])
    schema = json.loads((Path(util.__file__).parents[1] / "ray-schema.json").read_text())
    keys = {key: value for key, value in CLUSTER.items() if key != "min_workers"}
    jsonschema.validate(keys, schema)


def test_every_option_is_one_of_ray_start_and_the_head_trains_nothing() -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    commands = CLUSTER["head_start_ray_commands"] + CLUSTER["worker_start_ray_commands"]
    starts = [shlex.split(command) for command in commands if " start " in command]
    used = {word.split("=")[0] for words in starts for word in words if word.startswith("--")}
    assert used <= known
    assert {"--num-cpus=0", "--num-gpus=0", "--dashboard-host=127.0.0.1"} <= set(starts[0])
    assert all("RAY_AUTH_MODE=token" in words for words in starts)


def test_addresses_are_of_the_documentation_range() -> None:
    addresses = [CLUSTER["provider"]["head_ip"], *CLUSTER["provider"]["worker_ips"]]
    assert all(re.fullmatch(r"192\.0\.2\.\d+", address) for address in addresses)
