"""compose.yaml, and the configuration of Prometheus and Grafana beside it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.http.local_server import _END_S as LAST_RESPONSES_S
from serve.settings import settings

DOCKER = Path(__file__).resolve().parents[2] / "docker"


def loaded(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text())


COMPOSE = loaded("compose.yaml")
SERVICES: dict[str, Any] = COMPOSE["services"]


def test_yamllint_finds_nothing() -> None:
    linter = pytest.importorskip("yamllint.linter")
    config = pytest.importorskip("yamllint.config").YamlLintConfig(
        (DOCKER / ".yamllint.yaml").read_text()
    )
    files = sorted(DOCKER.rglob("*.yaml"))
    assert len(files) >= 8
    assert [
        (file.name, str(found)) for file in files for found in linter.run(file.read_text(), config)
    ] == []


def test_the_service_gets_its_bundle_and_token() -> None:
    ddm = SERVICES["ddm"]
    run, *words = ddm["command"]
    found = settings({"run": run}, words)
    assert found.serve.host == "0.0.0.0"
    assert found.serve.token_file == f"/run/secrets/{ddm['secrets'][0]}"
    (bundles,) = ddm["volumes"]
    assert bundles["read_only"] is True
    assert run.startswith(f"{bundles['target']}/")
    assert (DOCKER / ddm["build"]["context"] / ddm["build"]["dockerfile"]).is_file()


def test_docker_waits_for_the_drain_before_it_kills() -> None:
    ddm = SERVICES["ddm"]
    run, *words = ddm["command"]
    grace_s = float(ddm["stop_grace_period"].removesuffix("s"))
    assert grace_s > settings({"run": run}, words).serve.drain_s + LAST_RESPONSES_S


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_this_machine_alone(name: str) -> None:
    assert [port for port in SERVICES[name]["ports"] if not port.startswith("127.0.0.1:")] == []


@pytest.mark.parametrize("name", SERVICES)
def test_containers_write_only_to_their_volumes(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged", False)
    assert [
        mount
        for mount in service["volumes"]
        if isinstance(mount, dict) and mount.get("read_only") is not True
    ] == []


def test_images_have_a_version() -> None:
    assert [
        s["image"]
        for s in SERVICES.values()
        if not re.search(r":[\w.]+$", s["image"]) or ":latest" in s["image"]
    ] == []


def test_metrics_are_an_optional_profile() -> None:
    assert {name: service.get("profiles") for name, service in SERVICES.items()} == {
        "ddm": None,
        "prometheus": ["metrics"],
        "grafana": ["metrics"],
    }


def test_mounted_files_exist_and_volumes_are_declared() -> None:
    for service in SERVICES.values():
        for mount in service["volumes"]:
            if isinstance(mount, str):
                assert mount.split(":")[0] in COMPOSE["volumes"]
            elif mount["source"].startswith("./"):
                assert (DOCKER / mount["source"]).is_file()
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])


def test_required_variables_have_no_default() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+):\?", text)) == {"DDM_BUNDLES", "DDM_TOKEN_FILE"}
    assert set(re.findall(r"\$\{(\w+)(?!\w|:[?-])", text)) == set()


def test_cuda_changes_the_image_and_reserves_gpus() -> None:
    (name,) = loaded("compose.cuda.yaml")["services"]
    over = loaded("compose.cuda.yaml")["services"][name]
    assert name == "ddm"
    assert over["build"]["args"]["DEVICE"] == "cuda"
    assert over["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_prometheus_sends_the_token() -> None:
    jobs = {job["job_name"]: job for job in loaded("prometheus.yaml")["scrape_configs"]}
    (target,) = jobs["ddm"]["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert host in SERVICES
    assert SERVICES[host]["ports"][0].endswith(f":{port}")
    assert jobs["ddm"]["authorization"]["credentials_file"] == "/run/secrets/ddm_token"
    assert SERVICES["prometheus"]["secrets"] == ["ddm_token"]
    assert jobs["ddm"].get("metrics_path", "/metrics") == "/metrics"


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    (source,) = loaded("grafana/datasource.yaml")["datasources"]
    host, _, port = source["url"].removeprefix("http://").partition(":")
    assert SERVICES[host]["ports"][0].endswith(f":{port}")
    assert (
        source["jsonData"]["timeInterval"] == loaded("prometheus.yaml")["global"]["scrape_interval"]
    )
    (provider,) = loaded("grafana/provider.yaml")["providers"]
    targets = {
        mount["target"] for mount in SERVICES["grafana"]["volumes"] if isinstance(mount, dict)
    }
    assert f"{provider['options']['path']}/ddm.json" in targets
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in targets
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert json.loads((DOCKER / "grafana" / "ddm.json").read_text())["uid"] == "ddm"
