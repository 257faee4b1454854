"""The stage `bundle`: partition, experts and router in one folder that can be carried away and served."""

import logging

from ddm.artifacts import read_json, sha256
from ddm.bundle import MANIFEST, read_bundle, write_bundle, write_half
from ddm.errors import ArtifactError
from ddm.partition import Partition
from train.config import Config
from train.stages.expert import expert_stem

log = logging.getLogger(__name__)


def make_bundle(config: Config) -> None:
    """Put partition, experts and router together as one folder that can be carried away and served."""
    cut = Partition.read(config.folder / "partition")
    experts = [expert_stem(config, k) for k in range(cut.k)]
    for k, stem in enumerate(experts):
        if not stem.with_suffix(".json").exists():
            raise ArtifactError(
                f"{stem}.json is missing: train it with the stage 'expert' and expert.index={k}"
            )
    router_stem = config.folder / "router" / "router"
    has_router = cut.k > 1 and router_stem.with_suffix(".json").exists()
    stems = experts + ([router_stem] if has_router else [])
    folder, half = config.folder / "bundle", config.folder / "bundle-half"
    listed = (
        read_json(folder / MANIFEST).get("artifacts", {}) if (folder / MANIFEST).exists() else {}
    )
    if sorted(listed.values()) == sorted(sha256(stem.with_suffix(".json")) for stem in stems):
        log.info("bundle     up to date")
    else:
        write_bundle(folder, cut, experts, router_stem if has_router else None)
        made = f"{cut.k} experts{' and their router' if has_router else ' without a router'}"
        log.info("bundle     %s, version %s", made, read_bundle(folder).version[:12])
    if config.bundle.half and not (
        half.exists()
        and read_json(half / "expert-00.json").get("half_of") == sha256(folder / MANIFEST)
    ):
        write_half(folder, half)
        size = sum(file.stat().st_size for file in half.iterdir()) / 1e6
        log.info("bundle     in half precision, %.1f MB: %s", size, half)
