"""How a data set is cut into clusters: by label, by attributes, or by k-means."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ddm.errors import ConfigError, DataError, require
from train.data import ImageSet
from train.evaluation.features import script_network
from train.progress import bar


@dataclass
class PartitionConfig:
    """The rule of a partition. `k=1` puts everything into one cluster, whatever the rule: the monolithic baseline."""

    by: Literal["label", "attribute", "kmeans"] = "label"
    k: int | None = (
        None  # clusters; null is one a label or combination of attributes; fewer merges neighbours
    )
    attributes: list[str] = field(
        default_factory=list
    )  # for by=attribute: every combination is a cluster
    features: str | None = (
        None  # for by=kmeans: a TorchScript network, uint8 [B, C, H, W] -> [B, d]; null is pixels
    )

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

    Raises `ConfigError` or `DataError` naming the key where the images do not have what the rule needs.
    """
    n = len(images.images)
    if config.k is not None and config.k > n:
        raise DataError(f"partition.k must be at most the number of images, {n}, got {config.k}")
    if config.k == 1:
        return torch.zeros(n, dtype=torch.int64), ["all"]
    if config.by == "kmeans":
        assert config.k is not None
        return _kmeans(_features(images.images, config.features), config.k, seed), [
            f"cluster {k}" for k in range(config.k)
        ]
    if config.by == "label":
        if images.labels is None:
            raise ConfigError(
                "partition.by must be attribute or kmeans for images without labels, got 'label'"
            )
        group, names = images.labels, list(images.label_names)
    else:
        group, names = _combinations(images, config.attributes)
    return _merged(group, names, config.k)


def _combinations(images: ImageSet, wanted: list[str]) -> tuple[Tensor, list[str]]:
    """One group a combination of attributes, counted in binary with the first attribute as the highest bit."""
    if images.attributes is None:
        raise ConfigError(
            "partition.by must be label or kmeans for images without attributes, got 'attribute'"
        )
    group = torch.zeros(len(images.images), dtype=torch.int64)
    names = [""]
    for name in wanted:
        if name not in images.attribute_names:
            raise ConfigError(
                f"partition.attributes must be among {', '.join(images.attribute_names)}; got {name!r}"
            )
        group = 2 * group + images.attributes[:, list(images.attribute_names).index(name)]
        plain = name.replace("_", " ").lower()
        names = [
            f"{before}, {word}".lstrip(", ") for before in names for word in (f"not {plain}", plain)
        ]
    return group, names


def _merged(group: Tensor, names: list[str], k: int | None) -> tuple[Tensor, list[str]]:
    """k clusters of neighbouring groups, as even in number of groups as can be."""
    if k is None or k == len(names):
        return group, names
    require(
        k <= len(names),
        "partition.k",
        f"be at most {len(names)}, the number of labels or combinations",
        k,
    )
    cluster_of = torch.arange(len(names)) * k // len(names)
    members = [
        [name for name, c in zip(names, cluster_of.tolist(), strict=True) if c == cluster]
        for cluster in range(k)
    ]
    return cluster_of[group], [" + ".join(m) for m in members]


def _kmeans(points: Tensor, k: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans

    return torch.from_numpy(
        KMeans(k, n_init=3, random_state=seed % 2**32).fit_predict(points.numpy())
    ).long()


def _features(images: Tensor, network: str | None) -> Tensor:
    """Points to cluster, float32 `[N, d]`: pixels, or what a TorchScript network says of the images."""
    if network is None:
        return images.flatten(1).float()
    with bar("features for k-means", len(images)) as advance:
        return script_network("partition.features", network, "cpu")(images, advance).features
