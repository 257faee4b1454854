"""The rows of the table: which experts update the image, and where alpha comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddm.artifacts import sha256
from ddm.bundle import MANIFEST
from train.config import Config
from train.evaluation.rows import ROWS


@dataclass(frozen=True)
class Method:
    """A row of the table: its name, its run, its bundle's version, its settings of `sample`."""

    name: str
    run: str
    version: str
    settings: dict[str, Any]


def bundle_version(config: Config) -> str:
    """The SHA-256 of the manifest of a run's bundle."""
    return sha256(config.folder / "bundle" / MANIFEST)


def methods(config: Config, monolith: Config | None, names: Sequence[str], k: int) -> list[Method]:
    """The rows of these names.

    A mixture's only if there are several clusters; DDIM only if there is a monolith, or if the
    config has one cluster.
    """
    monolith = config if k == 1 else monolith
    wanted = ("DDIM",) if k == 1 else names
    found = []
    for name in wanted:
        sampled = monolith if name == "DDIM" else config
        if sampled is not None:
            settings = _settings(name, config)
            found.append(Method(name, sampled.run, bundle_version(sampled), settings))
    return found


def _settings(name: str, config: Config) -> dict[str, Any]:
    """What a row sets of `sample`."""
    row = ROWS[name]
    return {
        "source": row.source or config.sample.source,
        "temperature": 1.0 if row.source else config.sample.temperature,
        "policy": row.policy,
        "control_variate": row.control_variate,
        "clusters": {},
        **row.more,
    }
