"""Targets from owners who keep their images, against those over the images of all."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddm.errors import ConfigError
from ddm.gaussian import moments
from ddm.rng import RngStream, normal
from ddm.schedules import SCHEDULES, Schedule, schedule
from ddm.training import Batches
from router.owners import Owner, Owners, here
from router.targets import exact_posterior, exact_posterior_rate, weights_of_images
from train.data.cifar10 import load_cifar10

TIMES = torch.tensor([1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


def clusters(counts: tuple[int, ...] = (7, 30, 3)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(0, 256, (count, 2, 4, 6), generator=generator, dtype=torch.uint8)
        for count in counts
    ]


def owners_of(parts: list[Tensor], process: Schedule, flip: bool = False) -> Owners:
    asked = here([Owner(part, process, flip) for part in parts])
    return Owners(asked, len(parts), process, flip)


def test_an_owner_of_another_process_or_without_mirror_images_is_refused() -> None:
    process, other = schedule("vp_linear"), schedule("vp_cosine")
    parts = clusters()
    odd = Owner(parts[2], process, flip=True), Owner(parts[2], other)
    for owner, rule in zip(odd, ("data.flip", "schedule"), strict=True):
        asked = here([Owner(part, process) for part in parts[:2]] + [owner])
        with pytest.raises(
            ConfigError, match=f"{rule} must be that of the owner of cluster 2, got"
        ):
            Owners(asked, 3, process)


def test_weights_of_the_mixture_are_those_of_pooled_images() -> None:
    process, parts = schedule("vp_linear"), clusters()
    whole = torch.cat(parts)
    label = torch.arange(3).repeat_interleave(torch.tensor([len(part) for part in parts]))
    weights = weights_of_images(torch.tensor([0.6, 0.1, 0.3]), label)
    x0 = whole[:5].float() / 127.5 - 1
    eps, t = normal(1, RngStream.NOISE, torch.arange(5), 0, x0.shape[1:]), TIMES[-5:]
    found = owners_of(parts, process).rate(x0, eps, t, weights)
    expected = exact_posterior_rate(x0, eps, t, whole, label, process, 3, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def compare(parts: list[Tensor], process: Schedule) -> None:
    """The targets at queries around 14 of the images, within 1e-5 of their size."""
    whole = torch.cat(parts)
    label = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
    picked = torch.linspace(0, len(whole) - 1, len(TIMES)).long()
    x0 = whole[picked].float() / 127.5 - 1
    eps = normal(1, RngStream.NOISE, torch.arange(len(x0)), 0, x0.shape[1:])
    owners = owners_of(parts, process)
    alpha, rate = owners.rate(x0, eps, TIMES)
    expected_alpha, expected_rate = exact_posterior_rate(x0, eps, TIMES, whole, label, process)
    torch.testing.assert_close(alpha, expected_alpha, rtol=0, atol=1e-5)
    scale = expected_rate.abs().amax(dim=1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(rate / scale, expected_rate / scale, rtol=0, atol=1e-5)
    c = process(TIMES).broadcast_to(x0)
    x = c.a * x0 + c.s * eps
    torch.testing.assert_close(
        owners.posterior(x, TIMES),
        exact_posterior(x, TIMES, whole, label, process),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_sums_of_owners_are_those_over_all_images(name: str) -> None:
    compare(clusters(), schedule(name))


def test_sums_over_ten_shards_of_cifar10_are_those_over_all() -> None:
    folder = Path(os.environ.get("DDM_DATA", "data"))
    if not (folder / "cifar-10-batches-py").exists():
        pytest.skip(f"CIFAR-10 is not in {folder.absolute()}: set DDM_DATA")
    data = load_cifar10(str(folder), limit=10_000, download=False)
    compare([data.images[data.labels == k] for k in range(10)], schedule("vp_linear"))


@pytest.mark.parametrize("flip", [False, True])
def test_owners_are_a_set_of_images(flip: bool) -> None:
    parts, process = clusters(), schedule("vp_linear")
    owners = owners_of(parts, process, flip)
    whole = torch.cat(parts)
    whole = torch.cat([whole, whole.flip(3)]) if flip else whole
    assert len(owners) == len(whole)
    assert owners.shape == whole.shape
    place = torch.tensor([5, 0, len(whole) - 1, 5, 12, len(whole) // 2])
    assert owners[place].equal(whole[place])
    pooled, asked = Batches(whole, 16, 7), Batches(owners, 16, 7)
    for part in zip(pooled.x0(3), asked.x0(3), strict=True):
        assert part[0].equal(part[1])
    label = torch.arange(3).repeat_interleave(torch.tensor([len(part) for part in parts]))
    assert owners.cluster.equal(label.repeat(2) if flip else label)
    for (mean, variance), part in zip(owners.moments(), parts, strict=True):
        expected = moments(part, flip)
        torch.testing.assert_close(mean, expected[0])
        torch.testing.assert_close(variance, expected[1])


def test_what_is_sent_is_counted() -> None:
    owners = owners_of(clusters(), schedule("vp_linear"))
    owners.bytes_in = 0  # the counts and the moments
    owners.rate(torch.zeros(5, 2, 4, 6), torch.zeros(5, 2, 4, 6), torch.full((5,), 0.5))
    assert owners.bytes_out == 3 * 5 * (2 * 48 * 8 + 4)
    assert owners.bytes_in == 3 * 5 * 2 * 8
