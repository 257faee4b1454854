"""Scores of a set of samples: distances from the real images, and what they cover."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore

from ddm.errors import ConfigError
from ddm.measures import FrechetDistance, KernelDistance, neighbours
from train.evaluation.feature_network import NetworkFeatures
from train.evaluation.results import Score


class Scores:
    """Measures samples against the features of real images `[N, d]`.

    The Frechet distance is to `reference`, the mean and covariance from a file (`read_reference`),
    or to those of the real features if it is None. The kernel distance is over all pairs of images.
    Precision, recall and coverage compare as many real images as samples, the first ones of each.
    """

    VERSION = 3  # raise it when a measure changes: kept scores are then computed again

    def __init__(self, real: Tensor, reference: tuple[Tensor, Tensor] | None = None) -> None:
        self.real = real
        self.frechet = (
            FrechetDistance(*(part.to(real.device) for part in reference))
            if reference
            else FrechetDistance.to(real)
        )
        self.kernel = KernelDistance(real)

    def __call__(self, samples: NetworkFeatures) -> Score:
        """The measures of samples."""
        features, logits = samples
        count = min(len(self.real), len(features))
        covered = neighbours(self.real[:count], features[:count])
        score = Score(self.frechet(features), self.kernel(features), *covered, None, None, None)
        if logits is not None:
            probability = logits.softmax(dim=1)
            classes = probability.argmax(dim=1)
            score.inception_score = _inception_score(logits)
            score.confidence = float(probability.amax(dim=1).mean())
            score.class_frequencies = class_frequencies_of(classes, probability.shape[1])
        return score


def _inception_score(logits: Tensor) -> float:
    """The mean over two random halves, the same ones each time (arXiv 1606.03498, section 4)."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `.*` will save all extracted features")
        torch.manual_seed(0)
        metric = InceptionScore(nn.Identity(), splits=2)
        metric.update(logits)
        return float(metric.compute()[0])


def class_frequencies_of(labels: Tensor, classes: int) -> list[float]:
    """How often each class occurs, as fractions that sum to 1."""
    return (torch.bincount(labels, minlength=classes) / len(labels)).tolist()


def read_reference(path: Path) -> tuple[Tensor, Tensor]:
    """Mean `[d]` and covariance `[d, d]` from an `.npz` with `mu` and `sigma`.

    Raises `ConfigError` naming the file if it does not hold them.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"])
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} must be an .npz with mu and sigma: {error}") from error
