"""Owners: an expert is trained from its own shard and nothing else, and bundled from anywhere."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddm.artifacts import read_facts, sha256
from ddm.bundle_history import read_history
from ddm.errors import ArtifactError, ConfigError, DataError
from ddm.partition import Partition
from serve import load
from tests.conftest import ROOT, SMALL
from train.config import Config
from train.stages.run import run

AUDITED = """
import json, sys
opened, sockets = [], []
def hook(event, args):
    if event == "open":
        opened.append(str(args[0]))
    if event in ("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.sendto"):
        sockets.append(event)
sys.addaudithook(hook)
from train.__main__ import main
status = main(sys.argv[1:])
print(json.dumps([status, opened, sockets]))
"""


def audited(*words: str) -> tuple[list[str], list[str]]:
    """The files that a command opens, and what it does with sockets."""
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, *SMALL, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    status, opened, sockets = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stderr
    return opened, sockets


@pytest.fixture
def exported(small_run: Path, tmp_path: Path, small: Callable[..., Config]) -> Path:
    """The shards of the small run."""
    shutil.copytree(small_run / "partition", tmp_path / "central" / "partition")
    run(small(tmp_path / "central"), ["export"])
    return tmp_path / "central" / "shards"


def test_an_expert_opens_its_own_shard_no_other_cluster_and_no_socket(
    exported: Path, small_run: Path, tmp_path: Path
) -> None:
    shard = shutil.move(exported / "01", tmp_path / "shard")
    away = tmp_path / "central"
    for path in [*away.rglob("*.safetensors"), *away.rglob("partition.json")]:
        path.unlink()
        os.mkfifo(path)  # who opens one waits for ever
    words = ("expert", "expert.index=1", f"expert.shard={shard}", f"run={tmp_path / 'owner'}")
    opened, sockets = audited(*words)
    data = [path for path in opened if path.startswith(str(tmp_path))]
    assert str(Path(shard) / "cluster-00.safetensors") in data
    assert not [path for path in data if path.startswith(str(away))]
    assert sockets == []
    stem = tmp_path / "owner" / "experts" / "01" / "expert.safetensors"
    assert sha256(stem) == sha256(small_run / "experts" / "01" / "expert.safetensors")


def test_an_expert_of_a_run_opens_no_file_of_another_cluster(
    small_run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(small_run / "partition", copy / "partition")
    for k in (0, 2):
        path = Partition.file(copy / "partition", k)
        path.unlink()
        os.mkfifo(path)
    opened, sockets = audited("expert", "expert.index=1", f"run={copy}")
    clusters = {Path(path).name for path in opened if "cluster-" in path}
    assert (clusters, sockets) == ({"cluster-01.safetensors"}, [])


def test_a_shard_is_the_cluster_s_own_file_and_says_what_training_needs(
    exported: Path, small_run: Path, small: Callable[..., Config]
) -> None:
    whole = Partition.read(small_run / "partition")
    for k in range(3):
        shard = Partition.read(exported / f"{k:02d}")
        assert shard == whole.only(k)
        assert (shard.names, shard.sizes) == ([whole.names[k]], [whole.sizes[k]])
        file = Partition.file(exported / f"{k:02d}", 0)
        assert sha256(file) == whole.hashes[k]
    before = {path: path.stat().st_mtime_ns for path in exported.rglob("*")}
    run(small(exported.parent), ["export"])
    assert {path: path.stat().st_mtime_ns for path in exported.rglob("*")} == before


def test_held_out_images_go_with_their_cluster(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    run(small(tmp_path, "partition.holdout=0.2"), ["partition", "export"])
    whole = Partition.read(tmp_path / "partition")
    for k in range(3):
        folder = tmp_path / "shards" / f"{k:02d}"
        held = Partition.read(folder).cluster_holdout(folder, 0)["images"]
        assert torch.equal(held, whole.cluster_holdout(tmp_path / "partition", k)["images"])


def write_images(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.effect_noise((9, 9), 40 + i).save(folder / f"{i}.png")
    return folder


GREY = ("shard.grey=true", "data.size=8")


def test_an_owner_who_never_saw_the_partition_joins_with_a_folder_of_images(
    small_run: Path, tmp_path: Path, small: Callable[..., Config]
) -> None:
    mine = write_images(tmp_path / "photos", 5)
    config = small(tmp_path / "owner", f"shard.images={mine}", *GREY)
    run(config, ["shard"])
    shard = Partition.read(tmp_path / "owner" / "shard")
    assert (shard.names, shard.sizes, shard.shape) == (["photos"], [5], [1, 8, 8])
    words = (f"expert.shard={tmp_path / 'owner' / 'shard'}", "expert.steps=3")
    run(small(tmp_path / "owner", *words), ["expert"])
    facts = read_facts(tmp_path / "owner" / "experts" / "00" / "expert")
    assert (facts["name"], facts["count"], facts["cluster"]) == ("photos", 5, shard.hashes[0])
    paths = [small_run / "experts" / f"{k:02d}" for k in range(3)]
    paths.append(tmp_path / "owner" / "experts" / "00")
    experts = f"bundle.experts=[{', '.join(map(str, paths))}]"
    run(small(tmp_path / "all", experts), ["bundle"])
    model = load(tmp_path / "all")
    counts = torch.tensor([*Partition.read(small_run / "partition").sizes, 5])
    torch.testing.assert_close(model.pi, counts / counts.sum())
    assert model.names[-1] == "photos"
    card = (tmp_path / "all" / "bundle" / "README.md").read_text()
    assert "Images of several owners" in card and "held out" not in card
    assert model.sample(2, steps=2, source="gaussian").isfinite().all()
    weighted = small(tmp_path / "given", experts, "bundle.weights=[1, 1, 1, 5]")
    run(weighted, ["bundle"])
    torch.testing.assert_close(load(tmp_path / "given").pi, torch.tensor([1.0, 1, 1, 5]) / 8)
    (event,) = read_history(tmp_path / "given" / "bundle")
    assert event["what"] == "bundle" and len(event["added"]) == 4


def test_images_in_sub_folders_are_labelled_by_them(
    tmp_path: Path, small: Callable[..., Config]
) -> None:
    for name, count in (("cats", 2), ("dogs", 3)):
        write_images(tmp_path / "pets" / name, count)
    run(small(tmp_path, f"shard.images={tmp_path / 'pets'}", *GREY), ["shard"])
    tensors = Partition.read(tmp_path / "shard").cluster(tmp_path / "shard", 0)
    assert tensors["labels"].tolist() == [0, 0, 1, 1, 1]


def test_another_shard_is_not_written_over(tmp_path: Path, small: Callable[..., Config]) -> None:
    mine = write_images(tmp_path / "photos", 3)
    run(small(tmp_path, f"shard.images={mine}", *GREY), ["shard"])
    with pytest.raises(ArtifactError, match=r"shard holds another shard: move it away, or give"):
        run(small(tmp_path, f"shard.images={mine}", *GREY, "data.limit=2"), ["shard"])
    with pytest.raises(DataError, match=r"nothing holds no images \("):
        run(small(tmp_path, f"shard.images={tmp_path / 'nothing'}"), ["shard"])


def test_a_shard_that_cannot_be_is_refused_by_key(
    small_run: Path, exported: Path, tmp_path: Path, small: Callable[..., Config]
) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere/partition.json is missing"):
        run(small(tmp_path / "a", "expert.shard=nowhere"), ["expert"])
    many = small(tmp_path / "b", f"expert.shard={small_run / 'partition'}")
    with pytest.raises(ConfigError, match=r"expert.shard must be the folder of one cluster, got"):
        run(many, ["expert"])
    (exported / "00" / "cluster-00.safetensors").write_bytes(b"damaged")
    with pytest.raises(Exception, match=r"cluster-00.safetensors is damaged"):
        run(small(tmp_path / "c", f"expert.shard={exported / '00'}"), ["expert"])


def test_what_does_not_fit_a_bundle_is_said(
    small_run: Path, tmp_path: Path, small: Callable[..., Config]
) -> None:
    first, other = (small_run / "experts" / f"{k:02d}" for k in range(2))

    def bundled(*words: str) -> None:
        run(small(tmp_path / "all", *words), ["bundle"])

    with pytest.raises(ArtifactError, match="have one name, '0 "):
        bundled(f"bundle.experts=[{first}, {first}]")
    with pytest.raises(ConfigError, match="bundle.names must have one value for each of the 2"):
        bundled(f"bundle.experts=[{first}, {other}]", "bundle.names=[x]")
    with pytest.raises(ArtifactError, match=r"nowhere.json is missing"):
        bundled(f"bundle.experts=[{first}, nowhere]")
    with pytest.raises(ArtifactError, match=r"router.json is not an expert of this version"):
        bundled(f"bundle.experts=[{first}, {small_run / 'router' / 'router.json'}]")


def test_experts_of_other_networks_and_processes_share_a_bundle(
    small_run: Path, exported: Path, tmp_path: Path, small: Callable[..., Config]
) -> None:
    words = ("expert.parameterization=raw", "schedule={name: rectified_flow}", "expert.steps=3")
    net = "expert.unet={channels: 12, multipliers: [1], blocks: 1, attention: [], dropout: 0.0}"
    shard = f"expert.shard={exported / '02'}"
    run(small(tmp_path / "owner", *words, net, shard), ["expert"])
    paths = [small_run / "experts" / "00", small_run / "experts" / "01", tmp_path / "owner"]
    experts = f"bundle.experts=[{', '.join(map(str, paths))}]"
    run(small(tmp_path / "all", experts), ["bundle"])
    model = load(tmp_path / "all")
    assert [expert.conversion is None for expert in model.experts] == [True, True, False]
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.5, 0.9])
    alone = small(tmp_path / "alone", "schedule={name: rectified_flow}")
    alone.bundle.experts = [str(tmp_path / "owner" / "experts" / "00")]
    run(alone, ["bundle"])
    c, own = model.schedule(t), load(tmp_path / "alone").experts[0]
    t_own = c.s / (c.a + c.s)  # where t/(1 - t) = s/a
    x_own = x * ((1 - t_own) / c.a)[:, None, None, None]
    torch.testing.assert_close(model.experts[2](x, t), own(x_own, t_own), rtol=1e-4, atol=1e-5)
    assert model.sample(4, steps=4, source="gaussian", policy="full").isfinite().all()
