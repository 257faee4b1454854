"""docker/serve.yaml on a Ray cluster of several nodes on this machine."""

import asyncio
import contextlib
import http.client
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from benchmarks.load.client import Reply, closed, request_image, session
from benchmarks.load.cluster import Deployed, deployed
from benchmarks.load.drill import differences, other_weights
from ddm.errors import ConfigError
from serve import load
from serve.model.images import to_uint8
from serve.ray_app import ingress
from serve.settings import settings

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Ray's own, which are many
]


@pytest.fixture(scope="module")
def bundles(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return Path(shutil.copytree(small_run / "bundle", folder / "one")), other_weights(
        str(small_run), folder / "two"
    )


@pytest.fixture(scope="module")
def service(bundles: tuple[Path, Path]) -> Iterator[Deployed]:
    with deployed(str(bundles[0]), nodes=3, slots=1) as found:
        yield found


def expected(bundle: Path, n: int, **settings: Any) -> dict[str, Tensor]:
    model = load(bundle)
    return {model.version: to_uint8(model.sample(n, **settings)).permute(0, 2, 3, 1)}


def asked(service: Deployed, clients: int, requests: int, **settings: Any) -> list[Reply]:
    tally = asyncio.run(closed(service.url, clients, requests, settings))
    assert [reply.said for reply in tally.replies if reply.status != 200] == []
    return tally.replies


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        ({"host": "0.0.0.0"}, False),
        ({"host": "::"}, False),
        ({"host": "127.0.0.1"}, True),
        ({"host": None}, True),
        ({"host": "0.0.0.0", "token_file": "/run/secrets/token"}, True),
        ({"host": "0.0.0.0", "open": True}, True),
    ],
)
def test_a_proxy_beyond_loopback_needs_a_token(
    words: dict[str, Any], allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = {key: value for key, value in words.items() if key != "host"}
    client = SimpleNamespace(http_config=SimpleNamespace(host=words["host"]))
    monkeypatch.setattr(ingress, "_get_global_client", lambda: client)
    config = settings({"run": "one", "serve": serve})
    if allowed:
        ingress._check_proxy_host(config)
    else:
        with pytest.raises(ConfigError, match=r"http_options\.host must be 127\.0\.0\.1 unless"):
            ingress._check_proxy_host(config)


def test_every_replica_has_its_own_node(
    service: Deployed,
) -> None:
    found = service.replicas()
    assert sorted(found) == ["expert-00", "expert-01", "expert-02", "sampling"]
    nodes = [node for there in found.values() for _, node in there]
    assert len(nodes) == len(set(nodes)) == 4


def test_without_a_token_it_answers_at_localhost_alone(service: Deployed) -> None:
    address = service.url.removeprefix("http://")
    for host, status in (("localhost", 200), ("evil.example", 403)):
        with contextlib.closing(http.client.HTTPConnection(address, timeout=60)) as connection:
            connection.request("GET", "/v1/models", headers={"Host": host})
            assert connection.getresponse().status == status


def test_images_are_those_of_load_alone_and_among_64(
    service: Deployed, bundles: tuple[Path, Path]
) -> None:
    wanted = expected(bundles[0], 64)
    assert max(differences(asked(service, 1, 3), wanted)) == 0
    assert max(differences(asked(service, 64, 64), wanted)) <= 1


def test_choices_of_expert_are_those_of_load(service: Deployed, bundles: tuple[Path, Path]) -> None:
    async def traced() -> Any:
        async with session(service.url) as client:
            body = {
                "n": 5,
                "seed": 3,
                "trace": True,
                "format": "b64_json",
                "policy": "stochastic",
                "sampler": "heun",
            }
            async with client.post("/v1/samples", json=body) as response:
                return await response.json()

    _, trace = load(bundles[0]).sample(5, seed=3, trace=True, policy="stochastic", sampler="heun")
    answer = asyncio.run(traced())
    assert answer["trace"]["chosen"] == trace.chosen.int().tolist()
    assert answer["nfe"] == trace.calls
    np.testing.assert_allclose(answer["trace"]["alpha"], trace.alpha, atol=1e-4)


def test_a_killed_replica_costs_only_time(service: Deployed, bundles: tuple[Path, Path]) -> None:
    wanted = expected(bundles[0], 48, steps=40)

    async def work() -> list[Reply]:
        loading = asyncio.create_task(closed(service.url, 16, 48, {"steps": 40}))
        await asyncio.sleep(0.5)
        for name in ("expert-01", "expert-00"):
            found = await asyncio.to_thread(service.replicas)
            os.kill(found[name][0][0], signal.SIGKILL)
        return (await loading).replies

    replies = asyncio.run(work())
    assert [reply.said for reply in replies if reply.status != 200] == []
    assert len(replies) == 48
    assert max(differences(replies, wanted)) <= 1


def test_a_switch_drops_no_request_and_names_the_version_of_each(
    service: Deployed, bundles: tuple[Path, Path]
) -> None:
    service.wait()
    wanted = expected(bundles[0], 64) | expected(bundles[1], 64)
    process = service.replicas()["sampling"]

    async def work() -> tuple[list[Reply], list[Reply]]:
        loading = asyncio.create_task(closed(service.url, 16, 64, {}))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(service.deploy, str(bundles[1]))
        during = (await loading).replies
        async with session(service.url) as client:
            while (last := await request_image(client, 0, {})).version != load(bundles[1]).version:
                assert last.status == 200
            return during, [await request_image(client, index, {}) for index in range(8)]

    during, after = asyncio.run(work())
    assert [reply.said for reply in [*during, *after] if reply.status != 200] == []
    assert max(differences([*during, *after], wanted)) <= 1
    assert {reply.version for reply in after} == {load(bundles[1]).version}
    assert service.replicas()["sampling"] == process
    first, second = wanted.values()
    assert (
        int((first.int() - second.int()).abs().amax(dim=(1, 2, 3)).min()) > 2
    )  # they would be told apart


@pytest.mark.parametrize("folder", ["/no/such/folder", 5])
def test_a_wrong_user_config_keeps_the_weights(service: Deployed, folder: Any) -> None:
    service.wait()
    process = service.replicas()["sampling"]
    (before,) = asked(service, 1, 1)
    service.deploy(folder)
    logs = Path(service.cluster.head_node.get_session_dir_path(), "logs")
    ends = time.monotonic() + 60
    while not any(str(folder) in line for line in refusals(logs)):
        assert time.monotonic() < ends
        time.sleep(0.2)
    time.sleep(2)  # health checks come every second
    (after,) = asked(service, 1, 1)
    assert after.version == before.version
    assert service.replicas()["sampling"] == process


def refusals(logs: Path) -> list[str]:
    """What the replicas logged about a user_config that they refused."""
    text = "".join(path.read_text() for path in logs.glob("worker-*.err"))
    return [line for line in text.splitlines() if line.startswith("user_config is refused")]


def test_the_proxy_refuses_large_bodies_and_ignores_rays_headers(service: Deployed) -> None:
    async def work() -> tuple[int, int]:
        async with session(service.url) as client:
            async with client.post("/v1/samples", data=b" " * 200_000) as large:
                pass
            hurry = {"x-request-timeout-seconds": "0.001"}
            async with client.post("/v1/samples", json={"seed": 0}, headers=hurry) as hurried:
                return large.status, hurried.status

    assert asyncio.run(work()) == (413, 200)
