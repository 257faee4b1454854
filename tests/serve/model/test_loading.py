"""Loading bundles: what is damaged or foreign is refused, and parts that are loaded alone."""

import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddm.artifacts import read_artifact, read_json, sha256, write_artifact, write_json
from ddm.bundle_writing import write_half
from ddm.errors import ArtifactError, ConfigError
from ddm.partition import Partition
from ddm.schedules import schedule
from ddm.training import to_float
from router.sources import SOURCES
from serve import load
from serve.model.loading import load_experts
from train.config import Config
from train.stages.run import run


def rewrite(bundle: Path, name: str, tensors: dict[str, Tensor], facts: dict[str, object]) -> None:
    """Write an artifact of a bundle anew, with all hashes right."""
    write_artifact(
        bundle / name, tensors, {key: value for key, value in facts.items() if key != "sha256"}
    )
    manifest = read_json(bundle / "manifest.json")
    manifest["artifacts"][name] = sha256(bundle / f"{name}.json")
    write_json(bundle / "manifest.json", manifest)


def without(bundle: Path, name: str, tensor: str) -> None:
    """Take one tensor from an artifact of a bundle."""
    tensors, facts = read_artifact(bundle / name)
    del tensors[tensor]
    rewrite(bundle, name, tensors, facts)


@pytest.mark.parametrize("tensor", ["gaussian.mean", "gaussian.variance"])
def test_an_expert_without_the_moments_of_its_cluster_is_refused_by_name(
    small_run: Path, tmp_path: Path, tensor: str
) -> None:
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    without(bundle, "expert-02", tensor)
    with pytest.raises(
        ArtifactError,
        match=rf"expert-02.safetensors does not fit .*expert-02.json: it has no tensor {tensor}$",
    ):
        load(bundle)


def test_a_bundle_carried_away_gives_the_same_images(small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run / "bundle", tmp_path / "elsewhere")
    there, here = load(tmp_path / "elsewhere"), load(small_run)
    assert there.version == here.version
    assert torch.equal(there.sample(2, steps=3), here.sample(2, steps=3))
    with pytest.raises(ConfigError, match="source=analytic needs the training images"):
        there.sample(1, source="analytic")


def test_the_exact_posterior_is_over_mirror_images_too_where_the_experts_are(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    for flip in (False, True):
        config = small(tmp_path / f"{flip}", f"data.flip={flip}", "expert.steps=1")
        run(config, ["partition", "expert", "bundle"])
        whole = Partition.read(config.folder / "partition").all(config.folder / "partition")
        t = torch.tensor(1e-3)
        x = schedule(**config.schedule)(t).a * to_float(whole["images"].flip(3))
        alpha = load(config.folder, "cpu")._exact(x.float(), t)
        right = alpha.argmax(dim=1) == whole["cluster"]
        assert bool(right.all()) == flip


def test_a_model_that_is_dropped_frees_its_memory_at_once(small_run: Path) -> None:
    model = load(small_run)
    model.sample(1, steps=2, source="analytic")
    gone = weakref.ref(model)
    del model
    assert gone() is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_file(
    small_run: Path, tmp_path: Path, value: float
) -> None:
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    tensors, facts = read_artifact(bundle / "expert-01")
    name = "network.head.2.weight"
    tensors[name][0, 1, 2, 0] = value
    rewrite(bundle, "expert-01", tensors, facts)
    for read in (load, lambda folder: load_experts(folder, [1])):
        with pytest.raises(
            ArtifactError, match=f"expert-01.safetensors is damaged: {name} must be finite numbers"
        ):
            read(bundle)


def test_images_that_are_not_finite_are_never_returned(small_run: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    tensors, facts = read_artifact(bundle / "expert-01")
    huge = {name: tensor * 1e30 for name, tensor in tensors.items()}
    rewrite(bundle, "expert-01", huge, facts)
    with pytest.raises(
        ArtifactError, match=r"manifest.json: images 0 to 3 of seed 0 are not finite"
    ):
        load(bundle).sample(4, steps=2, policy="full", source="prior", clip=False)


def test_half_precision_weights_run_in_float32(small_run: Path, tmp_path: Path) -> None:
    write_half(small_run / "bundle", tmp_path / "half")
    half = load(tmp_path / "half")
    assert {p.dtype for p in half.experts[0].parameters()} == {torch.float32}
    whole = load(small_run)
    assert (half.sample(2, steps=3) - whole.sample(2, steps=3)).abs().max() < 0.1
    kernel = half.experts[0].network.encoder.stem.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_a_changed_weight_is_refused_with_file_and_hashes(small_run: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    path = bundle / "expert-01.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ArtifactError,
        match=r"expert-01.safetensors is damaged or foreign: its SHA-256 is \w{64}, expected \w{64}",
    ):
        load(bundle)


def test_an_expert_of_another_run_is_refused_even_with_its_hash_in_the_manifest(
    small_run: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    facts = json.loads((bundle / "expert-01.json").read_text())
    (bundle / "expert-01.json").write_text(json.dumps({**facts, "cluster": "0" * 64}))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["artifacts"]["expert-01"] = sha256(bundle / "expert-01.json")
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ArtifactError, match="expert-01.json does not belong to this bundle: its cluster is '000"
    ):
        load(bundle)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing is not a folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"manifest.json is missing"):
        load(tmp_path)


# Clusters, and the parts that serving takes


def test_an_expert_loads_without_the_files_of_the_others(small_run: Path, tmp_path: Path) -> None:
    model = load(small_run)
    x, t = torch.randn(2, *model.shape), torch.tensor([0.9, 0.2])
    for k in range(3):
        bundle = tmp_path / f"{k}"
        bundle.mkdir()
        for name in ("manifest.json", f"expert-{k:02d}.json", f"expert-{k:02d}.safetensors"):
            shutil.copyfile(small_run / "bundle" / name, bundle / name)
        (expert,), shape, version = load_experts(bundle, [k])
        assert (shape, version) == (model.shape, model.version)
        assert not expert.training and not any(p.requires_grad for p in expert.parameters())
        torch.testing.assert_close(expert(x, t), model.experts[k](x, t))
    assert load_experts(small_run, [1])[2] == model.version


def test_a_missing_or_damaged_expert_is_refused_by_name(small_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="bundle has no expert 3, it has 3"):
        load_experts(small_run, [3])
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    without(bundle, "expert-02", "gaussian.mean")
    with pytest.raises(
        ArtifactError,
        match="expert-02.safetensors does not fit .*expert-02.json: it has no tensor gaussian.mean",
    ):
        load(bundle)
    path = bundle / "expert-01.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match="expert-01.safetensors is damaged or foreign"):
        load_experts(bundle, [1])
    assert load_experts(bundle, [0])


def test_a_model_without_its_experts_routes_as_the_whole_one(small_run: Path) -> None:
    whole, bare = load(small_run), load(small_run, experts=False)
    assert bare.experts == [] and len(whole.experts) == 3
    assert bare.version == whole.version and bare.names == whole.names
    x, half = torch.randn(2, *whole.shape), torch.full((2,), 0.5, dtype=torch.float64)
    for source in SOURCES:
        routed = []
        for model in (whole, bare):
            router = model.plan(model.settings(source=source)).router
            alpha, memory = router.route(x, torch.tensor(1.0), router.start(x, half), half)
            routed.append((alpha, router.route(x, torch.tensor(0.6), memory, half)[0]))
        torch.testing.assert_close(routed[0], routed[1])
    torch.testing.assert_close(bare.gaussians.means, whole.gaussians.means)


def test_a_bundle_with_a_damaged_expert_is_refused_without_experts_too(
    small_run: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    path = bundle / "expert-01.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match="expert-01.safetensors is damaged or foreign"):
        load(bundle, experts=False)
