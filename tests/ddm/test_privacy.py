"""The Gaussian mechanism's numbers, and private moments."""

import math

import pytest
import torch
from torch import Tensor

from ddm.errors import ConfigError
from ddm.gaussian import moments
from ddm.privacy import PrivacyConfig, gaussian_delta, gaussian_epsilon, private_moments
from ddm.rng import RngStream, normal


def photographs(count: int = 4000) -> Tensor:
    """Smooth images, uint8 `[count, 3, 8, 8]`."""
    noise = normal(1, RngStream.NOISE, torch.arange(count), 0, (3, 8, 8))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2, count_include_pad=False)
    return (smooth * 120 + 128).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("sigma", "epsilon"),
    [(1.0, 4.3774), (3.730632, 1.0)],
)
def test_epsilon_is_that_of_the_analytic_gaussian_mechanism(sigma: float, epsilon: float) -> None:
    assert gaussian_epsilon(sigma, 1e-5) == pytest.approx(epsilon, rel=2e-3)
    assert gaussian_delta(sigma, gaussian_epsilon(sigma, 1e-5)) == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize(("sigma", "delta", "epsilon"), [(0.1, 1e-5, 91.82), (3.0, 1e-14, 2.46684)])
def test_epsilon_keeps_its_digits_where_the_laws_are_far_apart(
    sigma: float, delta: float, epsilon: float
) -> None:
    assert gaussian_epsilon(sigma, delta) == pytest.approx(epsilon, rel=1e-4)


def test_delta_is_the_difference_of_the_two_laws() -> None:
    # By integration: delta = integral of max(0, p - e^epsilon q), p and q one sensitivity apart.
    sigma, epsilon = 1.3, 0.7
    x = torch.linspace(-15, 15, 300_001, dtype=torch.float64)

    def density(mean: float) -> Tensor:
        return torch.exp(-((x - mean) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))

    gap = (density(1) - math.exp(epsilon) * density(0)).clamp_min(0)
    expected = float(torch.trapezoid(gap, x))
    assert gaussian_delta(sigma, epsilon) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("flip", [False, True])
def test_without_noise_they_are_the_moments_averaged_by_band(flip: bool) -> None:
    images = photographs()
    mean, variance = private_moments(images, flip, PrivacyConfig(sigma=0.0))
    expected_mean, expected_variance = moments(images, flip)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(variance.sum(), expected_variance.sum(), rtol=0.01, atol=0)
    assert variance[0, 0, 3] == variance[0, 3, 0]
    torch.testing.assert_close(variance[:, 0, 0], expected_variance[:, 0, 0])


def test_the_noise_has_the_spread_that_the_sensitivity_asks_for() -> None:
    images, config = photographs(500), PrivacyConfig(sigma=2.0, rms=0.5)
    without, _ = private_moments(images, False, PrivacyConfig(sigma=0.0, rms=0.5))
    noisy = torch.stack([private_moments(images, False, config)[0] for _ in range(40)])
    bound = 0.5 * math.sqrt(3 * 8 * 8)
    expected = math.sqrt(2) * 2.0 * 2 * bound / 500
    assert float((noisy - without).std()) == pytest.approx(expected, rel=0.05)
    torch.manual_seed(0)
    first = private_moments(images, False, config)[0]
    torch.manual_seed(0)
    assert not private_moments(images, False, config)[0].equal(first)  # of no seed at all


def test_one_image_moves_the_moments_by_at_most_their_sensitivity() -> None:
    images, config = photographs(50), PrivacyConfig(sigma=0.0, rms=0.4)
    other = images.clone()
    other[7] = 255
    other[7, :, ::2] = 0
    mean, _ = private_moments(images, False, config)
    moved, _ = private_moments(other, False, config)
    bound = 0.4 * math.sqrt(3 * 8 * 8)
    assert float((mean - moved).norm()) <= 2 * bound / 50


def test_variances_stay_positive_under_much_noise() -> None:
    _, variance = private_moments(photographs(20), True, PrivacyConfig(sigma=50.0))
    assert variance.min() >= 1e-4
    assert variance.isfinite().all()


@pytest.mark.parametrize(
    ("key", "value"),
    [("sigma", -1.0), ("sigma", 0.01), ("delta", 0.0), ("delta", 1.0), ("rms", 0.0), ("rms", 2.0)],
)
def test_values_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        PrivacyConfig(**{key: value}).check()
