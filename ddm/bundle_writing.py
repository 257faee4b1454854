"""Writing a bundle: from artifacts of anywhere, or from an old bundle with some of them changed."""

import errno
import itertools
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddm.artifacts import (
    file_of,
    flush,
    is_sha256,
    naming,
    read_facts,
    scratch_beside,
    sha256,
    write_artifact,
    write_json,
)
from ddm.bundle import (
    FORMAT,
    MANIFEST,
    OLD_ROUTER,
    ROUTER,
    SEED_MODEL,
    Bundle,
    check_networks,
    expected_facts,
    is_of_artifact,
    moved_aside,
    read_artifact,
    read_bundle,
    restore_bundle,
    signature_of,
)
from ddm.bundle_history import HISTORY, write_history
from ddm.errors import ArtifactError, require, shown
from ddm.gaussian import MOMENTS
from ddm.mixture import Mixture, is_whole


@dataclass(frozen=True)
class Parts:
    """What a bundle is made of: paths of artifacts, without suffix.

    experts: by the name of their files in the bundle, in the order of the mixture
    old_router: one that no longer fits, and the names of the clusters of its outputs
    seed_model: what guides and moves the images at high noise, and the time above which it moves them
    """

    mixture: Mixture
    schedule: dict[str, Any]
    experts: dict[str, Path]
    router: Path | None = None
    old_router: tuple[Path, list[str]] | None = None
    seed_model: tuple[Path, float] | None = None

    @property
    def stems(self) -> dict[str, Path]:
        """All artifacts by the name of their files in the bundle."""
        stems = dict(self.experts)
        if self.router:
            stems[ROUTER] = self.router
        if self.old_router:
            stems[OLD_ROUTER] = self.old_router[0]
        if self.seed_model:
            stems[SEED_MODEL] = self.seed_model[0]
        return stems

    @staticmethod
    def of(bundle: Bundle) -> "Parts":
        """Those of a bundle that has been read whole."""
        return Parts(
            bundle.mixture,
            bundle.schedule,
            {artifact.stem.name: artifact.stem for artifact in bundle.experts},
            bundle.router.stem if bundle.router else None,
            (bundle.old_router.stem, bundle.old_names) if bundle.old_router else None,
            (bundle.seed_model.stem, bundle.above) if bundle.seed_model else None,
        )


def mixture_of(
    experts: Sequence[Path], names: Sequence[str] = (), weights: Sequence[float] = ()
) -> Mixture:
    """The mixture of experts' artifacts, weighted by the images that each was trained on.

    names, weights: in place of the experts' own; empty for these.

    Raises `ArtifactError` naming the artifact, or the two of one name; `ConfigError` naming
    `names` or `weights` if it does not fit.
    """
    facts = []
    for stem in experts:
        found = read_facts(stem)
        whole = is_whole(found.get("count"), 2**40) and is_sha256(found.get("cluster"))
        if found.get("kind") != "expert" or not whole or not isinstance(found.get("name"), str):
            raise ArtifactError(
                f"{stem}.json is not an expert of this version: its kind must be 'expert' "
                "and it must have a name, a count of images and the hash of its cluster"
            )
        facts.append(found)
    for key, given in (("names", names), ("weights", weights)):
        rule = f"have one value for each of the {len(facts)} experts"
        require(not given or len(given) == len(facts), key, rule, list(given))
    rule = "be above 0 and at most 2^40"
    require(all(0 < weight <= 2**40 for weight in weights), "weights", rule, list(weights))
    chosen = list(names) or [one["name"] for one in facts]
    for name in chosen:
        same = [str(stem) for stem, other in zip(experts, chosen, strict=True) if other == name]
        if len(same) > 1:
            raise ArtifactError(
                f"{' and '.join(same)} have one name, {shown(name)}: experts of a bundle need "
                "different ones (bundle.names=[NAME, ...] gives them)"
            )
    pi = list(weights) or [one["count"] for one in facts]
    shape: Any = facts[0].get("shape")
    mixture = Mixture(shape, chosen, pi, [one["cluster"] for one in facts])
    return Mixture.from_facts(mixture.facts, file_of(experts[0], ".json"))


def expert_names(k: int) -> list[str]:
    """The names of k experts' files in a new bundle."""
    return [f"expert-{i:02d}" for i in range(k)]


def write_bundle(folder: Path, parts: Parts, what: str, before: str | None = None) -> None:
    """Copy artifacts into `folder` and write its manifest; `what` happened goes into its history.
    What else is in the folder stays, such as a model card, a licence or a repository's `.git`; the
    manifest's signature too, if the manifest is the same. before: the version that the parts were
    read from, if the change is to that one alone.

    The old bundle stays until the new one is whole and checked; concurrent writers do not disturb
    each other. After a kill at any moment, `read_bundle` finds the old bundle or the new one. Files
    that come from the old bundle are linked where the file system can, and in any case keep their
    bytes.

    Raises `ArtifactError` if the artifacts do not belong together, if another process has changed
    the bundle since `before`, or if the system refuses, and keeps the old bundle.
    """
    folder = folder.resolve()  # a link's target is replaced, not the link
    restore_bundle(folder)  # with the user's files in it, if a writer was killed
    _check_unchanged(folder, before)
    stems, files = parts.stems, list(parts.experts)
    old_names = parts.old_router[1] if parts.old_router else None
    with _scratch_folder(folder) as scratch, naming(folder, "written"):
        for name, stem in stems.items():
            belongs = expected_facts(name, parts.mixture, parts.schedule, files)
            read_artifact(stem, None, belongs, parts.schedule)
            for suffix in (".json", ".safetensors"):
                _place(file_of(stem, suffix), scratch / f"{name}{suffix}")
            signature = signature_of(file_of(stem, ".json"))
            if signature.exists():  # its owner's
                _place(signature, signature_of(scratch / f"{name}.json"))
        seed_stem, above = parts.seed_model or (None, 1.0)
        check_networks(
            above,
            parts.schedule,
            {file_of(stem, ".json"): read_facts(stem) for stem in parts.experts.values()},
            {} if seed_stem is None else {file_of(seed_stem, ".json"): read_facts(seed_stem)},
        )
        manifest = {
            "format": FORMAT,
            "schedule": parts.schedule,
            "mixture": parts.mixture.facts,
            "artifacts": {name: sha256(scratch / f"{name}.json") for name in stems},
            **({"old_router_names": old_names} if old_names else {}),
            **({"above": above} if parts.seed_model else {}),
        }
        write_json(scratch / MANIFEST, manifest)
        read_bundle(scratch).check_weights()
        write_history(folder, scratch, what)
        _copy_the_rest(folder, scratch)
        _check_unchanged(folder, before)  # copying takes long
        _replace_folder(folder, scratch)


def _check_unchanged(folder: Path, before: str | None) -> None:
    if before is not None and (there := read_bundle(folder, only=()).version) != before:
        raise ArtifactError(
            f"{folder} has changed from version {before[:12]} to {there[:12]} since this command began: "
            "give the same command again; what it has trained is kept"
        )


def _copy_the_rest(old: Path, new: Path) -> None:
    """Copy what the old folder of a bundle holds beside the bundle's own files."""
    signature = signature_of(old / MANIFEST)
    if signature.exists() and sha256(old / MANIFEST) == sha256(new / MANIFEST):
        _place(signature, new / signature.name)
    for path in old.iterdir() if old.exists() else ():
        name = path.name
        if name in (MANIFEST, HISTORY, signature.name) or is_of_artifact(name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / name, symlinks=True)
        else:
            shutil.copy2(path, new / name, follow_symlinks=False)


def _place(source: Path, target: Path) -> None:
    """A file of a bundle again, or a copy of one that somebody else may write to."""
    if source.with_name(MANIFEST).exists():
        with suppress(OSError):  # a file system without hard links
            target.hardlink_to(source)
            return
    shutil.copyfile(source, target)
    flush(target)


def write_half(bundle: Path, folder: Path) -> None:
    """Write a bundle to `folder` with the weights of another in half precision: half the size, for
    download.

    Only the networks' matrices and kernels are halved; norms, biases, mixture weights and the
    clusters' Gaussians are copied. Raises `ArtifactError`.
    """
    whole = read_bundle(bundle)
    parts = Parts.of(whole)
    with _scratch_folder(folder) as scratch:
        stems = {}
        for artifact in whole.artifacts:
            tensors = {name: _halved(name, tensor) for name, tensor in artifact.tensors.items()}
            stems[artifact.stem] = scratch / artifact.stem.name
            write_artifact(
                scratch / artifact.stem.name,
                tensors,
                {**artifact.facts, "half_of": whole.version},
            )
        halved = replace(
            parts,
            experts={name: stems[stem] for name, stem in parts.experts.items()},
            router=parts.router and stems[parts.router],
            old_router=parts.old_router and (stems[parts.old_router[0]], parts.old_router[1]),
            seed_model=parts.seed_model and (stems[parts.seed_model[0]], parts.seed_model[1]),
        )
        write_bundle(folder, halved, f"half precision of {whole.version}")


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
    for old in moved_aside(folder):
        shutil.rmtree(old, ignore_errors=True)
