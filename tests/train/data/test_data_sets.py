"""The data sets that come with a fixed form, and the choice of a part of them."""

import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from ddm.errors import DataError
from train.data import DataConfig, ImageSet
from train.data.image_set import stratified


def test_digits_are_the_1797_of_scikit_learn_from_black_to_white() -> None:
    images = DataConfig().build()
    assert images.images.shape == (1797, 1, 8, 8)
    assert images.images.dtype == torch.uint8
    assert (int(images.images.min()), int(images.images.max())) == (0, 255)
    assert images.labels is not None
    assert images.labels[:10].tolist() == list(range(10))


def test_missing_data_is_refused_with_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"CIFAR-10 is not in .*cifar-10-batches-py there, or .* data.download=true"
    ):
        DataConfig(name="cifar10", root=str(tmp_path)).build()
    with pytest.raises(
        DataError, match=r"CelebA-HQ is not in .*images \(or CelebA-HQ-img\) and CelebAMask"
    ):
        DataConfig(name="celeba_hq", root=str(tmp_path)).build()


def test_one_changed_pixel_changes_the_content_hash() -> None:
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    other = images.clone()
    other[2, 0, 1, 1] = 1
    assert ImageSet(images).hash == ImageSet(images.clone()).hash != ImageSet(other).hash


def by_hand(sizes: list[int], limit: int) -> list[int]:
    """One each where possible, then largest remainders of exact shares of the rest."""
    least = [int(size > 0 and limit >= sum(n > 0 for n in sizes)) for size in sizes]
    rest = [size - one for size, one in zip(sizes, least, strict=True)]
    seats = limit - sum(least)
    shares = [Fraction(size * seats, max(1, sum(rest))) for size in rest]
    counts = [one + math.floor(share) for one, share in zip(least, shares, strict=True)]
    order = sorted(range(len(sizes)), key=lambda k: (math.floor(shares[k]) - shares[k], k))
    for k in order[: limit - sum(counts)]:
        counts[k] += 1
    return counts


@pytest.mark.parametrize(
    ("sizes", "limit", "counts"),
    [
        ([8, 8, 8], 16, [6, 5, 5]),
        ([8, 8, 8], 2, [1, 1, 0]),
        ([8, 8, 8], 3, [1, 1, 1]),
        ([100, 10, 1], 12, [9, 2, 1]),  # 1 each, then 9 x 99/108, 9 x 9/108, 0
        ([0, 5, 5], 4, [0, 2, 2]),
        ([3, 4], 7, [3, 4]),
        ([3, 4], 70, [3, 4]),
    ],
)
def test_a_limit_keeps_the_proportions_of_the_classes(
    sizes: list[int], limit: int, counts: list[int]
) -> None:
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0))
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[order]
    chosen = stratified(labels, limit)
    assert torch.bincount(labels[chosen], minlength=len(sizes)).tolist() == counts
    assert by_hand(sizes, min(limit, sum(sizes))) == counts
    for label, count in enumerate(counts):
        of_class = (labels == label).nonzero()[:, 0]
        assert chosen[labels[chosen] == label].tolist() == of_class[:count].tolist()


def test_a_limit_of_the_digits_keeps_their_proportions() -> None:
    whole, part = DataConfig().build(), DataConfig(limit=105).build()
    assert whole.labels is not None and part.labels is not None
    sizes = torch.bincount(whole.labels).tolist()
    assert torch.bincount(part.labels).tolist() == by_hand(sizes, 105)
    assert torch.equal(DataConfig(limit=5000).build().images, whole.images)


def test_a_pipe_among_the_files_of_cifar10_is_refused_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    os.mkfifo(folder / "data_batch_1")
    with pytest.raises(DataError, match="data_batch_1 must be a regular file"):
        DataConfig(name="cifar10", root=str(tmp_path)).build()


@pytest.mark.data
def test_real_cifar10_is_read_as_torchvision_reads_it(real_data: Path) -> None:
    from torchvision.datasets import CIFAR10

    images = DataConfig(name="cifar10", root=str(real_data), limit=100).build()
    truth = CIFAR10(str(real_data), train=True)
    assert images.labels is not None
    counts = np.bincount(images.labels, minlength=10)
    assert counts.tolist() == [10] * 10
    first = [truth.targets.index(label) for label in range(10)]
    for label, place in enumerate(first):
        of_class = images.images[images.labels == label]
        assert np.array_equal(of_class[0].permute(1, 2, 0).numpy(), truth.data[place])
    assert images.label_names[0] == "airplane"
