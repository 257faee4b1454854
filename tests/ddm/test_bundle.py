"""A bundle: every file is the one that was put in, and all belong together."""

import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from ddm.artifacts import (
    read_json,
    read_tensors,
    scratch_beside,
    sha256,
    write_artifact,
    write_json,
    write_tensors,
)
from ddm.bundle import Bundle, read_bundle, write_bundle, write_half
from ddm.errors import ArtifactError, shown
from ddm.partition import Partition

SCHEDULE = {"name": "vp_linear", "beta_max": 20.0}


class Run:
    """A partition in two, two experts and a router, as training leaves them, and the bundle they make."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bundle = folder, folder / "bundle"
        images = torch.arange(5 * 4, dtype=torch.uint8).reshape(5, 1, 2, 2)
        self.partition = Partition.write(
            folder / "partition", images, torch.tensor([0, 0, 1, 0, 1]), ["a", "b"], None
        )
        self.experts = [folder / "experts" / f"{k:02d}" / "expert" for k in range(2)]
        self.router = folder / "router" / "router"
        for k in range(2):
            self.train(k)
        write_artifact(self.router, {"weight": torch.tensor([9.0])}, self.facts(kind="router"))

    def facts(self, **facts: Any) -> dict[str, Any]:
        common = {
            "kind": "expert",
            "shape": [1, 2, 2],
            "schedule": SCHEDULE,
            "partition": self.partition.hash,
        }
        return {**common, **facts}

    def train(self, k: int, weight: float = 0.0, **facts: Any) -> None:
        tensors = {"weight": torch.tensor([k + weight])}
        write_artifact(self.experts[k], tensors, self.facts(index=k, **facts))

    def write(self) -> None:
        write_bundle(self.bundle, self.partition, self.experts, self.router)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path)
    made.write()
    return made


def read_whole(folder: Path, only: Collection[str] | None = None) -> Bundle:
    """A bundle with its weights read."""
    bundle = read_bundle(folder, only)
    for artifact in bundle.artifacts:
        assert artifact.tensors.keys() == artifact.layout.keys()
    return bundle


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(message)):
        read_whole(folder)


def test_a_bundle_holds_what_was_put_in_after_a_move(run: Run, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run.bundle, elsewhere)
    for name in ("partition", "experts", "router", "bundle"):
        shutil.rmtree(tmp_path / name)
    bundle = read_bundle(elsewhere)
    assert [float(expert.tensors["weight"]) for expert in bundle.experts] == [0, 1]
    assert bundle.router is not None
    assert float(bundle.router.tensors["weight"]) == 9
    assert (bundle.partition, bundle.schedule) == (run.partition, SCHEDULE)


def test_a_bundle_need_not_have_a_router(run: Run) -> None:
    write_bundle(run.bundle, run.partition, run.experts, None)
    assert read_bundle(run.bundle).router is None
    assert not (run.bundle / "router.json").exists()


def test_the_version_changes_with_any_weight_and_with_nothing_else(run: Run) -> None:
    first = read_bundle(run.bundle).version
    run.write()
    assert read_bundle(run.bundle).version == first
    run.train(1, weight=0.5)
    run.write()
    assert read_bundle(run.bundle).version != first


@pytest.mark.parametrize("name", ["expert-00", "expert-01", "router"])
def test_a_tampered_weight_is_refused_naming_its_file_and_both_hashes(run: Run, name: str) -> None:
    path = run.bundle / f"{name}.safetensors"
    expected = sha256(path)
    write_tensors(path, {"weight": read_tensors(path)["weight"] + 1})
    refused(
        run.bundle,
        f"{path} is damaged or foreign: its SHA-256 is {sha256(path)}, expected {expected}",
    )


@pytest.mark.parametrize("name", ["expert-01", "router"])
def test_tampered_facts_are_refused_naming_their_file_and_both_hashes(run: Run, name: str) -> None:
    path = run.bundle / f"{name}.json"
    expected = sha256(path)
    write_json(path, {**read_json(path), "extra": 1})
    refused(
        run.bundle,
        f"{path} is damaged or foreign: its SHA-256 is {sha256(path)}, expected {expected}",
    )


def test_a_weight_tampered_together_with_its_facts_is_refused(run: Run) -> None:
    facts = read_json(run.bundle / "expert-00.json")
    write_artifact(run.bundle / "expert-00", {"weight": torch.tensor([7.0])}, facts)
    refused(run.bundle, f"{run.bundle / 'expert-00.json'} is damaged or foreign")


@pytest.mark.parametrize(
    "file", ["manifest.json", "expert-01.json", "expert-01.safetensors", "router.safetensors"]
)
def test_a_missing_file_is_named(run: Run, file: str) -> None:
    (run.bundle / file).unlink()
    refused(run.bundle, f"{run.bundle / file} is missing")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partition", "0" * 64),
        ("schedule", {"name": "vp_linear", "beta_max": 19.0}),
        ("shape", [1, 4, 4]),
    ],
)
def test_an_artifact_of_another_run_is_refused_naming_what_differs(
    run: Run, key: str, value: Any
) -> None:
    ours = run.facts()[key]
    run.train(1, **{key: value})
    message = f"{run.experts[1]}.json does not belong to this bundle: its {key} is {shown(value)}, expected {shown(ours)}"
    with pytest.raises(ArtifactError, match=re.escape(message)):
        run.write()
    run.train(1)
    write_artifact(run.router, {}, run.facts(**{key: value}))
    with pytest.raises(
        ArtifactError,
        match=re.escape(f"{run.router}.json does not belong to this bundle: its {key} is"),
    ):
        run.write()


def test_swapped_experts_are_refused_by_name(run: Run) -> None:
    run.experts.reverse()
    with pytest.raises(
        ArtifactError,
        match=re.escape(
            "01/expert.json does not belong to this bundle: its index is 1, expected 0"
        ),
    ):
        run.write()


def swap_in_manifest(manifest: dict[str, Any]) -> None:
    artifacts = manifest["artifacts"]
    artifacts["expert-00"], artifacts["expert-01"] = artifacts["expert-01"], artifacts["expert-00"]


def lose_an_expert(manifest: dict[str, Any]) -> None:
    del manifest["artifacts"]["expert-01"]


def add_an_expert(manifest: dict[str, Any]) -> None:
    manifest["artifacts"]["expert-02"] = "0" * 64


def lose_the_sizes(manifest: dict[str, Any]) -> None:
    del manifest["partition"]["sizes"]


def be_of_another_format(manifest: dict[str, Any]) -> None:
    manifest["format"] = "ddm-bundle-0"


def change_the_sizes(manifest: dict[str, Any]) -> None:
    manifest["partition"]["sizes"] = [1, 400]


def have_a_size_too_many(manifest: dict[str, Any]) -> None:
    manifest["partition"]["sizes"] = [3, 2, 1]


def change_the_names(manifest: dict[str, Any]) -> None:
    manifest["partition"]["names"] = ["b", "a"]


def change_the_shape(manifest: dict[str, Any]) -> None:
    manifest["partition"]["shape"] = [1, 4, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_in_manifest, "expert-00.json is damaged or foreign"),
        (lose_an_expert, "manifest.json lists no expert-01, but has 2 clusters"),
        (add_an_expert, "manifest.json lists an artifact that no cluster has: 'expert-02'"),
        (
            lose_the_sizes,
            "manifest.json does not describe a partition: sizes must be whole numbers in [1, 2^40], got None",
        ),
        (
            be_of_another_format,
            "manifest.json is not the manifest of a bundle: its format must be 'ddm-bundle-1'",
        ),
        (change_the_shape, "manifest.json is damaged: the hash of its partition is"),
        (change_the_sizes, "manifest.json"),
        (have_a_size_too_many, "manifest.json"),
        (change_the_names, "manifest.json"),
    ],
)
def test_a_tampered_manifest_is_refused_by_name(
    run: Run, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    manifest = read_json(run.bundle / "manifest.json")
    change(manifest)
    write_json(run.bundle / "manifest.json", manifest)
    refused(run.bundle, f"{run.bundle}/{message}")


def test_files_swapped_with_their_hashes_are_refused_by_name(run: Run) -> None:
    for suffix in (".json", ".safetensors"):
        first, second = (run.bundle / f"expert-{k:02d}{suffix}" for k in range(2))
        aside = first.rename(run.bundle / "aside")
        second.rename(first)
        aside.rename(second)
    manifest = read_json(run.bundle / "manifest.json")
    swap_in_manifest(manifest)
    write_json(run.bundle / "manifest.json", manifest)
    refused(
        run.bundle,
        f"{run.bundle / 'expert-00.json'} does not belong to this bundle: its index is 1, expected 0",
    )


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_a_manifest_of_another_kind_is_refused_by_name(run: Run, content: str) -> None:
    (run.bundle / "manifest.json").write_text(content)
    refused(run.bundle, f"{run.bundle / 'manifest.json'} must hold a JSON object")


@pytest.mark.parametrize("value", [None, "", "0" * 63, 0, [], {"sha256": "0" * 64}])
def test_a_listed_hash_that_is_no_sha256_is_refused(run: Run, value: object) -> None:
    manifest = read_json(run.bundle / "manifest.json")
    manifest["artifacts"]["expert-01"] = value
    write_json(run.bundle / "manifest.json", manifest)
    refused(
        run.bundle,
        f"{run.bundle / 'manifest.json'} is damaged: the hash of expert-01 must be 64 hex digits",
    )


@pytest.mark.parametrize("value", [None, [], "vp_linear", {"name": ["vp_linear"]}, {"name": {}}])
def test_a_schedule_that_is_not_flat_is_refused(run: Run, value: object) -> None:
    manifest = read_json(run.bundle / "manifest.json")
    write_json(run.bundle / "manifest.json", {**manifest, "schedule": value})
    refused(run.bundle, f"{run.bundle / 'manifest.json'} is damaged: schedule must be an object")


def test_a_pickle_among_the_weights_is_refused_by_name(run: Run) -> None:
    torch.save({"weight": torch.tensor([1.0])}, run.experts[1].with_suffix(".safetensors"))
    facts = read_json(run.experts[1].with_suffix(".json"))
    write_json(
        run.experts[1].with_suffix(".json"),
        {**facts, "sha256": sha256(run.experts[1].with_suffix(".safetensors"))},
    )
    with pytest.raises(
        ArtifactError, match=r"expert.*01.*\.safetensors is damaged: it is not a safetensors file"
    ):
        run.write()


def test_a_failed_write_leaves_the_old_bundle(run: Run) -> None:
    before = {path.name: path.read_bytes() for path in run.bundle.iterdir()}
    run.train(0, weight=0.5)
    run.train(1, weight=0.5, partition="0" * 64)
    with pytest.raises(ArtifactError):
        run.write()
    assert {path.name: path.read_bytes() for path in run.bundle.iterdir()} == before
    assert len(read_bundle(run.bundle).experts) == 2


def test_a_new_bundle_replaces_the_old_and_takes_nothing_from_a_failed_one(run: Run) -> None:
    leftover = scratch_beside(run.bundle)
    leftover.mkdir()
    (leftover / "expert-07.json").write_text("{}")
    os.utime(leftover, (0, 0))
    (run.bundle / "old").write_text("")
    run.write()
    names = {
        f"{name}{suffix}"
        for name in ("expert-00", "expert-01", "router")
        for suffix in (".json", ".safetensors")
    }
    assert {path.name for path in run.bundle.iterdir()} == names | {"manifest.json"}
    assert not leftover.exists()


def killed_while_replacing(run: Run, monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
    """Write a new bundle, and stop as a kill would at the rename after so many of the folder."""
    rename, done = Path.rename, []

    def counted(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise KeyboardInterrupt
        moved = rename(self, target)
        done.append(target)
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            run.write()


def test_a_kill_between_the_renames_loses_no_bundle(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = read_bundle(run.bundle).version
    run.train(0, weight=0.5)
    killed_while_replacing(run, monkeypatch, renames=1)
    assert not run.bundle.exists()
    assert read_bundle(run.bundle).version == old
    killed_while_replacing(run, monkeypatch, renames=1)
    run.write()
    assert float(read_whole(run.bundle).experts[0].tensors["weight"]) == 0.5
    assert not [path for path in run.folder.iterdir() if path.suffix == ".old"]


def write_often(run: Run, folder: Path, experts: int) -> None:
    mine = Run(folder / f"run-{experts}")
    mine.bundle = run.bundle
    for turn in range(10):
        mine.train(1, weight=float(10 * experts + turn))
        mine.write()


def test_concurrent_writers_leave_one_whole_bundle(run: Run, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        pool.starmap(write_often, [(run, tmp_path, writer) for writer in range(3)])
    weight = float(read_whole(run.bundle).experts[1].tensors["weight"])
    assert weight in {1.0 + 10 * writer + 9 for writer in range(3)}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_linked_bundle_is_replaced_where_the_link_leads(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    run.bundle.rename(target)
    run.bundle.symlink_to(target)
    run.train(1, weight=0.5)
    run.write()
    assert run.bundle.is_symlink()
    assert float(read_whole(target).experts[1].tensors["weight"]) == 1.5


def test_a_bundle_in_place_of_a_file_is_refused_by_name(run: Run) -> None:
    shutil.rmtree(run.bundle)
    run.bundle.write_text("mine")
    with pytest.raises(ArtifactError, match=re.escape(f"{run.bundle} cannot be written: Not a")):
        run.write()
    assert run.bundle.read_text() == "mine"


def test_too_few_experts_are_refused_and_leave_the_old_bundle(run: Run) -> None:
    version = read_bundle(run.bundle).version
    with pytest.raises(
        ArtifactError, match=re.escape("manifest.json lists no expert-01, but has 2 clusters")
    ):
        write_bundle(run.bundle, run.partition, run.experts[:1], None)
    assert read_bundle(run.bundle).version == version


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_an_artifact_that_is_not_there_is_refused_by_name(run: Run, suffix: str) -> None:
    path = run.experts[1].with_suffix(suffix)
    path.unlink()
    with pytest.raises(ArtifactError, match=re.escape(f"{path} is missing")):
        run.write()


def test_an_expert_that_does_not_say_its_schedule_is_refused_by_name(run: Run) -> None:
    write_artifact(
        run.experts[0], {}, {"index": 0, "shape": [1, 2, 2], "partition": run.partition.hash}
    )
    with pytest.raises(ArtifactError, match=r"expert.*\.json.*schedule"):
        run.write()


def test_only_the_artifacts_asked_for_are_read(run: Run) -> None:
    whole = read_bundle(run.bundle)
    for name in ("expert-00", "router"):
        for suffix in (".json", ".safetensors"):
            (run.bundle / f"{name}{suffix}").unlink()
    bundle = read_bundle(run.bundle, only=["expert-01"])
    assert [float(expert.tensors["weight"]) for expert in bundle.experts] == [1]
    assert bundle.router is None
    assert (bundle.version, bundle.partition, bundle.schedule) == (
        whole.version,
        whole.partition,
        whole.schedule,
    )
    assert read_bundle(run.bundle, only=[]).experts == []
    refused(run.bundle, f"{run.bundle / 'expert-00.json'} is missing")


def test_a_single_artifact_and_the_manifest_are_checked(run: Run) -> None:
    path = run.bundle / "expert-01.safetensors"
    write_tensors(path, {"weight": read_tensors(path)["weight"] + 1})
    with pytest.raises(ArtifactError, match=re.escape(f"{path} is damaged or foreign")):
        read_whole(run.bundle, only=["expert-01"])
    assert len(read_bundle(run.bundle, only=["expert-00", "router"]).experts) == 1
    manifest = read_json(run.bundle / "manifest.json")
    lose_an_expert(manifest)
    write_json(run.bundle / "manifest.json", manifest)
    with pytest.raises(ArtifactError, match="lists no expert-01"):
        read_bundle(run.bundle, only=["expert-00"])


def test_an_expert_of_another_number_is_refused_alone_too(run: Run) -> None:
    for suffix in (".json", ".safetensors"):
        shutil.copyfile(run.bundle / f"expert-00{suffix}", run.bundle / f"expert-01{suffix}")
    manifest = read_json(run.bundle / "manifest.json")
    manifest["artifacts"]["expert-01"] = manifest["artifacts"]["expert-00"]
    write_json(run.bundle / "manifest.json", manifest)
    with pytest.raises(
        ArtifactError,
        match="expert-01.json does not belong to this bundle: its index is 0, expected 1",
    ):
        read_bundle(run.bundle, only=["expert-01"])


def test_a_half_bundle_halves_only_matrices_and_kernels(tmp_path: Path) -> None:
    run = Run(tmp_path)
    tensors = {
        "kernel": torch.randn(64, 64, generator=torch.Generator().manual_seed(0)),
        "bias": torch.tensor([1e-7, 1.0]),
        "gaussian.variance": torch.full((1, 2, 2), 1e-7),
        "count": torch.tensor([[3]]),
    }
    for k in range(2):
        write_artifact(run.experts[k], tensors, run.facts(index=k))
    run.write()
    write_half(run.bundle, tmp_path / "half")
    half = read_bundle(tmp_path / "half")
    assert half.version != read_bundle(run.bundle).version == half.experts[0].facts["half_of"]
    for name, tensor in half.experts[1].tensors.items():
        expected = tensors[name].half() if name == "kernel" else tensors[name]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
    assert half.router is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bundle",
        "experts",
        "half",
        "partition",
        "router",
    ]
