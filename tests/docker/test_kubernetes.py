"""rayservice.yaml against Kubernetes' schemas, KubeRay's fields, and the other files."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.settings import settings

DOCKER = Path(__file__).resolve().parents[2] / "docker"
PARTS: dict[str, dict[str, Any]] = {
    part["kind"]: part for part in yaml.safe_load_all((DOCKER / "rayservice.yaml").read_text())
}
RAY = PARTS["RayService"]
CLUSTER = RAY["spec"]["rayClusterConfig"]
SERVE = yaml.safe_load(RAY["spec"]["serveConfigV2"])
GROUPS: dict[str, dict[str, Any]] = {
    "head": CLUSTER["headGroupSpec"],
    **{group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]},
}
# KubeRay's API reference, ray.io/v1.
FIELDS = {
    "RayService": {
        "serveConfigV2",
        "rayClusterConfig",
        "serveService",
        "upgradeStrategy",
        "excludeHeadPodFromServeSvc",
    },
    "RayCluster": {
        "rayVersion",
        "headGroupSpec",
        "workerGroupSpecs",
        "authOptions",
        "gcsFaultToleranceOptions",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "headServiceAnnotations",
        "suspend",
        "managedBy",
    },
    "head": {"serviceType", "headService", "enableIngress", "rayStartParams", "template"},
    "worker": {
        "groupName",
        "replicas",
        "minReplicas",
        "maxReplicas",
        "idleTimeoutSeconds",
        "numOfHosts",
        "rayStartParams",
        "template",
        "scaleStrategy",
        "suspend",
    },
}


def container(group: str) -> dict[str, Any]:
    (found,) = GROUPS[group]["template"]["spec"]["containers"]
    return found


def as_pod(group: str) -> dict[str, Any]:
    template = GROUPS[group]["template"]
    metadata = {"name": f"ddm-{group}", **template["metadata"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def validate(part: dict[str, Any], version: str) -> None:
    checker = pytest.importorskip("kubernetes_validate")
    checker.validate(part, version, strict=True)


@pytest.mark.parametrize("version", ["1.28", "1.37"])
@pytest.mark.parametrize("kind", ["PersistentVolumeClaim", "NetworkPolicy", "PodDisruptionBudget"])
def test_kubernetes_accepts_every_part(kind: str, version: str) -> None:
    validate(PARTS[kind], version)


@pytest.mark.parametrize("version", ["1.28", "1.37"])
@pytest.mark.parametrize("group", GROUPS)
def test_kubernetes_accepts_every_pod(group: str, version: str) -> None:
    validate(as_pod(group), version)


def test_a_typo_in_a_pod_is_found() -> None:
    checker = pytest.importorskip("kubernetes_validate")
    pod = as_pod("expert")
    wrong = {**pod, "spec": {**pod["spec"], "automountServiceAcountToken": False}}
    with pytest.raises(checker.ValidationError, match="automountServiceAcountToken"):
        validate(wrong, "1.37")


def test_kuberay_knows_every_field() -> None:
    assert (RAY["apiVersion"], RAY["kind"]) == ("ray.io/v1", "RayService")
    assert RAY["spec"].keys() <= FIELDS["RayService"]
    assert CLUSTER.keys() <= FIELDS["RayCluster"]
    assert {"headGroupSpec", "workerGroupSpecs"} <= CLUSTER.keys()
    for name, group in GROUPS.items():
        assert group.keys() <= FIELDS["head" if name == "head" else "worker"]
        assert {"rayStartParams", "template"} <= group.keys()
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert RAY["spec"]["upgradeStrategy"]["type"] in {
        "NewCluster",
        "NewClusterWithIncrementalUpgrade",
        "None",
    }
    assert CLUSTER["authOptions"] == {"mode": "token"}


def test_ray_has_the_tested_version() -> None:
    constraints = (DOCKER.parent / "constraints.txt").read_text().splitlines()
    assert f"ray=={CLUSTER['rayVersion']}" in constraints


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray's own
def test_ray_serve_keeps_every_key() -> None:
    from ray.serve.schema import ServeDeploySchema

    assert (
        ServeDeploySchema.model_validate(SERVE).model_dump(mode="json", exclude_unset=True) == SERVE
    )


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {
            key: value
            for k, v in tree.items()
            for key, value in leaves(v, f"{path}.{k}" if path else k).items()
        }
    if isinstance(tree, list):
        return {
            key: value
            for k, v in enumerate(tree)
            for key, value in leaves(v, f"{path}[{k}]").items()
        }
    return {path: tree}


def test_the_application_differs_from_serve_yaml_only_in_access() -> None:
    bare, here = leaves(yaml.safe_load((DOCKER / "serve.yaml").read_text())), leaves(SERVE)
    differ = {
        key: (bare.get(key), here.get(key))
        for key in bare.keys() | here.keys()
        if bare.get(key) != here.get(key)
    }
    assert differ == {
        "proxy_location": ("HeadOnly", "EveryNode"),
        "http_options.host": ("127.0.0.1", "0.0.0.0"),
        "applications[0].args.serve.host": (None, "0.0.0.0"),
        "applications[0].args.serve.token_file": (None, "/run/secrets/ddm/token"),
    }


def test_the_hosts_agree() -> None:
    found = settings(SERVE["applications"][0]["args"])
    assert (found.serve.host, found.serve.port) == (
        SERVE["http_options"]["host"],
        SERVE["http_options"]["port"],
    )
    assert found.serve.open is False  # so it needs the token's file


def test_resources_fit_the_replicas() -> None:
    ray = settings(SERVE["applications"][0]["args"]).serve.ray
    limits = {name: container(name)["resources"]["limits"] for name in GROUPS}
    assert [name for name in GROUPS if "nvidia.com/gpu" in limits[name]] == ["expert"]
    assert float(limits["expert"]["nvidia.com/gpu"]) == ray.gpus * ray.replicas == 1
    assert float(limits["expert"]["cpu"]) >= ray.cpus
    assert GROUPS["service"]["replicas"] == ray.services
    assert (
        float(limits["service"]["cpu"]) == ray.service_cpus
    )  # room for one, so that two are on two
    assert GROUPS["head"]["rayStartParams"]["num-cpus"] == "0"
    for name in ("expert", "service"):
        assert (
            GROUPS[name]["minReplicas"] == GROUPS[name]["replicas"] == GROUPS[name]["maxReplicas"]
        )


@pytest.mark.parametrize("group", GROUPS)
def test_pods_meet_the_restricted_standard(group: str) -> None:
    pod, cfg = GROUPS[group]["template"]["spec"], container(group)["securityContext"]
    image_user = next(
        line.split()[1]
        for line in (DOCKER / "Dockerfile").read_text().splitlines()
        if line.startswith("USER ")
    )
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert (
        f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
        == image_user
    )
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert cfg == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}


@pytest.mark.parametrize("group", GROUPS)
def test_bundles_are_read_only(group: str) -> None:
    pod, args = GROUPS[group]["template"]["spec"], SERVE["applications"][0]["args"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container(group)["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == volumes.keys()
    bundles = mounts[str(Path(args["run"]).parent)]
    assert bundles["readOnly"] is True
    claim = volumes[bundles["name"]]["persistentVolumeClaim"]
    assert claim == {
        "claimName": PARTS["PersistentVolumeClaim"]["metadata"]["name"],
        "readOnly": True,
    }
    assert "emptyDir" in volumes[mounts["/tmp"]["name"]]


@pytest.mark.parametrize("group", GROUPS)
def test_only_workers_have_the_token(group: str) -> None:
    folder = str(Path(SERVE["applications"][0]["args"]["serve"]["token_file"]).parent)
    mounts = {mount["mountPath"]: mount for mount in container(group)["volumeMounts"]}
    assert (folder in mounts) == (group != "head")
    if group != "head":
        volumes = {
            volume["name"]: volume for volume in GROUPS[group]["template"]["spec"]["volumes"]
        }
        assert mounts[folder]["readOnly"] is True
        assert volumes[mounts[folder]["name"]]["secret"] == {
            "secretName": "ddm-token",
            "defaultMode": 0o440,
        }


@pytest.mark.parametrize("group", GROUPS)
def test_pods_have_the_environment_of_serving(group: str) -> None:
    tree = ast.parse(
        (DOCKER.parent / "serve" / "ray_app" / "__init__.py").read_text()
    )  # importing it would change our own
    (value,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RAY_ENV"
    ]
    assert {entry["name"]: entry["value"] for entry in container(group)["env"]} == eval(
        ast.unparse(value)
    )


@pytest.mark.parametrize("group", GROUPS)
def test_probes_are_http(group: str) -> None:
    alive = {
        "path": "/api/healthz",
        "port": 52365,
    }  # Ray's agent; KubeRay's own probes may call wget
    assert container(group)["livenessProbe"]["httpGet"] == alive
    serves = {"path": "/-/healthz", "port": SERVE["http_options"]["port"]}
    assert container(group)["readinessProbe"]["httpGet"] == (alive if group == "head" else serves)


def test_no_secret_is_in_the_file() -> None:
    assert "Secret" not in PARTS


def test_policy_and_budget_select_every_pod() -> None:
    (label,) = PARTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items()
    assert PARTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == dict([label])
    assert [
        name
        for name in GROUPS
        if label not in GROUPS[name]["template"]["metadata"]["labels"].items()
    ] == []


def test_rays_ports_are_closed_to_other_pods() -> None:
    policy = PARTS["NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    opened = {}
    for rule in policy["ingress"]:
        (peer,) = rule["from"]
        (label,) = peer["podSelector"]["matchLabels"].items()
        opened[label] = [port["port"] for port in rule["ports"]] if "ports" in rule else "all"
        assert ("namespaceSelector" in peer) == (label[1] == "kuberay-operator")
    assert opened == {
        ("app", "ddm"): "all",
        ("ddm-client", "true"): [8000],
        ("ddm-scraper", "true"): [8080],
        ("app.kubernetes.io/name", "kuberay-operator"): [8265, 8000],
    }


def test_egress_is_the_cluster_and_dns() -> None:
    inner, dns = PARTS["NetworkPolicy"]["spec"]["egress"]
    assert inner == {"to": [{"podSelector": {"matchLabels": {"app": "ddm"}}}]}
    assert {port["port"] for port in dns["ports"]} == {53}
