"""How a data set is cut into clusters: by label, by attributes, or by k-means."""

import logging
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ddm.errors import ConfigError, DataError, require
from train.data import ImageSet
from train.evaluation.feature_network import script_network
from train.progress import bar

log = logging.getLogger(__name__)

_RESTARTS = 10  # of k-means: on the digits 3 end in a poor optimum for 4 of 10 seeds, 10 for none


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
    """

    by: Literal["label", "attribute", "kmeans"] = "label"
    k: int | None = None
    attributes: list[str] = field(default_factory=list)
    features: str | None = None

    def check(self) -> None:
        """Raise `ConfigError` naming the key `partition.…` of a value that makes no sense."""
        require(self.k is None or self.k >= 1, "partition.k", "be at least 1", self.k)
        if self.by == "kmeans":
            require(self.k is not None, "partition.k", "be given for partition.by=kmeans", self.k)
        if self.by == "attribute":
            require(
                len(self.attributes) > 0,
                "partition.attributes",
                "name at least one attribute for partition.by=attribute",
                [],
            )


def assign(images: ImageSet, config: PartitionConfig, seed: int) -> tuple[Tensor, list[str]]:
    """The cluster of every image, int64 `[N]`, and the clusters' names.

    Raises `ConfigError` or `DataError` naming the key if the images lack what the rule needs.
    """
    n = len(images.images)
    if config.k is not None and config.k > n:
        raise DataError(f"partition.k must be at most the number of images, {n}, got {config.k}")
    if config.k == 1:
        return torch.zeros(n, dtype=torch.int64), ["all"]
    match config.by:
        case "kmeans":
            assert config.k is not None
            cluster = _kmeans(_features(images.images, config.features), config.k, seed)
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


def _kmeans(points: Tensor, k: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans

    kmeans = KMeans(k, n_init=_RESTARTS, random_state=seed % 2**32)
    return torch.from_numpy(kmeans.fit_predict(points.numpy())).long()


def _features(images: Tensor, network: str | None) -> Tensor:
    """Points to cluster, float32 `[N, d]`: pixels, or a TorchScript network's features."""
    if network is None:
        return images.flatten(1).float()
    with bar("features for k-means", len(images)) as advance:
        return script_network("partition.features", network, "cpu")(images, advance).features
