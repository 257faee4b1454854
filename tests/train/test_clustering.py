"""The rules by which images are cut into clusters."""

from pathlib import Path

import pytest
import torch

from ddm.errors import DataError
from train.clustering import PartitionConfig, assign
from train.data import DataConfig, ImageSet


def test_fewer_clusters_than_labels_merge_neighbours() -> None:
    images = ImageSet(
        torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5), ["a", "b", "c", "d", "e"]
    )
    cluster, names = assign(images, PartitionConfig(k=2), 0)
    assert cluster.tolist() == [0, 0, 0, 1, 1]
    assert names == ["a + b + c", "d + e"]


def test_more_clusters_than_labels_are_one_per_label_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = ImageSet(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2, 1]), "abc")
    cluster, names = assign(images, PartitionConfig(k=4), 0)
    assert (cluster.tolist(), list(names)) == ([0, 1, 2, 1], ["a", "b", "c"])
    assert "3 clusters, one per class: there are fewer than partition.k=4" in caplog.text
    with pytest.raises(DataError, match="partition.k must be at most the number of images, 4"):
        assign(images, PartitionConfig(k=5), 0)


def test_k_means_of_the_digits_ends_in_a_good_optimum_for_every_seed() -> None:
    images = DataConfig().build()
    assert images.labels is not None
    for seed in range(4):
        cluster, _ = assign(images, PartitionConfig(by="kmeans", k=10), seed)
        most = [torch.bincount(images.labels[cluster == k]).max() for k in range(10)]
        assert float(sum(most)) / len(cluster) > 0.78  # 3 restarts give 0.73 for seed 0


def test_k_means_finds_well_separated_groups_in_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(30) % 3
    images = (
        group[:, None, None, None] * 80 + torch.randint(0, 20, (30, 1, 4, 4), generator=generator)
    ).to(torch.uint8)
    cluster, names = assign(ImageSet(images), PartitionConfig(by="kmeans", k=3), 0)
    assert names == ["cluster 0", "cluster 1", "cluster 2"]
    for g in range(3):
        assert len(cluster[group == g].unique()) == 1
    assert len(cluster.unique()) == 3


def test_k_means_uses_the_features_of_a_given_network(tmp_path: Path) -> None:
    class Corner(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, 0, :1, 0].float()

    with pytest.warns(Warning, match="torch.jit"):
        torch.jit.script(Corner()).save(tmp_path / "corner.pt")
    images = torch.randint(0, 256, (20, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    bright = torch.arange(20) % 2
    images[:, 0, 0, 0] = (bright * 200).to(torch.uint8)
    cluster, _ = assign(
        ImageSet(images), PartitionConfig(by="kmeans", k=2, features=str(tmp_path / "corner.pt")), 0
    )
    assert torch.equal(cluster, bright) or torch.equal(cluster, 1 - bright)


def test_one_cluster_holds_all_whatever_the_rule() -> None:
    images = ImageSet(torch.zeros(4, 1, 2, 2, dtype=torch.uint8))
    assert assign(images, PartitionConfig(by="attribute", attributes=["Male"], k=1), 0)[
        0
    ].tolist() == [0, 0, 0, 0]
