"""A bundle: a folder with everything that sampling needs, and a manifest that names each artifact
by its SHA-256.
"""

import errno
import itertools
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.artifacts import (
    Layout,
    check_sha256,
    file_of,
    flush,
    is_sha256,
    naming,
    read_facts,
    read_json,
    read_layout,
    read_tensors,
    scratch_beside,
    sha256,
    write_artifact,
    write_json,
)
from ddm.errors import ArtifactError, shown
from ddm.gaussian import MOMENTS
from ddm.partition import Partition

FORMAT = "ddm-bundle-1"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """One artifact of a bundle: its facts, and the dtypes and shapes of its tensors."""

    stem: Path
    facts: dict[str, Any]
    layout: dict[str, Layout]

    @property
    def json(self) -> Path:
        """The file with the facts."""
        return file_of(self.stem, ".json")

    @property
    def weights(self) -> Path:
        """The file with the tensors."""
        return file_of(self.stem, ".safetensors")

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors, read at first use.

        Raises `ArtifactError` if their file is not the one that the facts name, or a number in it
        is not finite.
        """
        tensors = read_tensors(self.weights, self.facts["sha256"])
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not _is_finite(tensor):
                raise ArtifactError(f"{self.weights} is damaged: {name} must be finite numbers")
        return tensors


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; `isfinite` of them would make temporaries of the same size."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


@dataclass(frozen=True)
class Bundle:
    """A bundle as read and checked.

    experts: those that were asked for, in the order of their clusters
    router: None if the bundle has none or it was not asked for
    version: the SHA-256 of the manifest, which changes with any weight
    manifest: its file
    """

    partition: Partition
    schedule: dict[str, Any]
    experts: list[Artifact]
    router: Artifact | None
    version: str
    manifest: Path

    @property
    def artifacts(self) -> list[Artifact]:
        """The experts, then the router."""
        return [*self.experts, *([self.router] if self.router else [])]


def write_bundle(
    folder: Path, partition: Partition, experts: list[Path], router: Path | None
) -> None:
    """Copy artifacts (stems, the experts in the order of their clusters) into `folder` and write
    its manifest.

    The old bundle stays until the new one is whole and checked; concurrent writers do not disturb
    each other. After a kill at any moment, `read_bundle` finds the old bundle or the new one.

    Raises `ArtifactError` if the artifacts do not belong together or the system refuses, and keeps
    the old bundle.
    """
    stems = {_name(k): stem for k, stem in enumerate(experts)}
    if router:
        stems["router"] = router
    schedule = read_facts(experts[0]).get("schedule")
    for name, stem in stems.items():
        read_artifact(stem, None, _expected_facts(name, partition, schedule))
    folder = folder.resolve()  # a link's target is replaced, not the link
    with _scratch_folder(folder) as scratch, naming(folder, "written"):
        for name, stem in stems.items():
            for suffix in (".json", ".safetensors"):
                copy = scratch / f"{name}{suffix}"
                shutil.copyfile(file_of(stem, suffix), copy)
                flush(copy)
        manifest = {
            "format": FORMAT,
            "schedule": schedule,
            "partition": {**partition.facts, "hash": partition.hash},
            "artifacts": {name: sha256(scratch / f"{name}.json") for name in stems},
        }
        write_json(scratch / MANIFEST, manifest)
        for artifact in read_bundle(scratch).artifacts:
            check_sha256(artifact.weights, artifact.facts["sha256"])
        _replace_folder(folder, scratch)


def write_half(bundle: Path, folder: Path) -> None:
    """Write a bundle to `folder` with the weights of another in half precision: half the size, for
    download.

    Only the networks' matrices and kernels are halved; norms, biases, mixture weights and the
    clusters' Gaussians are copied. Raises `ArtifactError`.
    """
    whole = read_bundle(bundle)
    with _scratch_folder(folder) as scratch:
        stems = []
        for artifact in whole.artifacts:
            tensors = {name: _halved(name, tensor) for name, tensor in artifact.tensors.items()}
            stem = scratch / artifact.stem.name
            write_artifact(stem, tensors, {**artifact.facts, "half_of": whole.version})
            stems.append(stem)
        k = whole.partition.k
        write_bundle(folder, whole.partition, stems[:k], stems[k] if whole.router else None)


def _halved(name: str, tensor: Tensor) -> Tensor:
    matrix = tensor.ndim > 1 and tensor.is_floating_point() and name not in MOMENTS
    return tensor.half() if matrix else tensor


@contextmanager
def _scratch_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, removed at the end unless it has been renamed."""
    scratch = scratch_beside(folder)
    with naming(folder, "written"):
        scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace_folder(folder: Path, scratch: Path) -> None:
    """Rename `scratch` to `folder`; the old folder is moved aside first and removed afterwards."""
    flush(scratch)
    for attempt in itertools.count():  # a name per attempt: other writers may come between
        aside = scratch.with_suffix(f".{attempt}.old")
        try:
            scratch.rename(folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with suppress(FileNotFoundError):  # another writer was faster
            folder.rename(aside)
    flush(folder.parent)
    for old in _moved_aside(folder):
        shutil.rmtree(old, ignore_errors=True)


def _moved_aside(folder: Path) -> list[Path]:
    """Old bundles that writers of `folder` have moved aside and not yet removed."""
    prefix = f".{folder.name[:40]}."
    if not folder.parent.is_dir():
        return []
    siblings = list(folder.parent.iterdir())
    return [path for path in siblings if path.name.startswith(prefix) and path.suffix == ".old"]


def restore_bundle(folder: Path) -> None:
    """Move the old bundle back if its writer was killed after moving it aside.

    Raises `ArtifactError` if that fails.
    """
    if folder.exists():
        return
    with naming(folder, "written"):
        asides = _moved_aside(folder)
        if not asides:
            return
        newest = max(asides, key=lambda path: path.lstat().st_mtime)
        try:
            newest.rename(folder)
        except OSError:
            if not folder.exists():  # else its writer lives, and has gone on
                raise


def read_bundle(folder: Path, only: Collection[str] | None = None) -> Bundle:
    """Read a bundle, or `only` the artifacts named, and check that hashes, schedules, shapes and
    partitions agree.

    The weights themselves are read, and their hashes checked, when `Artifact.tensors` is first
    used.

    Raises `ArtifactError` naming the file that is wrong, and why.
    """
    restore_bundle(folder)
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} is not the manifest of a bundle: its format must be {FORMAT!r}"
        )
    partition = Partition.from_facts(manifest.get("partition"), path)
    schedule = manifest.get("schedule")
    if not (isinstance(schedule, dict) and all(map(_is_plain, schedule.values()))):
        raise ArtifactError(
            f"{path} is damaged: schedule must be an object with a name and numbers, "
            f"got {shown(schedule)}"
        )
    listed = _listed(path, manifest.get("artifacts"), partition.k)
    found = {
        name: read_artifact(folder / name, expected, _expected_facts(name, partition, schedule))
        for name, expected in listed.items()
        if only is None or name in only
    }
    experts = [found[_name(k)] for k in range(partition.k) if _name(k) in found]
    return Bundle(partition, schedule, experts, found.get("router"), sha256(path), path)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _listed(path: Path, listed: Any, k: int) -> dict[str, str]:
    """The artifacts that a manifest lists: all experts, a router at most, and nothing else, each
    with a hash.
    """
    if not isinstance(listed, dict):
        raise ArtifactError(f"{path} is damaged: artifacts must be an object, got {shown(listed)}")
    wanted = [_name(i) for i in range(k)]
    for name in wanted:
        if name not in listed:
            raise ArtifactError(f"{path} lists no {name}, but has {k} clusters")
    for name in listed.keys() - {*wanted, "router"}:
        raise ArtifactError(f"{path} lists an artifact that no cluster has: {shown(name)}")
    for name, value in listed.items():
        if not is_sha256(value):
            raise ArtifactError(
                f"{path} is damaged: the hash of {name} must be 64 hex digits, got {shown(value)}"
            )
    return listed


def _expected_facts(name: str, partition: Partition, schedule: Any) -> dict[str, Any]:
    """What the facts of an artifact must say to belong to a bundle."""
    facts = {"shape": partition.shape, "schedule": schedule, "partition": partition.hash}
    if name == "router":
        return facts
    return {**facts, "index": int(name.removeprefix("expert-"))}


def read_artifact(stem: Path, expected: str | None, belongs: dict[str, Any]) -> Artifact:
    """An artifact whose facts must have the values of `belongs`; `expected` is the hash of its
    JSON, None for no check.
    """
    facts = read_facts(stem, expected)
    for key, value in belongs.items():
        if facts.get(key) != value:
            raise ArtifactError(
                f"{stem}.json does not belong to this bundle: "
                f"its {key} is {shown(facts.get(key))}, expected {shown(value)}"
            )
    return Artifact(stem, facts, read_layout(file_of(stem, ".safetensors")))


def _name(k: int) -> str:
    return f"expert-{k:02d}"
