"""The stage `bundle`: experts and router in one folder that can be copied and served."""

import logging
from pathlib import Path
from typing import Any

from ddm.artifacts import file_of, read_facts, read_json, sha256
from ddm.bundle import MANIFEST, read_bundle, restore_bundle, signature_of
from ddm.bundle_history import read_history
from ddm.bundle_writing import Parts, expert_names, mixture_of, write_bundle, write_half
from ddm.errors import ArtifactError, within
from ddm.mixture import Mixture
from train.config import Config
from train.model_card import write_cards
from train.run_folder import claim, read_partition
from train.stages.denoiser import artifact_stem, hash_of, initial
from train.stages.expert import expert_stem

log = logging.getLogger(__name__)


def make_bundle(config: Config) -> None:
    """Put experts and router together as one folder that can be copied and served."""
    cfg = config.bundle
    experts = [artifact_stem(path) for path in cfg.experts] or _own_experts(config)
    with within("bundle"):
        mixture = mixture_of(experts, cfg.names, cfg.weights)
    router = config.folder / "router" / "router"
    fits = _fits(router, mixture, config.schedule)
    parts = Parts(
        mixture,
        config.schedule,
        dict(zip(expert_names(mixture.k), experts, strict=True)),
        router if fits else None,
        seed_model=_seed_model(config),
    )
    folder, half = config.folder / "bundle", config.folder / "bundle-half"
    restore_bundle(folder)
    if _holds(folder, parts):
        log.info("bundle     up to date")
    elif changes := _changes(folder):
        log.warning(
            "bundle     %s stays as it is, after %s: move it away to make it anew", folder, changes
        )
    else:
        claim(config)
        write_bundle(folder, parts, "bundle")
        made = f"{mixture.k} experts{' and their router' if fits else ' without a router'}"
        log.info("bundle     %s, version %s", made, read_bundle(folder).version[:12])
    if config.bundle.half and not is_half_of(half, folder):
        write_half(folder, half)
        size = sum(file.stat().st_size for file in half.iterdir()) / 1e6
        log.info("bundle     in half precision, %.1f MB: %s", size, half)
    write_cards(config)


def _seed_model(config: Config) -> tuple[Path, float] | None:
    """The seed model that stays in the bundle, and the time above which it moves images.

    Raises `ArtifactError` if it is missing.
    """
    above, stem = config.seed_model.above, initial(config)
    if above is None or stem is None:
        return None
    hash_of(stem)
    return stem, above


def _own_experts(config: Config) -> list[Path]:
    """The artifacts of the run's partition. Raises `ArtifactError` naming one that is missing."""
    experts = [expert_stem(config, k) for k in range(read_partition(config).k)]
    for k, stem in enumerate(experts):
        if not stem.with_suffix(".json").exists():
            raise ArtifactError(
                f"{stem}.json is missing: train it with the stage 'expert' and expert.index={k}"
            )
    return experts


def _changes(folder: Path) -> str:
    """What has happened to a bundle since it was made by this stage, by its history."""
    events = [str(event.get("what")) for event in read_history(folder)]
    return ", ".join(what for what in events if what != "bundle")


def _fits(router: Path, mixture: Mixture, process: dict[str, Any]) -> bool:
    """Whether there is a router of this mixture; one of another is named in a warning."""
    if mixture.k == 1 or not file_of(router, ".json").exists():
        return False
    facts = read_facts(router)
    if facts.get("mixture") == mixture.hash and facts.get("schedule") == process:
        return True
    log.warning(
        "bundle     %s is left out: it was trained for other clusters, names or weights, or another schedule",
        router,
    )
    return False


def _holds(folder: Path, parts: Parts) -> bool:
    """Whether a folder is a whole bundle of these artifacts; what is missing or damaged is named in a warning."""
    if not folder.exists():
        return False
    try:
        read_bundle(folder).check_weights()
    except ArtifactError as error:
        log.warning("bundle     %s; it is made again", error)
        return False
    found = read_json(folder / MANIFEST)
    hashes = {name: sha256(file_of(stem, ".json")) for name, stem in parts.stems.items()}
    same = found["schedule"] == parts.schedule and found["mixture"] == parts.mixture.facts
    above = parts.seed_model[1] if parts.seed_model else None
    same = same and found["artifacts"] == hashes and found.get("above") == above
    return same and not any(
        _is_newly_signed(stem, folder / name) for name, stem in parts.stems.items()
    )


def _is_newly_signed(stem: Path, bundled: Path) -> bool:
    """Whether an artifact has a signature that its copy in a bundle has not."""
    given, held = (signature_of(file_of(each, ".json")) for each in (stem, bundled))
    return given.exists() and not (held.exists() and held.read_bytes() == given.read_bytes())


def is_half_of(half: Path, whole: Path) -> bool:
    """Whether a folder is the half-precision copy of a bundle, and whole."""
    if not half.exists():
        return False
    try:
        read_bundle(half).check_weights()
    except ArtifactError as error:
        log.warning("bundle     %s; it is made again", error)
        return False
    first = read_bundle(half, only=()).files[0]
    return read_facts(half / first).get("half_of") == sha256(whole / MANIFEST)
