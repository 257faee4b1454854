"""What images are conditioned on, a class or attributes, guidance towards it, and guidance away from
a worse network.

A condition is a vector `[C]`, one number per name of a vocabulary: of a class 1 at its own name; of
attributes 1 where one is wanted, -1 where it is not, 0 where nothing is said of it. A vector of
zeros is no condition.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ddm.errors import ArtifactError, ConfigError, shown
from ddm.seed_model import is_above

Kind = Literal["label", "attributes"]

# (x [B, ...], t [] or [B], vector [B, C]) -> E[x0 | x_t = x, c], or without a vector
ConditionalDenoiser = Callable[..., Tensor]


@dataclass(frozen=True)
class Vocabulary:
    """The names that a condition may use: of classes, or of attributes."""

    kind: Kind
    names: list[str]

    def vectors(self, values: Tensor) -> Tensor:
        """The vectors `[B, C]` of labels, int64 `[B]`, or of attributes, uint8 `[B, C]`."""
        if self.kind == "label":
            return F.one_hot(values, len(self.names)).float()
        return values.float() * 2 - 1

    def vector(self, condition: Mapping[str, int]) -> Tensor:
        """The vector `[C]` of a condition that `check` lets through; zeros for an empty one."""
        vector = torch.zeros(len(self.names))
        for name, value in condition.items():
            vector[self.names.index(name)] = 1.0 if value else -1.0
        return vector

    def check(self, condition: Mapping[str, int]) -> None:
        """Raise `ConfigError` naming the key `condition` of a condition that cannot be."""
        what = "class" if self.kind == "label" else "attribute"
        for name in condition:
            if name not in self.names:
                raise ConfigError(
                    f"condition must name one of the {what} names {', '.join(self.names)}; "
                    f"got {shown(name)}",
                    "condition",
                )
        if self.kind == "label" and condition and list(condition.values()) != [1]:
            raise ConfigError(
                f"condition must name one class, got {shown(dict(condition))}", "condition"
            )

    def counts(self, values: Tensor) -> list[int]:
        """How many images are of each class, or have each attribute; `values` as in `vectors`."""
        if self.kind == "label":
            return torch.bincount(values, minlength=len(self.names)).tolist()
        counts: list[int] = values.sum(dim=0).tolist()
        return counts


@dataclass(frozen=True)
class ImageConditions:
    """The conditions of N images: labels int64 `[N]`, or attributes, 0 or 1, uint8 `[N, C]`."""

    vocabulary: Vocabulary
    values: Tensor

    @property
    def facts(self) -> dict[str, Any]:
        """The vocabulary and the counts, for an artifact."""
        counts = self.vocabulary.counts(self.values)
        kind, names = self.vocabulary.kind, self.vocabulary.names
        return {"kind": kind, "names": names, "counts": counts, "images": len(self.values)}

    def vectors(self, place: Tensor) -> Tensor:
        """The vectors `[B, C]` of the images at places `[B]`."""
        return self.vocabulary.vectors(self.values[place])

    def to(self, device: torch.device) -> "ImageConditions":
        """The same on a device."""
        return ImageConditions(self.vocabulary, self.values.to(device))


@dataclass(frozen=True)
class ClusterCounts:
    """How many of a cluster's images have each name of the vocabulary."""

    vocabulary: Vocabulary
    counts: list[int]
    images: int

    @staticmethod
    def from_facts(facts: Any, path: Path) -> "ClusterCounts | None":
        """Those that an expert's artifact describes, None for an expert without a condition.

        Raises `ArtifactError` naming the file.
        """
        if facts is None:
            return None
        if not isinstance(facts, dict) or (fault := _fault(facts)):
            what = fault if isinstance(facts, dict) else f"it must be an object, got {shown(facts)}"
            raise ArtifactError(f"{path} is damaged: condition: {what}")
        vocabulary = Vocabulary(facts["kind"], facts["names"])
        return ClusterCounts(vocabulary, facts["counts"], facts["images"])

    def fraction(self, condition: Mapping[str, int]) -> float:
        """The fraction of the cluster's images that fit a condition, in [0, 1]. That of several
        attributes is the product of theirs, as if they were independent within the cluster.
        """
        product = 1.0
        for name, value in condition.items():
            part = self.counts[self.vocabulary.names.index(name)] / self.images
            product *= part if value else 1 - part
        return product


def check_same_vocabulary(conditions: Mapping[Path, Any]) -> None:
    """Raise `ArtifactError` naming a file whose vocabulary is not that of the first; `conditions`
    are those of experts' artifacts, by file.
    """
    found = {file: ClusterCounts.from_facts(facts, file) for file, facts in conditions.items()}
    words = {file: None if one is None else one.vocabulary for file, one in found.items()}
    for file, vocabulary in words.items():
        first = next(iter(words))
        if vocabulary != words[first]:
            raise ArtifactError(
                f"{file} does not fit {first}: its condition is {_described(vocabulary)}, there it "
                f"is {_described(words[first])}"
            )


def _described(vocabulary: Vocabulary | None) -> str:
    if vocabulary is None:
        return "none"
    return f"{vocabulary.kind} of {shown(vocabulary.names)}"


class Conditions(NamedTuple):
    """What B images are conditioned on, and how much they are guided.

    vector: `[B, C]`; `[B, 0]` for experts that take no condition. guidance, autoguidance: float32
    `[B]`, on the CPU; 1 for none.
    """

    vector: Tensor
    guidance: Tensor
    autoguidance: Tensor

    @property
    def evaluations(self) -> Tensor:
        """Of a network for each image and expert, int64 `[B]`: one more for each guidance."""
        return 1 + (self.guidance != 1).long() + (self.autoguidance != 1).long()


@dataclass(frozen=True)
class Condition:
    """What all images of one sampling plan are conditioned on, and how much they are guided.

    vector: `[C]`; `[0]` for experts that take no condition. guidance, autoguidance: the weights in
    `guided`, at t in `interval`; elsewhere they are 1. learned_from: the first t that the guide has
    learned; below it autoguidance is 1, and also above `above`, where the guide is the denoiser.
    """

    vector: Tensor
    guidance: float = 1.0
    autoguidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    learned_from: float = 0.0
    above: float = 1.0

    def at(self, t: Tensor, n: int) -> Conditions:
        """Of n images at t, `[]` or `[n]`."""
        low, high = self.interval
        t = t.detach().cpu()
        inside = (low <= t) & (t <= high)
        guidance = torch.where(inside, self.guidance, 1.0)
        guides = inside & (t >= self.learned_from) & ~is_above(t, self.above)
        autoguidance = torch.where(guides, self.autoguidance, 1.0)
        weights = (weight.float().expand(n) for weight in (guidance, autoguidance))
        return Conditions(self.vector.expand(n, -1), *weights)


def guided(
    denoise: ConditionalDenoiser,
    x: Tensor,
    t: Tensor,
    given: Conditions,
    guide: ConditionalDenoiser | None = None,
) -> Tensor:
    """`D(x, t, c) + (w - 1) (D(x, t, c) - D(x, t)) + (v - 1) (D(x, t, c) - G(x, t, c))`.

    w is the guidance, classifier-free (arXiv 2207.12598, equation 6, whose w is this one less 1), and v
    the autoguidance, away from a worse network G, the `guide` (arXiv 2406.02507, equation 3). x
    `[B, ...]`, t `[]` or `[B]`. A network is called only for images that need it: for those with
    w = v = 1 that is D alone, once. Without a condition, denoise and guide take x and t alone.
    """
    answers = found = _ask(denoise, x, t, given.vector)
    others = (
        (given.guidance, denoise, torch.zeros_like(given.vector)),
        (given.autoguidance, guide, given.vector),
    )
    for weights, network, vector in others:
        rows = (weights != 1).nonzero()[:, 0]
        if not len(rows):
            continue
        assert network is not None
        weight = weights[rows].to(answers).reshape(-1, *[1] * (x.ndim - 1))
        rows = rows.to(x.device)
        times = t[rows.to(t.device)] if t.ndim else t
        away = answers[rows] - _ask(network, x[rows], times, vector[rows])
        found = found.index_add(0, rows, (weight - 1) * away)
    return found


def _ask(denoise: ConditionalDenoiser, x: Tensor, t: Tensor, vector: Tensor) -> Tensor:
    return denoise(x, t, vector) if vector.shape[1] else denoise(x, t)


def names_fault(facts: Mapping[str, Any]) -> str | None:
    """What is wrong with the description of a vocabulary, or None."""
    kind, names = facts.get("kind"), facts.get("names")
    if kind not in ("label", "attributes"):
        return f"kind must be label or attributes, got {shown(kind)}"
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        return f"names must be strings, at least one, got {shown(names)}"
    if len(set(names)) < len(names):
        return f"names must be different, got {shown(names)}"
    return None


def _fault(facts: Mapping[str, Any]) -> str | None:
    if fault := names_fault(facts):
        return fault
    counts, images = facts.get("counts"), facts.get("images")
    if type(images) is not int or not 1 <= images <= 2**40:
        return f"images must be a whole number in [1, 2^40], got {shown(images)}"
    rule = f"counts must be {len(facts['names'])} whole numbers in [0, {images}]"
    if not isinstance(counts, list) or len(counts) != len(facts["names"]):
        return f"{rule}, got {shown(counts)}"
    if not all(type(count) is int and 0 <= count <= images for count in counts):
        return f"{rule}, got {shown(counts)}"
    return None
