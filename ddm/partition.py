"""A data set split into K clusters, one file per cluster, so that an expert can read its cluster
and nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.artifacts import (
    digest,
    is_sha256,
    read_json,
    read_tensors,
    sha256,
    write_json,
    write_tensors,
)
from ddm.errors import ArtifactError, DataError, shown

MAX_CLUSTERS = 10_000


@dataclass(frozen=True)
class Partition:
    """A partition without its images.

    shape: of one image, `[C, H, W]`
    names: of the clusters, unique
    sizes: images per cluster, each at least 1
    hashes: SHA-256 of each cluster's file, in hex

    On disk a folder: `partition.json` and `cluster-00.safetensors` ... with the tensors `images`
    (uint8 `[n, C, H, W]`), `index` (int64 `[n]`, positions in the data set) and, if the data set
    has them, `labels` (int64 `[n]`).
    """

    shape: list[int]
    names: list[str]
    sizes: list[int]
    hashes: list[str]

    @property
    def k(self) -> int:
        """The number of clusters."""
        return len(self.sizes)

    @property
    def pi(self) -> Tensor:
        """Mixture weights: each cluster's fraction of the images, float32 `[K]`."""
        return torch.tensor(self.sizes) / sum(self.sizes)

    @property
    def hash(self) -> str:
        """The content hash: two partitions are the same if and only if their hashes are."""
        return digest(asdict(self))

    @staticmethod
    def write(
        folder: Path, images: Tensor, cluster: Tensor, names: Sequence[str], labels: Tensor | None
    ) -> "Partition":
        """Split `images` (uint8 `[N, C, H, W]`) by `cluster` (int64 `[N]`, values below
        `len(names)`) into a folder.

        Raises `DataError` naming a cluster without images, `ArtifactError` naming a file that
        cannot be written.
        """
        sizes = torch.bincount(cluster, minlength=len(names)).tolist()
        assert len(sizes) == len(names)
        if len(names) > MAX_CLUSTERS:
            raise DataError(f"a partition has at most {MAX_CLUSTERS} clusters, got {len(names)}")
        for k, size in enumerate(sizes):
            if size == 0:
                raise DataError(
                    f"cluster {k} ({names[k]}) of {len(names)} has no images: "
                    "every cluster needs at least one"
                )
        hashes = []
        for k in range(len(names)):
            index = (cluster == k).nonzero()[:, 0]
            tensors = {"images": images[index], "index": index}
            if labels is not None:
                tensors["labels"] = labels[index]
            path = Partition.file(folder, k)
            write_tensors(path, tensors)
            hashes.append(sha256(path))
        partition = Partition(list(images.shape[1:]), list(names), sizes, hashes)
        write_json(folder / "partition.json", {**asdict(partition), "hash": partition.hash})
        return partition

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
        partition = Partition(**{key: facts[key] for key in _RULES})
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

    def cluster(self, folder: Path, k: int) -> dict[str, Tensor]:
        """The tensors of cluster k and of no other.

        Raises `ArtifactError` if its file is not the one of this partition.
        """
        return read_tensors(self.file(folder, k), self.hashes[k])

    def all(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of all clusters, concatenated, and `cluster` (int64 `[N]`): for the router
        and for evaluation.
        """
        clusters = [self.cluster(folder, k) for k in range(self.k)]
        whole = {name: torch.cat([c[name] for c in clusters]) for name in clusters[0]}
        whole["cluster"] = torch.repeat_interleave(torch.arange(self.k), torch.tensor(self.sizes))
        return whole


def _fault(facts: Any) -> str | None:
    """What is wrong with the description of a partition, or None."""
    if not isinstance(facts, dict):
        return f"it must be an object, got {shown(facts)}"
    for key, (rule, holds) in _RULES.items():
        value = facts.get(key)
        if not (isinstance(value, list) and len(value) <= MAX_CLUSTERS and holds(value)):
            return f"{key} must be {rule}, got {shown(value)}"
    lengths = {key: len(facts[key]) for key in ("names", "sizes", "hashes")}
    if len(set(lengths.values())) > 1:
        return f"names, sizes and hashes must have one length, got {lengths}"
    return None


def _whole(value: Any, most: int) -> bool:
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
        len(shape) == 3 and _whole(shape[0], 64) and all(_whole(side, 4096) for side in shape[1:])
    )


def _are_sizes(sizes: list[Any]) -> bool:
    return len(sizes) > 0 and all(_whole(size, 2**40) for size in sizes)


def _are_hashes(hashes: list[Any]) -> bool:
    return all(is_sha256(value) for value in hashes)


_RULES: dict[str, tuple[str, Callable[[list[Any]], bool]]] = {
    "shape": ("[C, H, W], C in [1, 64], H and W in [1, 4096]", _is_shape),
    "names": (f"at most {MAX_CLUSTERS} different strings of at most 255 bytes", _are_names),
    "sizes": ("whole numbers in [1, 2^40]", _are_sizes),
    "hashes": ("SHA-256 in hex", _are_hashes),
}
