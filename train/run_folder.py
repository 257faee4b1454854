"""The run folder: which config it belongs to, and its partition."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ddm.artifacts import replaced, scratch_beside
from ddm.errors import ArtifactError, require
from ddm.partition import Partition
from train.config import Config, plain, read_config_file

BUNDLED = "seed_model.above"  # the key that the bundle alone depends on
# Keys that may change between two calls: where things are, which part of the work to do, and how.
_FREE = {
    "run",
    "accelerator",
    "data.root",
    "data.download",
    "seed_model.data.root",
    "seed_model.data.download",
    "expert.index",
    "expert.shard",
    "expert.init",
    "expert.workers",
    "expert.threads",
    "expert.devices",
    "expert.checkpoint_every",
    "router.checkpoint_every",
}
_NOT_IN_TABLE = ("bundle", "shard", "update", "evaluate", "watch", "launch")
_FREE_SECTIONS = ("bundle", "shard", "update", "watch", "launch", "sample", "evaluate", "table")


def settled(config: Config) -> dict[str, Any]:
    """What of a config decides what is learned and what `table` measures, flat: `expert.steps` ..."""
    tree = plain(config)
    flat = _flat({key: value for key, value in tree.items() if key not in _NOT_IN_TABLE})
    free = {*_FREE, "sample.n", "sample.seed", "sample.first_index", "sample.format"}
    return {key: value for key, value in flat.items() if key not in free}


def check_claim(config: Config) -> None:
    """Raise `ArtifactError` with every key that differs if the run's folder was made by another config.

    A key that the folder's config does not have, because the program was older, has its default there. expert.steps
    may be raised: what is trained goes on. router.data may change until the run's router is begun: a bundle of experts
    from elsewhere has none at first.
    """
    path = config.folder / "config.yaml"
    if not path.exists():
        return
    saved = read_config_file(path, ArtifactError)
    there = _learned(_with_defaults(saved, plain(Config())))
    here = _learned(plain(config))
    changes = [
        f"{key} is {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
        and not _may_change(config.folder, key, there.get(key), here.get(key))
    ]
    if changes:
        raise ArtifactError(
            f"{config.folder} was made by another config: {'; '.join(changes)}. "
            "Give run=FOLDER for a new run, or repeat the old values"
        )


def _may_change(folder: Path, key: str, there: Any, here: Any) -> bool:
    if key == "expert.steps":
        return isinstance(there, int) and there < here
    return key in ("router.data", "router.samples") and not (folder / "router").exists()


def claim(config: Config) -> None:
    """Make the run's folder this config's: to be called before the first output. Raises as `check_claim`."""
    check_claim(config)
    path = config.folder / "config.yaml"
    text = OmegaConf.to_yaml(OmegaConf.create(plain(config)))
    if path.is_file() and path.read_text() == text:
        return
    with replaced(path) as scratch:
        scratch.write_text(text)


def copy_part(part: str, source: Config, target: Config) -> None:
    """Copy a part of a run, such as `router`, into another's folder, unless it is there: all of it or nothing."""
    there, here = source.folder / part, target.folder / part
    if there.exists() and not here.exists():
        scratch = scratch_beside(here)
        shutil.copytree(there, scratch)
        scratch.rename(here)


def read_partition(config: Config) -> Partition:
    """The run's partition. Raises `ArtifactError` that says how to make the one that is missing."""
    folder = config.folder / "partition"
    if not (folder / "partition.json").exists():
        raise ArtifactError(
            f"{folder / 'partition.json'} is missing: run the stage 'partition' first, as in "
            f"python -m train CONFIG partition run={config.folder}"
        )
    return Partition.read(folder)


def read_clusters(config: Config) -> tuple[Path, Partition]:
    """The folder that experts are trained from, and its partition: `expert.shard`, or the run's partition.

    Raises `ArtifactError` naming what is missing, `ConfigError` if the shard holds more than one cluster.
    """
    if config.expert.shard is None:
        return config.folder / "partition", read_partition(config)
    folder = Path(config.expert.shard)
    shard = Partition.read(folder)
    require(
        shard.k == 1, "expert.shard", "be the folder of one cluster", f"{folder}, with {shard.k}"
    )
    return folder, shard


def _learned(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that decide what is learned, flat."""
    flat = _flat({key: value for key, value in tree.items() if key not in _FREE_SECTIONS})
    return {key: value for key, value in flat.items() if key not in {*_FREE, BUNDLED}}


def _with_defaults(tree: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of keys with those of the defaults that it lacks; `schedule`, whose keys are free, stays as it is."""
    whole = {**defaults, **tree}
    for key, value in tree.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict) and key != "schedule":
            whole[key] = _with_defaults(value, default)
    return whole


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
