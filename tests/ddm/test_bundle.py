"""A bundle: every file is the one that was put in, and all belong together."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddm.artifacts import read_json, read_tensors, sha256, write_artifact, write_json, write_tensors
from ddm.bundle import read_bundle, write_bundle, write_half
from ddm.errors import ArtifactError
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


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(message)):
        read_bundle(folder)


def test_a_bundle_holds_what_was_put_in_wherever_it_is_carried(run: Run, tmp_path: Path) -> None:
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
    message = f"expert-01.json does not belong to this bundle: its {key} is {value!r}, the manifest's {ours!r}"
    with pytest.raises(ArtifactError, match=re.escape(message)):
        run.write()
    run.train(1)
    write_artifact(run.router, {}, run.facts(**{key: value}))
    with pytest.raises(
        ArtifactError,
        match=re.escape(f"router.json does not belong to this bundle: its {key} is {value!r}"),
    ):
        run.write()


def test_swapped_experts_are_refused_by_name(run: Run) -> None:
    run.experts.reverse()
    with pytest.raises(
        ArtifactError, match=re.escape("expert-00.json does not belong here: it is expert 1, not 0")
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
        (add_an_expert, "manifest.json lists an artifact that no cluster has: expert-02"),
        (lose_the_sizes, "manifest.json does not describe a partition: KeyError('sizes')"),
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
        run.bundle, f"{run.bundle / 'expert-00.json'} does not belong here: it is expert 1, not 0"
    )


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_a_manifest_of_another_kind_is_refused_by_name(run: Run, content: str) -> None:
    (run.bundle / "manifest.json").write_text(content)
    refused(run.bundle, f"{run.bundle / 'manifest.json'} is not the manifest of a bundle")


def test_a_pickle_among_the_weights_is_refused_by_name(run: Run) -> None:
    torch.save({"weight": torch.tensor([1.0])}, run.experts[1].with_suffix(".safetensors"))
    facts = read_json(run.experts[1].with_suffix(".json"))
    write_json(
        run.experts[1].with_suffix(".json"),
        {**facts, "sha256": sha256(run.experts[1].with_suffix(".safetensors"))},
    )
    with pytest.raises(
        ArtifactError, match=r"expert.*01.*\.safetensors is damaged: it is no safetensors file"
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


def test_a_new_bundle_replaces_the_old_and_carries_nothing_of_a_failed_one(run: Run) -> None:
    leftover = run.bundle.with_name("bundle.part")
    leftover.mkdir()
    (leftover / "expert-07.json").write_text("{}")
    (run.bundle / "old").write_text("")
    run.write()
    names = {
        f"{name}{suffix}"
        for name in ("expert-00", "expert-01", "router")
        for suffix in (".json", ".safetensors")
    }
    assert {path.name for path in run.bundle.iterdir()} == names | {"manifest.json"}
    assert not leftover.exists()


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


def test_only_what_is_asked_for_is_read_and_the_others_may_be_anywhere(run: Run) -> None:
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


def test_what_alone_is_asked_for_is_checked_as_ever_and_so_is_the_manifest(run: Run) -> None:
    path = run.bundle / "expert-01.safetensors"
    write_tensors(path, {"weight": read_tensors(path)["weight"] + 1})
    with pytest.raises(ArtifactError, match=re.escape(f"{path} is damaged or foreign")):
        read_bundle(run.bundle, only=["expert-01"])
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
        ArtifactError, match="expert-01.json does not belong here: it is expert 0, not 1"
    ):
        read_bundle(run.bundle, only=["expert-01"])


def test_a_half_bundle_holds_half_the_bytes_and_leaves_what_is_no_matrix(tmp_path: Path) -> None:
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
