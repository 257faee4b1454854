"""A data set split into K clusters, one file per cluster, so that an expert can read its cluster
and nothing else.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.artifacts import (
    digest,
    read_json,
    read_tensors,
    sha256,
    write_json,
)
from ddm.condition import ImageConditions, Vocabulary, names_fault
from ddm.errors import ArtifactError, DataError, shown
from ddm.mixture import (
    HASHES_RULE,
    MAX_CLUSTERS,
    NAMES_RULE,
    SHAPE_RULE,
    Mixture,
    Rules,
    is_whole,
    list_fault,
)
from ddm.row_file import Release, write_rows


@dataclass(frozen=True)
class Partition:
    """A partition without its images.

    shape: of one image, `[C, H, W]`
    names: of the clusters, unique
    sizes: images per cluster, each at least 1
    hashes: SHA-256 of each cluster's file, in hex
    holdout_sizes: held-out images per cluster, at least 0; empty if no image is held out
    holdout_hashes: SHA-256 of each cluster's file of held-out images, likewise
    vocabulary: of what experts are conditioned on; None where they are not

    On disk a folder: `partition.json` and `cluster-00.safetensors` ... with the tensors `images`
    (uint8 `[n, C, H, W]`), `index` (int64 `[n]`, positions in the data set) and, if the data set
    has them, `labels` (int64 `[n]`); where experts are conditioned on attributes, `attributes`
    (uint8 `[n, C]`). Held-out images, which no training may see, are in
    `holdout-00.safetensors` ..., with the same tensors.
    """

    shape: list[int]
    names: list[str]
    sizes: list[int]
    hashes: list[str]
    holdout_sizes: list[int] = field(default_factory=list)
    holdout_hashes: list[str] = field(default_factory=list)
    vocabulary: Vocabulary | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """The partition as plain data; without the keys of the holdout and of the vocabulary if
        there is none.
        """
        facts = asdict(self)
        left_out = [] if self.holdout_sizes else list(_HOLDOUT_RULES)
        left_out += [] if self.vocabulary else ["vocabulary"]
        return {key: value for key, value in facts.items() if key not in left_out}

    @property
    def k(self) -> int:
        """The number of clusters."""
        return len(self.sizes)

    @property
    def pi(self) -> Tensor:
        """Mixture weights: each cluster's fraction of the images, float32 `[K]`."""
        return self.mixture.pi

    @property
    def mixture(self) -> Mixture:
        """The clusters, weighted by their numbers of images."""
        return Mixture(self.shape, self.names, self.sizes, self.hashes)

    @property
    def hash(self) -> str:
        """The content hash: two partitions are the same if and only if their hashes are."""
        return digest(self.facts)

    @staticmethod
    def write(
        folder: Path,
        images: Tensor,
        cluster: Tensor,
        names: Sequence[str],
        labels: Tensor | None,
        held_out: Tensor | None = None,
        release: Release = lambda: None,
        conditions: ImageConditions | None = None,
    ) -> "Partition":
        """Split `images` (uint8 `[N, C, H, W]`) by `cluster` (int64 `[N]`, values below
        `len(names)`) into a folder; those that are `held_out` (bool `[N]`) into their own files.
        `release` is called after every few images: `images` may be a mapped file. `conditions`: of
        the images, for experts with one.

        Raises `DataError` naming a cluster without images, `ArtifactError` naming a file that
        cannot be written.
        """
        held = torch.zeros(len(images), dtype=torch.bool) if held_out is None else held_out
        sizes = torch.bincount(cluster[~held], minlength=len(names)).tolist()
        assert len(sizes) == len(names)
        if len(names) > MAX_CLUSTERS:
            raise DataError(f"a partition has at most {MAX_CLUSTERS} clusters, got {len(names)}")
        for k, size in enumerate(sizes):
            if size == 0:
                raise DataError(
                    f"cluster {k} ({names[k]}) of {len(names)} has no images: "
                    "every cluster needs at least one"
                )

        def written(path: Path, chosen: Tensor) -> str:
            tensors = {"images": images, "index": torch.arange(len(images))}
            if labels is not None:
                tensors["labels"] = labels
            if conditions is not None and conditions.vocabulary.kind == "attributes":
                tensors["attributes"] = conditions.values
            write_rows(path, tensors, chosen.nonzero()[:, 0], release)
            return sha256(path)

        hashes = [
            written(Partition.file(folder, k), (cluster == k) & ~held) for k in range(len(names))
        ]
        holdout_sizes: list[int] = []
        holdout_hashes: list[str] = []
        if held.any():
            holdout_sizes = torch.bincount(cluster[held], minlength=len(names)).tolist()
            holdout_hashes = [
                written(Partition.holdout_file(folder, k), (cluster == k) & held)
                for k in range(len(names))
            ]
        shape = list(images.shape[1:])
        partition = Partition(
            shape,
            list(names),
            sizes,
            hashes,
            holdout_sizes,
            holdout_hashes,
            conditions.vocabulary if conditions else None,
        )
        partition.describe(folder)
        return partition

    def describe(self, folder: Path) -> None:
        """Write `partition.json`, with which a folder that has the clusters' files is complete.

        Raises `ArtifactError` naming the file.
        """
        write_json(folder / "partition.json", {**self.facts, "hash": self.hash})

    def only(self, k: int) -> "Partition":
        """Cluster k alone, a shard: its file is that of this partition, under the name of cluster 0."""
        held = self.holdout_sizes[k : k + 1] if any(self.holdout_sizes[k : k + 1]) else []
        return Partition(
            self.shape,
            [self.names[k]],
            [self.sizes[k]],
            [self.hashes[k]],
            held,
            self.holdout_hashes[k : k + 1] if held else [],
            self.vocabulary,
        )

    @staticmethod
    def read(folder: Path) -> "Partition":
        """The partition in a folder.

        Raises `ArtifactError` if its file is missing or does not match its own hash.
        """
        path = folder / "partition.json"
        return Partition.from_facts(read_json(path), path)

    @staticmethod
    def from_facts(facts: Any, path: Path) -> "Partition":
        """The partition described by plain data from the file `path`.

        Raises `ArtifactError` naming the file.
        """
        if fault := _fault(facts):
            raise ArtifactError(f"{path} does not describe a partition: {fault}")
        known = [*_RULES, *(key for key in _HOLDOUT_RULES if key in facts)]
        vocabulary = Vocabulary(**facts["vocabulary"]) if "vocabulary" in facts else None
        partition = Partition(**{key: facts[key] for key in known}, vocabulary=vocabulary)
        if partition.hash != facts.get("hash"):
            raise ArtifactError(
                f"{path} is damaged: the hash of its partition is {partition.hash}, "
                f"it says {shown(facts.get('hash'))}"
            )
        return partition

    @staticmethod
    def file(folder: Path, k: int) -> Path:
        """The file of cluster k."""
        return folder / f"cluster-{k:02d}.safetensors"

    @staticmethod
    def holdout_file(folder: Path, k: int) -> Path:
        """The file of the held-out images of cluster k."""
        return folder / f"holdout-{k:02d}.safetensors"

    def files(self, folder: Path) -> dict[Path, str]:
        """All files of the clusters and of their held-out images, with their SHA-256."""
        files = {self.file(folder, k): found for k, found in enumerate(self.hashes)}
        held = {self.holdout_file(folder, k): found for k, found in enumerate(self.holdout_hashes)}
        return files | held

    def cluster(self, folder: Path, k: int) -> dict[str, Tensor]:
        """The tensors of cluster k and of no other.

        Raises `ArtifactError` if its file is not the one of this partition.
        """
        return read_tensors(self.file(folder, k), self.hashes[k])

    def conditions(self, cluster: dict[str, Tensor], kind: str, folder: Path) -> ImageConditions:
        """The conditions of the images of `cluster` or `all`: kind is `label` or `attributes`.

        Raises `ArtifactError` if the partition in `folder` was cut for another kind, or for none.
        """
        if self.vocabulary is None or self.vocabulary.kind != kind:
            there = self.vocabulary.kind if self.vocabulary else "none"
            raise ArtifactError(
                f"{folder} was cut for expert.condition={there}, not for {kind}: cut it anew with "
                "the stage 'partition', in a new run"
            )
        values = cluster["labels" if kind == "label" else "attributes"]
        return ImageConditions(self.vocabulary, values)

    def all(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of all clusters, concatenated, and `cluster` (int64 `[N]`): for the router
        and for evaluation.
        """
        return _joined([self.cluster(folder, k) for k in range(self.k)])

    def those(self, folder: Path, clusters: Sequence[str]) -> dict[str, Tensor]:
        """As `all`, of the clusters with these hashes, in their order.

        Raises `ArtifactError` naming the one that this partition does not have.
        """
        for cluster in clusters:
            if cluster not in self.hashes:
                raise ArtifactError(f"{folder} does not hold the images of cluster {cluster}")
        return _joined([self.cluster(folder, self.hashes.index(one)) for one in clusters])

    def in_order(self, folder: Path) -> dict[str, Tensor]:
        """The same as `all`, in the order of the data set, however it was cut."""
        whole = self.all(folder)
        order = whole["index"].argsort()
        return {name: tensor[order] for name, tensor in whole.items()}

    def cluster_holdout(self, folder: Path, k: int) -> dict[str, Tensor]:
        """The tensors of the held-out images of cluster k, as in `cluster`.

        Raises `ArtifactError` if no image is held out, or if the file is not of this partition.
        """
        if not self.holdout_sizes:
            raise ArtifactError(
                f"{folder} has no held-out images: cut it with partition.holdout above 0"
            )
        return read_tensors(self.holdout_file(folder, k), self.holdout_hashes[k])

    def holdout(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of all held-out images, as in `all`: what no training has seen.

        Raises `ArtifactError` if no image is held out.
        """
        return _joined([self.cluster_holdout(folder, k) for k in range(self.k)])


def _joined(clusters: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of clusters, concatenated, and the `cluster` of each image, int64 `[N]`."""
    whole = {name: torch.cat([c[name] for c in clusters]) for name in clusters[0]}
    sizes = torch.tensor([len(c["index"]) for c in clusters])
    whole["cluster"] = torch.repeat_interleave(torch.arange(len(clusters)), sizes)
    return whole


def _fault(facts: Any) -> str | None:
    """What is wrong with the description of a partition, or None."""
    fault = list_fault(facts, _RULES, ("names", "sizes", "hashes"))
    if fault is None and "vocabulary" in facts:
        fault = _vocabulary_fault(facts["vocabulary"])
    return fault or _holdout_fault(facts, len(facts["sizes"]))


def _vocabulary_fault(vocabulary: Any) -> str | None:
    if not isinstance(vocabulary, dict) or set(vocabulary) != {"kind", "names"}:
        return f"vocabulary must have a kind and names, got {shown(vocabulary)}"
    return names_fault(vocabulary)


def _holdout_fault(facts: dict[str, Any], k: int) -> str | None:
    """What is wrong with the description of the held-out images, if there are any, or None."""
    given = [key for key in _HOLDOUT_RULES if key in facts]
    for key in given:
        rule, holds = _HOLDOUT_RULES[key]
        value = facts[key]
        if not (isinstance(value, list) and len(value) == k and holds(value)):
            return f"{key} must be {rule} for each cluster, got {shown(value)}"
    if len(given) == 1:
        return f"holdout_sizes and holdout_hashes must both be there, got only {given[0]}"
    return None


def _are_sizes(sizes: list[Any]) -> bool:
    return len(sizes) > 0 and all(is_whole(size, 2**40) for size in sizes)


def _are_counts(counts: list[Any]) -> bool:
    whole = all(type(count) is int and 0 <= count <= 2**40 for count in counts)
    return whole and sum(counts) > 0


_RULES: Rules = {
    "shape": SHAPE_RULE,
    "names": NAMES_RULE,
    "sizes": ("whole numbers in [1, 2^40]", _are_sizes),
    "hashes": HASHES_RULE,
}
_HOLDOUT_RULES: Rules = {
    "holdout_sizes": ("a whole number in [0, 2^40], not all 0,", _are_counts),
    "holdout_hashes": ("a SHA-256 in hex", HASHES_RULE[1]),
}
