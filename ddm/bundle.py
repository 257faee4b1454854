"""A bundle: a folder with everything that sampling needs, and a manifest that names each artifact
by its SHA-256. `ddm/bundle_writing.py` writes it.
"""

import re
from collections.abc import Collection
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
    is_sha256,
    naming,
    read_facts,
    read_json,
    read_layout,
    read_tensors,
    scratch_prefix,
    sha256,
)
from ddm.condition import check_same_vocabulary
from ddm.conversion import check_conversion
from ddm.errors import ArtifactError, ConfigError, shown
from ddm.mixture import Mixture
from ddm.schedules import Schedule, schedule
from ddm.seed_model import check_above, check_learned

FORMAT = "ddm-bundle-2"
MANIFEST = "manifest.json"
CARD = "README.md"  # for people; no part of the version
ROUTER, OLD_ROUTER, SEED_MODEL = "router", "old-router", "seed-model"
IMAGE_RANGE = [-1, 1]  # of the images that the networks see
_EXPERT = re.compile("expert-([0-9]{2,6})")


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

    mixture: what its experts are of
    schedule: what it samples on; an expert of another is converted to it
    files: the names of the experts' files, without suffix, in the order of their clusters
    experts: those that were asked for, in that order
    router: None if the bundle has none or it was not asked for
    old_router: one that was trained for other experts, from which the next can start
    old_names: the names of the clusters that its outputs belong to
    seed_model: what guides, and moves the images at t > `above`; None if the bundle has none, whose `above` is 1,
        or it was not asked for
    version: the SHA-256 of the manifest, which changes with any weight
    manifest: its file
    """

    mixture: Mixture
    schedule: dict[str, Any]
    files: list[str]
    experts: list[Artifact]
    router: Artifact | None
    old_router: Artifact | None
    old_names: list[str]
    seed_model: Artifact | None
    above: float
    version: str
    manifest: Path

    @property
    def artifacts(self) -> list[Artifact]:
        """The experts, then the routers and the seed model."""
        others = [self.router, self.old_router, self.seed_model]
        return [*self.experts, *(other for other in others if other)]

    def check_weights(self) -> None:
        """Raise `ArtifactError` naming a file of weights that is missing or not of the hash that its facts have."""
        for artifact in self.artifacts:
            check_sha256(artifact.weights, artifact.facts["sha256"])


def moved_aside(folder: Path) -> list[Path]:
    """Old bundles that writers of `folder` have moved aside and not yet removed."""
    name = re.compile(re.escape(scratch_prefix(folder)) + r"[0-9]+-[0-9a-f]+\.[0-9]+\.old")
    if not folder.parent.is_dir():
        return []
    return [path for path in folder.parent.iterdir() if name.fullmatch(path.name)]


def restore_bundle(folder: Path) -> None:
    """Move the old bundle back if its writer was killed after moving it aside.

    Raises `ArtifactError` if that fails.
    """
    if folder.exists():
        return
    with naming(folder, "written"):
        asides = moved_aside(folder)
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
    clusters agree.

    The weights themselves are read, and their hashes checked, when `Artifact.tensors` is first
    used.

    Raises `ArtifactError` naming the file that is wrong, and why.
    """
    restore_bundle(folder)
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} is not the manifest of a bundle: its format must be {FORMAT!r}, "
            f"got {shown(manifest.get('format'))}"
        )
    mixture = Mixture.from_facts(manifest.get("mixture"), path)
    process = manifest.get("schedule")
    if not (isinstance(process, dict) and all(map(_is_plain, process.values()))):
        raise ArtifactError(
            f"{path} is damaged: schedule must be an object with a name and numbers, "
            f"got {shown(process)}"
        )
    as_schedule(process, path)
    listed = _listed(path, manifest.get("artifacts"), mixture.k)
    old_names = manifest.get("old_router_names", [])
    if not (isinstance(old_names, list) and all(isinstance(name, str) for name in old_names)):
        raise ArtifactError(f"{path} is damaged: old_router_names must be names of clusters")
    above = check_above(path, manifest.get("above"), SEED_MODEL in listed)
    files = _experts(listed)
    found = {
        name: read_artifact(
            folder / name, value, expected_facts(name, mixture, process, files), process
        )
        for name, value in listed.items()
        if only is None or name in only
    }
    experts = [found[name] for name in files if name in found]
    seed_model = found.get(SEED_MODEL)
    check_networks(
        above,
        process,
        {one.json: one.facts for one in experts},
        {} if seed_model is None else {seed_model.json: seed_model.facts},
    )
    return Bundle(
        mixture,
        process,
        files,
        experts,
        found.get(ROUTER),
        found.get(OLD_ROUTER),
        old_names,
        seed_model,
        above,
        sha256(path),
        path,
    )


def check_networks(
    above: float,
    process: dict[str, Any],
    experts: dict[Path, dict[str, Any]],
    seed_model: dict[Path, dict[str, Any]],
) -> None:
    """Raise `ArtifactError` naming the file of a network whose condition or times are not those of
    the others. experts, seed_model: facts, by file; above: as in `Bundle`.
    """
    networks = {**experts, **seed_model}
    check_same_vocabulary({file: facts.get("condition") for file, facts in networks.items()})
    check_learned(above, process, seed_model, experts)


def listed_artifacts(path: Path) -> dict[str, str]:
    """The artifacts that a manifest names, with the hash of each one's JSON; they need not be there.

    Raises `ArtifactError` naming the manifest.
    """
    manifest = read_json(path)
    mixture = Mixture.from_facts(manifest.get("mixture"), path)
    return _listed(path, manifest.get("artifacts"), mixture.k)


def is_of_artifact(name: str) -> bool:
    """Whether a file of a bundle with this name is of an artifact."""
    stem, _, suffix = name.partition(".")
    known = stem in (ROUTER, OLD_ROUTER, SEED_MODEL) or expert_number(stem) >= 0
    return known and suffix in ("json", "safetensors", "json.minisig")


def expert_number(name: str) -> int:
    """The number in the name of an expert's files, without suffix; -1 for another name."""
    found = _EXPERT.fullmatch(name)
    return int(found[1]) if found else -1


def signature_of(path: Path) -> Path:
    """Where the signature of a file is, if it has one (serve/model/signatures.py)."""
    return path.with_name(f"{path.name}.minisig")


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _experts(listed: Collection[str]) -> list[str]:
    """Of the names of artifacts, those of experts, by number."""
    return sorted((name for name in listed if expert_number(name) >= 0), key=expert_number)


def _listed(path: Path, listed: Any, k: int) -> dict[str, str]:
    """The artifacts that a manifest lists: k experts, the routers and the seed model at most, and
    nothing else, each with a hash.
    """
    if not isinstance(listed, dict):
        raise ArtifactError(f"{path} is damaged: artifacts must be an object, got {shown(listed)}")
    experts = _experts(listed)
    if len(experts) != k:
        raise ArtifactError(f"{path} lists {len(experts)} experts, but has {k} clusters")
    for name in listed.keys() - {*experts, ROUTER, OLD_ROUTER, SEED_MODEL}:
        raise ArtifactError(f"{path} lists an artifact that no cluster has: {shown(name)}")
    for name, value in listed.items():
        if not is_sha256(value):
            raise ArtifactError(
                f"{path} is damaged: the hash of {name} must be 64 hex digits, got {shown(value)}"
            )
    return listed


def expected_facts(
    name: str, mixture: Mixture, process: dict[str, Any], files: list[str]
) -> dict[str, Any]:
    """What the facts of an artifact must say to belong to a bundle; an expert and a seed model have
    a process of their own.
    """
    facts: dict[str, Any] = {"shape": mixture.shape, "range": IMAGE_RANGE}
    match name:
        case "router":
            return {"kind": "router", **facts, "schedule": process, "mixture": mixture.hash}
        case "old-router":
            return {"kind": "router", **facts, "schedule": process}
        case "seed-model":
            return facts
        case _:
            return {"kind": "expert", **facts, "cluster": mixture.clusters[files.index(name)]}


def read_artifact(
    stem: Path,
    expected: str | None,
    belongs: dict[str, Any],
    process: dict[str, Any] | None = None,
) -> Artifact:
    """An artifact whose facts must have the values of `belongs`; `expected` is the hash of its
    JSON, None for no check; `process` that of the bundle, to which its own must be convertible.

    Raises `ArtifactError` naming the file, the fact and both values.
    """
    facts = read_facts(stem, expected)
    for key, value in belongs.items():
        if facts.get(key) != value:
            raise ArtifactError(
                f"{stem}.json does not belong to this bundle: "
                f"its {key} is {shown(facts.get(key))}, expected {shown(value)}"
            )
    if process is not None and facts.get("schedule") != process:
        try:
            check_conversion(
                schedule(**process), as_schedule(facts.get("schedule"), file_of(stem, ".json"))
            )
        except ConfigError as error:
            raise ArtifactError(f"{stem}.json does not belong to this bundle: {error}") from error
    return Artifact(stem, facts, read_layout(file_of(stem, ".safetensors")))


def as_schedule(facts: Any, path: Path) -> Schedule:
    """The forward process that plain data describes. Raises `ArtifactError` naming their file."""
    try:
        found = schedule(**facts)
    except (ConfigError, TypeError) as error:
        raise ArtifactError(f"{path} does not describe a schedule: {error}") from error
    coefficients = torch.stack(list(found(torch.linspace(1e-3, 1, 101))))
    if not coefficients.isfinite().all():
        raise ArtifactError(
            f"{path} does not describe a schedule: "
            f"a, s and their derivatives must be finite for t in [0.001, 1], got {shown(facts)}"
        )
    return found
