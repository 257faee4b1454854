"""Whether copies are found, whose they are, and that what is no copy is not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddm.measures import nearest
from ddm.partition import Partition
from train.config import Config
from train.evaluation.measure import Measurement
from train.evaluation.memorization import RealImages
from train.evaluation.results import Evaluation
from train.stages.run import run


def images(n: int, seed: int, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, side, side), dtype=torch.uint8, generator=generator)


def real(held_out: Tensor | None = None, flip: bool = False) -> RealImages:
    """Two clusters: a small one of 20, then one of 280."""
    cluster = (torch.arange(300) >= 20).long()
    return RealImages(images(300, 0), cluster, held_out, flip, "cpu")


def silent(_: int) -> None:
    pass


def test_the_nearest_in_chunks_are_those_of_all_distances() -> None:
    points, others = torch.randn(30, 5), torch.randn(100, 5)
    own = torch.arange(30)
    chunks = [(part, others[part]) for part in torch.arange(100).split(7)]
    found = nearest(points, chunks, 4)
    distances = torch.cdist(points.double(), others.double())
    expected = distances.topk(4, largest=False)
    assert found.place.equal(expected.indices)
    assert torch.allclose(found.distance, expected.values)
    distances[own, own] = torch.inf
    assert nearest(points, chunks, 1, own).place[:, 0].equal(distances.argmin(dim=1))
    assert nearest(points, chunks[:1], 50).distance.shape == (30, 7)


def test_copies_are_found_with_their_cluster_and_their_image() -> None:
    of = real()
    samples = images(50, 1)
    noise = torch.randint(-3, 4, samples[:6].shape)
    copied = torch.tensor([2, 5, 7, 19, 20, 250])
    samples[10:16] = (of.training[copied].int() + noise).clamp(0, 255).to(torch.uint8)
    found = of.copies(samples, silent)
    assert found.near_copies == found.alone == 6 / 50
    assert found.copied == [4, 2]
    assert sum(found.nearest) == 50
    assert {(a, b) for a, b, _ in found.closest[:6]} == set(
        zip(range(10, 16), copied.tolist(), strict=True)
    )
    assert found.nearest_is_training is None and found.over_held_out is None
    assert all(held_out == -1 for _, _, held_out in found.closest)


def test_images_of_the_same_distribution_are_no_copies_and_favour_neither() -> None:
    of = real(held_out=images(300, 2))
    found = of.copies(images(2000, 3), silent)
    assert found.near_copies == found.alone == 0
    assert of.expected == 0.5
    assert found.nearest_is_training == pytest.approx(0.5, abs=0.05)
    assert found.over_held_out == pytest.approx(1, abs=0.05)
    copies = of.copies(of.training, silent)
    assert copies.nearest_is_training == copies.near_copies == 1
    assert copies.over_held_out == copies.ratio == 0


def test_the_floor_is_of_held_out_images_none_against_itself() -> None:
    found = real(held_out=images(40, 2)).floor(100, 0, silent)
    assert sum(found.nearest) == 40
    assert found.near_copies == 0 and found.ratio > 0.5
    assert all(image != held_out for image, _, held_out in found.closest)


def test_the_floor_without_held_out_images_is_of_training_images_against_the_others() -> None:
    of = real()
    assert of.floor(300, 0, silent).near_copies == 0
    of.training[7] = of.training[99]  # the data has a duplicate
    assert of.floor(300, 0, silent).near_copies == pytest.approx(2 / 300)


def test_few_images_are_no_copies_of_the_others() -> None:
    few = RealImages(images(40, 0), torch.zeros(40, dtype=torch.int64), None, False, "cpu")
    found = few.floor(40, 0, silent)
    assert found.near_copies == found.alone == 0
    assert 0.5 < found.ratio < 1


def test_a_mirrored_copy_counts_where_training_mirrors() -> None:
    mirrored = images(300, 0)[:10].flip(3)
    assert real().copies(mirrored, silent).near_copies == 0
    assert real(flip=True).copies(mirrored, silent).near_copies == 1


def test_large_images_are_compared_at_32_pixels() -> None:
    training = images(100, 0, side=64)
    of = RealImages(training, torch.zeros(100, dtype=torch.int64), None, False, "cpu")
    checkerboard = 20 * ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2 - 1)
    samples = (training[:5].int() + checkerboard).clamp(0, 255).to(torch.uint8)
    assert of.copies(samples, silent).near_copies == 1


def test_a_run_records_it_for_every_method_and_seed(small_run: Path) -> None:
    found = Evaluation.read(small_run / "evaluate" / "record.json")
    assert found.memorization is not None
    assert found.memorization.steps == 4
    assert found.memorization.held_out == 0 and found.memorization.expected is None
    assert set(found.memorization.methods) == set(found.versions)
    assert {len(seeds) for seeds in found.memorization.methods.values()} == {1}
    cut = Partition.read(small_run / "partition")
    for (copies,) in found.memorization.methods.values():
        assert sum(copies.nearest) == 20 and len(copies.nearest) == cut.k


def test_a_run_with_held_out_images_compares_with_them(
    tmp_path: Path, small: Callable[..., Config]
) -> None:
    words = ("partition.holdout=0.2", "evaluate.methods=[Naive, switching]", "evaluate.seeds=2")
    config = small(tmp_path / "run", *words, "evaluate.features=[pixels]")
    run(config, ["partition", "expert", "router", "bundle", "evaluate"])
    found = Evaluation.read(tmp_path / "run" / "evaluate" / "record.json").memorization
    cut = Partition.read(tmp_path / "run" / "partition")
    assert found is not None and found.held_out == sum(cut.holdout_sizes) > 0
    assert found.expected == sum(cut.sizes) / 240
    assert found.floor.nearest_is_training is not None
    assert [len(seeds) for seeds in found.methods.values()] == [2, 2]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<th>seen, %</th>" in page and "real: held-out images" in page
    measurement = Measurement(config, {}, config.evaluate, "evaluate")
    (tmp_path / "run" / "evaluate" / "record.json").unlink()
    again = measurement.make()  # from the kept figures
    assert again.memorization == found
