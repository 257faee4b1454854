"""The rows of the table: which experts update the image, and where alpha comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddm.artifacts import sha256
from ddm.bundle import MANIFEST
from train.config import PAPER, Config

MEANING = {
    "DDIM": "one model on all images",
    "Naive": "one expert per image, drawn from the mixture weights",
    "MoG-a": "one expert per step, drawn from the posterior net's alpha",
    "MoG-da": "one expert per step, drawn from the integrated alpha",
    "balanced": "one expert per step, with error feedback",
    "balanced-cv": "balanced, with the Gaussian control variate",
    "adaptive": "balanced-cv, with a second expert where alpha is undecided",
    "top-1": "the most likely expert of each step",
    "top-2": "the two most likely experts of each step, weighted by alpha",
    "nucleus": "the fewest experts per step that carry 0.9 of alpha, weighted by alpha",
    "full": "all experts at each step, weighted by alpha",
}


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

    A mixture's only if there are several clusters; DDIM only if there is a monolith. The paper's
    rows have their own source of alpha; the others take the config's, at its temperature. The
    control variate is off except for `balanced-cv` and `adaptive`.
    """

    def row(name: str, sampled: Config, **settings: Any) -> Method:
        paper = name in PAPER
        alpha = {
            "source": config.sample.source,
            "temperature": 1.0 if paper else config.sample.temperature,
        }
        usual = {**alpha, "control_variate": "none", "clusters": {}}
        return Method(name, sampled.run, bundle_version(sampled), {**usual, **settings})

    if k == 1:
        return [row("DDIM", config, source="prior", policy="full")]
    known = {
        "Naive": row("Naive", config, source="prior", policy="fixed"),
        "MoG-a": row("MoG-a", config, source="posterior", policy="stochastic"),
        "MoG-da": row("MoG-da", config, source="combined", policy="stochastic"),
        "balanced": row("balanced", config, policy="balanced"),
        "balanced-cv": row("balanced-cv", config, policy="balanced", control_variate="gaussian"),
        "adaptive": row("adaptive", config, policy="adaptive", control_variate="gaussian"),
        "top-1": row("top-1", config, policy="top_k", top_k=1),
        "top-2": row("top-2", config, policy="top_k", top_k=2),
        "nucleus": row("nucleus", config, policy="nucleus", nucleus_p=0.9),
        "full": row("full", config, policy="full"),
    }
    if monolith is not None:
        known["DDIM"] = row("DDIM", monolith, source="prior", policy="full")
    return [known[name] for name in names if name in known]
