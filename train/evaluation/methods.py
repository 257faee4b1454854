"""The rows of the table: which experts update the image, and where alpha comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddm.artifacts import sha256
from ddm.bundle import MANIFEST
from train.config import Config
from train.evaluation.rows import ONE_MODEL, ROWS


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


def methods(
    config: Config, monoliths: Mapping[str, Config], names: Sequence[str], k: int
) -> list[Method]:
    """The rows of these names; `monoliths` are the runs of those without experts, by row.

    A mixture's only if there are several clusters; one model's only if it is trained, or if the
    config has one cluster.
    """
    if k == 1:
        names, monoliths = ONE_MODEL[:1], {ONE_MODEL[0]: config}
    found = []
    for name in names:
        sampled = monoliths.get(name) if name in ONE_MODEL else config
        if sampled is not None:
            settings = _settings(name, config)
            found.append(Method(name, sampled.run, bundle_version(sampled), settings))
    return found


def _settings(name: str, config: Config) -> dict[str, Any]:
    """What a row sets of `sample`."""
    row = ROWS[name]
    above = config.seed_model.above
    if name == "Naive" and above is not None and above < 1:
        # Its one expert is drawn where the seed model ends, and there alpha is not pi.
        row = row._replace(source=None)
    return {
        "source": row.source or config.sample.source,
        "temperature": 1.0 if row.source else config.sample.temperature,
        "policy": row.policy,
        "control_variate": row.control_variate,
        "clusters": {},
        **row.more,
    }
