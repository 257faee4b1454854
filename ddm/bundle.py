"""A bundle: a folder with all that sampling needs, held together by a manifest that names every artifact by SHA-256."""

import shutil
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ddm.artifacts import read_artifact, read_json, sha256, write_artifact, write_json
from ddm.errors import ArtifactError
from ddm.gaussian import MOMENTS
from ddm.partition import Partition

FORMAT = "ddm-bundle-1"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """One artifact as read: where it came from, its tensors and its facts."""

    stem: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Bundle:
    """A bundle as read and checked: K experts in the order of their clusters, and the router if there is one."""

    partition: Partition
    schedule: dict[str, Any]
    experts: list[Artifact]  # those that were asked for
    router: Artifact | None
    version: str  # the SHA-256 of the manifest: it changes with any weight


def write_bundle(
    folder: Path, partition: Partition, experts: list[Path], router: Path | None
) -> None:
    """Copy artifacts (stems, the experts in the order of their clusters) into `folder` and write its manifest last.

    The old bundle stays in place until the new one is whole. Raises `ArtifactError` where they do not belong together.
    """
    scratch, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    stems = {f"expert-{k:02d}": stem for k, stem in enumerate(experts)} | (
        {"router": router} if router else {}
    )
    for name, stem in stems.items():
        for suffix in (".json", ".safetensors"):
            try:
                shutil.copyfile(stem.with_suffix(suffix), scratch / f"{name}{suffix}")
            except FileNotFoundError as error:
                raise ArtifactError(f"{stem.with_suffix(suffix)} is missing") from error
    facts = read_json(scratch / "expert-00.json")
    if not isinstance(facts, dict) or "schedule" not in facts:
        raise ArtifactError(
            f"{experts[0].with_suffix('.json')} does not describe an expert: it has no key 'schedule'"
        )
    manifest = {
        "format": FORMAT,
        "schedule": facts["schedule"],
        "partition": {**asdict(partition), "hash": partition.hash},
        "artifacts": {name: sha256(scratch / f"{name}.json") for name in stems},
    }
    write_json(scratch / MANIFEST, manifest)
    read_bundle(scratch)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_half(bundle: Path, folder: Path) -> None:
    """Write the bundle `folder`, with the weights of another in half precision: half as large, to give away.

    What is no network's matrix or kernel stays as it is: norms, biases, shares, the clusters' Gaussians. Raises `ArtifactError`.
    """
    whole = read_bundle(bundle)
    with tempfile.TemporaryDirectory(dir=bundle.parent) as scratch:
        stems = []
        for artifact in [*whole.experts, *([whole.router] if whole.router else [])]:
            tensors = {
                name: tensor.half()
                if tensor.ndim > 1 and tensor.is_floating_point() and name not in MOMENTS
                else tensor
                for name, tensor in artifact.tensors.items()
            }
            stems.append(Path(scratch) / artifact.stem.name)
            write_artifact(stems[-1], tensors, {**artifact.facts, "half_of": whole.version})
        experts, router = stems[: whole.partition.k], stems[whole.partition.k :]
        write_bundle(folder, whole.partition, experts, router[0] if router else None)


def read_bundle(folder: Path, only: Collection[str] | None = None) -> Bundle:
    """Read a bundle and check every hash, and that schedules, shapes and partitions agree; or `only` the artifacts named.

    Raises `ArtifactError` naming the file that is wrong, and why.
    """
    path = folder / MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} is not the manifest of a bundle: its format must be {FORMAT!r}"
        )
    partition = Partition.from_facts(manifest.get("partition"), path)
    listed, schedule = manifest.get("artifacts"), manifest.get("schedule")
    if not isinstance(listed, dict) or not isinstance(schedule, dict):
        raise ArtifactError(f"{path} is damaged: it needs the keys 'artifacts' and 'schedule'")
    wanted = [f"expert-{k:02d}" for k in range(partition.k)]
    if missing := [name for name in wanted if name not in listed]:
        raise ArtifactError(f"{path} lists no {missing[0]}, but has {partition.k} clusters")
    if unknown := [name for name in listed if name not in [*wanted, "router"]]:
        raise ArtifactError(f"{path} lists an artifact that no cluster has: {unknown[0]}")
    found = {}
    for name, expected in listed.items():
        if only is not None and name not in only:
            continue
        stem = folder / name
        tensors, facts = read_artifact(stem, expected)
        for key, value in (
            ("shape", partition.shape),
            ("schedule", schedule),
            ("partition", partition.hash),
        ):
            if facts.get(key) != value:
                raise ArtifactError(
                    f"{stem}.json does not belong to this bundle: its {key} is {facts.get(key)!r}, the manifest's {value!r}"
                )
        found[name] = Artifact(stem, tensors, facts)
    for k, name in enumerate(wanted):
        expert = found.get(name)
        if expert is not None and expert.facts.get("index") != k:
            raise ArtifactError(
                f"{expert.stem}.json does not belong here: it is expert {expert.facts.get('index')!r}, not {k}"
            )
    return Bundle(
        partition,
        schedule,
        [found[name] for name in wanted if name in found],
        found.get("router"),
        sha256(path),
    )
