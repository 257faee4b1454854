"""Several experts in one replica on Ray: `serve.ray.experts_per_replica`."""

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import RayActorError

from benchmarks.load.client import Reply, closed
from benchmarks.load.cluster import Deployed, deployed
from benchmarks.load.drill import differences, other_weights
from ddm.bundle import read_bundle
from ddm.condition import Conditions
from ddm.errors import ArtifactError
from serve import load
from serve.model.images import to_uint8
from serve.model.loading import load_experts
from serve.ray_app import ingress
from serve.ray_app.replica import ExpertReplica
from serve.ray_app.server import make_absolute
from serve.settings import settings

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Ray's own, which are many
]


@pytest.fixture(scope="module")
def service(small_run: Path) -> Iterator[Deployed]:
    with deployed(str(small_run), nodes=2, slots=1, ray={"experts_per_replica": 2}) as found:
        yield found


def test_every_path_of_the_settings_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replicas, which read them, run in another folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("token", "mine", "secret"):
        Path(name).write_text(32 * name)
    Path("runs/a").mkdir(parents=True)
    jobs = {"webhook_hosts": ["a.example"], "webhook_secret_file": "secret"}
    keys = {"me": {"token_file": "mine"}}
    serve = {"token_file": "token", "signers": "signers", "jobs": jobs, "keys": keys}
    config = settings({"run": "runs/a", "serve": serve})
    make_absolute(config)
    own = config.serve
    paths = [config.run, own.token_file, own.signers, own.jobs.webhook_secret_file]
    names = ("runs/a", "token", "signers", "secret", "mine")
    assert [*paths, own.keys["me"].token_file] == [str(tmp_path / name) for name in names]
    shipped = settings({"run": "demo"})
    make_absolute(shipped)
    assert shipped.run == "demo"


def test_a_group_of_experts_is_one_deployment_and_gives_the_same_images(
    service: Deployed, small_run: Path
) -> None:
    """Also when its replica is killed, which takes both of its experts."""
    found = service.replicas()
    assert sorted(found) == ["expert-02", "experts-00-01", "sampling"]
    assert [len(replicas) for replicas in found.values()] == [1, 1, 1]
    model = load(small_run)
    wanted = {model.version: to_uint8(model.sample(48, steps=40)).permute(0, 2, 3, 1)}

    async def work() -> list[Reply]:
        loading = asyncio.create_task(closed(service.url, 16, 48, {"steps": 40}))
        await asyncio.sleep(0.5)
        os.kill(found["experts-00-01"][0][0], signal.SIGKILL)
        return (await loading).replies

    replies = asyncio.run(work())
    assert [reply.said for reply in replies if reply.status != 200] == []
    assert len(replies) == 48
    assert max(differences(replies, wanted)) <= 1
    assert service.replicas()["expert-02"] == found["expert-02"]


def test_a_replica_answers_as_each_of_its_experts(small_run: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(small_run / "bundle", tmp_path / "bundle"))
    replica = ExpertReplica([1, 2], str(bundle), "cpu", "float32", False)
    x, t = np.random.default_rng(0).normal(size=(2, 1, 8, 8)), np.array([0.3, 0.7], np.float32)
    x = x.astype(np.float32)
    answers = []
    for k in (1, 2):
        (denoiser,), _, version = load_experts(bundle, [k], "cpu")
        answers.append(asyncio.run(replica.denoise(k, str(bundle), version, x, t)))
        with torch.inference_mode():
            expected = denoiser(torch.tensor(x), torch.tensor(t))
        torch.testing.assert_close(torch.tensor(answers[-1]), expected)
    assert np.abs(answers[0] - answers[1]).max() > 1e-3
    with pytest.raises(ArtifactError, match="no longer holds version other"):
        asyncio.run(replica.denoise(1, str(bundle), "other", x, t))


def test_a_replica_that_has_lost_its_gpu_is_not_healthy(
    small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = small_run / "bundle"
    replica = ExpertReplica([0], str(bundle), "cpu", "float32", False)
    asyncio.run(replica.check_health())

    def lose(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    version = next(iter(replica.runners))
    monkeypatch.setitem(replica.runners[version], 0, lose)
    x, t = np.zeros((1, 1, 8, 8), np.float32), np.array([0.5], np.float32)
    for call in (replica.denoise(0, str(bundle), version, x, t), replica.check_health()):
        with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
            asyncio.run(call)


def late(*_: object) -> str:
    raise TimeoutError


def lost(*_: object) -> str:
    raise RayActorError


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda replica, folder: asyncio.run(replica.prepare(folder)), None),
        (lambda *_: "0" * 64, "experts-00-01 has version 000000000000"),
        (late, "experts-00-01 has not loaded .* within 300 s"),
        (lost, None),  # the replica that takes its place loads it with its first call
    ],
)
def test_new_weights_are_loaded_by_each_expert_before_they_are_used(
    small_run: Path, tmp_path: Path, answer: Callable[..., str], said: str | None
) -> None:
    replica = ExpertReplica([0, 1], str(small_run / "bundle"), "cpu", "float32", False)
    two = other_weights(str(small_run), tmp_path / "two")
    version = read_bundle(two).version

    def call(folder: str) -> Any:
        return SimpleNamespace(result=lambda timeout_s: answer(replica, folder))

    remote = SimpleNamespace(prepare=SimpleNamespace(remote=call))
    service: Any = SimpleNamespace(experts={"experts-00-01": remote})
    if said is None:
        ingress.Sampling._prepare(service, two, version)
        assert answer is lost or list(replica.runners)[1] == version
        return
    with pytest.raises(ArtifactError, match=said):
        ingress.Sampling._prepare(service, two, version)


def test_the_version_in_use_is_the_last_that_a_replica_drops(
    small_run: Path, tmp_path: Path
) -> None:
    first = small_run / "bundle"
    replica = ExpertReplica([0], str(first), "cpu", "float32", False)
    version = read_bundle(first).version
    x, t = np.zeros((1, 1, 8, 8), np.float32), np.array([0.5], np.float32)
    newest = str(first)
    for number in (1, 2):
        newest = str(other_weights(newest, tmp_path / f"{number}"))
        asyncio.run(replica.prepare(newest))
        asyncio.run(replica.denoise(0, "nowhere", version, x, t))  # it need not load it again
    assert len(replica.runners) == 2


def test_a_replica_is_told_conditions_and_guidance(small_labels_run: Path) -> None:
    bundle = small_labels_run / "bundle"
    replica = ExpertReplica([0], str(bundle), "cpu", "float32", False)
    (denoiser,), _, version = load_experts(bundle, [0], "cpu")
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.3, 0.7, 0.9])
    vector = torch.eye(10)[[2, 2, 7]]
    given = Conditions(vector, torch.tensor([1.0, 3.0, 3.0]), torch.ones(3))
    arrays = [tensor.numpy() for tensor in (x, t, *given)]
    found = asyncio.run(replica.denoise(0, str(bundle), version, *arrays))
    with torch.inference_mode():
        told, plain = denoiser(x, t, vector), denoiser(x, t)
    weight = given.guidance[:, None, None, None]
    torch.testing.assert_close(torch.tensor(found), plain + weight * (told - plain))
