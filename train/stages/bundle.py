"""The stage `bundle`: partition, experts and router in one folder that can be copied and served."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ddm.artifacts import check_sha256, read_facts, read_json, sha256
from ddm.bundle import MANIFEST, read_bundle, write_bundle, write_half
from ddm.errors import ArtifactError
from train.config import Config
from train.run_folder import claim, read_partition
from train.stages.expert import expert_stem

log = logging.getLogger(__name__)


def make_bundle(config: Config) -> None:
    """Put partition, experts and router together as one folder that can be copied and served."""
    cut = read_partition(config)
    experts = [expert_stem(config, k) for k in range(cut.k)]
    for k, stem in enumerate(experts):
        if not stem.with_suffix(".json").exists():
            raise ArtifactError(
                f"{stem}.json is missing: train it with the stage 'expert' and expert.index={k}"
            )
    router = config.folder / "router" / "router"
    has_router = cut.k > 1 and router.with_suffix(".json").exists()
    folder, half = config.folder / "bundle", config.folder / "bundle-half"
    if _holds(folder, [*experts, *([router] if has_router else [])]):
        log.info("bundle     up to date")
    else:
        claim(config)
        write_bundle(folder, cut, experts, router if has_router else None)
        made = f"{cut.k} experts{' and their router' if has_router else ' without a router'}"
        log.info("bundle     %s, version %s", made, read_bundle(folder).version[:12])
    if config.bundle.half and not _is_half_of(half, folder):
        write_half(folder, half)
        size = sum(file.stat().st_size for file in half.iterdir()) / 1e6
        log.info("bundle     in half precision, %.1f MB: %s", size, half)


def _holds(folder: Path, stems: Sequence[Path]) -> bool:
    """Whether a folder is a whole bundle of these artifacts; what is missing or damaged is named in a warning."""
    if not folder.exists():
        return False
    try:
        _check_weights(folder)
    except ArtifactError as error:
        log.warning("bundle     %s; it is made again", error)
        return False
    listed = read_json(folder / MANIFEST)["artifacts"]
    return sorted(listed.values()) == sorted(sha256(stem.with_suffix(".json")) for stem in stems)


def _is_half_of(half: Path, whole: Path) -> bool:
    """Whether a folder is the half-precision copy of a bundle, and whole."""
    if not half.exists():
        return False
    try:
        _check_weights(half)
    except ArtifactError as error:
        log.warning("bundle     %s; it is made again", error)
        return False
    return read_facts(half / "expert-00").get("half_of") == sha256(whole / MANIFEST)


def _check_weights(folder: Path) -> None:
    """Raise `ArtifactError` naming a file of a bundle that is missing or damaged."""
    read_bundle(folder)
    for name in read_json(folder / MANIFEST)["artifacts"]:
        weights = (folder / name).with_suffix(".safetensors")
        check_sha256(weights, read_facts(folder / name)["sha256"])
