"""A run of two experts and a router, as training leaves it, and the bundle that they make."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from ddm.artifacts import write_artifact
from ddm.bundle import Bundle, read_bundle
from ddm.bundle_writing import Parts, expert_names, write_bundle
from ddm.partition import Partition

SCHEDULE = {"name": "vp_linear", "beta_max": 20.0}


class Run:
    """A partition in two, two experts and a router, as training leaves them, and the bundle they make."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bundle = folder, folder / "bundle"
        images = torch.arange(5 * 4, dtype=torch.uint8).reshape(5, 1, 2, 2)
        self.partition = Partition.write(
            folder / "partition", images, torch.tensor([0, 0, 1, 0, 1]), ["a", "b"], None
        )
        self.experts = [folder / "experts" / f"{k:02d}" / "expert" for k in range(2)]
        self.router = folder / "router" / "router"
        for k in range(2):
            self.train(k)
        facts = self.facts(kind="router", mixture=self.partition.mixture.hash)
        write_artifact(self.router, {"weight": torch.tensor([9.0])}, facts)

    def facts(self, **facts: Any) -> dict[str, Any]:
        common = {
            "kind": "expert",
            "shape": [1, 2, 2],
            "range": [-1, 1],
            "schedule": SCHEDULE,
        }
        return {**common, **facts}

    def train(self, k: int, weight: float = 0.0, **facts: Any) -> None:
        tensors = {"weight": torch.tensor([k + weight])}
        cut = self.partition
        own = {"name": cut.names[k], "count": cut.sizes[k], "cluster": cut.hashes[k]}
        write_artifact(self.experts[k], tensors, self.facts(**{**own, **facts}))

    def parts(self, router: Path | None) -> Parts:
        experts = dict(zip(expert_names(2), self.experts, strict=True))
        return Parts(self.partition.mixture, SCHEDULE, experts, router)

    def write(self) -> None:
        write_bundle(self.bundle, self.parts(self.router), "test")


def read_whole(folder: Path, only: Collection[str] | None = None) -> Bundle:
    """A bundle with its weights read."""
    bundle = read_bundle(folder, only)
    for artifact in bundle.artifacts:
        assert artifact.tensors.keys() == artifact.layout.keys()
    return bundle
