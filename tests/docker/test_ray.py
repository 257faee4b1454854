"""serve.yaml and ray-cluster.yaml against the schemas of Ray itself, and against ours."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from serve.settings import settings

DOCKER = Path(__file__).resolve().parents[2] / "docker"
SERVE = yaml.safe_load((DOCKER / "serve.yaml").read_text())
CLUSTER = yaml.safe_load((DOCKER / "ray-cluster.yaml").read_text())


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray's own
def test_ray_serve_keeps_every_key() -> None:
    from ray.serve.schema import ServeDeploySchema  # Ray takes seconds to import

    taken = ServeDeploySchema.model_validate(SERVE).model_dump(mode="json", exclude_unset=True)
    assert taken == SERVE  # pydantic ignores what it does not know


def test_args_are_valid_settings() -> None:
    (app,) = SERVE["applications"]
    found = settings(app["args"])
    assert found.serve.placement == "ray"
    assert found.serve.ray.gpus == 1


def test_the_hosts_agree() -> None:
    (app,) = SERVE["applications"]
    assert SERVE["http_options"]["host"] == settings(app["args"]).serve.host == "127.0.0.1"
    assert SERVE["http_options"]["port"] == settings(app["args"]).serve.port


def test_the_proxy_waits_longer_than_the_service() -> None:
    (app,) = SERVE["applications"]
    assert (
        SERVE["http_options"]["request_timeout_s"] > settings(app["args"]).serve.limits.deadline_s
    )


def test_import_paths_exist() -> None:
    (app,) = SERVE["applications"]
    module, _, name = app["import_path"].partition(":")
    tree = ast.parse((DOCKER.parent / module.replace(".", "/") / "__init__.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert name in {alias.name for node in imports for alias in node.names}


def test_a_proxy_that_starts_imports_neither_torch_nor_ray() -> None:
    module, _, name = ray_env()["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
    code = f"import sys; from {module} import {name}; {name}(); print({{'torch', 'ray'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=DOCKER.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_user_config_holds_the_run() -> None:
    (app,) = SERVE["applications"]
    assert app["deployments"] == [{"name": "sampling", "user_config": {"run": app["args"]["run"]}}]


def test_ray_up_accepts_the_cluster() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    prepared = util.prepare_config(CLUSTER)
    util.validate_config(prepared)
    (kind,) = prepared["available_node_types"].values()
    machines = len(CLUSTER["provider"]["worker_ips"])
    assert (kind["min_workers"], kind["max_workers"], prepared["max_workers"]) == (
        machines,
        machines,
        machines,
    )


def test_ray_up_knows_every_key() -> None:
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    keys = {
        key: value for key, value in CLUSTER.items() if key != "min_workers"
    }  # moved to the node type by `ray up`
    jsonschema.validate(keys, schema)
    with pytest.raises(jsonschema.ValidationError, match="min_worker_count"):
        jsonschema.validate({**keys, "min_worker_count": 1}, schema)


def ray_env() -> dict[str, str]:
    """`RAY_ENV` of serve/ray_app, parsed: importing it would change this process's environment."""
    tree = ast.parse((DOCKER.parent / "serve" / "ray_app" / "__init__.py").read_text())
    (value,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RAY_ENV"
    ]
    found: dict[str, str] = eval(ast.unparse(value))
    return found


def starts() -> list[tuple[dict[str, str], list[str]]]:
    """The environment and the words of each `ray start`."""
    commands = CLUSTER["head_start_ray_commands"] + CLUSTER["worker_start_ray_commands"]
    found = []
    for command in commands:
        if " start " in command:
            exports, _, ray_start = (part.strip() for part in command.split(";"))
            word, *pairs = shlex.split(exports)
            assert word == "export"
            found.append((dict(pair.split("=", 1) for pair in pairs), shlex.split(ray_start)))
    return found


def test_every_node_has_the_environment_and_rays_token() -> None:
    assert [environment for environment, _ in starts()] == [
        {"RAY_AUTH_MODE": "token", **ray_env()}
    ] * 2
    assert "~/.ray/auth_token" in CLUSTER["file_mounts"]


def test_the_head_has_no_expert_and_a_local_dashboard() -> None:
    (_, head), (_, worker) = starts()
    assert {"--head", "--num-cpus=0", "--num-gpus=0", "--dashboard-host=127.0.0.1"} <= set(head)
    assert "--address=$RAY_HEAD_IP:6379" in worker


def test_every_option_is_one_of_ray_start() -> None:
    from ray.scripts.scripts import start

    known = {
        option
        for parameter in start.params
        for option in [*parameter.opts, *parameter.secondary_opts]
    }
    used = {word.split("=")[0] for _, words in starts() for word in words if word.startswith("--")}
    assert used <= known


def test_addresses_are_of_the_documentation_range() -> None:
    addresses = [CLUSTER["provider"]["head_ip"], *CLUSTER["provider"]["worker_ips"]]
    assert all(re.fullmatch(r"192\.0\.2\.\d+", address) for address in addresses)
    assert len(set(addresses)) == len(addresses)
