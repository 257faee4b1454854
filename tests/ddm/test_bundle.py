"""A bundle: every file is the one that was put in, and all belong together."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddm.artifacts import (
    read_json,
    read_tensors,
    sha256,
    write_artifact,
    write_json,
    write_tensors,
)
from ddm.bundle import read_bundle
from ddm.bundle_history import read_history
from ddm.bundle_writing import Parts, mixture_of, write_bundle, write_half
from ddm.errors import ArtifactError, ConfigError, shown
from tests.ddm.bundles import SCHEDULE, Run, read_whole


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
    assert (bundle.mixture, bundle.schedule) == (run.partition.mixture, SCHEDULE)


def test_a_bundle_need_not_have_a_router(run: Run) -> None:
    write_bundle(run.bundle, run.parts(None), "test")
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
    [("cluster", "0" * 64), ("shape", [1, 4, 4]), ("range", [0, 1]), ("kind", "seed_model")],
)
def test_an_artifact_of_another_run_is_refused_naming_what_differs(
    run: Run, key: str, value: Any
) -> None:
    ours = read_json(run.experts[1].with_suffix(".json"))[key]
    run.train(1, **{key: value})
    message = f"{run.experts[1]}.json does not belong to this bundle: its {key} is {shown(value)}, expected {shown(ours)}"
    with pytest.raises(ArtifactError, match=re.escape(message)):
        run.write()


@pytest.mark.parametrize(
    ("key", "value"), [("mixture", "0" * 64), ("schedule", {}), ("shape", [1, 4, 4])]
)
def test_a_router_of_another_run_is_refused_naming_what_differs(
    run: Run, key: str, value: Any
) -> None:
    facts = run.facts(kind="router", mixture=run.partition.mixture.hash)
    write_artifact(run.router, {}, {**facts, key: value})
    message = f"{run.router}.json does not belong to this bundle: its {key} is {shown(value)}"
    with pytest.raises(ArtifactError, match=re.escape(message)):
        run.write()


@pytest.mark.parametrize(
    ("process", "message"),
    [
        ({"name": "vp_constant", "beta": 0.1}, "schedule must reach s/a = 20 at t = 1"),
        ({"name": "nothing"}, "01/expert.json does not describe a schedule: name must be one of"),
        (None, "01/expert.json does not describe a schedule"),
    ],
)
def test_an_expert_whose_process_cannot_be_converted_is_refused_by_name(
    run: Run, process: Any, message: str
) -> None:
    run.train(1, schedule=process)
    with pytest.raises(ArtifactError, match=re.escape(message)) as refusal:
        run.write()
    assert str(run.experts[1]) in str(refusal.value)


def test_experts_of_different_processes_are_bundled(run: Run) -> None:
    run.train(1, schedule={"name": "rectified_flow"})
    run.write()
    assert read_bundle(run.bundle).experts[1].facts["schedule"] == {"name": "rectified_flow"}


def test_a_mixture_weighs_experts_by_their_images_or_as_it_is_told(run: Run) -> None:
    assert mixture_of(run.experts) == run.partition.mixture
    given = mixture_of(run.experts, ["x", "y"], [0.5, 1.5])
    assert given.names == ["x", "y"]
    torch.testing.assert_close(given.pi, torch.tensor([0.25, 0.75]))


def test_experts_that_make_no_mixture_are_refused_by_name(run: Run) -> None:
    with pytest.raises(ConfigError, match="weights must have one value for each of the 2 experts"):
        mixture_of(run.experts, weights=[1.0])
    with pytest.raises(ConfigError, match=r"weights must be above 0 and at most 2\^40, got"):
        mixture_of(run.experts, weights=[1.0, 0.0])
    run.train(1, name="a")
    both = f"{run.experts[0]} and {run.experts[1]} have one name, 'a'"
    with pytest.raises(ArtifactError, match=re.escape(both)):
        mixture_of(run.experts)
    run.train(1, count=0)
    with pytest.raises(ArtifactError, match=r"01/expert.json is not an expert of this version"):
        mixture_of(run.experts)


def test_the_history_says_what_was_added_and_removed(run: Run) -> None:
    first = read_bundle(run.bundle).version
    run.write()
    run.train(1, weight=0.5)
    old, new = (
        sha256(folder.with_suffix(".json")) for folder in (run.bundle / "expert-01", run.experts[1])
    )
    run.write()
    made, changed = read_history(run.bundle)
    assert (made["version"], made["removed"]) == (first, {})
    assert made["added"].keys() == {"expert-00", "expert-01", "router"}
    assert (changed["added"], changed["removed"]) == ({"expert-01": new}, {"expert-01": old})
    assert changed["version"] == read_bundle(run.bundle).version


def test_files_that_stay_in_a_bundle_are_the_same_files(run: Run) -> None:
    before = (run.bundle / "expert-00.safetensors").stat()
    parts = Parts.of(read_bundle(run.bundle))
    alone = mixture_of([run.bundle / "expert-00"])
    rest = Parts(alone, SCHEDULE, {"expert-00": parts.experts["expert-00"]})
    write_bundle(run.bundle, rest, "remove b")
    after = (run.bundle / "expert-00.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert read_whole(run.bundle).mixture.names == ["a"]


def test_numbers_of_experts_may_have_gaps(run: Run) -> None:
    parts = run.parts(run.router)
    gap = {"expert-03": run.experts[0], "expert-117": run.experts[1]}
    write_bundle(run.bundle, Parts(parts.mixture, SCHEDULE, gap, run.router), "test")
    assert read_bundle(run.bundle).files == ["expert-03", "expert-117"]
    assert float(read_whole(run.bundle, only=["expert-117"]).experts[0].tensors["weight"]) == 1


def test_swapped_experts_are_refused_by_name(run: Run) -> None:
    run.experts.reverse()
    with pytest.raises(
        ArtifactError,
        match=re.escape("01/expert.json does not belong to this bundle: its cluster is"),
    ):
        run.write()


def swap_in_manifest(manifest: dict[str, Any]) -> None:
    artifacts = manifest["artifacts"]
    artifacts["expert-00"], artifacts["expert-01"] = artifacts["expert-01"], artifacts["expert-00"]


def lose_an_expert(manifest: dict[str, Any]) -> None:
    del manifest["artifacts"]["expert-01"]


def add_an_expert(manifest: dict[str, Any]) -> None:
    manifest["artifacts"]["expert-x"] = "0" * 64


def lose_the_weights(manifest: dict[str, Any]) -> None:
    del manifest["mixture"]["weights"]


def be_of_another_format(manifest: dict[str, Any]) -> None:
    manifest["format"] = "ddm-bundle-1"


def change_the_weights(manifest: dict[str, Any]) -> None:
    manifest["mixture"]["weights"] = [1, 400]


def have_a_weight_too_many(manifest: dict[str, Any]) -> None:
    manifest["mixture"]["weights"] = [3, 2, 1]


def change_the_names(manifest: dict[str, Any]) -> None:
    manifest["mixture"]["names"] = ["b", "a"]


def change_the_shape(manifest: dict[str, Any]) -> None:
    manifest["mixture"]["shape"] = [1, 4, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_in_manifest, "expert-00.json is damaged or foreign"),
        (lose_an_expert, "manifest.json lists 1 experts, but has 2 clusters"),
        (add_an_expert, "manifest.json lists an artifact that no cluster has: 'expert-x'"),
        (
            lose_the_weights,
            "manifest.json does not describe a mixture: weights must be numbers in (0, 2^40], got None",
        ),
        (
            be_of_another_format,
            "manifest.json is not the manifest of a bundle: its format must be 'ddm-bundle-2', got 'ddm-bundle-1'",
        ),
        (change_the_shape, "manifest.json is damaged: the hash of its mixture is"),
        (change_the_weights, "manifest.json"),
        (have_a_weight_too_many, "manifest.json"),
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
        f"{run.bundle / 'expert-00.json'} does not belong to this bundle: its cluster is",
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


@pytest.mark.parametrize("value", [{}, {"beta_max": 20.0}, {"name": "vp_linaer"}])
def test_a_schedule_that_is_none_is_refused_in_the_manifest(run: Run, value: object) -> None:
    run.write()
    manifest = read_json(run.bundle / "manifest.json")
    write_json(run.bundle / "manifest.json", {**manifest, "schedule": value})
    refused(run.bundle, f"{run.bundle / 'manifest.json'} does not describe a schedule")


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


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_an_artifact_that_is_not_there_is_refused_by_name(run: Run, suffix: str) -> None:
    path = run.experts[1].with_suffix(suffix)
    path.unlink()
    with pytest.raises(ArtifactError, match=re.escape(f"{path} is missing")):
        run.write()


def test_an_expert_that_does_not_say_its_schedule_is_refused_by_name(run: Run) -> None:
    run.train(0, schedule=None)
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
    assert (bundle.version, bundle.mixture, bundle.schedule) == (
        whole.version,
        whole.mixture,
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
    with pytest.raises(ArtifactError, match="lists 1 experts"):
        read_bundle(run.bundle, only=["expert-00"])


def test_an_expert_of_another_number_is_refused_alone_too(run: Run) -> None:
    for suffix in (".json", ".safetensors"):
        shutil.copyfile(run.bundle / f"expert-00{suffix}", run.bundle / f"expert-01{suffix}")
    manifest = read_json(run.bundle / "manifest.json")
    manifest["artifacts"]["expert-01"] = manifest["artifacts"]["expert-00"]
    write_json(run.bundle / "manifest.json", manifest)
    with pytest.raises(
        ArtifactError,
        match="expert-01.json does not belong to this bundle: its cluster is",
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
        facts = read_json(run.experts[k].with_suffix(".json"))
        write_artifact(run.experts[k], tensors, facts)
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
