"""The rules by which images are cut into clusters."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ddm.artifacts import read_json
from ddm.errors import ConfigError, DataError
from train import kmeans
from train.cluster_report import quality
from train.clustering import PartitionConfig, assign
from train.config import Config
from train.data import DataConfig, ImageSet
from train.kmeans import of_equal_sizes
from train.stages.partition import make_partition


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


def purity(images: ImageSet, cluster: torch.Tensor) -> float:
    assert images.labels is not None
    most = [torch.bincount(images.labels[cluster == k]).max() for k in cluster.unique().tolist()]
    return float(sum(most)) / len(cluster)


@pytest.mark.parametrize(
    "settings", [{"fine": 200}, {"balanced": True}, {"fine": 200, "balanced": True}]
)
def test_two_levels_and_equal_sizes_know_the_digits(settings: dict[str, Any]) -> None:
    images = DataConfig().build()
    for seed in range(2):
        cluster, _ = assign(images, PartitionConfig(by="kmeans", k=10, **settings), seed)
        assert purity(images, cluster) > 0.74
        again, _ = assign(images, PartitionConfig(by="kmeans", k=10, **settings), seed)
        assert torch.equal(again, cluster)
        if "balanced" in settings:
            assert sorted(torch.bincount(cluster).tolist()) == [179] * 3 + [180] * 7


def test_points_that_do_not_fit_are_clustered_in_two_levels_by_parts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, means: Path
) -> None:
    caplog.set_level("INFO")
    images = DataConfig().build()
    monkeypatch.setattr(kmeans, "FINE", 150)
    whole, _ = assign(images, PartitionConfig(by="kmeans", k=10, fine=150), 0)
    monkeypatch.setattr(kmeans, "MEMORY_BYTES", 40_000)
    monkeypatch.setattr(kmeans, "_CHUNK_BYTES", 10_000)
    parts, _ = assign(images, PartitionConfig(by="kmeans", k=10), 0)
    assert "two levels of k-means, by partition.fine=150: 1797 points" in caplog.text
    assert torch.equal(parts, whole)
    # features in a file
    network = {"features": str(means), "fine": 150}
    stored, _ = assign(images, PartitionConfig(by="kmeans", k=10, **network), 0)
    monkeypatch.setattr(kmeans, "MEMORY_BYTES", 2**30)
    held, _ = assign(images, PartitionConfig(by="kmeans", k=10, **network), 0)
    assert torch.equal(stored, held)


def test_held_out_images_take_no_place_in_equal_clusters() -> None:
    images = DataConfig().build()
    held = torch.arange(1797) % 5 == 0
    for fine in (None, 200):
        config = PartitionConfig(by="kmeans", k=10, fine=fine, balanced=True)
        cluster, _ = assign(images, config, 0, held)
        changed = images.images.clone()
        changed[held] = 255 - changed[held]
        other, _ = assign(ImageSet(changed), config, 0, held)
        assert torch.equal(cluster[~held], other[~held])
        sizes = torch.bincount(cluster[~held], minlength=10)
        assert int(sizes.max() - sizes.min()) <= 1
        assert len(cluster[held].unique()) > 5


def test_equal_sizes_cost_little_more_than_the_best_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        costs = torch.rand(7, 3, generator=generator)
        found = of_equal_sizes(costs)
        assert torch.bincount(found, minlength=3).tolist() == [3, 2, 2]
        every = [torch.tensor(c) for c in product(range(3), repeat=7)]
        equal = [c for c in every if torch.bincount(c, minlength=3).tolist() == [3, 2, 2]]
        best = min(float(costs[torch.arange(7), c].sum()) for c in equal)
        assert float(costs[torch.arange(7), found].sum()) < best + 0.6
    free = torch.tensor([[0.0, 9.0], [0.0, 1.0], [5.0, 0.0], [5.0, 0.0]])
    assert of_equal_sizes(free).tolist() == [0, 0, 1, 1]
    crowded = torch.tensor([[0.0, 9.0], [0.0, 1.0], [0.0, 5.0], [0.0, 0.5]])
    assert of_equal_sizes(crowded).tolist() == [0, 1, 0, 1]


def test_the_report_is_by_hand(tmp_path: Path) -> None:
    images = torch.tensor([0, 1, 10, 11]).view(4, 1, 1, 1).to(torch.uint8)
    labels = torch.tensor([0, 0, 1, 0])
    found = quality(ImageSet(images, labels), torch.tensor([0, 0, 1, 1]), None, 0)
    by_hand = [1 - 1 / 10.5, 1 - 1 / 9.5, 1 - 1 / 9.5, 1 - 1 / 10.5]
    assert found["silhouette"] == pytest.approx(sum(by_hand) / 4)
    assert found["purity"] == 0.75
    # Pairs: 1 of 6 together in both, 2 by cluster, 3 by label; by chance 2 * 3 / 6 = 1.
    assert found["adjusted_rand_index"] == pytest.approx((1 - 1) / ((2 + 3) / 2 - 1))
    assert quality(ImageSet(images), torch.zeros(4, dtype=torch.int64), None, 0) == {}


def test_a_run_has_the_report_and_a_sheet_of_each_cluster(
    tmp_path: Path, small: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = small(tmp_path, "partition={by: kmeans, k: 4, fine: 50, balanced: true}")
    make_partition(config)
    folder = tmp_path / "partition"
    found = read_json(folder / "quality.json")
    assert found["sizes"] == [60] * 4
    assert {"silhouette", "purity", "adjusted_rand_index"} <= found.keys()
    assert f"silhouette {found['silhouette']:.3f}, purity {found['purity']:.3f}" in caplog.text
    sheets = [folder / "clusters" / f"{k:02d}.png" for k in range(4)]
    before = [sheet.read_bytes() for sheet in sheets]
    sheets[2].unlink()
    make_partition(config)
    assert [sheet.read_bytes() for sheet in sheets] == before
    caplog.clear()
    make_partition(config)
    assert "up to date" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["partition.fine=10"], "partition.fine must be null where partition.by=label, got 10"),
        (["partition.balanced=true"], "partition.balanced must be false where partition.by=label"),
        (
            ["partition.by=kmeans", "partition.k=5", "partition.fine=4"],
            "partition.fine must be at least partition.k, got 4",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(
    tmp_path: Path, small: Callable[..., Config], words: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        small(tmp_path, *words)


def test_more_fine_centres_than_images_are_refused(
    tmp_path: Path, small: Callable[..., Config]
) -> None:
    with pytest.raises(ConfigError, match=r"partition.fine must be in \[3, 240\], got 300"):
        make_partition(small(tmp_path, "partition={by: kmeans, k: 3, fine: 300}"))
