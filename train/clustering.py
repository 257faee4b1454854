"""How a data set is cut into clusters: by label, by attributes, or by k-means."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ddm.errors import ConfigError, DataError, require
from train.data import ImageSet
from train.kmeans import kmeans, points

log = logging.getLogger(__name__)


@dataclass
class PartitionConfig:
    """How the images are cut into clusters.

    - `by`: the rule. `label` and `attribute` use what comes with the images; `kmeans` uses pixels
      or `features`.
    - `k`: the number of clusters, at least 1. For label and attribute it is the most there can be:
      neighbouring classes are merged down to it, fewer classes have one cluster each, and null is
      one cluster per class. 1 puts all images into one cluster, whatever the rule.
    - `attributes`: for by=attribute: every combination of their values is a cluster.
    - `features`: for by=kmeans: a TorchScript file, uint8 `[B, 3, H, W]` -> `[B, d]`; null is
      pixels.
    - `fine`: for by=kmeans: two levels. Mini-batch k-means finds so many fine centres, at least k,
      and k-means over these the clusters: for any number of images. null is one level, over all
      images at once, or 1024 where their points would take more than 1 GiB.
    - `balanced`: for by=kmeans: clusters of equally many images, but for one.
    - `holdout`: the fraction of the images, in [0, 1), that no training sees, nor k-means when it
      fits: for validation. Which ones depends on `seed` and the number of images alone. They get
      a cluster by the same rule, and are written in files of their own.
    """

    by: Literal["label", "attribute", "kmeans"] = "label"
    k: int | None = None
    attributes: list[str] = field(default_factory=list)
    features: str | None = None
    fine: int | None = None
    balanced: bool = False
    holdout: float = 0.0

    def check(self) -> None:
        """Raise `ConfigError` naming the key `partition.…` of a value that makes no sense."""
        require(self.k is None or self.k >= 1, "partition.k", "be at least 1", self.k)
        require(0 <= self.holdout < 1, "partition.holdout", "be in [0, 1)", self.holdout)
        if self.by == "kmeans":
            require(self.k is not None, "partition.k", "be given for partition.by=kmeans", self.k)
        rule = f"be null where partition.by={self.by}"
        require(self.by == "kmeans" or self.fine is None, "partition.fine", rule, self.fine)
        rule = f"be false where partition.by={self.by}"
        require(self.by == "kmeans" or not self.balanced, "partition.balanced", rule, True)
        rule = "be at least partition.k"
        least = self.k or 1
        require(self.fine is None or self.fine >= least, "partition.fine", rule, self.fine)
        if self.by == "attribute":
            require(
                len(self.attributes) > 0,
                "partition.attributes",
                "name at least one attribute for partition.by=attribute",
                [],
            )


def held_out(count: int, config: PartitionConfig, seed: int) -> Tensor:
    """Which of `count` images are held out, bool `[count]`: a random `config.holdout` of them.

    Raises `ConfigError` naming the key if that is no image, or all of them.
    """
    held = torch.zeros(count, dtype=torch.bool)
    if config.holdout == 0:
        return held
    chosen = round(config.holdout * count)
    rule = f"hold out at least one of the {count} images and leave one"
    require(1 <= chosen < count, "partition.holdout", rule, config.holdout)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held[order[:chosen]] = True
    return held


def check_left(
    cluster: Tensor, names: Sequence[str], held: Tensor, config: PartitionConfig
) -> None:
    """Raise `ConfigError` naming the key if all images of a cluster are held out."""
    sizes = torch.bincount(cluster, minlength=len(names))
    left = torch.bincount(cluster[~held], minlength=len(names))
    for k in ((sizes > 0) & (left == 0)).nonzero()[:, 0].tolist():
        raise ConfigError(
            f"partition.holdout must leave every cluster an image to learn from, "
            f"cluster {k} ({names[k]}) has none left with {config.holdout}",
            "partition.holdout",
        )


def assign(
    images: ImageSet, config: PartitionConfig, seed: int, held: Tensor | None = None
) -> tuple[Tensor, list[str]]:
    """The cluster of every image, int64 `[N]`, and the clusters' names.

    k-means is fitted without the images that are `held` out, bool `[N]`.
    Raises `ConfigError` or `DataError` naming the key if the images lack what the rule needs.
    """
    n = len(images.images)
    held = torch.zeros(n, dtype=torch.bool) if held is None else held
    learned = int((~held).sum())
    if config.k is not None and config.k > learned:
        raise DataError(
            f"partition.k must be at most the number of images, {learned}, got {config.k}"
        )
    if config.k == 1:
        return torch.zeros(n, dtype=torch.int64), ["all"]
    match config.by:
        case "kmeans":
            assert config.k is not None
            with points(images, config.features) as found:
                cluster = kmeans(found, ~held, config.k, seed, config.fine, config.balanced)
            return cluster, [f"cluster {k}" for k in range(config.k)]
        case "label":
            return _merged(*_labels(images), config.k)
        case "attribute":
            return _merged(*_combinations(images, config.attributes), config.k)


def _labels(images: ImageSet) -> tuple[Tensor, list[str]]:
    if images.labels is None:
        raise ConfigError(
            "partition.by must be attribute or kmeans for images without labels, got 'label'"
        )
    return images.labels, list(images.label_names)


def _combinations(images: ImageSet, wanted: list[str]) -> tuple[Tensor, list[str]]:
    """One group per combination of attributes, counted in binary: the first is the highest bit."""
    if images.attributes is None:
        raise ConfigError(
            "partition.by must be label or kmeans for images without attributes, got 'attribute'"
        )
    group = torch.zeros(len(images.images), dtype=torch.int64)
    names = [""]
    for attribute in wanted:
        if attribute not in images.attribute_names:
            known = ", ".join(images.attribute_names)
            raise ConfigError(f"partition.attributes must be among {known}; got {attribute!r}")
        column = list(images.attribute_names).index(attribute)
        group = 2 * group + images.attributes[:, column]
        word = attribute.replace("_", " ").lower()
        names = [
            f"{before}, {value}".lstrip(", ") for before in names for value in (f"not {word}", word)
        ]
    return group, names


def _merged(group: Tensor, names: list[str], k: int | None) -> tuple[Tensor, list[str]]:
    """At most k clusters of neighbouring groups, as even in number of groups as possible."""
    if k is not None and k > len(names):
        log.warning(
            "partition  %d clusters, one per class: there are fewer than partition.k=%d",
            len(names),
            k,
        )
    if k is None or k >= len(names):
        return group, names
    cluster_of = torch.arange(len(names)) * k // len(names)
    merged: list[list[str]] = [[] for _ in range(k)]
    for name, cluster in zip(names, cluster_of.tolist(), strict=True):
        merged[cluster].append(name)
    return cluster_of[group], [" + ".join(members) for members in merged]
