"""Owners who answer from their own processes on a Ray cluster, and the router that asks them."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# The only switch that keeps Ray's own ports on this machine; read when Ray is imported.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray
from ray.cluster_utils import Cluster

from ddm.artifacts import read_tensors
from ddm.errors import ConfigError
from tests.conftest import SMALL
from train.config import Config
from train.ray_owners import answer
from train.stages.partition import make_partition
from train.stages.router import train_router
from train.stages.shard import export_shards

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4,
            "include_dashboard": False,
            "object_store_memory": 80_000_000,
        },
    )
    yield str(cluster.address)
    ray.shutdown()
    cluster.shutdown()


def test_the_router_learns_from_owners_elsewhere_what_it_learns_from_pooled_images(
    address: str, tmp_path: Path, small: Callable[..., Config]
) -> None:
    run = tmp_path / "run"
    pooled = small(run)
    make_partition(pooled)
    export_shards(pooled)
    train_router(pooled)
    expected = read_tensors(run / "router" / "router.safetensors")
    shutil.rmtree(run / "router")
    shards = sorted((run / "shards").iterdir())
    for path in (run / "partition").glob("cluster-*"):
        path.unlink()

    asking = ("router.data=shards", "launch.backend=ray", f"launch.address={address}")
    with pytest.raises(ConfigError, match=r"needs the owner of .*answer expert\.shard=SHARD"):
        train_router(small(run, *asking))

    words = [*SMALL, "answer", "launch.backend=ray", f"launch.address={address}"]
    owners = [
        subprocess.Popen(
            [sys.executable, "-m", "train", *words, f"expert.shard={shard}"],
            cwd=_ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for shard in shards
    ]
    try:
        for owner in owners:
            assert owner.stderr is not None
            assert "until ctrl-C" in next(line for line in owner.stderr if "answer" in line)
        with pytest.raises(ConfigError, match="nobody answers for"):
            answer(small(tmp_path / "twice", *asking[1:], f"expert.shard={shards[0]}"))
        train_router(small(run, *asking))
    finally:
        for owner in owners:
            owner.send_signal(signal.SIGINT)
        ends = [owner.wait(60) for owner in owners]
    assert ends == [130] * len(owners)
    found = read_tensors(run / "router" / "router.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_an_owner_needs_a_shard_and_a_node(tmp_path: Path, small: Callable[..., Config]) -> None:
    on_ray = ("launch.backend=ray", "launch.address=ray://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"expert\.shard must be the shard"):
        answer(small(tmp_path, *on_ray))
    with pytest.raises(ConfigError, match=r"launch\.address must be auto or HOST:PORT"):
        answer(small(tmp_path, *on_ray, f"expert.shard={tmp_path}"))
