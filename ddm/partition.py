"""A data set cut into K clusters, each in a file of its own, so that an expert can read its cluster and nothing else."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.artifacts import digest, read_json, read_tensors, sha256, write_json, write_tensors
from ddm.errors import ArtifactError, DataError


@dataclass(frozen=True)
class Partition:
    """What is known of a partition without its images: the clusters' names, sizes and files' SHA-256.

    On disk a folder: `partition.json` and `cluster-00.safetensors` ... with `images` (uint8 `[n, C, H, W]`), `index` (int64
    `[n]`, the place in the data set) and, where the data set has them, `labels` (int64 `[n]`).
    """

    shape: list[int]  # of one image, [C, H, W]
    names: list[str]
    sizes: list[int]
    hashes: list[str]

    @property
    def k(self) -> int:
        """The number of clusters."""
        return len(self.sizes)

    @property
    def pi(self) -> Tensor:
        """The clusters' shares of the images, float32 `[K]`."""
        return torch.tensor(self.sizes) / sum(self.sizes)

    @property
    def hash(self) -> str:
        """The content hash: two partitions are the same if and only if they have the same one."""
        return digest(asdict(self))

    @staticmethod
    def write(
        folder: Path, images: Tensor, cluster: Tensor, names: Sequence[str], labels: Tensor | None
    ) -> "Partition":
        """Cut `images` (uint8 `[N, C, H, W]`) by `cluster` (int64 `[N]`, values below `len(names)`) and write the folder.

        Raises `DataError` naming a cluster without images.
        """
        sizes = torch.bincount(cluster, minlength=len(names)).tolist()
        assert len(sizes) == len(names)
        for k, size in enumerate(sizes):
            if size == 0:
                raise DataError(
                    f"cluster {k} ({names[k]}) of {len(names)} has no images: every cluster needs at least one"
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
        """The partition in a folder. Raises `ArtifactError` where its file is missing, or does not match its own hash."""
        path = folder / "partition.json"
        return Partition.from_facts(read_json(path), path)

    @staticmethod
    def from_facts(facts: Any, path: Path) -> "Partition":
        """The partition that plain data from the file `path` describes. Raises `ArtifactError` where it does not."""
        try:
            partition = Partition(
                **{key: facts[key] for key in ("shape", "names", "sizes", "hashes")}
            )
            found, expected = partition.hash, facts["hash"]
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path} does not describe a partition: {error!r}") from error
        if found != expected:
            raise ArtifactError(
                f"{path} is damaged: the hash of its partition is {found}, it says {expected}"
            )
        return partition

    @staticmethod
    def file(folder: Path, k: int) -> Path:
        """Where cluster k lies."""
        return folder / f"cluster-{k:02d}.safetensors"

    def cluster(self, folder: Path, k: int) -> dict[str, Tensor]:
        """The tensors of cluster k, and of no other. Raises `ArtifactError` where its file is not the one of this partition."""
        return read_tensors(self.file(folder, k), self.hashes[k])

    def all(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of all clusters, one after another, and `cluster` (int64 `[N]`): for the router and for evaluation."""
        clusters = [self.cluster(folder, k) for k in range(self.k)]
        whole = {name: torch.cat([c[name] for c in clusters]) for name in clusters[0]}
        whole["cluster"] = torch.repeat_interleave(torch.arange(self.k), torch.tensor(self.sizes))
        return whole
