"""`partition.holdout`: images that no training sees, assigned by the same rule."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddm.artifacts import read_json, write_json
from ddm.errors import ArtifactError, ConfigError
from ddm.partition import Partition
from train.clustering import PartitionConfig, assign, check_left, held_out
from train.config import Config, config_file, load_config, shipped_configs
from train.data import ImageSet
from train.stages.partition import make_partition

Small = Callable[..., Config]


def cut(config: Config) -> tuple[Partition, Path]:
    make_partition(config)
    folder = config.folder / "partition"
    return Partition.read(folder), folder


def grouped(n: int = 60) -> tuple[ImageSet, Tensor]:
    """Images of three groups that are far apart, and their group."""
    group = torch.arange(n) % 3
    noise = torch.randint(0, 20, (n, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    return ImageSet((group[:, None, None, None] * 80 + noise).to(torch.uint8)), group


def test_a_tenth_of_the_images_is_apart_with_labels_and_clusters(
    small: Small, tmp_path: Path
) -> None:
    partition, folder = cut(small(tmp_path / "run", "partition.holdout=0.1"))
    trained, held = partition.all(folder), partition.holdout(folder)
    assert (len(trained["index"]), len(held["index"])) == (216, 24)
    assert sorted(trained["index"].tolist() + held["index"].tolist()) == list(range(240))
    # Three clusters of ten digits: 0 to 3, 4 to 6, 7 to 9.
    for part in (trained, held):
        assert torch.equal(part["cluster"], part["labels"] * 3 // 10)


def test_without_a_holdout_nothing_changes(small: Small, tmp_path: Path) -> None:
    plain, folder = cut(small(tmp_path / "plain"))
    zero, _ = cut(small(tmp_path / "zero", "partition.holdout=0"))
    assert plain == zero
    assert plain.holdout_sizes == []
    assert not list(folder.glob("holdout-*"))


def test_the_same_images_are_held_out_whatever_the_clusters(small: Small, tmp_path: Path) -> None:
    words = ("partition.holdout=0.2", "seed=3")
    several, folder = cut(small(tmp_path / "run", *words))
    one, alone = cut(small(tmp_path / "run" / "monolith", "partition.k=1", *words))
    expected = sorted(one.holdout(alone)["index"].tolist())
    assert sorted(several.holdout(folder)["index"].tolist()) == expected
    other, elsewhere = cut(small(tmp_path / "seed", "partition.holdout=0.2", "seed=4"))
    assert sorted(other.holdout(elsewhere)["index"].tolist()) != expected


def test_k_means_is_fitted_without_held_out_images_and_assigns_them() -> None:
    images, group = grouped()
    held = torch.zeros(60, dtype=torch.bool)
    held[:20] = True
    changed = images.images.clone()
    changed[5] = 255 - changed[5]  # a held-out image of another group
    config = PartitionConfig(by="kmeans", k=3)
    cluster, _ = assign(images, config, 0, held)
    other, _ = assign(ImageSet(changed), config, 0, held)
    for g in range(3):
        assert len(cluster[group == g].unique()) == 1
    assert torch.equal(cluster[~held], other[~held])
    alone, _ = assign(ImageSet(images.images[~held]), config, 0)
    assert torch.equal(cluster[~held], alone)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused_by_name(
    small: Small, tmp_path: Path, value: float
) -> None:
    with pytest.raises(ConfigError, match=r"partition.holdout must be in \[0, 1\), got"):
        small(tmp_path, f"partition.holdout={value}")


def test_a_holdout_that_empties_a_cluster_is_refused_by_name(small: Small, tmp_path: Path) -> None:
    config = small(tmp_path / "run", "partition.holdout=0.97", "data.limit=100")
    with pytest.raises(ConfigError, match="partition.holdout must leave every cluster an image"):
        make_partition(config)
    assert not (tmp_path / "run").exists()
    held = torch.tensor([True, True, False])
    with pytest.raises(ConfigError, match=re.escape("cluster 0 (a) has none left with 0.6")):
        check_left(torch.tensor([0, 0, 1]), "ab", held, PartitionConfig(holdout=0.6))


def test_a_holdout_of_no_image_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="partition.holdout must hold out at least one of the 4"):
        held_out(4, PartitionConfig(holdout=0.1), 0)


def test_a_lost_or_changed_file_is_cut_again(small: Small, tmp_path: Path) -> None:
    config = small(tmp_path / "run", "partition.holdout=0.1")
    partition, folder = cut(config)
    path = Partition.holdout_file(folder, 1)
    whole = path.read_bytes()
    for damage in (b"", whole[:-1] + b"x"):
        path.write_bytes(damage)
        assert cut(config)[0] == partition
        assert path.read_bytes() == whole
    path.unlink()
    cut(config)
    assert path.read_bytes() == whole


def test_another_holdout_is_another_run(small: Small, tmp_path: Path) -> None:
    cut(small(tmp_path / "run"))
    with pytest.raises(ArtifactError):
        cut(small(tmp_path / "run", "partition.holdout=0.1"))


def test_a_partition_of_an_older_program_is_up_to_date(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small(tmp_path / "run")
    _, folder = cut(config)
    facts = read_json(folder / "partition.json")
    write_json(folder / "partition.json", {k: v for k, v in facts.items() if "holdout" not in k})
    caplog.set_level("INFO")
    cut(config)
    assert "partition  up to date" in caplog.text


def test_real_sets_hold_out_a_tenth_and_digits_nothing() -> None:
    for name in shipped_configs():
        path = config_file(name)
        assert path is not None
        expected = 0.0 if name == "digits" else 0.1
        assert load_config(path, []).partition.holdout == expected, name
