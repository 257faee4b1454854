"""Runs whose experts are told a class or attributes, from the images to the artifacts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddm.artifacts import read_artifact, read_facts, read_json
from ddm.condition import ImageConditions, Vocabulary
from ddm.errors import ArtifactError, ConfigError
from ddm.partition import Partition
from ddm.schedules import schedule
from ddm.training import Batches
from experts.denoiser import ExpertConfig
from experts.expert_module import ExpertLearning
from experts.unet import UNetConfig
from train.config import Config
from train.data import ImageSet
from train.stages.expert import train_expert
from train.stages.partition import conditions_of, make_partition
from train.stages.shard import export_shards
from train.watching import held_out_losses

Small = Callable[..., Config]


def test_artifacts_carry_the_vocabulary_and_the_counts_of_their_own_cluster(
    small_labels_run: Path,
) -> None:
    folder = small_labels_run / "partition"
    cut = Partition.read(folder)
    assert cut.vocabulary == Vocabulary("label", [str(digit) for digit in range(10)])
    for k in range(cut.k):
        labels = cut.cluster(folder, k)["labels"]
        told = read_facts(small_labels_run / "bundle" / f"expert-{k:02d}")["condition"]
        assert told["counts"] == torch.bincount(labels, minlength=10).tolist()
        assert told["images"] == len(labels) and told["names"] == cut.vocabulary.names


def test_without_a_condition_nothing_is_said_of_labels(small_run: Path) -> None:
    assert "vocabulary" not in read_json(small_run / "partition" / "partition.json")
    tensors, facts = read_artifact(small_run / "experts" / "00" / "expert")
    assert "condition" not in facts
    assert not [name for name in tensors if "condition" in name]


def test_a_shard_has_what_its_expert_is_told(small: Small, tmp_path: Path) -> None:
    config = small(tmp_path / "run", "expert.condition=label", "expert.steps=1")
    make_partition(config)
    export_shards(config)
    shard = config.folder / "shards" / "01"
    alone = small(
        tmp_path / "alone", "expert.condition=label", "expert.steps=1", f"expert.shard={shard}"
    )
    train_expert(alone, 0, lambda _: None)
    counts = read_facts(alone.folder / "experts" / "00" / "expert")["condition"]["counts"]
    labels = Partition.read(config.folder / "partition").cluster(config.folder / "partition", 1)
    assert counts == torch.bincount(labels["labels"], minlength=10).tolist()
    other = small(tmp_path / "other", "expert.condition=attributes", f"expert.shard={shard}")
    with pytest.raises(ArtifactError, match="cut for expert.condition=label, not for attributes"):
        train_expert(other, 0, lambda _: None)


def test_an_expert_with_a_condition_starts_from_one_without(
    small: Small, small_run: Path, tmp_path: Path
) -> None:
    first = small_run / "experts" / "00" / "expert"
    words = ["expert.condition=label", "expert.steps=1", "expert.ema_decay=0"]
    config = small(
        tmp_path / "run", *words, f"expert.init={first}.json", "expert.learning_rate=1e-9"
    )
    make_partition(config)
    train_expert(config, 0, lambda _: None)
    stem = config.folder / "experts" / "00" / "expert"
    before, after = read_artifact(first)[0], read_artifact(stem)[0]
    told = after.pop("network.condition.weight")
    assert told.abs().max() < 1e-6
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    back = small(tmp_path / "back", "expert.steps=1", f"expert.init={stem}.json")
    make_partition(back)
    with pytest.raises(ConfigError, match="must be an artifact of the same condition, or of none"):
        train_expert(back, 0, lambda _: None)


def test_attributes_are_in_the_clusters_files(tmp_path: Path) -> None:
    images = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    has = torch.tensor([[True, False], [False, False], [True, True]]).repeat(2, 1)
    data = ImageSet(images, attributes=has, attribute_names=["Smiling", "Male"])
    told = conditions_of(data, "attributes")
    cluster = torch.tensor([0, 0, 0, 1, 1, 1])
    cut = Partition.write(tmp_path, images, cluster, ["a", "b"], None, None, conditions=told)
    assert Partition.read(tmp_path) == cut
    found = cut.conditions(cut.cluster(tmp_path, 1), "attributes", tmp_path)
    assert torch.equal(found.values.bool(), has[3:])
    assert found.facts["counts"] == [2, 1] and found.facts["names"] == ["Smiling", "Male"]


def test_what_images_lack_is_refused() -> None:
    bare = ImageSet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="expert.condition must be none for images without label"):
        conditions_of(bare, "label")
    many = ImageSet(bare.images, torch.tensor([0, 1]), [f"class {i}" for i in range(1001)])
    with pytest.raises(ConfigError, match="be none for more than 1000 names"):
        conditions_of(many, "label")


def test_held_out_losses_are_told_the_condition() -> None:
    """An expert that knows its class alone: the loss is 0 with the class and not without."""
    labels = torch.arange(40) % 2
    images = (labels * 255).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    told = ImageConditions(Vocabulary("label", ["dark", "bright"]), labels)
    unet = UNetConfig(channels=8, multipliers=[1], blocks=1, attention=[], dropout=0.0)
    config = ExpertConfig(unet=unet, batch=20, condition="label")
    denoiser = config.build([1, 8, 8], schedule("vp_linear"), condition=2)

    class Knows(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
            return (vector[:, 1] - vector[:, 0])[:, None, None, None].expand_as(x)

    denoiser.network = Knows()
    module = ExpertLearning(denoiser, Batches(images, 20, 0), config, told)
    assert held_out_losses(module, images, told)["loss"] < 1e-6
    assert held_out_losses(module, images)["loss"] > 0.5
