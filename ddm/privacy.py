"""Differential privacy of a cluster's moments, by the Gaussian mechanism.

An expert's artifact carries its cluster's mean and variance, with which `source=gaussian` routes and
the control variate works. The mean of few images shows them. `private_moments` releases both so that
with one image replaced by another they would hardly be likelier or less likely. The numbers of
images are taken to be public. This is said of the moments alone: what a network has learned from
the images carries no such promise, nor does the hash of their file, nor do the sums of
`router.owners`, in which at little noise one image decides alone, so that noise that hides it would
hide everything.
"""

import math
from dataclasses import dataclass
from random import SystemRandom

import torch
from torch import Tensor

from ddm.errors import require
from ddm.gaussian import cosine
from ddm.training import to_float

_CHUNK = 1024  # images at a time
_LEAST_VARIANCE = 1e-4


@dataclass
class PrivacyConfig:
    """Noise on the moments that leave an owner.

    sigma: its standard deviation in sensitivities of the moments; 0 for none, else at least 0.1
    delta: at which epsilon is said, in (0, 1); below one in the number of images
    rms: an image brighter or darker than this, by the root of its mean square in [-1, 1], is scaled
        down to it; in (0, 1]. The smaller, the less noise
    """

    sigma: float = 0.0
    delta: float = 1e-5
    rms: float = 1.0

    def check(self) -> None:
        """Raise `ConfigError` naming the key of a value out of its range."""
        rule = "be 0, or in [0.1, 1000]"
        require(self.sigma == 0 or 0.1 <= self.sigma <= 1000, "sigma", rule, self.sigma)
        require(0 < self.delta < 1, "delta", "be in (0, 1)", self.delta)
        require(0 < self.rms <= 1, "rms", "be in (0, 1]", self.rms)


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """The least delta for which noise of `sigma` sensitivities is (epsilon, delta)-private
    (arXiv 1805.06530, theorem 8).

    `Phi(1/(2 sigma) - epsilon sigma) - e^epsilon Phi(-1/(2 sigma) - epsilon sigma)`.
    """
    half, far = 0.5 / sigma, epsilon * sigma
    return _normal_cdf(half - far) - math.exp(epsilon) * _normal_cdf(-half - far)


def _normal_cdf(x: float) -> float:
    """Of the standard normal law; by erfc, which keeps its digits where it is small."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """The least epsilon for which noise of `sigma` sensitivities is (epsilon, delta)-private."""
    low, high = 0.0, 1.0
    while gaussian_delta(sigma, high) > delta:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(sigma, middle) > delta else (low, middle)
    return high


def private_moments(images: Tensor, flip: bool, config: PrivacyConfig) -> tuple[Tensor, Tensor]:
    """`ddm.gaussian.moments` with noise of `config.sigma` sensitivities on both together.

    The variance is one number for all cosines of a channel with the same whole wave number, whose
    sum takes no more noise than each would: high frequencies vary less than the noise. The noise
    comes from the operating system's randomness: a generator that begins at a seed could be tried
    with all of them, and torch's has 2^32.
    """
    shape = images.shape[1:]
    bound = config.rms * math.sqrt(shape.numel())
    bands = _bands(shape)
    first = torch.zeros(shape, dtype=torch.float64)
    second = torch.zeros(int(bands.max()) + 1, dtype=torch.float64)
    for chunk in images.split(_CHUNK):
        x = to_float(chunk).double()
        norm = torch.linalg.vector_norm(x.flatten(1), dim=1).clamp_min(bound)
        x = x * (bound / norm).reshape(-1, *(1,) * len(shape))
        # An image and its mirror image are one contribution, their mean.
        versions = [cosine(each) for each in ((x, x.flip(3)) if flip else (x,))]
        for y in versions:
            first += y.sum(dim=0) / len(versions)
            square = y.square().sum(dim=0) / len(versions)
            second.index_add_(0, bands.flatten(), square.flatten())
    count = len(images)
    # Replacing an image moves the mean by at most 2 bound / n, and the bands' energies, which are
    # positive and add up to at most bound^2, by sqrt(2) bound^2 / n. sqrt(2): two releases.
    spread = math.sqrt(2) * config.sigma / count
    spread_mean, spread_square = spread * 2 * bound, spread * math.sqrt(2) * bound**2
    mean = first / count + spread_mean * _noise(first.shape)
    second = second / count + spread_square * _noise(second.shape)
    of_mean = torch.zeros_like(second)
    of_mean.index_add_(0, bands.flatten(), (mean.square() - spread_mean**2).flatten())
    sizes = torch.bincount(bands.flatten())
    variance = ((second - of_mean) / sizes).clamp_min(_LEAST_VARIANCE)
    return mean.float(), variance[bands].float()


def _noise(shape: torch.Size) -> Tensor:
    gauss = SystemRandom().gauss
    values = [gauss() for _ in range(shape.numel())]
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def _bands(shape: torch.Size) -> Tensor:
    """For each cosine its band's number: its channel and the whole part of its wave number."""
    channels, height, width = shape
    vertical, horizontal = torch.arange(height)[:, None], torch.arange(width)
    radius = torch.hypot(vertical.float(), horizontal.float()).long()
    return torch.arange(channels)[:, None, None] * (int(radius.max()) + 1) + radius
