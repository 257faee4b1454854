"""The router trained on images sampled from the experts."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddm.artifacts import read_facts, read_tensors, write_json
from ddm.errors import ArtifactError
from serve import load
from train.config import Config
from train.stages.bundle import make_bundle
from train.stages.router import train_router


@pytest.fixture
def trained(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the small run without its router and bundle."""
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder, ignore=shutil.ignore_patterns("router", "bundle"))
    (folder / "config.yaml").unlink()
    return folder


SAMPLED = ("router.data=experts", "router.samples=30")


def test_a_router_of_the_experts_opens_no_cluster_s_images(
    trained: Path, small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (trained / "partition").glob("cluster-*"):
        path.unlink()
    train_router(small(trained, *SAMPLED))
    whole = read_tensors(trained / "router" / "router.safetensors")
    assert all(tensor.isfinite().all() for tensor in whole.values())
    assert read_facts(trained / "router" / "router")["config"]["data"] == "experts"
    config = small(trained, *SAMPLED)
    make_bundle(config)
    images = load(trained / "bundle").sample(2, source="posterior")
    assert images.shape == (2, 1, 8, 8)


def test_a_router_of_the_experts_is_the_same_again_and_another_for_other_experts(
    trained: Path, small: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    train_router(small(trained, *SAMPLED))
    first = read_tensors(trained / "router" / "router.safetensors")
    caplog.set_level("INFO")
    train_router(small(trained, *SAMPLED))
    assert "up to date" in caplog.text
    facts = read_facts(trained / "experts" / "01" / "expert")
    write_json(trained / "experts" / "01" / "expert.json", {**facts, "sha256": "0" * 64})
    train_router(small(trained, *SAMPLED))  # as after more steps of that expert
    assert "router     stays as it is" in caplog.text
    write_json(trained / "experts" / "01" / "expert.json", facts)
    shutil.rmtree(trained / "router")
    train_router(small(trained, *SAMPLED))
    again = read_tensors(trained / "router" / "router.safetensors")
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])


def test_an_expert_that_is_missing_is_named(trained: Path, small: Callable[..., Config]) -> None:
    shutil.rmtree(trained / "experts" / "01")
    with pytest.raises(
        ArtifactError,
        match=r"router.data=experts needs .*01/expert.json: run the stage expert first",
    ):
        train_router(small(trained, *SAMPLED))


def test_a_router_of_owners_learns_what_one_of_their_pooled_images_does(
    trained: Path, small: Callable[..., Config]
) -> None:
    routers = []
    for data in ("pooled", "shards"):
        shutil.rmtree(trained / "router", ignore_errors=True)
        (trained / "config.yaml").unlink(missing_ok=True)
        train_router(small(trained, f"router.data={data}", "data.flip=true"))
        routers.append(read_tensors(trained / "router" / "router.safetensors"))
    pooled, asked = routers
    assert pooled.keys() == asked.keys()
    for name, tensor in pooled.items():
        torch.testing.assert_close(asked[name], tensor, rtol=1e-3, atol=1e-4)
