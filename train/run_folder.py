"""The run folder: which config it belongs to."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from ddm.errors import ArtifactError
from train.config import Config, plain

# Where things lie, which part of the work to do and how it is shown may change between two calls; what was learned may not.
_FREE = {
    "run",
    "accelerator",
    "data.root",
    "data.download",
    "expert.index",
    "expert.workers",
    "bundle.half",
    "expert.checkpoint_every",
    "router.checkpoint_every",
}


def settled(config: Config) -> dict[str, Any]:
    """What of a config decides what is learned and what `table` measures, flat: `expert.steps` ..."""
    flat = _flat({key: value for key, value in plain(config).items() if key != "evaluate"})
    return {
        key: value for key, value in flat.items() if key not in {*_FREE, "sample.n", "sample.seed"}
    }


def claim(config: Config) -> None:
    """Make the run's folder this config's, or refuse where what lies there was learned with another one.

    Raises `ArtifactError` listing every key that differs.
    """
    path = config.folder / "config.yaml"
    if path.exists():
        there, here = (
            _flat({k: v for k, v in c.items() if k not in ("sample", "evaluate", "table")})
            for c in (_saved(path), plain(config))
        )
        keys = [
            key
            for key in sorted(there.keys() | here.keys())
            if key not in _FREE and there.get(key) != here.get(key)
        ]
        if keys:
            changes = "; ".join(
                f"{key} is {there.get(key)!r} there, {here.get(key)!r} here" for key in keys
            )
            raise ArtifactError(
                f"{config.folder} was made by another config: {changes}. Give run=FOLDER for a new run, or repeat the old values"
            )
    config.folder.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    scratch.replace(path)


def _saved(path: Path) -> dict[str, Any]:
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    if not isinstance(saved, dict):
        raise ArtifactError(f"{path} is damaged: it holds no configuration")
    return {str(key): value for key, value in saved.items()}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return leaves
