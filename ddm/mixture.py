"""What the experts of a bundle are trained on: K clusters with their weights, without any image."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.artifacts import digest, is_sha256
from ddm.errors import ArtifactError, shown

MAX_CLUSTERS = 10_000


@dataclass(frozen=True)
class Mixture:
    """K clusters, in the order of the experts and of a router's outputs.

    shape: of one image, `[C, H, W]`
    names: of the clusters, unique
    weights: of the clusters, above 0; as a rule the number of images of each
    clusters: SHA-256 of each cluster's file, in hex
    """

    shape: list[int]
    names: list[str]
    weights: Sequence[float]
    clusters: list[str]

    @property
    def facts(self) -> dict[str, Any]:
        """The mixture as plain data, with its hash."""
        return {**asdict(self), "hash": self.hash}

    @property
    def k(self) -> int:
        """The number of clusters."""
        return len(self.clusters)

    @property
    def pi(self) -> Tensor:
        """Mixture weights that sum to 1, float32 `[K]`."""
        return torch.tensor(self.weights) / sum(self.weights)

    @property
    def hash(self) -> str:
        """The content hash, to which a router is bound."""
        return digest(asdict(self))

    @staticmethod
    def from_facts(facts: Any, path: Path) -> "Mixture":
        """The mixture described by plain data from the file `path`.

        Raises `ArtifactError` naming the file.
        """
        if fault := list_fault(facts, _RULES, ("names", "weights", "clusters")):
            raise ArtifactError(f"{path} does not describe a mixture: {fault}")
        mixture = Mixture(**{key: facts[key] for key in _RULES})
        if mixture.hash != facts.get("hash"):
            raise ArtifactError(
                f"{path} is damaged: the hash of its mixture is {mixture.hash}, "
                f"it says {shown(facts.get('hash'))}"
            )
        return mixture


Rules = dict[str, tuple[str, Callable[[list[Any]], bool]]]


def list_fault(facts: Any, rules: Rules, of_k: tuple[str, ...]) -> str | None:
    """What is wrong with an object of lists, or None; the keys `of_k` have one value per cluster."""
    if not isinstance(facts, dict):
        return f"it must be an object, got {shown(facts)}"
    for key, (rule, holds) in rules.items():
        value = facts.get(key)
        if not (isinstance(value, list) and len(value) <= MAX_CLUSTERS and holds(value)):
            return f"{key} must be {rule}, got {shown(value)}"
    lengths = {key: len(facts[key]) for key in of_k}
    if len(set(lengths.values())) > 1:
        words = f"{', '.join(of_k[:-1])} and {of_k[-1]}"
        return f"{words} must have one length, got {lengths}"
    return None


def is_whole(value: Any, most: int) -> bool:
    """Whether a value is a whole number in [1, most]."""
    return type(value) is int and 1 <= value <= most


def _is_name(value: Any) -> bool:
    """A string of at most 255 bytes in UTF-8, which cannot encode half a surrogate pair."""
    try:
        return isinstance(value, str) and len(value.encode()) <= 255
    except UnicodeEncodeError:
        return False


def _are_names(names: list[Any]) -> bool:
    return all(_is_name(name) for name in names) and len(set(names)) == len(names)


def _is_shape(shape: list[Any]) -> bool:
    return (
        len(shape) == 3
        and is_whole(shape[0], 64)
        and all(is_whole(side, 4096) for side in shape[1:])
    )


def _are_weights(weights: list[Any]) -> bool:
    return len(weights) > 0 and all(
        type(weight) in (int, float) and 0 < weight <= 2**40 for weight in weights
    )


def _are_hashes(hashes: list[Any]) -> bool:
    return all(is_sha256(value) for value in hashes)


SHAPE_RULE = ("[C, H, W], C in [1, 64], H and W in [1, 4096]", _is_shape)
NAMES_RULE = (f"at most {MAX_CLUSTERS} different strings of at most 255 bytes", _are_names)
HASHES_RULE = ("SHA-256 in hex", _are_hashes)
_RULES: Rules = {
    "shape": SHAPE_RULE,
    "names": NAMES_RULE,
    "weights": ("numbers in (0, 2^40]", _are_weights),
    "clusters": HASHES_RULE,
}
