"""Whitened pixels: a feature space that is computed from the real images, without a network."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddm.errors import ConfigError
from ddm.measures import FrechetDistance
from tests.train.conftest import frechet, gaussian
from train.config import Config
from train.data import DataConfig
from train.evaluation.measure import Measurement
from train.evaluation.pixels import pixels_network


def random_images(n: int, side: int, channels: int = 1, seed: int = 0) -> Tensor:
    """Images whose pixels are correlated."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 128 + 40 * torch.randn(n, channels, side // 2, side // 2, generator=generator)
    fine = 20 * torch.randn(n, channels, side, side, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, scale_factor=2)
    return (smooth + fine).round().clamp(0, 255).to(torch.uint8)


def features(real: Tensor, shown: Tensor, directions: int = 32) -> Tensor:
    found = pixels_network(real, "cpu", directions)(shown, lambda _: None)
    assert found.logits is None
    return found.features


def test_real_images_have_mean_0_and_covariance_1() -> None:
    real = random_images(300, 8)
    found = features(real, real).double()
    assert found.shape == (300, 32)
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(32).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.T.cov(), torch.eye(32).double(), atol=1e-4, rtol=0)


def test_directions_are_those_of_a_singular_value_decomposition() -> None:
    real, others = random_images(200, 6), random_images(50, 6, seed=1)
    flat = real.flatten(1).double().numpy()
    centred = flat - flat.mean(axis=0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    projected = (others.flatten(1).double().numpy() - flat.mean(axis=0)) @ axes[:5].T
    whitened = projected / (values[:5] / 199**0.5)
    found = features(real, others, 5).double().numpy()
    assert found @ found.T == pytest.approx(whitened @ whitened.T, rel=1e-3, abs=1e-3)


def test_constant_pixels_give_no_direction() -> None:
    real = random_images(100, 4)
    real[:, :, :2] = 7  # 8 pixels of 16 are left
    assert features(real, real).shape == (100, 8)


def test_large_images_are_averaged_down_first() -> None:
    real = random_images(60, 64, channels=3)
    halves = torch.nn.functional.avg_pool2d(real.double() / 255, 2)
    centred = halves.flatten(1) - halves.flatten(1).mean(dim=0)
    values = torch.linalg.svdvals(centred)[:4]
    network = pixels_network(real, "cpu", 4)
    axes = network.network.axes
    assert isinstance(axes, Tensor)
    deviations = 1 / axes.norm(dim=0)
    torch.testing.assert_close(deviations.sort().values, (values / 59**0.5).sort().values)


def test_400_resampled_digits_are_about_as_far_as_400_of_a_gaussian() -> None:
    """Of d dimensions it is d/n by the mean and d(d + 1)/4n by the covariance: 0.74 here."""
    real = DataConfig().build().images
    found = features(real, real)
    to_real = FrechetDistance.to(found)
    floors = []
    for seed in range(3):
        places = torch.randint(1797, (400,), generator=torch.Generator().manual_seed(seed))
        floors.append(to_real(found[places]))
    assert 0.74 < sum(floors) / 3 < 0.95  # digits have heavier tails


@pytest.fixture
def copy(small_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_run, tmp_path / "run")


def test_figures_and_floor_by_pixels_stand_beside_the_classifier_s(
    copy: Path, small: Callable[..., Config]
) -> None:
    config = small(copy, "evaluate.seeds=2", "evaluate.methods=[Naive]")
    assert config.evaluate.features == ["classifier", "pixels"]
    measurement = Measurement(config, None, config.evaluate, "evaluate")
    record = measurement.make()
    assert list(record.features) == ["classifier", "pixels"]
    whole = measurement._images()["images"]
    of_real = features(whole, whole).double().numpy()
    for spec, cell in zip(measurement.specs, record.cells, strict=True):
        images = measurement.samples(spec).images
        found = gaussian(features(whole, images).double().numpy())
        expected = frechet(gaussian(of_real), found)
        assert cell.scores["pixels"].frechet == pytest.approx(expected, rel=1e-3)
    order = torch.randperm(240, generator=torch.Generator().manual_seed(0))
    floor = record.features["pixels"].floor
    assert len(floor) == 2
    for seed, distance in enumerate(floor):
        places = torch.randint(240, (20,), generator=torch.Generator().manual_seed(seed))
        expected = frechet(gaussian(of_real), gaussian(of_real[order[places].numpy()]))
        assert distance == pytest.approx(expected, rel=1e-3)


def test_the_number_of_directions_is_a_setting(copy: Path, small: Callable[..., Config]) -> None:
    words = ("evaluate.features=[pixels]", "evaluate.methods=[Naive]")
    found = {}
    for count in (3, 7):
        config = small(copy, *words, f"evaluate.pixel_directions={count}")
        record = Measurement(config, None, config.evaluate, "evaluate").make()
        assert f"({count} leading" in record.features["pixels"].what
        found[count] = record.cells[0].scores["pixels"].frechet
    assert found[3] != found[7]
    with pytest.raises(ConfigError, match=r"evaluate.pixel_directions must be in \[1, 1024\]"):
        small(copy, "evaluate.pixel_directions=0")
